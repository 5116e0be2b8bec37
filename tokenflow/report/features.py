"""What a run's features look like: their principal components, and where tokens come from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from tokenflow.errors import InputError
from tokenflow.propagation import Correspondence, Window
from tokenflow.report.pictures import picture
from tokenflow.runs.observed import Observed
from tokenflow.storage.atomic import atomic
from tokenflow.video import Frames, contact_sheet

CORNERS = ((1.0, 0.35, 0.2), (1.0, 0.9, 0.2), (0.35, 0.25, 1.0), (0.1, 0.9, 0.7))
"""Colours of a picture's upper left, upper right, lower left and lower right corner."""


@dataclass(frozen=True)
class Features:
    """Pictures of what was observed: `links` are captions and pictures, from keyframe to frame."""

    site: str
    step: int
    steps: int
    size: str
    frame: int
    links: list[tuple[str, str]]
    components: str

    def save(self, file: Path) -> None:
        """Writes them to a file, for pages that are made later on."""
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Features:
        """Reads them again.

        Raises:
            InputError: The file holds something else.
        """
        try:
            found = json.loads(file.read_text())
            links = [(caption, uri) for caption, uri in found.pop("links")]
            return cls(**found, links=links)
        except Exception as error:  # whatever the file holds instead
            raise InputError(
                f"{file} holds no features ({error}); remove it, and see tokenflow report "
                f"--features"
            ) from error


def draw(
    seen: Observed,
    source: Float[Tensor, "frames 3 height width"] | Frames,
    frame: int | None = None,
) -> Features:
    """The pictures of the page.

    Args:
        seen: At one site and step.
        source: All frames of the source.
        frame: Whose tokens to follow, one of those whose correspondence was seen; the one farthest
            from its keyframes if not given.
    """
    chosen = most_between(seen.parts) if frame is None else frame
    size = (source.shape[2], source.shape[3])
    shown = torch.stack([source[number] for number in seen.frames])
    maps = interpolate(principal(seen.tokens), size, mode="nearest")
    height, width = seen.tokens.shape[1:3]
    return Features(
        site=seen.site.removesuffix(".processor"),
        step=seen.step,
        steps=seen.steps,
        size=f"{width}×{height}",
        frame=chosen,
        links=[(caption, picture(image)) for caption, image in links(seen.parts, source, chosen)],
        components=picture(contact_sheet([shown, maps])),
    )


def draw_correspondences(
    seen: Observed,
    source: Float[Tensor, "frames 3 height width"] | Frames,
    frame: int | None = None,
) -> Float[Tensor, "3 sheet_height sheet_width"]:
    """One picture: a frame's keyframes, coloured by place, and the frame with what it takes.

    Args:
        seen: As of `find_correspondences`, or of a probe.
        source: All frames of the source.
        frame: As of `draw`.
    """
    chosen = most_between(seen.parts) if frame is None else frame
    pictures = [image for _, image in links(seen.parts, source, chosen)]
    return contact_sheet([torch.stack(pictures)])


def most_between(parts: list[tuple[Window, Correspondence]]) -> int:
    """The frame between two keyframes whose nearer one is farthest; else one beside a keyframe."""

    def reach(window: Window, number: int) -> tuple[bool, int]:
        near = {window.keyframes[k] for k in window.neighbours[number].tolist()}
        return len(near) == 2, min(abs(window.frames[number] - at) for at in near)

    reaches = {w.frames[n]: reach(w, n) for w, _ in parts for n in range(len(w.frames))}
    return max(reaches, key=reaches.__getitem__)


def links(
    parts: list[tuple[Window, Correspondence]],
    source: Float[Tensor, "frames 3 height width"] | Frames,
    frame: int,
) -> list[tuple[str, Float[Tensor, "3 height width"]]]:
    """Each keyframe of a frame in colours that tell places, and the frame with those it takes."""
    window, found = next((w, c) for w, c in parts if frame in w.frames)
    number = window.frames.index(frame)
    places = place_colours(window.height, window.width)
    indices, weights = found.indices[number].cpu(), found.weights[number].float().cpu()
    result = []
    for k in dict.fromkeys(window.neighbours[number].tolist()):
        taken = weights * (indices // len(places) == k)
        colours = (taken[..., None] * places[indices % len(places)]).sum(dim=1)
        colours = colours / taken.sum(dim=1, keepdim=True).clamp(min=1e-6)
        at = window.keyframes[k]
        result.append((f"keyframe {at}", tinted(source[at], places, window)))
        caption = f"frame {frame}, from {at}"
        result.append((caption, tinted(source[frame], colours, window)))
    return result[:2] + result[2:][::-1]  # keyframe, frame, frame, keyframe


def place_colours(height: int, width: int) -> Float[Tensor, "tokens 3"]:
    """A colour for each place of a picture, mixed from those of its corners."""
    corners = torch.tensor(CORNERS).T.reshape(1, 3, 2, 2)
    mixed = interpolate(corners, (height, width), mode="bilinear", align_corners=True)
    return mixed[0].flatten(1).T


def tinted(
    image: Float[Tensor, "3 height width"], colours: Float[Tensor, "tokens 3"], window: Window
) -> Float[Tensor, "3 height width"]:
    """Its tokens' colours over a picture, of which the brightness is left."""
    tokens = colours.T.reshape(1, 3, window.height, window.width)
    over = interpolate(tokens, (image.shape[1], image.shape[2]), mode="nearest")[0]
    grey = image.mean(dim=0)
    grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-6)
    return over * (0.6 + 0.4 * grey)


def principal(
    tokens: Float[Tensor, "frames height width channels"],
) -> Float[Tensor, "frames 3 height width"]:
    """The three principal components over all frames, in 0..1 from their 1st to 99th percentile."""
    rows = tokens.float().flatten(0, 2)
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    # an eigenvector's sign is arbitrary
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    values = rows @ (directions * largest.sign())
    count = len(values)
    ordered = values.sort(dim=0).values
    low, high = ordered[count // 100], ordered[count - 1 - count // 100]
    scaled = ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return scaled.reshape(*tokens.shape[:3], 3).permute(0, 3, 1, 2)
