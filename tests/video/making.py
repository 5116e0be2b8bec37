"""Small real videos, made by PyAV where a test needs them."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.reformatter import Colorspace
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

SAMPLE_RATE = 48_000
LOSSLESS = {"qp": "0", "bf": "0"}


def noise(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames of smooth noise, (count, height, width, 3) in 0..255, all different."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def beeps(at: Sequence[float], seconds: float) -> np.ndarray:
    """Mono 16-bit sound, silent but for 50 ms of 1 kHz at each of the given seconds."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    on = sum(((time >= t) & (time < t + 0.05)).astype(float) for t in at)
    return (np.sin(2 * np.pi * 1000 * time) * on * 26_000).astype(np.int16)


def make_video(
    path: Path,
    frames: np.ndarray,
    *,
    rate: Fraction = Fraction(10),
    times: Sequence[Fraction] | None = None,
    codec: str = "libx264rgb",
    pixels: str = "rgb24",
    options: dict[str, str] | None = None,
    matrix: Sequence[int] | None = None,
    pixel_aspect: Fraction | None = None,
    colorspace: Colorspace | None = None,
    tag: bool = True,
    sound: np.ndarray | None = None,
    sound_codec: str = "aac",
    movflags: str = "",
    damage: Callable[[int, bytes], bytes] = lambda index, data: data,
    damage_sound: Callable[[int, bytes], bytes] = lambda index, data: data,
) -> Path:
    """Encode RGB frames (losslessly unless told otherwise) and 16-bit mono sound.

    `damage` is given each packet's index and data, and returns what to write, b"" for nothing.
    """
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or LOSSLESS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = Fraction(1, 1000)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if colorspace is not None and tag:
            stream.codec_context.colorspace = colorspace
        packets: list[Packet] = []
        for index, pixel in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixel).reformat(
                format=pixels, dst_colorspace=colorspace
            )
            frame.time_base = Fraction(1, 1000)
            frame.pts = round((times[index] if times else index / rate) * 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets = _damaged(packets, damage)
        if sound is not None:
            packets += _damaged(_encoded_sound(output, sound, sound_codec), damage_sound)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return path


def _damaged(packets: list[Packet], damage: Callable[[int, bytes], bytes]) -> list[Packet]:
    result = []
    for index, packet in enumerate(packets):
        data = damage(index, bytes(packet))
        if data == bytes(packet):
            result.append(packet)
        elif data:
            new = Packet(data)
            new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
            new.stream, new.is_keyframe = packet.stream, packet.is_keyframe
            result.append(new)
    return result


def _encoded_sound(output: av.container.OutputContainer, sound: np.ndarray, codec: str) -> list:
    stream = output.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
    packets = []
    for start in range(0, len(sound), 1024):
        frame = av.AudioFrame.from_ndarray(
            sound[None, start : start + 1024], format="s16", layout="mono"
        )
        frame.rate, frame.pts, frame.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def heard(path: Path) -> tuple[str, list[float]]:
    """The codec of a file's sound, and the seconds at which a sound sets in after silence."""
    onsets: list[float] = []
    last = -1.0
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        for frame in container.decode(stream):
            samples = np.abs(frame.to_ndarray()[0].astype(float))
            loud = 0.2 * (1 if "flt" in frame.format.name else 32767)
            for index in np.nonzero(samples > loud)[0]:
                now = float(frame.pts * frame.time_base) + index / frame.rate
                if now - last > 0.2:
                    onsets.append(now)
                last = now
    return stream.codec_context.codec.canonical_name, onsets


def as_frames(pixels: np.ndarray) -> Float[Tensor, "frames 3 height width"]:
    """Frames as a clip has them, of those given to `make_video`."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def damaged_png(path: Path) -> Path:
    """A PNG whose compressed text is longer than Pillow unpacks, for which it has no own error."""
    text = PngInfo()
    text.add_text("a", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=text)
    return path
