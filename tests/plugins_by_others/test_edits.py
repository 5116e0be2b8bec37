"""What they promise: by numbers, through ranks, an interruption and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gaussian_flow import GaussianFlow
from tests.on_ranks import on_ranks
from tests.plugins_by_others.grid_shuffle import GridShuffle, grids
from tests.plugins_by_others.no_inversion import NoInversion
from tests.plugins_by_others.prompt_to_prompt import PromptToPrompt
from tests.plugins_by_others.top_k import TopK
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, StableDiffusion
from tokenflow.editors import Batch, Editor, Prompts
from tokenflow.engine import PerFrame, Settings, edit_clip
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import Preempted
from tokenflow.propagation import NNField, Window
from tokenflow.report import read_run
from tokenflow.storage.cache import Cache
from tokenflow.testing import tiny_clip
from tokenflow.video import Clip, read_clip, write_clip

PROMPTS = Prompts("a red ball", inversion_prompt="a blue ball")
SETTINGS = Settings(steps=4, keyframe_every=2, batch=2)
CLIP = tiny_clip(3)
# float32 sums in batches of other sizes, through four steps with guidance
ROUNDING = 1e-3


def test_prompt_to_prompt_takes_the_layouts_maps(backbone: Backbone) -> None:
    """Against maps that are written out; the other branches attend as they do."""
    (name, site), *_ = backbone.cross_attention().items()
    editor, branches = PromptToPrompt(), ("source", "layout", "negative", "prompt")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, backbone.network.get_submodule(name).query_dim, generator=generator)
    told = backbone.embed(["", "a ball", "", "a cube"]).per_frame(2)
    frames = torch.zeros(4, 2, 4, 8, 8)
    text = told["embeddings"]
    for step, replaced in ((3, True), (4, False)):  # of five, 80 %
        batch = Batch(branches, (0, 1), frames, told, 1, step, 5)
        found = editor.attend(batch, site, x, encoder_hidden_states=text)
        expected = site.plain(x, encoder_hidden_states=text)
        if replaced:
            queries, keys, values = site.qkv(x, encoder_hidden_states=text)
            scale = queries.shape[-1] ** -0.5 if site.scale is None else site.scale
            maps = (queries[2:4] @ keys[2:4].mT * scale).softmax(-1)
            expected[6:] = site.output(maps @ values[6:])
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_layout_that_is_not_used_changes_nothing(backbone: Backbone) -> None:
    class Plain(Editor):
        """Classifier-free guidance alone."""

    edited = [
        edit_clip(backbone, CLIP, PROMPTS, editor, NNField(), SETTINGS).latents
        for editor in (PromptToPrompt(share=0), Plain(), PromptToPrompt())
    ]
    assert torch.allclose(edited[0], edited[1], atol=ROUNDING)
    assert not torch.allclose(edited[2], edited[1], atol=0.1)


def test_top_k_is_softer_in_the_decoder_and_early() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 6, 8, generator=generator)
    both = torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]])

    def found(site: str, step: int) -> tuple[Tensor, Tensor]:
        window = Window((1,), (0, 2), *both, 2, 3, site=site, step=step, steps=10)
        answer = TopK(k=2).correspond(tokens[1:2], tokens[[0, 2]], window)
        return answer.indices[0], answer.weights[0]

    indices, early = found("up_blocks.1", 0)
    _, late = found("up_blocks.1", 9)
    alone, weights = found("down_blocks.0", 0)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    for token, query in enumerate(unit[1]):
        for keyframe, own in enumerate((unit[0], unit[2])):
            best = sorted(range(6), key=lambda other: -float(query @ own[other]))[:2]
            expected = [keyframe * 6 + place for place in best]
            assert indices[token, 2 * keyframe : 2 * keyframe + 2].tolist() == expected
            assert alone[token, keyframe] == expected[0]
    assert torch.equal(weights, torch.tensor([0.75, 0.25]).expand(6, 2))
    assert (late[:, 0] > early[:, 0]).all()


def test_without_inversion_a_gaussians_mean_is_moved() -> None:
    """By the difference of the prompts' means, which is FlowEdit's path for Gaussian latents."""
    model, clip = GaussianFlow(), Clip.from_frames(torch.rand(3, 3, 2, 2))
    settings = Settings(steps=400, keyframe_every=2, guidance=1.0)
    prompts = Prompts("0.9", inversion_prompt="0.4")
    edited = edit_clip(model, clip, prompts, NoInversion(), NNField(), settings).latents
    # Euler's error falls as one over the number of steps
    assert torch.allclose(edited - clip.frames, torch.tensor(0.5), atol=2 / settings.steps)


def test_without_inversion_an_edit_is_resumed(backbone: Backbone, tmp_path: Path) -> None:
    def edit(stop: int = 0, **given: Any) -> tuple[Tensor, list[tuple[str, int]]]:
        seen: list[tuple[str, int]] = []

        def on_step(stage: str, step: int, steps: int) -> Any:
            seen.append((stage, step))
            return "stop" if (stage, step) == ("edit", stop) else None

        result = edit_clip(
            backbone, CLIP, PROMPTS, NoInversion(), NNField(), SETTINGS, on_step=on_step, **given
        )
        return result.latents, seen

    store = ResumeStore(Cache(tmp_path), "NoInversion", "NNField")
    whole, seen = edit()
    assert {stage for stage, _ in seen} == {"encode", "edit", "decode"}
    with pytest.raises(Preempted):
        edit(2, store=store)
    resumed, seen = edit(store=store)
    assert [step for stage, step in seen if stage == "edit"] == [3, 4]
    assert torch.equal(resumed, whole)


def test_without_inversion_a_run_leaves_its_report(model_folder: Path, tmp_path: Path) -> None:
    name = "tests.plugins_by_others.no_inversion.NoInversion"
    video = write_clip(tmp_path / "in.mp4", tiny_clip(3))
    main([
        "predict", f"--data.video={video}", f"--model.backbone={model_folder}",
        "--model.prompt=a red ball", "--model.inversion_prompt=a blue ball", "--model.steps=2",
        f"--model.editor={name}", "--allow_imports=tests", "--trainer.accelerator=cpu",
        f"--output.folder={tmp_path / 'runs'}",
    ])  # fmt: skip
    folder = tmp_path / "runs" / "in"
    assert len(read_clip(folder / "edited.mp4")) == 3
    assert "invert" not in read_run(folder).came["seconds"]
    assert "NoInversion" in (folder / "report.html").read_text("utf-8")


class OneFrame(GridShuffle):
    side = 1


def test_a_grid_of_one_frame_is_that_frame(backbone: Backbone) -> None:
    def edit(way: Any) -> Tensor:
        given = backbone, CLIP, PROMPTS, NoInversion(), NNField(), SETTINGS
        return edit_clip(*given, consistency=way).latents

    alone, one, four = map(edit, (PerFrame, OneFrame, GridShuffle))
    assert torch.allclose(alone, one, atol=ROUNDING)
    assert four.isfinite().all()
    assert not torch.allclose(alone, four, atol=0.1)


def test_every_frame_is_in_a_grid() -> None:
    for frames in range(1, 14):
        found = grids(frames, 4, seed=3)
        assert {len(grid) for grid in found} == {4}
        assert {frame for grid in found for frame in grid} == set(range(frames))
    assert grids(9, 4, seed=3) != grids(9, 4, seed=4)


def edits(folder: Path) -> list[Tensor]:
    """This rank's latents, by an editor and by a way of consistency that are not tokenflow's."""
    ranks, model = FrameGroup.join(), Backbone.load(folder, "cpu", "float32")
    assert isinstance(model, StableDiffusion)
    for network in (model.unet, model.vae, model.text_encoder):
        network.double()  # so that no match turns by rounding
    settings = Settings(steps=2, keyframe_every=2, batch=2)
    return [
        edit_clip(
            model, tiny_clip(5), PROMPTS, NoInversion(), NNField(), settings,
            consistency=way, ranks=ranks,
        ).latents
        for way in (None, GridShuffle)
    ]  # fmt: skip


def test_two_ranks_are_as_one(model_folder: Path, tmp_path: Path) -> None:
    parts = on_ranks(2, tmp_path, edits, model_folder)
    for alone, shared in zip(
        edits(model_folder), map(torch.cat, zip(*parts, strict=True)), strict=True
    ):
        assert torch.allclose(alone, shared, atol=ROUNDING)
