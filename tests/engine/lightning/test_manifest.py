"""Which clips a manifest lists, and what it may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from tokenflow.engine.lightning.job import ClipSource, Job
from tokenflow.engine.lightning.manifest import part_of, read_manifest
from tokenflow.errors import InputError

CHOICE = {"start": 0, "resolution": 512}


def written(folder: Path, text: str, name: str = "clips.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_yaml_manifest(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
- {video: a.mp4, prompt: a red ball}
- video: sub/b.mp4
  name: second
  prompt: a box
  negative_prompt: blur
  start: 4
  max_frames: 8
  steps: 20
  guidance: 3
  keyframes: center
""",
    )
    first, second = read_manifest(path, None, CHOICE)
    assert (first.name, first.prompts, first.settings) == ("a", {"prompt": "a red ball"}, {})
    assert (first.source.path, first.source.choice) == (tmp_path / "a.mp4", CHOICE)
    assert second.name == "second"
    assert second.prompts == {"prompt": "a box", "negative_prompt": "blur"}
    assert second.source.path == tmp_path / "sub" / "b.mp4"
    assert second.source.choice == {"start": 4, "resolution": 512, "max_frames": 8}
    assert second.settings == {"steps": 20, "guidance": 3.0, "keyframes": "center"}
    assert second.where == f"{path}, clip 2"


def test_a_csv_manifest(tmp_path: Path) -> None:
    text = 'video,prompt,start,seed,keyframes\na.mp4,"a ball, red",,3,\nb.mp4,123,4,,2\n'
    first, second = read_manifest(written(tmp_path, text, "clips.csv"), None, CHOICE)
    assert (first.prompts, first.settings) == ({"prompt": "a ball, red"}, {"seed": 3})
    assert first.source.choice == CHOICE
    assert (second.prompts, second.settings) == ({"prompt": "123"}, {"keyframes": 2})
    assert second.source.choice["start"] == 4


def test_videos_lie_under_another_root(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    path = written(tmp_path, "- video: a.mp4")
    [job] = read_manifest(path, tmp_path / "videos", {})
    assert job.source.path == tmp_path / "videos" / "a.mp4"


def test_a_link_out_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.mp4").touch()
    (root / "inside.mp4").touch()
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "in.mp4").symlink_to(root / "inside.mp4")
    assert len(read_manifest(written(root, "- video: in.mp4"), None, {})) == 1
    with pytest.raises(InputError, match=r"out\.mp4 lies outside of"):
        read_manifest(written(root, "- video: out.mp4"), None, {})


def test_a_link_out_of_the_root_in_a_folder_of_images(tmp_path: Path) -> None:
    root, images = tmp_path / "root", tmp_path / "root" / "images"
    images.mkdir(parents=True)
    for path in (tmp_path / "secret.png", root / "1.png"):
        path.touch()
    (images / "1.png").symlink_to("../1.png")
    path = written(root, "- video: images")
    assert len(read_manifest(path, None, {})) == 1
    (images / "2.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"clip 1: .*images/2\.png lies outside of"):
        read_manifest(path, None, {})


def test_an_empty_value_is_not_given(tmp_path: Path) -> None:
    path = written(tmp_path, "- {video: a.mp4, name: , prompt: , steps: , start: , stop: null}")
    [job] = read_manifest(path, None, CHOICE)
    assert (job.name, job.prompts, job.settings, job.source.choice) == ("a", {}, {}, CHOICE)


@pytest.mark.parametrize("name", ["clips.csv", "clips.yaml"])
def test_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    text = {"clips.csv": "video,prompt\na.mp4,été\n"}.get(name, "- {video: a.mp4, prompt: été}")
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    [job] = read_manifest(tmp_path / name, None, {})
    assert job.prompts == {"prompt": "été"}


BAD = {
    "no list": ("video: a.mp4", "expected a list of clips"),
    "nothing": ("[]", "lists no clip"),
    "no video": ("- prompt: a ball", "clip 1: expected video: PATH, got none"),
    "an empty video": ("- {video: ''}", "clip 1: expected video: PATH"),
    "an unknown option": ("- {video: a.mp4, stepz: 3}", "clip 1: .*stepz"),
    "a wrong type": ("- video: b.mp4\n- {video: a.mp4, steps: many}", "clip 2: .*steps"),
    "outside": ("- video: ../a.mp4", "lies outside of .*--data.root"),
    "absolute": ("- video: /etc/passwd", "lies outside of"),
    "twice": ("- video: a.mp4\n- video: x/a.mp4", "several clips would write into .*'a'"),
    "a name that is a path": ("- {video: a.mp4, name: ../b}", "expected the name of a folder"),
    "an empty name": ("- {video: a.mp4, name: ''}", "expected the name of a folder .*got ''"),
    "a video's name that leads out": ("- video: ...mp4", "clip 1: expected the name of .*'..'"),
    "no YAML": ("- {video", "is no YAML"),
    "something twice": ("- {video: a.mp4, prompt: x, prompt: y}", "is no YAML: .*'prompt' twice"),
    "too deep": ("[" * 5000, "is no YAML"),
    "in a circle": ("&a [{video: a.mp4}, *a]", "is no YAML: expected no cycles"),
    "a huge number": (f"- {{video: a.mp4, seed: {'4' * 400}}}", "is no YAML: .*64 bits, got 444"),
    "a name with a line's end": (r'- {video: a.mp4, name: "a\nb"}', "clip 1: the name 'a.*control"),
    "a name with an escape": (r'- {video: a.mp4, name: "a\e[2J"}', "clip 1: the name .*control"),
    "a name with a NUL": (r'- {video: a.mp4, name: "a\0"}', "clip 1: the name .*control"),
    "a name of half a character": (r'- {video: a.mp4, name: "\ud800"}', "is no YAML"),
    "a name that is too long": (f"- {{video: a.mp4, name: {'é' * 128}}}", "has 256 bytes, .* 255"),
    "a video's name that is too long": (f"- video: {'a' * 256}.mp4", "is no path: .*too long"),
    "a video's name with an end": (r'- video: "a\nb.mp4"', "clip 1: the name .* give the row"),
    "an option without a name": ("- {video: a.mp4, ~: 3}", "clip 1: None is no option"),
    "a path that is none": ('- video: "a\\0.mp4"', r"clip 1: 'a\\x00.mp4' is no path: .*null"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_manifest_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    text, message = BAD[case]
    with pytest.raises(InputError, match=message):
        read_manifest(written(tmp_path, text), None, {})


def test_a_row_with_more_cells_than_names(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"clip 1: expected 1 cells, as the first line has, .*in quotes"
    ):
        read_manifest(written(tmp_path, "video\na.mp4,more\n", "clips.csv"), None, {})


def test_csv_cells_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = 'a.mp4,"a robot\nwalking, slowly",2\n  \n , ,\nb.mp4,one\u2028line,\nc.mp4,null,\n'
    jobs = read_manifest(written(tmp_path, f"video,prompt,steps\n{rows}", "clips.csv"), None, {})
    prompts = ["a robot\nwalking, slowly", "one\u2028line", "null"]
    assert [job.prompts["prompt"] for job in jobs] == prompts
    assert [job.name for job in jobs] == ["a", "b", "c"]
    assert [job.settings for job in jobs] == [{"steps": 2}, {}, {}]


BAD_CSV = {
    "a quote that does not end": (
        'video,prompt\na.mp4,"a ball\nb.mp4,',
        "is no CSV: unexpected end",
    ),
    "a name twice": ("video,prompt,prompt\na.mp4,x,y\n", "is no CSV: .*'prompt' twice"),
    "too long": (f"video,prompt\na.mp4,{'x' * 140_000}\n", "is no CSV: field larger"),
    "no number": ("video,steps\na.mp4,null\n", "clip 1: .*steps"),
    "no seed": ("video,seed\na.mp4,null\n", "clip 1: .*seed"),
    "a huge seed": (f"video,seed\na.mp4,{'4' * 400}\n", "clip 1: expected seed of at most 64 bits"),
    "a huge scale": (f"video,guidance\na.mp4,{'4' * 400}\n", "(?s)clip 1: .*too large"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_manifest_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    text, message = BAD_CSV[case]
    with pytest.raises(InputError, match=message):
        read_manifest(written(tmp_path, text, "clips.csv"), None, {})


def test_a_manifest_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.yaml, \.yml or \.csv"):
        read_manifest(written(tmp_path, "a.mp4", "clips.txt"), None, {})


def test_the_longest_name(tmp_path: Path) -> None:
    path = written(tmp_path, f"- {{video: a.mp4, name: {'é' * 127}x}}")
    [job] = read_manifest(path, None, {})
    (tmp_path / job.name).mkdir()  # the system takes it, too


def test_half_a_character_that_no_file_can_hold() -> None:
    with pytest.raises(
        InputError, match=r"clip 1: the name 'a\\udcff' .*give the row another name"
    ):
        Job(ClipSource(Path("a.mp4")), "a\udcff", where="clip 1")


def test_a_parser_sees_a_value_once_however_many_rows_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parser for each row took ten times what all else does."""
    parsed: list[dict[str, Any]] = []
    parse = ArgumentParser.parse_object

    def counted(parser: ArgumentParser, values: dict[str, Any]) -> Any:
        parsed.append(values)
        return parse(parser, values)

    monkeypatch.setattr(ArgumentParser, "parse_object", counted)
    row = "- {{video: {0}.mp4, prompt: ball {0}, seed: {0}, fit: crop, max_frames: 48}}\n"
    path = written(tmp_path, "".join(map(row.format, range(100))))
    assert len(read_manifest(path, None, CHOICE)) == 100
    assert parsed == [{"fit": "crop"}, {"max_frames": 48}]


def test_parts_are_the_whole(tmp_path: Path) -> None:
    jobs = read_manifest(
        written(tmp_path, "".join(f"- video: {i}.mp4\n" for i in range(7))), None, {}
    )
    parts = [[job.name for job in part_of(jobs, f"{m}/3")] for m in (1, 2, 3)]
    assert parts == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert part_of(jobs, "9/9") == []


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/0", ""])
def test_a_part_that_is_none(part: str) -> None:
    with pytest.raises(InputError, match='expected a part like "3/16"'):
        part_of([], part)
