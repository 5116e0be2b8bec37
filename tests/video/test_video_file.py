"""What a file's own nature does to its frames: colours, orientation, times, damage."""

import gc
import math
from fractions import Fraction
from itertools import product

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace
from PIL import Image

from tokenflow.video import VideoError, count_frames, read_clip, video_file
from tokenflow.video.decoder import clean_frames, configure

from .making import as_frames, beeps, make_video, noise

ONE = 1 << 16
# Rows of a QuickTime matrix: where the stored picture's right and down point to on the screen.
RIGHT, LEFT, DOWN, UP = (ONE, 0, 0), (-ONE, 0, 0), (0, ONE, 0), (0, -ONE, 0)


def pixel(row: int, column: int, height: int, width: int, right, down) -> tuple[int, int]:
    """Where the stored pixel is seen, by applying the matrix to it and nothing else."""
    x = column * right[0] // ONE + row * down[0] // ONE
    y = column * right[1] // ONE + row * down[1] // ONE
    farthest_x = (width - 1) * right[0] // ONE + (height - 1) * down[0] // ONE
    farthest_y = (width - 1) * right[1] // ONE + (height - 1) * down[1] // ONE
    return y - min(0, farthest_y), x - min(0, farthest_x)


@pytest.mark.parametrize(
    ("right", "down"),
    [*product([RIGHT, LEFT], [DOWN, UP]), *product([DOWN, UP], [RIGHT, LEFT])],
)
def test_all_eight_orientations_come_out_upright(tmp_path, right, down):
    pixels = noise(2, 32, 48)
    matrix = (*right, *down, 0, 0, 1 << 30)
    clip = read_clip(make_video(tmp_path / "a.mp4", pixels, matrix=matrix))
    expected = torch.empty_like(clip.frames)
    for row in range(32):
        for column in range(48):
            y, x = pixel(row, column, 32, 48, right, down)
            expected[:, :, y, x] = as_frames(pixels)[:, :, row, column]
    assert torch.equal(clip.frames, expected)


def test_a_turned_video_has_a_turned_pixel_aspect(tmp_path):
    path = make_video(
        tmp_path / "a.mp4",
        noise(1, 32, 48),
        matrix=(*DOWN, *LEFT, 0, 0, 1 << 30),
        pixel_aspect=Fraction(2),
    )
    # Lying 96x32 in square pixels, standing 32x96, at the short side's own scale.
    assert read_clip(path).frames.shape == (1, 3, 96, 32)


def patches(height: int, width: int) -> np.ndarray:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50)]
    row = np.repeat(np.array(colours, np.uint8), width // len(colours), axis=0)
    return np.broadcast_to(row, (2, height, len(row), 3)).copy()


@pytest.mark.parametrize(
    ("height", "colorspace", "tag"),
    [
        (48, Colorspace.ITU709, True),
        (48, Colorspace.ITU601, True),
        (720, Colorspace.ITU601, True),
        (48, Colorspace.ITU601, False),
        (576, Colorspace.ITU601, False),
        (720, Colorspace.ITU709, False),
    ],
)
def test_colours_follow_the_tags_or_the_usual_guess(tmp_path, height, colorspace, tag):
    pixels = patches(height, 96)
    path = make_video(
        tmp_path / "a.mp4",
        pixels,
        codec="libx264",
        pixels="yuv444p",
        colorspace=colorspace,
        tag=tag,
    )
    error = (read_clip(path).frames - as_frames(pixels)).abs().max() * 255
    # Rounding Y, Cb and Cr to 8-bit limited range: up to half a level each, times the largest
    # gains of the inverse (1.16, and 2.1 for chroma), and the result rounded. A wrong matrix: 20.
    assert error <= math.ceil(0.5 * 1.16 + 0.5 * 2.1 + 0.5)


def test_a_variable_frame_rate_keeps_its_times(tmp_path):
    times = [Fraction(n, 1000) for n in (0, 40, 140, 173, 500)]
    path = make_video(tmp_path / "a.mp4", noise(5), times=times)
    assert read_clip(path).times == tuple(times)
    assert read_clip(path, start=1, stride=2).times == (0, Fraction(133, 1000))


def test_frames_without_times_are_spaced_evenly_with_a_warning(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", noise(4), sound=beeps([], 1))
    picture = video_file._picture
    monkeypatch.setattr(video_file, "_picture", lambda *args: picture(*args)._replace(time=None))
    with pytest.warns(UserWarning, match="times of 3 of 3 frames are missing or out of order"):
        clip = read_clip(path, start=1)
    assert clip.times == (0, Fraction(1, 10), Fraction(2, 10))
    assert clip.audio.start == Fraction(1, 10)


def test_a_missing_file(tmp_path):
    with pytest.raises(VideoError, match=r"gone\.mp4: expected a video file or a folder"):
        read_clip(tmp_path / "gone.mp4")


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 100])
def test_not_a_video(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a\.mp4 is not a video that can be read"):
        read_clip(path)


def test_a_playlist_is_refused_though_it_points_to_a_video(tmp_path):
    make_video(tmp_path / "a.ts", noise(4), codec="libx264", pixels="yuv420p")
    playlist = tmp_path / "a.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    with av.open(str(playlist)) as container:
        assert len(list(container.decode(video=0))) == 4  # so it is our refusal that is seen
    with pytest.raises(VideoError, match="playlists are refused"):
        read_clip(playlist)


def test_a_name_with_a_colon_is_a_name(tmp_path, monkeypatch):
    make_video(tmp_path / "x.mp4", noise(2)).rename(tmp_path / "http:x.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read_clip("http:x.mp4")) == 2


def test_sound_without_picture(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), layout="mono")
        frame.rate = 48_000
        output.mux(stream.encode(frame) + stream.encode(None))
    with pytest.raises(VideoError, match="expected a video stream, found audio"):
        read_clip(path)


def test_a_cover_image_is_no_video(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "cover.jpg")
    path = tmp_path / "song.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("flac", rate=48_000, layout="mono")
        output.add_attachment("cover.jpg", "image/jpeg", (tmp_path / "cover.jpg").read_bytes())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4608), np.int16), layout="mono")
        frame.rate = 48_000
        output.mux(stream.encode(frame) + stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1  # so it is our doing that it is passed over
    with pytest.raises(VideoError, match="expected a video stream, found audio;"):
        read_clip(path)


def test_sound_that_no_decoder_is_for_does_not_count(tmp_path):
    path = make_video(tmp_path / "a.mkv", noise(10), sound=beeps([], 1), sound_codec="flac")
    assert read_clip(path).audio is not None
    path.write_bytes(path.read_bytes().replace(b"A_FLAC", b"A_NONE"))
    assert read_clip(path).audio is None


def test_a_gap_in_a_transport_stream_is_an_error(tmp_path):
    path = make_video(tmp_path / "a.ts", noise(12), codec="libx264", pixels="yuv420p")
    data = bytearray(path.read_bytes())
    # A wrong continuity counter (low half of byte 3) of one of the video's 188-byte packets.
    packets = [k for k in range(0, len(data), 188) if data[k + 1] & 31 == 1 and data[k + 2] == 0]
    data[packets[len(packets) // 2] + 3] ^= 0b101
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"frame \d+ cannot be decoded \(its packet is marked"):
        read_clip(path)


def test_a_video_stream_without_frames(tmp_path):
    path = make_video(
        tmp_path / "a.mkv", noise(3), sound=beeps([], 1), damage=lambda index, data: b""
    )
    with pytest.raises(VideoError, match="expected frames, found none"):
        read_clip(path)


def test_frames_are_counted_without_being_decoded(tmp_path):
    path = make_video(tmp_path / "a.mp4", noise(12), options={"bf": "2"})
    assert count_frames(path) == len(read_clip(path)) == 12

    def spoilt(index, data):
        return data[:8] + bytes(len(data) - 8) if index == 8 else data

    path = make_video(tmp_path / "b.mkv", noise(12), damage=spoilt)
    assert count_frames(path) == 12
    with pytest.raises(VideoError, match="frame 8 cannot be decoded"):
        read_clip(path)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="is not a video that can be read"):
        count_frames(tmp_path / "c.mp4")


def test_a_truncated_file_says_where_and_the_frames_before_can_be_read(tmp_path):
    path = make_video(tmp_path / "a.mp4", noise(12), movflags="faststart")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(VideoError, match=r"a\.mp4: frame \d+ cannot be decoded .*cut short") as e:
        read_clip(path)
    good = int(str(e.value).split("stop=")[1].split(")")[0])
    assert 3 < good < 9
    assert torch.equal(read_clip(path, stop=good).frames, as_frames(noise(12))[:good])


def test_a_truncated_file_that_ends_silently_warns(tmp_path):
    path = make_video(tmp_path / "a.mkv", noise(12))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.warns(UserWarning, match=r"the file announces 1\.20 s; it may have been cut"):
        assert len(read_clip(path)) < 12


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_sound_that_goes_on_for_longer_is_no_truncated_picture(tmp_path, name, recwarn):
    path = make_video(tmp_path / name, noise(3), sound=beeps([], 2))
    assert len(read_clip(path)) == 3
    assert not [str(w.message) for w in recwarn if "cut short" in str(w.message)]


def half_zero(index: int, data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2) if index == 5 else data


@pytest.mark.parametrize(
    ("codec", "pixels", "reason"),
    [("libx264", "yuv420p", "it is marked corrupt"), ("mjpeg", "yuvj420p", "Invalid data")],
)
def test_a_corrupt_frame_is_an_error(tmp_path, codec, pixels, reason):
    path = make_video(
        tmp_path / "a.mkv",
        noise(12),
        codec=codec,
        pixels=pixels,
        options={"qp": "10", "bf": "0"} if codec == "libx264" else {"qmin": "2", "qmax": "2"},
        damage=half_zero,
    )
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 12  # FFmpeg alone conceals it
    with pytest.raises(VideoError, match=rf"frame 5 cannot be decoded \({reason}"):
        read_clip(path)
    assert len(read_clip(path, stop=5)) == 5


def test_frames_that_are_too_large(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", noise(2))
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(VideoError, match="at most 3071 pixels, got 64x48"):
        read_clip(path)


def test_the_decoder_itself_refuses_frames_that_are_too_large(tmp_path):
    path = make_video(tmp_path / "a.mp4", noise(2))
    with av.open(str(path)) as container:
        configure(container.streams.video[0], 1000)
        with pytest.raises(av.FFmpegError):
            list(clean_frames(container.demux(video=0)))


def test_decoded_frames_do_not_outlive_their_use(tmp_path):
    """Else a long video fills the memory: a frame is many bytes, but few objects."""
    path = make_video(tmp_path / "clip.mp4", noise(40))
    gc.collect()
    before = {id(one) for one in gc.get_objects() if type(one) is av.VideoFrame}
    gc.disable()
    try:
        clip = read_clip(path)
        alive = [one for one in gc.get_objects() if type(one) is av.VideoFrame]
        left = [one for one in alive if id(one) not in before]
    finally:
        gc.enable()
    assert len(clip) == 40
    assert len(left) <= 1  # the first one's orientation is looked at
