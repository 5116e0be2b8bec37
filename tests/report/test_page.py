"""What stands on the pages, without a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

import pytest

from tests.report.making import make_run
from tokenflow.errors import InputError
from tokenflow.report import read_run, write_comparison, write_report
from tokenflow.report.page import names_of, number
from tokenflow.video import read_clip

EVIL = "<script>alert(1)</script>"


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = (make_run(tmp_path / "bar") / "report.html").read_text()
    sources = re.findall(r'\b(?:src|href|action|poster|data)="([^"]*)"', text)
    assert len(sources) >= 5
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    text = (make_run(tmp_path / "bar") / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text


def test_the_embedded_videos_are_the_runs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar")
    text = (folder / "report.html").read_text()
    source, edited = re.findall(r'src="data:video/mp4;base64,([^"]+)"', text)
    assert base64.b64decode(edited) == (folder / "edited.mp4").read_bytes()
    (tmp_path / "source.mp4").write_bytes(base64.b64decode(source))
    shown, true = read_clip(tmp_path / "source.mp4"), read_run(folder).source()
    assert shown.times == true.times
    assert (shown.frames - true.frames[:]).abs().mean() < 0.03  # of another encoding


def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    configuration = {"data": {"video": EVIL}, "model": {"editor": {"class_path": EVIL}}}
    name = EVIL.replace("/", "%")
    resolved = {"inversion_prompt": EVIL, "device": EVIL}
    folder = make_run(tmp_path / name, EVIL, configuration, **resolved)
    (folder / "metrics.json").write_text('{"metrics": {"<script>alert(1)</script>": 1}}')
    other = make_run(tmp_path / f"{name}2", EVIL + "2", {"data": {"video": EVIL + "2"}})
    runs = [read_run(folder), read_run(other)]
    pages = [write_report(runs[0]), write_comparison(runs, tmp_path / "page.html")]
    for page, least in zip(pages, (7, 4), strict=True):
        text = page.read_text()
        assert text.count("<script>") == 1
        assert text.count(html.escape("<script>alert(1)")) >= least


def test_a_page_has_what_is_known_of_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar", seed=3)
    (folder / "metrics.json").write_text('{"metrics": {"warp_error": 0.012345678, "clip": null}}')
    text = write_report(read_run(folder)).read_text()
    for said in (
        "a red bar", "a blue bar", "24 frames of 64×48, 8 a second", "2.5 s", "4.0 s",
        '<th scope="row">warp_error</th><td>0.01235</td>', '<th scope="row">clip</th><td>–</td>',
        f"--config {folder / 'run.yaml'}", "video: bar.mp4",
    ):  # fmt: skip
        assert said in text


def test_metrics_have_the_round_trip_beside_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar", reconstruction_psnr=30.25)
    measured = '{"metrics": {"warp_error": 0.25, "clip": 0.3}, "round_trip": %s}'
    (folder / "metrics.json").write_text(measured % '{"warp_error": 0.125, "clip": null}')
    text = write_report(read_run(folder)).read_text()
    assert '<th scope="col">VAE round trip</th>' in text
    for said in (
        "reconstruction_psnr</th><td>30.25</td><td>–</td>",
        "warp_error</th><td>0.25</td><td>0.125</td>",
        "clip</th><td>0.3</td><td>–</td>",
    ):
        assert said in text
    (folder / "metrics.json").write_text(measured % "null")
    assert "VAE round trip" not in write_report(read_run(folder)).read_text()


def test_a_run_that_was_allowed_imports_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar", allow_imports=["mine", "yours.Logger"])
    text = write_report(read_run(folder)).read_text()
    assert "--allow_imports mine --allow_imports yours.Logger" in text
    assert "lets its configuration run code of mine, yours.Logger" in text


def test_a_video_without_room_is_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "bar")
    size = (folder / "edited.mp4").stat().st_size
    monkeypatch.setattr("tokenflow.report.page.SPACE", size)
    text = write_report(read_run(folder)).read_text()
    assert text.count("<video") == 1
    assert "source.mp4 is left out" in text


def test_a_run_without_its_videos_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bar")
    (folder / "compare.mp4").unlink()
    with pytest.raises(InputError, match=r"compare\.mp4: expected a video file"):
        write_report(read_run(folder), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def rows(text: str) -> list[list[str]]:
    body = text.split("<tbody>")[1]
    return [
        re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row)
        for row in re.findall("<tr>(.*?)</tr>", body)
    ]


def test_a_comparison_shows_what_differs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", steps=4, guidance=3.0)
    two = make_run(tmp_path / "two", steps=10, guidance=3.0)
    (two / "metrics.json").write_text('{"metrics": {"warp_error": 0.5}}')
    runs = [read_run(one), read_run(two)]
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    columns = re.findall(r"<button type=\"button\">([^<]*)</button>", text)
    assert columns == ["run", "steps", "warp_error", "seconds"]
    assert rows(text) == [["one", "4", "–", "4"], ["two", "10", "0.5", "4"]]
    assert text.count("<video") == 3  # one source
    assert "<h1>a red bar</h1>" in text


def test_a_comparison_ends_with_the_round_trips(tmp_path: Path) -> None:
    def measured(name: str, error: float, floor: str) -> None:
        made = f'{{"metrics": {{"warp_error": {error}}}, "round_trip": {floor}}}'
        (tmp_path / name / "metrics.json").write_text(made)

    runs = [read_run(make_run(tmp_path / name, steps=n)) for n, name in enumerate("abc")]
    for name in "abc":
        measured(name, 0.5, '{"warp_error": 0.125}')
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert rows(text)[3:] == [["VAE round trip", "–", "0.125", "–"]]
    assert text.index("</tbody>") < text.index("VAE round trip")  # sorting leaves it there
    measured("b", 0.5, '{"warp_error": 0.25}')
    measured("c", 0.5, "null")
    runs = [read_run(run.folder) for run in runs]
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert rows(text)[3:] == [
        ["VAE round trip of a", "–", "0.125", "–"],
        ["VAE round trip of b", "–", "0.25", "–"],
    ]


def test_runs_of_two_sources_show_both(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    two = make_run(tmp_path / "two", configuration={"data": {"video": "other.mp4"}})
    text = write_comparison([read_run(one), read_run(two)], tmp_path / "page.html").read_text()
    assert text.count("<video") == 4
    assert "source of one" in text
    assert "source of two" in text


def test_clips_of_one_manifest_are_different_sources(tmp_path: Path) -> None:
    made = {"configuration": {"data": {"manifest": "clips.yaml"}}}
    runs = [read_run(make_run(tmp_path / name, **made)) for name in ("one", "two")]
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert text.count("<video") == 4


def test_infinite_metrics_can_be_sorted(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name)) for name in ("one", "two")]
    (tmp_path / "one" / "metrics.json").write_text('{"metrics": {"psnr": Infinity}}')
    (tmp_path / "two" / "metrics.json").write_text('{"metrics": {"psnr": NaN}}')
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert '<td data-number="Infinity">inf</td>' in text
    assert "<td>–</td>" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / where / "bar")) for where in ("a", "b")]
    assert names_of(runs) == ["a/bar", "b/bar"]
    assert names_of(runs[:1]) == ["bar"]


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0.012345, 1234567, True, None, "", float("nan"), "x")] == [
        "0.01235", "1234567", "True", "–", "–", "–", "x"
    ]  # fmt: skip


def test_a_comparison_has_changed_settings_first_and_marks_the_best(tmp_path: Path) -> None:
    paths = {"one": "tokenflow.editors.PnP", "two": "tokenflow.PnP", "three": "PnP"}
    metrics = {
        "one": '{"psnr": 20.123, "lpips": 0.25, "flicker": 0.5, "flicker_source": 0.25}',
        "two": '{"psnr": 25.0, "lpips": 0.125, "flicker": 0.2, "flicker_source": 0.25}',
        "three": '{"psnr": 25.001, "warp_error_8": 0.0125, "visible_8": 0.5}',
    }
    for name, path in paths.items():
        editor = {"class_path": path, "init_args": {"features": len(name)}}
        configuration = {"data": {"video": "bar.mp4"}, "model": {"editor": editor}}
        make_run(tmp_path / name, configuration=configuration, steps=len(name), frames=3)
        (tmp_path / name / "metrics.json").write_text(f'{{"metrics": {metrics[name]}}}')
    runs = [read_run(tmp_path / name) for name in paths]
    text = write_comparison(runs, tmp_path / "page.html").read_text()
    assert re.findall(r"<button type=\"button\">([^<]*)</button>", text) == [
        "run", "steps", "editor.features", "PSNR, dB ↑", "LPIPS, ↓", "flicker, share",
        "source&#39;s flicker, share", "warp error, 8 apart, x 1000 ↓", "visible_8", "seconds",
    ]  # fmt: skip
    assert rows(text) == [
        ["one", "3", "3", "20.12", "0.250", "0.500", "0.250", "–", "–", "4"],
        ["two", "3", "3", "25.00", "0.125", "0.200", "0.250", "–", "–", "4"],
        ["three", "5", "5", "25.00", "–", "–", "–", "12.50", "0.5", "4"],
    ]
    best = re.findall(r'class="best" title="best">([^<]*)<', text)
    assert best == ["25.00", "0.125", "0.200", "25.00"]  # as shown, two are best
