"""The mask of a local edit where none is drawn: where the two prompts' predictions differ.

Source: DiffEdit (Couairon et al. 2022, arXiv 2210.11427), section 3.2. Ours are the threshold, and
that the differences of a clip's frames agree along the source's motion, so that the mask holds
still.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import cv2
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from tokenflow.diffusion import Conditioning
from tokenflow.diffusion.noise import frame_noise
from tokenflow.diffusion.schedule import require_finite
from tokenflow.diffusion.trajectory import rows
from tokenflow.editors import Prompts
from tokenflow.engine.invert import OnStep, reported
from tokenflow.engine.region import AUTO
from tokenflow.engine.sampling import Sampling
from tokenflow.errors import InputError
from tokenflow.propagation import Window
from tokenflow.propagation.fusion import fuse
from tokenflow.video import Clip, Frames

DRAWS = 4
"""Of noise, over which differences are averaged."""
ROUNDS = 4
"""In each, the differences of every frame become the mean of its own and its two neighbours', along
flow that can be trusted."""
NEARLY_ALL = 0.95
"""Share of the clip from which on an edit is hardly local."""
ALIKE = 1e-3
"""Share of the largest difference by which all must differ from the smallest."""


def require_comparable(mask: object, prompts: Prompts) -> None:
    """Raises `InputError` unless a mask is to be automatic and the prompts say where it may be."""
    if mask != AUTO:
        raise InputError(f"expected a mask as a clip (by read_clip), or {AUTO!r}, got {mask!r}")
    source, target = prompts.inversion_prompt.strip(), prompts.prompt.strip()
    if not source or source == target:
        found = f"both are {target!r}" if source else "that of the source is empty"
        raise InputError(
            f"an automatic mask is where the predictions for the source's prompt and the edit's "
            f"differ: expected two prompts, {found}; say what the source shows (inversion_prompt), "
            f"in the same words where nothing is to change"
        )


def automatic_mask(sampling: Sampling, prompts: Prompts, on_step: OnStep) -> Clip:
    """White where the prompts' predictions differ: of the whole clip, on every rank.

    Args:
        sampling: Of this rank's frames, with their clip and flow.
        prompts: Of the source and the edit.
        on_step: Called after every batch of frames, with the stage mask.

    Raises:
        InputError: The predictions differ nowhere, or everywhere alike.
        Preempted: `on_step` asked to stop.
    """
    s, clip, here = sampling, sampling.clip, sampling.trajectory.positions
    assert clip is not None, "edit_clip gives it"
    assert s.flow is not None, "and this"
    ranks, counts, total = s.ranks, s.shard.frame_counts, s.trajectory.total
    held = here if s.shard.idle else range(max(here.start - 1, 0), min(here.stop + 1, total))
    found, windows, parts = list[Tensor](), list[Window](), s.parts(here)
    with ranks.together(), ranks.preemption.interruptible():
        both = s.network.model.embed([prompts.inversion_prompt, prompts.prompt])
        for number, part in enumerate(parts, start=1):
            found.append(difference(s, both, part))
            windows.append(s.flow.moved(beside(part, held)))
            reported(on_step, "mask", number, len(parts))
        own = torch.cat(found)
        require_finite(own, "the predictions for an automatic mask")

    def exchanged(values: Float[Tensor, "own c h w"]) -> Float[Tensor, "held c h w"]:
        return ranks.exchange_halo(values.cpu(), counts, host=True)

    source = exchanged(s.trajectory.clean)
    for _ in range(ROUNDS):
        near = exchanged(own)
        places = [(rows(held, w.frames), rows(held, w.keyframes)) for w in windows]
        own = torch.cat(
            [
                fuse(near[i], near[k], source[i], source[k], window, 2 / 3)
                for (i, k), window in zip(places, windows, strict=True)
            ]
        )
    # differences are skewed: their roots part better
    every = ranks.all_gather(own, counts, host=True).clamp(min=0).sqrt()
    threshold = parting(every)
    share = float((every > threshold).float().mean())
    if share > NEARLY_ALL:
        warnings.warn(
            f"the automatic mask takes in {share:.0%} of the clip, so that the edit is hardly "
            f"local; leave the mask out, or let both prompts say alike what is to stay",
            stacklevel=2,
        )
    wide = max_pool2d(every, 3, stride=1, padding=1)  # outlines need room
    height, width = clip.frames.shape[-2:]

    def frame(position: int) -> Float[Tensor, "3 height width"]:
        fine = interpolate(wide[position][None], (height, width), mode="bilinear")[0]
        return (fine > threshold).float().expand(3, -1, -1)

    times = tuple(position / clip.rate for position in range(total))
    frames = Frames(frame, range(total), (height, width))
    return Clip(frames, times, clip.rate, clip.name, clip.display_size)


def difference(
    sampling: Sampling, prompts: Conditioning, frames: Sequence[int]
) -> Float[Tensor, "frames 1 h w"]:
    """Mean magnitudes of the difference of two prompts' predictions, for some of the frames.

    The model alone is asked, without the editor, at the level of sampling's schedule at which
    signal and noise are nearest to each other. All frames have the same noise.
    """
    s, schedule, model = sampling, sampling.schedule, sampling.network.model
    clean, inputs = s.trajectory.source(frames).clean, dict[str, Tensor]()
    level = min(range(len(schedule)), key=lambda i: abs(schedule.signal[i] - schedule.noise[i]))
    given = prompts.per_frame(len(frames))
    if (channels := s.network.channels) is not None:
        inputs["channels"] = channels[list(frames)].to(model.device).repeat(2, 1, 1, 1)
    result = torch.zeros_like(clean[:, :1])
    for draw in range(DRAWS):
        noise = frame_noise(s.settings.seed, 0, clean.shape[1:], level, draw)
        x = schedule.mix(clean, noise, level).to(model.device).repeat(2, 1, 1, 1)
        source, edit = model.predict(x, schedule.timesteps[level], given, **inputs).chunk(2)
        result += (edit - source).abs().mean(dim=1, keepdim=True).cpu() / DRAWS
    return result


def beside(frames: Sequence[int], held: range) -> Window:
    """Frames whose neighbours, with equal weights, are the frames before and after them.

    Args:
        frames: Positions in the clip.
        held: Those of the frames that are here; at their ends a frame is its own neighbour.
    """
    keys = range(max(frames[0] - 1, held.start), min(frames[-1] + 2, held.stop))
    pairs = [[max(f - 1, keys[0]), min(f + 1, keys[-1])] for f in frames]
    return Window(
        frames=tuple(frames),
        keyframes=tuple(keys),
        neighbours=torch.tensor(pairs) - keys[0],
        blend=torch.full((len(frames), 2), 0.5),
    )


def parting(values: Tensor) -> float:
    """The threshold between a few values and the rest: Otsu's, of 256 levels.

    Source: Otsu 1979, "A Threshold Selection Method from Gray-Level Histograms". It needs no guess
    of how much of the picture changes, which may be a small thing or all that is behind it.

    Raises:
        InputError: All values are nearly equal.
    """
    least, most = map(float, values.aminmax())
    span = most - least
    if span <= ALIKE * most:
        raise InputError(
            "the model's predictions for the source's prompt and the edit's differ nowhere, or "
            "everywhere alike: expected a difference where the edit is to be; let the prompts "
            "differ more, or give a mask"
        )
    levels = ((values - least) * (255 / span)).round().byte().flatten(1).numpy()
    level, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    return least + (level + 0.5) * span / 255
