"""FlowEdit by its published loop, on models that are solved exactly, and through the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.diffusion.making_transformers import write_tiny_flux, write_tiny_sd3
from tests.gaussian_flow import GaussianFlow
from tests.gaussian_noise import GaussianNoise
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, Conditioning, Schedule, Source, Trajectory, frame_noise
from tokenflow.editors import FlowEdit, Prompts, Step
from tokenflow.editors.inversion_free import NOISES
from tokenflow.engine import Settings, edit_clip
from tokenflow.engine.resume import ResumeStore
from tokenflow.errors import InputError, Preempted
from tokenflow.propagation import NNField
from tokenflow.report import read_run
from tokenflow.storage.cache import Cache
from tokenflow.testing import editor_checks, tiny_clip
from tokenflow.video import Clip, read_clip, write_clip

PROMPTS = Prompts("0.9", "-0.2", "0.4")
STEPS, FRAMES = 6, 3
ROUNDING = 1e-5  # float32, a few steps with guidance, sums in another order


def clip(frames: int = FRAMES) -> Clip:
    generator = torch.Generator().manual_seed(0)
    return Clip.from_frames(torch.rand(frames, 3, 4, 4, generator=generator))


def edited(
    model: Backbone, editor: FlowEdit, prompts: Prompts = PROMPTS, **settings: Any
) -> Tensor:
    chosen = Settings(**{"steps": STEPS, "keyframe_every": 2, "batch": 2, **settings})
    return edit_clip(model, clip(), prompts, editor, NNField(), chosen).latents


Output = Callable[[Tensor, float, str, float], Tensor]
"""The network's guided output, of a latent, a timestep, a prompt and the scale of guidance."""


def guided(model: Backbone) -> Output:
    """By a negative prompt, or by an input of the network."""

    def output(z: Tensor, t: float, prompt: str, scale: float) -> Tensor:
        told = model.embed([PROMPTS.negative_prompt, prompt])
        if "guidance" in told:
            told = told.rows([1])
            told["guidance"].fill_(scale)
            return model.predict(z[None], t, told)[0]
        negative, positive = (model.predict(z[None], t, told.rows([n]))[0] for n in (0, 1))
        return negative + scale * (positive - negative)

    return output


def published(
    output: Output,
    x_src: Tensor,
    schedule: Schedule,
    scales: tuple[float, float],
    n: tuple[int, int, int],
    draw: Callable[[int, int], Tensor],
) -> Tensor:
    """FlowEdit's loop for one image (algorithm 1 and the authors' code), written out.

    The ε-form is their own: [ε(z_tar) - ε(z_src) - (z - x_src)] / (1 - t); the network is given
    latents at the scale of its own schedule.
    """
    (n_max, n_min, n_avg), (g_src, g_tar), steps = n, scales, len(schedule)
    signal, noise, form = schedule.signal, schedule.noise, schedule.prediction
    z_edit, x_tar = x_src.clone(), None

    def asked(z: Tensor, i: int, prompt: str, scale: float) -> Tensor:
        return output(z * (signal[i] + noise[i]), schedule.timesteps[i], prompt, scale)

    for i in range(steps):
        if steps - i > n_max:
            continue
        t = noise[i] / (signal[i] + noise[i])
        t_next = noise[i + 1] / (signal[i + 1] + noise[i + 1]) if i + 1 < steps else 0.0
        if steps - i > n_min:
            v_delta = torch.zeros_like(x_src)
            for k in range(n_avg):
                z_src = (1 - t) * x_src + t * draw(i, k)
                z_tar = z_edit + z_src - x_src
                output_tar = asked(z_tar, i, PROMPTS.prompt, g_tar)
                output_src = asked(z_src, i, PROMPTS.inversion_prompt, g_src)
                v = output_tar - output_src
                if form == "epsilon":
                    v = (v - (z_edit - x_src)) / (1 - t)
                v_delta += v / n_avg
            z_edit = z_edit + (t_next - t) * v_delta
            continue
        if x_tar is None:
            x_tar = z_edit + (1 - t) * x_src + t * draw(i, 0) - x_src
        t_next = noise[i + 1] / (signal[i + 1] + noise[i + 1])  # sampling as always
        v = asked(x_tar, i, PROMPTS.prompt, g_tar)
        if form == "epsilon":
            v = (v - x_tar) / (1 - t)
        x_tar = x_tar + (t_next - t) * v
    return z_edit if x_tar is None else x_tar * (signal[-1] + noise[-1])


@pytest.mark.parametrize("n", [(6, 0, 1), (4, 0, 1), (4, 0, 3), (5, 2, 1), (5, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("model", [GaussianFlow(share=0.1), GaussianNoise(share=0.1)])
def test_every_frame_is_as_in_the_published_loop(
    model: GaussianFlow, n: tuple[int, int, int]
) -> None:
    draws = torch.randn(STEPS, 3, FRAMES, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    n_max, n_min, n_avg = n
    editor = FlowEdit(n_max, n_min, n_avg, guidance_source=1.5).with_noise(draws)
    found = edited(model, editor, guidance=4.0, consistency="none")
    for frame, x_src in enumerate(clip().frames):
        expected = published(
            guided(model), x_src, model.schedule(STEPS), (1.5, 4.0), n,
            lambda step, draw, frame=frame: draws[step, draw, frame],
        )  # fmt: skip
        assert torch.allclose(found[frame], expected, rtol=0, atol=ROUNDING)
    assert (found - clip().frames).abs().max() > 0.1


def test_steps_that_sample_run_no_branch_that_they_do_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, predict = list[int](), GaussianFlow.predict

    def counted(self: GaussianFlow, x: Tensor, *given: Any, **more: Any) -> Tensor:
        rows.append(len(x))
        return predict(self, x, *given, **more)

    monkeypatch.setattr(GaussianFlow, "predict", counted)
    edited(GaussianFlow(), FlowEdit(4, 2, n_avg=3), guidance=4.0, consistency="none", batch=FRAMES)
    # source, negative and prompt in the place of three draws of four branches
    assert [count // FRAMES for count in rows] == [12, 12, 3, 3]


@pytest.fixture(scope="module", params=["Stable Diffusion", "SD 3", "Flux"])
def network(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, backbone: Backbone
) -> Backbone:
    """A real network of each kind; that of Stable Diffusion has some noise at its last level."""
    if request.param == "Stable Diffusion":
        return backbone
    write = {"SD 3": write_tiny_sd3, "Flux": write_tiny_flux}[request.param]
    return Backbone.load(write(tmp_path_factory.mktemp("tiny")), "cpu", "float32")


def test_real_networks_edit_as_the_published_loop(network: Backbone) -> None:
    source, n = tiny_clip(2), (3, 1, 1)
    clean = network.encode(source.frames)
    size = clean.shape[2], clean.shape[3]
    draws = torch.randn(4, 1, *clean.shape, generator=torch.Generator().manual_seed(1))
    editor = FlowEdit(3, 1, guidance_source=1.5)
    editor.with_noise(lambda frame, step, draw: draws[step, draw, frame])
    settings = Settings(steps=4, guidance=3.0, consistency="none")
    found = edit_clip(network, source, PROMPTS, editor, NNField(), settings).latents
    for frame, x_src in enumerate(clean):
        expected = published(
            guided(network), x_src, network.schedule(4, size), (1.5, 3.0), n,
            lambda step, draw, frame=frame: draws[step, draw, frame],
        )  # fmt: skip
        # Δv of a network that predicts noise is divided by 1 - t, 0.1 at first
        assert torch.allclose(found[frame], expected, rtol=0, atol=10 * ROUNDING)
    assert (found - clean).abs().max() > 0.01


@pytest.mark.parametrize("model", [GaussianFlow(), GaussianNoise()])
@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_a_gaussians_mean_moves_by_the_prompts_difference(model: Backbone, noise: str) -> None:
    """z - x_src = (1 - t) Δmean solves the difference of the two velocities, and Euler's steps.

    Guidance of two Gaussians alike but for their means is a Gaussian with the guided mean.
    """
    editor = FlowEdit(STEPS, guidance_source=1.5, noise=noise)
    found = edited(model, editor, guidance=4.0, consistency="none")
    means = [-0.2 + scale * (mean + 0.2) for scale, mean in ((4.0, 0.9), (1.5, 0.4))]
    first, move = model.schedule(STEPS), means[0] - means[1]
    # the first level's signal, where there is any, begins at z = x_src instead
    missed = move * first.signal[0] / (first.signal[0] + first.noise[0])
    error = (found - clip().frames - move).abs().max()
    assert error <= missed + ROUNDING


class Apart(FlowEdit):
    """FlowEdit whose source's branch attends to its own frame alone."""

    interface = 2
    joint_source = False


@pytest.mark.parametrize("n_avg", [1, 2])
@pytest.mark.parametrize("consistency", ["none", "joint", "tokenflow"])
@pytest.mark.parametrize("model", [GaussianFlow(share=0.1), GaussianNoise(share=0.1)])
def test_the_source_comes_back_exactly_where_both_sides_are_alike(
    model: Backbone, consistency: str, n_avg: int
) -> None:
    def change(kind: type[FlowEdit]) -> float:
        editor = kind(STEPS, n_avg=n_avg, guidance_source=5.0)
        prompts = Prompts("0.4", "-0.2", "0.4")
        found = edited(model, editor, prompts, guidance=5.0, consistency=consistency)
        return float((found - clip().frames).abs().max())

    assert change(FlowEdit) < ROUNDING
    if consistency != "none":
        assert change(Apart) > 100 * ROUNDING  # the difference of attention


def test_real_networks_give_the_source_back(network: Backbone) -> None:
    source, settings = tiny_clip(3), Settings(steps=2, keyframe_every=2, guidance=5.0)
    editor, prompts = FlowEdit(2, guidance_source=5.0), Prompts("a ball", "", "a ball")
    found = edit_clip(network, source, prompts, editor, NNField(), settings)
    assert torch.allclose(found.latents, network.encode(source.frames), rtol=0, atol=ROUNDING)


def first_step(editor: FlowEdit, guidance: float = 4.0) -> Step:
    return Step(0, GaussianFlow().schedule(STEPS), guidance, 5, tuple(editor.branches(PROMPTS)))


def sources(editor: FlowEdit, frames: range) -> Tensor:
    """The source's inputs in a step, of clean latents that are zero."""
    zero, schedule = torch.zeros(len(frames), 3, 4, 4), GaussianFlow().schedule(STEPS)
    own = Trajectory.empty(zero, schedule, None, frames.start, 9)
    return editor.inputs(zero, first_step(editor), own.source())[0]


def test_noise_is_each_frames_own_or_one() -> None:
    own, shared = (sources(FlowEdit(noise=noise), range(2, 5)) for noise in NOISES)
    assert torch.equal(own, torch.stack([frame_noise(5, f, (3, 4, 4), 0) for f in range(2, 5)]))
    assert all(torch.equal(frame, frame_noise(5, 0, (3, 4, 4), 0)) for frame in shared)
    assert torch.equal(sources(FlowEdit(noise="shared"), range(4, 5)), shared[:1])


def test_draws_and_steps_have_noise_of_their_own() -> None:
    drawn = [frame_noise(5, 1, (1, 1, 3), step, draw) for step in (0, 1, 10) for draw in (0, 1, 10)]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 9


def test_noise_of_another_shape_is_refused() -> None:
    editor = FlowEdit().with_noise(torch.zeros(STEPS, 1, 1, 3, 2, 2))
    with pytest.raises(InputError, match=r"noise of .* shape \(3, 4, 4\) .* got \(3, 2, 2\)"):
        sources(editor, range(1))


def test_without_guidance_no_negative_branch_runs() -> None:
    class Asked(FlowEdit):
        asked: ClassVar[list[tuple[str, ...]]] = []

        def advance(
            self, x: Tensor, outputs: Mapping[str, Tensor], step: Step, source: Source
        ) -> Tensor:
            self.asked.append(tuple(outputs))
            return super().advance(x, outputs, step, source)

    model = GaussianFlow(share=0.1)
    part = edited(model, Asked(STEPS), guidance=3.0, guidance_begin=0.5, consistency="none")
    every = ("source", "source_negative", "negative", "prompt")
    assert Asked.asked == [("source", "prompt")] * 2 * 3 + [every] * 2 * 3  # by two batches
    assert not torch.allclose(part, edited(model, FlowEdit(STEPS), guidance=3.0), atol=0.01)
    assert list(FlowEdit(guidance_source=1.0).branches(PROMPTS)) == ["source", "negative", "prompt"]
    assert list(FlowEdit(n_avg=2, guidance_source=1.0).branches(PROMPTS))[3:] == [
        "source_2", "negative_2", "prompt_2",
    ]  # fmt: skip


def test_guidance_of_the_source_is_a_fifth_as_far_from_1() -> None:
    assert FlowEdit().source_scale(13.5) == pytest.approx(3.5)
    assert FlowEdit().source_scale(1.0) == 1.0
    assert FlowEdit(guidance_source=1.5).source_scale(5.5) == 1.5


class Distilled(GaussianFlow):
    """The mean is shifted by the scale of guidance, which is an input."""

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        given = super().embed(prompts)
        return Conditioning(mean=given["mean"], guidance=torch.full((len(given),), 5.5))

    def predict(self, latents: Tensor, t: float, conditioning: Conditioning, **_: Any) -> Tensor:
        mean = conditioning["mean"] + conditioning["guidance"]
        return super().predict(latents, t, Conditioning(mean=mean))


def test_a_network_that_is_given_guidance_gets_one_scale_for_each_side() -> None:
    editor = FlowEdit(STEPS, guidance_source=1.5)
    found = edited(Distilled(), editor, guidance=5.5)
    move = torch.tensor((0.9 + 5.5) - (0.4 + 1.5))
    assert torch.allclose(found - clip().frames, move, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("options", [{}, {"n_max": 2, "n_min": 1, "n_avg": 2, "noise": "shared"}])
@pytest.mark.parametrize("check", ["start_per_frame", "advance_per_frame", "two_ranks_agree"])
def test_it_keeps_the_contract(options: dict[str, Any], check: str) -> None:
    class Texts(GaussianFlow):
        """The mean is the length of a text."""

        def embed(self, prompts: Sequence[str]) -> Conditioning:
            return super().embed([f"{len(prompt)}" for prompt in prompts])

    checks = editor_checks(FlowEdit(**options), Texts(share=0.1))
    (one,) = (each for each in checks if each.function.__name__ == check)
    one()


def test_an_edit_is_resumed(tmp_path: Path) -> None:
    def edit(stop: int = 0, **given: Any) -> tuple[Tensor, list[int]]:
        seen: list[int] = []

        def on_step(stage: str, step: int, steps: int) -> Any:
            seen.extend([step] if stage == "edit" else [])
            return "stop" if (stage, step) == ("edit", stop) else None

        chosen = Settings(steps=4, keyframe_every=2, batch=2)
        result = edit_clip(
            GaussianFlow(share=0.1), clip(), PROMPTS, FlowEdit(3, 1), NNField(), chosen,
            on_step=on_step, **given,
        )  # fmt: skip
        return result.latents, seen

    store = ResumeStore(Cache(tmp_path), "FlowEdit", "NNField")
    whole, seen = edit()
    assert seen == [2, 3, 4]
    with pytest.raises(Preempted):
        edit(3, store=store)
    resumed, seen = edit(store=store)
    assert seen == [4]
    assert torch.equal(resumed, whole)


def test_a_run_leaves_its_report(model_folder: Path, tmp_path: Path) -> None:
    main([
        "predict", f"--data.video={write_clip(tmp_path / 'in.mp4', tiny_clip(3))}",
        f"--model.backbone={model_folder}", "--model.prompt=a red ball",
        "--model.inversion_prompt=a blue ball", "--model.steps=2",
        "--model.editor=tokenflow.editors.FlowEdit", "--model.editor.n_max=2",
        "--trainer.accelerator=cpu", f"--output.folder={tmp_path / 'runs'}",
    ])  # fmt: skip
    folder = tmp_path / "runs" / "in"
    assert len(read_clip(folder / "edited.mp4")) == 3
    assert "invert" not in read_run(folder).came["seconds"]
    assert "FlowEdit" in (folder / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_max": 0}, "n_max from 1 up and n_min from 0 to n_max, got n_max 0 and n_min 0"),
        ({"n_max": 2, "n_min": 3}, "got n_max 2 and n_min 3"),
        ({"n_min": -1}, "got n_max None and n_min -1"),
        ({"n_avg": 0}, "n_avg must be at least 1, got 0"),
        ({"guidance_source": float("nan")}, "guidance_source must be a finite number, got nan"),
        ({"noise": "inverted"}, "noise must be one of independent, shared, got 'inverted'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowEdit(**options)


@pytest.mark.parametrize("options", [{"n_max": 7}, {"n_min": 7}])
def test_more_steps_than_the_edit_has_are_refused(options: dict[str, int]) -> None:
    (name,) = options
    message = f"expected {name} of FlowEdit up to the 6 steps .* got 7"
    with pytest.raises(InputError, match=message):
        edited(GaussianFlow(), FlowEdit(**options))
    model = GaussianFlow()
    model.encode = lambda frames: pytest.fail("frames are encoded")  # type: ignore[method-assign]
    with pytest.raises(InputError, match=message):
        edit_clip(model, clip(), "x", FlowEdit(**options), NNField(), Settings(steps=6))


def test_too_many_steps_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit):
        main([
            "predict", f"--data.video={write_clip(tmp_path / 'in.mp4', tiny_clip(3))}",
            "--model.prompt=a red ball", "--model.inversion_prompt=a blue ball", "--model.steps=6",
            "--model.editor=FlowEdit", "--model.editor.n_max=7", "--trainer.accelerator=cpu",
            f"--output.folder={tmp_path / 'runs'}",
        ])  # fmt: skip
    assert "expected n_max of FlowEdit up to the 6 steps" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "run"), [(50, 33), (28, 18), (4, 3), (1, 1)])
def test_two_thirds_of_the_steps_run(steps: int, run: int) -> None:
    schedule = GaussianFlow().schedule(steps)
    source = Trajectory.empty(clip().frames, schedule, None).source()
    begin = FlowEdit().start(source, schedule, 0)
    assert begin.step == steps - run
    assert torch.equal(begin.latents, clip().frames)
