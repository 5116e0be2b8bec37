"""What a plugin or a model may not do, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gaussian_flow import GaussianFlow
from tokenflow.diffusion import Backbone, Conditioning, ModelError, Source, Traits
from tokenflow.diffusion.backbone import Defaults
from tokenflow.editors import Batch, Editor, Injection, Prompts, SDEdit, Step
from tokenflow.engine import PerFrame, Settings, edit_clip, edit_latents
from tokenflow.engine.automatic_mask import require_comparable
from tokenflow.engine.checked import CheckedEditor, require_kinds
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import InputError, PluginError
from tokenflow.propagation import NNField
from tokenflow.storage.cache import Cache
from tokenflow.video import Clip

SETTINGS = Settings(steps=3, keyframe_every=2, batch=2)


def clip() -> Clip:
    return Clip.from_frames(torch.rand(4, 3, 4, 6, generator=torch.Generator().manual_seed(0)))


def edited(editor: Editor, **options: Any) -> Tensor:
    return edit_clip(GaussianFlow(), clip(), "0.5", editor, NNField(), SETTINGS, **options).latents


class Old(SDEdit):
    interface = 1


class OldField(NNField):
    interface = 1


def test_an_earlier_interface_is_refused_in_python_too() -> None:
    with pytest.raises(PluginError, match=r"interface 1 of Editor.*injections"):
        edited(Old())
    with pytest.raises(PluginError, match="interface 1 of Propagation"):
        edit_clip(GaussianFlow(), clip(), "0.5", SDEdit(), OldField(), SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"editor": SDEdit}, r"expected Editor, as PnP\(\), got <class"),
        ({"propagation": "NNField"}, r"expected Propagation, as NNField\(\), got 'NNField'"),
        ({"settings": {"steps": 2}}, r"expected Settings, as Settings\(steps=25\), got \{"),
    ],
)
def test_arguments_of_another_kind(change: dict[str, Any], message: str) -> None:
    given = {"editor": SDEdit(), "propagation": NNField(), "settings": SETTINGS}
    require_kinds(**given)
    with pytest.raises(InputError, match=message):
        require_kinds(**given | change)


@pytest.mark.parametrize("mask", [Path("mask.png"), torch.ones(4, 1, 4, 6), False])
def test_a_mask_of_another_kind(mask: object) -> None:
    with pytest.raises(InputError, match=r"expected a mask as a clip \(by read_clip\), or 'auto'"):
        require_comparable(mask, Prompts("0.5"))


class Wide(SDEdit):
    def conditioning(self, batch: Batch) -> Conditioning:
        return batch.conditioning.map(lambda tensor: tensor.double())


class Texts(SDEdit):
    def injections(self, model: Backbone) -> Sequence[Injection]:
        return [Injection("tokens", lambda edited, source, batch: edited, begin="0")]  # type: ignore[arg-type]


class Idle(SDEdit):
    def idle(self, step: Step) -> Sequence[str]:
        return ("source",)


@pytest.mark.parametrize(
    ("editor", "words"),
    [
        (Wide(), "dtype torch.float32"),
        (Texts(), "begin"),
        (Idle(), r"in idle: expected some of the edited branches negative, prompt, not all"),
    ],
)
def test_wrong_answers_name_the_editor(editor: Editor, words: str) -> None:
    with pytest.raises(PluginError, match=words) as caught:
        edited(editor)
    assert type(editor).__name__ in str(caught.value)


class Transformers(SDEdit):
    def check_model(self, model: Traits) -> None:
        if model.family is GaussianFlow:
            raise InputError("no Gaussians")
        raise RuntimeError("midway")


def test_an_editor_refuses_a_model_by_what_it_is() -> None:
    with pytest.raises(InputError, match=r"^no Gaussians$"):
        edited(Transformers())
    message = r"Transformers .* failed in check_model: RuntimeError: midway"
    with pytest.raises(PluginError, match=message):
        CheckedEditor(Transformers(), GaussianFlow()).check_model(Traits(Backbone))


class Noisy(SDEdit):
    """Without inversion, but with its noise."""

    inverts = False

    def inputs(self, x: Tensor, step: Step, source: Source) -> Tensor:
        return torch.stack([source.noise, x, x])


def test_there_is_no_noise_without_inversion() -> None:
    with pytest.raises(PluginError, match="was not inverted"):
        edited(Noisy())


class Half(PerFrame):
    def outputs(self, x: Tensor, step: Step) -> Iterator[tuple[Sequence[int], Tensor]]:
        for frames, outputs in super().outputs(x, step):
            yield frames[:1], outputs[:, :1]


def test_a_way_that_leaves_out_frames_is_refused() -> None:
    with pytest.raises(InputError, match=r"Half.outputs yielded nothing for frames \[1, 3\]"):
        edited(SDEdit(), consistency=Half)


def test_ways_of_the_same_name_do_not_share_a_checkpoint(tmp_path: Path) -> None:
    def way(share: float) -> type[PerFrame]:
        class Way(PerFrame):
            @classmethod
            def cache_key(cls) -> str:
                return f"{share}"

            def outputs(self, x: Tensor, step: Step) -> Iterator[tuple[Sequence[int], Tensor]]:
                for frames, outputs in super().outputs(x, step):
                    yield frames, share * outputs

        return Way

    store = ResumeStore(Cache(tmp_path / "cache"), "editor", "kernel", 1)
    first = edited(SDEdit(), consistency=way(1.0), store=store)
    other = edited(SDEdit(), consistency=way(0.5), store=store)
    assert not torch.equal(first, other)
    assert torch.equal(first, edited(SDEdit(), consistency=way(1.0), store=store))


def test_steps_one_by_one_are_the_whole() -> None:
    from tokenflow.diffusion import invert

    model, schedule = GaussianFlow(), GaussianFlow().schedule(3)
    trajectory = invert(model, clip().frames[:], "0.2", schedule, 3)
    rest = model, trajectory, schedule, "0.5", SDEdit(1.0), NNField(), SETTINGS
    whole, x = edit_latents(*rest), trajectory.at(0)
    for step in range(3):
        x = edit_latents(*rest, x=x, first=step, last=step + 1)
    assert torch.equal(x, whole)


@pytest.mark.parametrize(
    "text",
    ['{"guidance": "7"}', '{"features": 3}', '{"feature_layers": 0}', '{"a": 1}', "[", "[1]"],
)
def test_defaults_that_no_model_has(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenflow.json"
    file.write_text(text)
    with pytest.raises(ModelError, match="holds something else"):
        Defaults.read(file)
    file.write_text(json.dumps({"guidance": 3.0}))
    assert Defaults.read(file).guidance == 3
