import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.metrics.making import (
    noise,
    still,
    translation,
    write_random_alexnet,
    write_tiny_clip,
)
from tokenflow.errors import InputError
from tokenflow.metrics import (
    ClipEmbedder,
    Measures,
    frame_consistency,
    load_lpips,
    long_range,
    lpips,
    psnr,
    structure,
    text_alignment,
    visible_flow,
)
from tokenflow.miniature.edits import SceneFlow
from tokenflow.miniature.scenes import Attributes, random_scene
from tokenflow.propagation import FlowFiles
from tokenflow.video import Clip, Frames

SCENE = random_scene(7, 10, Attributes.parse("a plain blue ball on sand"))
SOURCE, EDIT = (
    Clip.from_frames(scene.render(), name="scene")
    for scene in (SCENE, SCENE.with_attributes(color="red"))
)
MASK = torch.stack([SCENE.mask(i) > 0 for i in range(len(SCENE))])
CAPTIONS = "a plain red ball on sand", "a plain blue ball on sand"


def test_a_true_edit_does_well_by_all() -> None:
    measures = Measures(SceneFlow(SCENE), judge=True)
    motions = measures.motions(SOURCE)
    found = measures.of(EDIT, motions, *CAPTIONS, MASK)
    assert list(found) == [
        "warp_error_1", "visible_1", "warp_error_8", "visible_8", "flicker", "flicker_source",
        "psnr", "psnr_outside", "ssim", "structure", "structure_outside", "judge_edited",
        "judge_kept",
    ]  # fmt: skip
    assert found["warp_error_8"] == long_range(EDIT.frames, visible_flow(motions), 8).error  # type: ignore[union-attr]
    assert found["psnr"] == pytest.approx(psnr(EDIT.frames, SOURCE.frames), rel=1e-6)
    assert found["structure"] == float(structure(EDIT.frames, SOURCE.frames).mean())
    assert found["psnr_outside"] == 100  # equal, and JSON has no infinity
    assert found["structure_outside"] == pytest.approx(1, abs=1e-6)
    assert found["structure"] < 1 - 1e-4
    assert found["judge_edited"] == found["judge_kept"] == 1
    noisy = Clip.from_frames((EDIT.frames + 0.1 * noise(10, 3, 128, 128)).clamp(0, 1))
    worse = measures.of(noisy, motions, *CAPTIONS, MASK)
    for name in ("warp_error_1", "warp_error_8"):
        assert worse[name] > 2 * found[name], name
    assert worse["flicker"] > found["flicker"] + 0.1
    for name in ("ssim", "structure", "psnr_outside"):
        assert worse[name] < found[name] - 0.05, name


def test_frames_that_are_not_in_memory_have_the_same_numbers() -> None:
    asked = []

    class Watched(Frames):
        def __getitem__(self, which: Any) -> torch.Tensor:
            found = super().__getitem__(which)
            asked.append(len(found) if found.ndim == 4 else 1)
            return found

    def apart(clip: Clip) -> Clip:
        frames = Watched(clip.frames.__getitem__, clip.positions, clip.display_size)
        return dataclasses.replace(clip, frames=frames)

    measures = Measures(SceneFlow(SCENE), judge=True)
    together = measures.of(EDIT, measures.motions(SOURCE), *CAPTIONS, MASK)
    assert not asked
    found = measures.of(apart(EDIT), measures.motions(apart(SOURCE)), *CAPTIONS, MASK)
    assert found == together
    assert 1 < max(asked) <= 8 < len(EDIT)


def test_what_broken_pixels_make_of_a_metric_is_left_out() -> None:
    measures = Measures(SceneFlow(SCENE), distances=(1,))
    broken = Clip.from_frames(torch.full_like(SOURCE.frames[:], torch.nan))
    found = measures.of(broken, measures.motions(SOURCE), mask=MASK)
    assert list(found) == ["visible_1", "flicker_source"]


def test_clip_and_lpips_are_of_the_edit_and_its_prompt(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is LPIPS's extra")
    clip, alexnet = str(write_tiny_clip(tmp_path)), str(write_random_alexnet(tmp_path))
    measures = Measures(SceneFlow(SCENE), distances=1, clip=clip, lpips=alexnet, device="cpu")
    motions = measures.motions(SOURCE)
    found = measures.of(EDIT, motions, *CAPTIONS)
    images, text = ClipEmbedder(clip)(EDIT.frames[:], CAPTIONS[0])
    # some frames at a time, float32
    alignment, consistency = text_alignment(images, text), frame_consistency(images)
    assert found["clip_text"] == pytest.approx(float(alignment.mean()), abs=1e-6)
    assert found["clip_frames"] == pytest.approx(float(consistency.mean()), abs=1e-6)
    distances = lpips(load_lpips(alexnet), EDIT.frames[:], SOURCE.frames[:])
    assert found["lpips"] == float(distances.mean()) > 0
    assert "clip_text" not in measures.of(EDIT, motions)  # no prompt, nothing to agree with
    first = Clip.from_frames(EDIT.frames[:1]), Clip.from_frames(SOURCE.frames[:1])
    assert "clip_frames" not in measures.of(first[0], measures.motions(first[1]), *CAPTIONS)
    with pytest.raises(InputError, match="frames of 35x35 pixels or more"):
        measures.of(SMALL, measures.motions(SMALL), *CAPTIONS)


def test_one_distance_needs_no_list() -> None:
    assert Measures(distances=8).described["distances"] == [8]


def test_the_flows_options_are_told() -> None:
    assert Measures().described | {"flow.preset": "medium"} == Measures().described
    told = Measures(FlowFiles("some/flow", first=1)).described
    assert (told["flow"], told["flow.folder"], told["flow.first"]) == ("FlowFiles", "some/flow", 1)
    assert [k for k in Measures(SceneFlow(SCENE)).described if k.startswith("flow")] == ["flow"]


def test_the_flow_of_the_edit_itself() -> None:
    """Noise that stands still in the source and moves in the edit."""
    source, edited = (Clip.from_frames(make(3, 64, 64)) for make in (still, translation))
    errors = []
    for motion in ("source", "edit"):
        measures = Measures(motion=motion, distances=(1,))  # type: ignore[arg-type]
        errors.append(measures.of(edited, measures.motions(source))["warp_error_1"])
    assert errors[1] < 0.1 * errors[0]


def test_what_a_clip_is_too_short_for_is_left_out() -> None:
    measures, frame = Measures(judge=False), Clip.from_frames(still(1))
    assert set(measures.of(frame, measures.motions(frame))) == {"psnr", "ssim", "structure"}


SMALL = Clip.from_frames(still(2))
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another number of frames": (
        {}, {"edited": Clip.from_frames(still(3))},
        "3 frames of 20x16 for the edit 'clip' and 2 frames of 20x16 for the source",
    ),
    "another size": ({}, {"edited": Clip.from_frames(still(2, 20, 20))}, "2 frames of 20x20"),
    "another mask": ({}, {"mask": MASK}, "expected a mask of 2 frames of 20x16"),
    "a mask of labels": ({}, {"mask": torch.zeros(2, 16, 20).bool()}, "labels of 0 and 1"),
    "a mask of all": ({}, {"mask": torch.ones(2, 16, 20).bool()}, "leaves some of every"),
    "the judge at another size": ({"judge": True}, {}, "of 128x128 pixels, got 2 frames of 20x16"),
    "no distance": ({"distances": ()}, {}, "1 frame or more"),
    "a distance of nothing": ({"distances": (0,)}, {}, "1 frame or more"),
    "files for the edit's motion": (
        {"flow": FlowFiles("some/flow"), "motion": "edit"}, {},
        "motion 'edit', got FlowFiles, which has the source's for every video",
    ),
    "a scene for the edit's motion": (
        {"flow": SceneFlow(SCENE), "motion": "edit"}, {}, "got SceneFlow"
    ),
    "no CLIP": ({"clip": "gone"}, {}, "'gone' has no config.json"),
    "no LPIPS": ({"lpips": "gone.pth"}, {}, "no weights at gone.pth; expected a file of"),
}  # fmt: skip


def test_the_judge_needs_captions() -> None:
    measures, clip = Measures(judge=True), Clip.from_frames(still(2, 128, 128))
    with pytest.raises(InputError, match="needs captions"):
        measures.of(clip, measures.motions(clip), "a robot")


def test_a_mask_with_hardly_anything_outside() -> None:
    measures, mask = Measures(distances=1), torch.ones(2, 16, 20, dtype=torch.bool)
    mask[:, 0, 0] = False
    found = measures.of(SMALL, measures.motions(SMALL), mask=mask)
    assert found["psnr_outside"] == 100
    assert "structure_outside" not in found  # all is beside the mask
    mask[1] = False  # the object has left
    found = measures.of(SMALL, measures.motions(SMALL), mask=mask)
    assert found["structure_outside"] == pytest.approx(found["structure"])


def test_files_of_flow_of_another_size_say_which_is_needed(tmp_path: Path) -> None:
    for name in ("0_1", "1_0"):
        np.save(tmp_path / f"{name}.npy", np.zeros((2, 64, 64), dtype=np.float32))
    with pytest.raises(InputError, match=r"expected \(2, 16, 20\).*evaluate at that of the run's"):
        Measures(FlowFiles(str(tmp_path))).motions(SMALL)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_to_do(case: str) -> None:
    options, arguments, message = BAD[case]

    def measure() -> None:
        measures = Measures(**options)
        measures.of(**{"edited": SMALL, "source": measures.motions(SMALL)} | arguments)

    with pytest.raises(InputError) as error:
        measure()
    assert message in str(error.value)


def test_frames_too_small_for_ssim_are_refused() -> None:
    tiny = Clip.from_frames(still(2, 8, 8))
    measures = Measures(SceneFlow(SCENE))
    with pytest.raises(InputError, match="11x11 pixels or more"):
        measures.of(tiny, measures.motions(tiny))
