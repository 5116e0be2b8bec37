"""Windows of frames, the keyframes drawn from them, and each frame's neighbours."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from tokenflow.errors import InputError
from tokenflow.propagation import Window

Keyframes = Literal["random", "center", "first"] | int
Neighbours = Literal["bracketing", "previous"]
Blend = Literal["sigmoid", "linear"]


def split_windows(frames: int, keyframe_every: int) -> list[range]:
    """Runs of `keyframe_every` consecutive frames; the last may be shorter, none is dropped."""
    if keyframe_every < 1:
        raise InputError(f"keyframe_every must be at least 1 frame, got {keyframe_every}")
    return [range(i, min(i + keyframe_every, frames)) for i in range(0, frames, keyframe_every)]


def draw_keyframes(
    windows: Sequence[range], policy: Keyframes, seed: int, clip: str, step: int
) -> list[int]:
    """One keyframe for each window.

    "random" draws uniformly, per step, from (seed, clip, step) alone; "center" is frame `n // 2`
    of each window, "first" its first, and a number is a fixed offset (the last frame of a window
    that is too short for it).
    """
    if policy == "random":
        # a name that is no UTF-8 has lone surrogates
        digest = hashlib.sha256(f"{seed}/{clip}/{step}".encode(errors="surrogatepass")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        shares = torch.rand(len(windows), generator=generator).tolist()
        return [w[int(u * len(w))] for w, u in zip(windows, shares, strict=True)]
    if policy == "center":
        return [center(w) for w in windows]
    if policy == "first":
        return [w[0] for w in windows]
    if isinstance(policy, int) and not isinstance(policy, bool) and policy >= 0:
        return [w[min(policy, len(w) - 1)] for w in windows]
    raise InputError(
        f"keyframes must be 'random', 'center', 'first' or an offset of 0 or more, got {policy!r}"
    )


def neighbourhood(
    frames: Sequence[int],
    windows: Sequence[range],
    keyframes: Sequence[int],
    neighbours: Neighbours = "bracketing",
    blend: Blend = "sigmoid",
    step: int = 0,
    steps: int = 1,
) -> tuple[Window, list[int]]:
    """The neighbours of ascending `frames`, and which of all keyframes these are.

    "bracketing" (the paper) takes the nearest keyframe before and after each frame, by true
    position. "previous" (the published code) takes the keyframes of the frame's own window and of
    the window before, and measures distances to the windows' centres.
    """
    pairs, blends = [], []
    for frame in frames:
        if neighbours == "bracketing":
            before = [k for k, at in enumerate(keyframes) if at <= frame][-1:]
            after = [k for k, at in enumerate(keyframes) if at >= frame][:1]
            earlier, later = (before or after)[0], (after or before)[0]
            centers = keyframes[earlier], keyframes[later]
        else:
            later = next(number for number, w in enumerate(windows) if frame in w)
            earlier = max(later - 1, 0)
            centers = center(windows[earlier]), center(windows[later])
        pairs.append((earlier, later))
        blends.append(blend_weights(frame, *centers, blend) if earlier != later else (1.0, 0.0))
    used = sorted({k for pair in pairs for k in pair})
    window = Window(
        frames=tuple(frames),
        keyframes=tuple(keyframes[k] for k in used),
        neighbours=torch.tensor([[used.index(k) for k in pair] for pair in pairs]),
        blend=torch.tensor(blends, dtype=torch.float32),
        step=step,
        steps=steps,
    )
    return window, used


def leading(keyframes: Sequence[int], own: range, held: range, step: int) -> Window:
    """For some of all keyframes the one beside it that leads it, with weight 1.

    Every other keyframe leads and has none: odd numbers and even ones in turn, by step. The rest
    follow the one before them, and in every other pair of steps the one after, so that each
    comes to agree with all; a mean of some that disagree would be a blur.

    Args:
        keyframes: All of the clip's, by position.
        own: Numbers of those that are asked for.
        held: And of these and one more at each side, where the clip has them.
        step: Of sampling.
    """
    pairs, blends = [], []
    for number in own:
        beside = (number - 1, number + 1)
        first, second = beside if step // 2 % 2 == 0 else beside[::-1]
        leader = first if first in held else second
        follows = (number + step) % 2 == 1 and leader in held
        pairs.append((held.index(leader if follows else number),) * 2)
        blends.append((float(follows), 0.0))
    return Window(
        frames=tuple(keyframes[number] for number in own),
        keyframes=tuple(keyframes[number] for number in held),
        neighbours=torch.tensor(pairs),
        blend=torch.tensor(blends),
        step=step,
    )


def both_sides(keyframes: Sequence[int], own: range, held: range) -> Window:
    """Some of all keyframes with those before and after them; at a clip's ends with themselves.

    Args:
        keyframes: All of the clip's, by position.
        own: Numbers of those that are asked for.
        held: And of these and one more at each side, where the clip has them.
    """
    pairs = [[held.index(near if near in held else k) for near in (k - 1, k + 1)] for k in own]
    return Window(
        frames=tuple(keyframes[number] for number in own),
        keyframes=tuple(keyframes[number] for number in held),
        neighbours=torch.tensor(pairs),
        blend=torch.full((len(own), 2), 0.5),
    )


def center(window: range) -> int:
    """Frame `n // 2` of a window of n frames."""
    return window[len(window) // 2]


def blend_weights(frame: int, earlier: int, later: int, blend: Blend) -> tuple[float, float]:
    """Equation 6: the later keyframe's weight is σ(d⁻ / (d⁻ + d⁺)); "linear" leaves out the σ.

    d⁻ and d⁺ are the frame's distances to the earlier and the later keyframe.
    """
    before, after = abs(frame - earlier), abs(frame - later)
    ratio = before / (before + after)
    weight = 1 / (1 + math.exp(-ratio)) if blend == "sigmoid" else ratio
    return 1 - weight, weight


class Span(NamedTuple):
    """Consecutive windows, and the keyframes that attend to each other for them, by number.

    Attributes:
        windows: Whose frames take their features from these keyframes.
        keyframes: Ascending: of the windows, of one more at each side, and the anchors.
    """

    windows: range
    keyframes: tuple[int, ...]


def spans(windows: int, span: int, anchors: int, step: int) -> list[Span]:
    """At most `span` windows each, with one joint pass for each; together all of a clip's.

    The anchors lie in the middle of that many equal parts of the clip and are in every pass. The
    seams between spans lie elsewhere in each step than in the one before. Where one span is enough,
    all keyframes attend to each other.
    """
    everywhere = {(2 * i + 1) * windows // (2 * anchors) for i in range(anchors)}
    found = []
    for start, stop in itertools.pairwise(seams(windows, span, step)):
        beside = range(max(start - 1, 0), min(stop + 1, windows))
        found.append(Span(range(start, stop), tuple(sorted({*beside, *everywhere}))))
    return found


def seams(windows: int, span: int, step: int) -> list[int]:
    """Where spans begin, and where the last one ends."""
    inside = range(shift(span, step), windows, span) if span < windows else ()
    return sorted({0, *inside, windows})


def shift(span: int, step: int) -> int:
    """How far on a step's seams lie: half a span in every other one."""
    return step % 2 * (span // 2)
