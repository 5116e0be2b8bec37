"""Wide gamut and high dynamic range to the BT.709 that image models know."""

from functools import cache

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation
from jaxtyping import Float, UInt8
from torch import Tensor

from tokenflow.video.clip import VideoError

# swscale's shortcuts cost a level or two.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
WHITE_16 = 255 * 256  # what swscale makes of white in 16 bits
WHITE_NITS = 203.0  # reference white of PQ and HLG (ITU-R BT.2408)
HLG_PEAK_NITS = 1000.0
KNEE = 0.8  # of reference white; what is brighter is compressed
GAMMA = 2.4  # of a BT.709 display (ITU-R BT.1886)

# FFmpeg's names of what its converter does not know, as ffprobe prints them
UNKNOWN_MATRICES = {
    8: "ycgco", 10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c",
    14: "ictcp", 15: "ipt-c2", 16: "ycgco-re", 17: "ycgco-ro",
}  # fmt: skip
UNTAGGED = (0, 2, 3)  # RGB (of a YUV format: a wrong tag), unspecified, reserved

# x and y of red, green and blue (ITU-T H.273); the white is D65
WIDE = {
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
D65 = (0.3127, 0.3290)
HIGH = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}


def dynamic_range(frame: VideoFrame) -> str | None:
    """ "PQ" or "HLG" of a frame with high dynamic range."""
    return HIGH.get(frame.color_trc)  # type: ignore[call-overload]


def rgb(frame: VideoFrame, what: str) -> UInt8[Tensor, "3 height width"]:
    """The frame as 8-bit RGB of BT.709 primaries and brightness.

    The matrix is the frame's own; untagged frames are taken for BT.709 if they are wider than 1279
    or higher than 576, else for BT.601, as players do. BT.2020 and Display P3 are converted. Of
    PQ and HLG, reference white becomes level 244, and what is brighter lies between that and 255.

    Raises:
        VideoError: The matrix is one that FFmpeg does not convert; `what` names the frame.
    """
    matrix = _matrix(frame, what)
    high, primaries = dynamic_range(frame), WIDE.get(frame.color_primaries)  # type: ignore[call-overload]
    if high is None and primaries is None:
        return _planes(frame, "rgb24", matrix)
    coded = _planes(frame, "rgb48le", matrix).to(torch.int32)
    linear = _linear(high or "SDR")[coded]
    if high == "HLG":  # the display's part of the curve depends on luminance
        luminance = torch.tensordot(torch.tensor((0.2627, 0.6780, 0.0593)), linear, 1)
        linear = linear * luminance.pow(0.2) * (HLG_PEAK_NITS / WHITE_NITS)
    if primaries is not None:
        linear = torch.tensordot(_to_bt709(primaries), linear, 1).clamp_min(0)
    if high is not None:
        brightest = linear.amax(0).clamp_min(1e-6)
        linear = linear * (compressed(brightest) / brightest)  # colours keep their hue
    return (linear.clamp(0, 1).pow(1 / GAMMA) * 255).round().to(torch.uint8)


def deep(frame: VideoFrame, what: str) -> Float[Tensor, "3 height width"]:
    """The frame's own levels in 0..255 and between, unlike `rgb` whatever light they mean.

    Raises:
        VideoError: The matrix is one that FFmpeg does not convert; `what` names the frame.
    """
    coded = _planes(frame, "rgb48le", _matrix(frame, what))
    return coded.float().div(WHITE_16 / 255).clamp(max=255)


def compressed(light: Float[Tensor, "*pixels"]) -> Float[Tensor, "*pixels"]:
    """Linear light of reference white 1, without bound, to 0..1: as it is up to the knee.

    Above, x/(1 + x) in units of what is left (Reinhard et al., "Photographic Tone Reproduction
    for Digital Images", 2002, equation 3), which begins with slope 1.
    """
    above = (light - KNEE).clamp_min(0) / (1 - KNEE)
    return torch.where(light > KNEE, KNEE + (1 - KNEE) * above / (1 + above), light)


def _matrix(frame: VideoFrame, what: str) -> Colorspace | None:
    if frame.format.is_rgb:
        return None
    if frame.colorspace in UNKNOWN_MATRICES or frame.colorspace > max(UNKNOWN_MATRICES):
        name = UNKNOWN_MATRICES.get(frame.colorspace, str(int(frame.colorspace)))
        raise VideoError(
            f"{what}: expected colours in a matrix that can be converted (BT.601, BT.709, BT.2020 "
            f"or like them), got {name}; re-encode the video in BT.709, or correct its tag."
        )
    if frame.colorspace in UNTAGGED:
        wide = frame.color_primaries == ColorPrimaries.BT2020 or dynamic_range(frame)
        large = frame.width >= 1280 or frame.height > 576
        return Colorspace.BT2020 if wide else Colorspace.ITU709 if large else Colorspace.ITU601
    return None


def _planes(frame: VideoFrame, format: str, matrix: Colorspace | None) -> Tensor:
    pixels = frame.to_ndarray(format=format, src_colorspace=matrix, interpolation=EXACT, threads=1)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@cache
def _linear(transfer: str) -> Float[Tensor, " codes"]:
    """Linear light of each 16-bit code, reference white 1; of HLG, the scene's, 0..1."""
    v = np.minimum(np.arange(1 << 16) / WHITE_16, 1)
    if transfer == "PQ":  # SMPTE ST 2084
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        e = v ** (1 / m2)
        light = (np.maximum(e - c1, 0) / (c2 - c3 * e)) ** (1 / m1) * (10_000 / WHITE_NITS)
    elif transfer == "HLG":  # ARIB STD-B67
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(v <= 0.5, v**2 / 3, (np.exp((v - c) / a) + b) / 12)
    else:
        light = v**GAMMA
    return torch.from_numpy(light).float()


@cache
def _to_bt709(primaries: tuple[tuple[float, float], ...]) -> Float[Tensor, "3 3"]:
    both = np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)
    return torch.from_numpy(both).float()


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    def xyz(x: float, y: float) -> list[float]:
        return [x / y, 1.0, (1 - x - y) / y]

    columns = np.array([xyz(*point) for point in primaries]).T
    return columns * np.linalg.solve(columns, xyz(*D65))
