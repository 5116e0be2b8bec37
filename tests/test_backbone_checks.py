"""The conformance kit's checks of backbones: ours pass, and each check can fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.gaussian_flow import GaussianFlow, OneHead
from tests.installing import install
from tests.test_testing import assert_fails
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, Conditioning, Schedule, Site
from tokenflow.testing import backbone_checks, check_backbone


class Named(GaussianFlow):
    """Whose mean is the prompt's number of letters."""

    multiple = 2

    def __init__(self) -> None:
        super().__init__(share=0.1)

    @classmethod
    def from_model(cls, model: str, device: str, dtype: torch.dtype) -> Named:
        return cls()

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(mean=torch.tensor([len(prompt) / 10 for prompt in prompts]))


@dataclasses.dataclass
class By:
    """A replacement that is given a site of `sites()`, and not another of the layer's."""

    site: Site
    by: Any

    def attention(self, _: Site, hidden_states: Tensor) -> Any:
        return self.by.attention(self.site, hidden_states)


class Given(OneHead):
    @contextmanager
    def replaced(self, by: Any) -> Iterator[None]:
        with super().replaced(By(self, by)):
            yield


def with_site(**methods: Any) -> Backbone:
    """One whose site has methods of its own."""
    kind = type("Broken", (Given,), methods)

    class WithSite(Named):
        def sites(self) -> Mapping[str, Site]:
            return {"tokens": kind("tokens", self.network["tokens"])}

    return WithSite()


def with_method(**methods: Any) -> Backbone:
    """One that has methods or attributes of its own."""
    return type("Broken", (Named,), methods)()


def narrow(self: GaussianFlow, frames: Tensor) -> Tensor:
    return frames[:, :, 1:].float()


def averaged(self: GaussianFlow, frames: Tensor) -> Tensor:
    return frames - frames.mean()


def rising(self: GaussianFlow, steps: int, size: Any = None) -> Schedule:
    found = GaussianFlow.schedule(self, steps)
    return dataclasses.replace(found, signal=found.noise, noise=found.signal)


class Counts(Named):
    """Whose schedule differs from call to call."""

    calls = 0

    def schedule(self, steps: int, size: Any = None) -> Schedule:
        self.calls += 1
        found = super().schedule(steps)
        return dataclasses.replace(found, timesteps=tuple(t + self.calls for t in found.timesteps))


def between_prompts(self: GaussianFlow, prompts: Sequence[str]) -> Conditioning:
    mean = Named.embed(self, prompts)["mean"]  # type: ignore[arg-type]
    return Conditioning(mean=mean - mean.mean())


def one_row(self: GaussianFlow, prompts: Sequence[str]) -> Conditioning:
    return Conditioning(mean=torch.zeros(1))


def doubled(self: GaussianFlow, latents: Tensor, *args: Any, **inputs: Any) -> Tensor:
    return GaussianFlow.predict(self, latents, *args, **inputs).double()


def written(self: GaussianFlow, latents: Tensor, *args: Any, **inputs: Any) -> Tensor:
    return GaussianFlow.predict(self, latents.mul_(0.9), *args, **inputs)


def of_the_batch(self: GaussianFlow, latents: Tensor, *args: Any, **inputs: Any) -> Tensor:
    return GaussianFlow.predict(self, latents, *args, **inputs) + latents.mean()


def drawn(self: GaussianFlow, latents: Tensor, *args: Any, **inputs: Any) -> Tensor:
    torch.rand(1)
    return GaussianFlow.predict(self, latents, *args, **inputs)


def other_name(self: GaussianFlow) -> dict[str, Site]:
    return {"tokens": OneHead("other", self.network["tokens"])}


@contextmanager
def unheard(self: OneHead, by: Any) -> Iterator[None]:
    yield


@contextmanager
def left(self: OneHead, by: Any) -> Iterator[None]:
    self.layer.by = by
    yield


@contextmanager
def frozen(self: OneHead, by: Any) -> Iterator[None]:
    self.layer.by = by
    try:
        yield
    finally:
        self.layer.by = None
        self.layer.eval()


@contextmanager
def left_by_exceptions(self: OneHead, by: Any) -> Iterator[None]:
    self.layer.by = by
    yield
    self.layer.by = None


def halved(self: OneHead, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Not what the layer does by itself."""
    return self.output(scaled_dot_product_attention(*self.qkv(hidden_states)) / 2)


def own_frame_alone(self: OneHead, hidden_states: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """Keys that grow with the number of the batch's rows: other frames weigh more than the own."""
    x = hidden_states[:, None]
    return x, x * torch.linspace(1, 2, len(x)).view(-1, 1, 1, 1), x


BROKEN: list[tuple[str, Backbone, str]] = [
    ("sizes_stated", with_method(size=0), "size to be a number above 0, got 0"),
    ("sizes_stated", with_method(latent_scale=4), "got multiple 2 and latent_scale 4"),
    ("latents_of_frames", with_method(encode=narrow), r"latents of shape \(3, 3, 2, 4\) in float"),
    ("latents_of_frames", with_method(encode=averaged), "the same latent of a frame"),
    (
        "latents_of_frames",
        with_method(decode=lambda self, x: x.float() + 1),
        r"in float32, from 0 to 1, got .* from 1.* to 2; decode",
    ),
    ("schedule_of_noise", with_method(schedule=rising), "levels that fall from noise to the clean"),
    ("schedule_of_noise", Counts(), "the same schedule at each call"),
    ("conditioning_per_prompt", with_method(embed=one_row), "a Conditioning with 2 rows"),
    ("conditioning_per_prompt", with_method(embed=between_prompts), "the same mean of a prompt"),
    ("output_like_latents", with_method(predict=doubled), "in torch.float64 on cpu; predict"),
    ("output_like_latents", with_method(predict=written), "latents left as they were"),
    ("rows_independent", with_method(predict=of_the_batch), "not to depend on the batch's other"),
    ("sites_named", with_method(sites=lambda self: {}), "at least one attention site, got none"),
    ("sites_named", with_method(sites=other_name), r"those of modules, got \['tokens'\]"),
    ("sites_matched", with_site(matched=False), r"of each site, .*, got \[False\] and \[False\]"),
    ("sites_matched", with_site(matched="no"), r"true or false of each site, .*, got \['no'\]"),
    ("sites_called", with_site(replaced=unheard), "called in a pass, got tokens not called"),
    (
        "sites_called",
        with_site(image=lambda self, tokens, **_: torch.cat([tokens, tokens[:, :1]], 1)),
        "as many image tokens as a smaller picture of 2 x 4 has, got 9 at tokens",
    ),
    (
        "sites_make_up_the_attention",
        with_site(qkv=lambda self, x, **_: (x[:, None], x[:, None], 2 * x[:, None])),
        "norms, positions and scale belong into them",
    ),
    ("sites_restored", with_site(plain=halved), r"Site\.plain to change nothing, got a difference"),
    ("sites_restored", with_site(replaced=left), "got tokens still replaced; restore the layer"),
    ("sites_restored", with_site(replaced=left_by_exceptions), "also after an exception"),
    ("sites_restored", with_site(replaced=frozen), "the network after an edit to be what it was"),
    (
        "layers_named",
        with_method(layers=lambda self, role: ["nowhere"]),
        r"of role structure, got \['nowhere'\]",
    ),
    (
        "layers_named",
        with_method(entries=lambda self, layer: ["nowhere"]),
        r"layers and entries of role structure, got \['nowhere'\]",
    ),
    ("equal_frames_as_one_alone", with_site(qkv=own_frame_alone), "where consistency is 'tokenfl"),
    ("fingerprint_stable", with_method(fingerprint=""), "got '' and ''; make it a digest"),
    ("global_state_unchanged", with_method(predict=drawn), "another torch's random state"),
]


@pytest.mark.parametrize("check", backbone_checks(Named()))
def test_a_backbone_of_another_kind_passes(check: Any) -> None:
    check()


@pytest.mark.parametrize("check", ["sites_make_up_the_attention", "schedule_of_noise"])
def test_ours_passes(backbone: Backbone, check: str) -> None:
    (one,) = (one for one in backbone_checks(backbone) if one.__name__ == check)
    one()


@pytest.mark.parametrize(("check", "broken", "message"), BROKEN)
def test_a_broken_backbone_fails_its_check(check: str, broken: Backbone, message: str) -> None:
    assert_fails(backbone_checks(broken), check, message)


def test_every_check_can_fail() -> None:
    assert {one.__name__ for one in backbone_checks(Named())} == {check for check, *_ in BROKEN}


def test_one_call_stops_at_the_first_failure() -> None:
    with pytest.raises(AssertionError, match="sizes_stated"):
        check_backbone(with_method(size=0, fingerprint=""))


class Unfitting(Named):
    @classmethod
    def from_model(cls, model: str, device: str, dtype: torch.dtype) -> Named:
        raise KeyError("std")


ENTRIES = """
[tokenflow.backbones]
NamedPipeline = tests.test_backbone_checks:Named
UnfittingPipeline = tests.test_backbone_checks:Unfitting
GonePipeline = nosuchmodule:Gone
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with backbones, and a model's folder."""
    install(tmp_path, "tokenflow-families", ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("NamedPipeline", 0, "NamedPipeline of tokenflow-families 1.0: all is well"),
        ("UnfittingPipeline", 1, "model cannot be loaded: KeyError: 'std'"),
        ("GonePipeline", 1, "is unusable: the backbone nosuchmodule:Gone for GonePipeline cannot"),
        ("NamedPipelin", 2, "there is no plugin 'NamedPipelin'; did you mean NamedPipeline"),
    ],
)
def test_a_backbone_is_checked_by_the_command_line(
    installed: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plugins", "check", name, "--model", str(installed)])
    assert ended.value.code == code
    assert message in "".join(capsys.readouterr())


def test_a_backbone_is_checked_on_a_model(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--model", str(installed / "none")], []):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["plugins", "check", "NamedPipeline", *words])
    printed = "".join(capsys.readouterr())
    assert "none' does not exist; give the folder that holds model_index.json" in printed
    assert "--model" in printed


def test_backbones_are_listed(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["plugins"])
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["plugins", "check"])
    lines = {tuple(line.split()) for line in capsys.readouterr().out.splitlines()}
    row = "NamedPipeline", "backbone", "tokenflow-families", "1.0"
    assert (*row, "tests.test_backbone_checks.Named") in lines
    assert (*row, "usable") in lines
    assert any(line[:1] == ("GonePipeline",) and line[4] == "unusable:" for line in lines)
