"""`tokenflow evaluate`, as users meet it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import ROOT
from tests.metrics.making import write_tiny_clip
from tokenflow.cli.evaluate import show, write_csv
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone
from tokenflow.engine.lightning.finished_run import FinishedRun
from tokenflow.engine.lightning.metrics import Sources, measure_run
from tokenflow.metrics import Measures
from tokenflow.video import Clip, read_clip, write_clip, write_image

DEMO = ROOT / "tokenflow" / "miniature" / "demo" / "blue_ball.mp4"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A small run of odd proportions, with its metrics measured on the way."""
    folder = tmp_path_factory.mktemp("runs")
    frames = torch.rand(6, 3, 30, 50, generator=torch.Generator().manual_seed(0))
    video = write_clip(folder / "in.mp4", Clip.from_frames(frames))
    main([
        "predict", f"--data.video={video}", "--data.start=1", f"--model.backbone={model_folder}",
        "--model.prompt=a plain red ball on sand", "--model.steps=1", "--model.cache=null",
        "--model.inversion_prompt=a plain blue ball on sand", f"--output.folder={folder / 'out'}",
        "--trainer.accelerator=cpu", "--metrics.measure=true", "--metrics.round_trip=true",
        "--metrics.distances=[1,2]", "--model.dtype=auto",  # as evaluate takes it
    ])  # fmt: skip
    return folder / "out" / "in"


def test_predict_leaves_what_evaluate_says(
    run: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = json.loads((run / "metrics.json").read_text())
    assert left["frames"] == 5
    assert left["size"] == [30, 50]  # of the videos, not of the frames that the model saw
    assert set(left["metrics"]) == set(left["round_trip"])
    assert left["options"]["distances"] == [1, 2]
    (run / "metrics.json").unlink()
    table = tmp_path / "table.csv"
    main([
        "evaluate", str(run), f"--round_trip={model_folder}",
        "--distances=[1,2]", f"--csv={table}", "--device=cpu",
    ])  # fmt: skip
    assert json.loads((run / "metrics.json").read_text()) == left
    out = capsys.readouterr().out
    for words in ("warp error", "x 1000 ↓", "PSNR", "VAE round trip of", f"{run} "):
        assert words in out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == [
        f"VAE round trip of {run.parents[1] / 'in.mp4'}",
        str(run),
    ]
    assert float(rows[1]["ssim"]) == left["metrics"]["ssim"]
    assert float(rows[0]["psnr"]) == left["round_trip"]["psnr"]


def test_several_runs_of_one_source(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    record = yaml.safe_load((other / "run.yaml").read_text())
    record["run"]["consistency"] = "none"
    (other / "run.yaml").write_text(yaml.safe_dump(record))
    main(["evaluate", str(run), str(other)])
    assert f"{other} (per frame)" in capsys.readouterr().out
    values = [
        json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (run, other)
    ]
    assert values[0] == values[1]


def test_a_run_that_cannot_be_measured_does_not_stop_the_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, failed, table = tmp_path / "broken", tmp_path / "failed", tmp_path / "table.csv"
    for folder in (broken, failed):
        folder.mkdir()
    (broken / "run.yaml").write_text("nothing")
    (failed / "failed.yaml").write_text("failed: no disk")
    words = [str(broken), str(failed), str(run), f"--csv={table}"]
    refused(words, f"{failed} is not measured: {failed}: expected a finished run's folder", capsys)
    refused(words, "run.yaml; its edit failed, as failed.yaml says", capsys)
    refused(words, f"{broken} is not measured: ", capsys)
    (row,) = csv.DictReader(table.open())
    assert row["video"] == str(run)


def test_the_judge_is_asked(tmp_path: Path) -> None:
    file, caption = tmp_path / "pair.json", "a plain blue ball on grass"
    main([
        "evaluate", f"--source={DEMO}", f"--edited={DEMO}", "--judge=true", f"--json={file}",
        f"--source_prompt={caption}", "--prompt=a plain red ball on grass", "--distances=[1]",
    ])  # fmt: skip
    found = json.loads(file.read_text())["metrics"]
    assert found["judge_edited"] == 0
    assert found["judge_kept"] > 0.9


def test_a_run_of_a_manifest_knows_its_source(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(run.parents[1] / "in.mp4", tmp_path)
    write_clip(tmp_path / "other.mp4", Clip.from_frames(torch.rand(5, 3, 30, 50)))
    manifest, folder = tmp_path / "clips.yaml", tmp_path / "runs" / "in"

    def list_clip(**row: Any) -> None:
        manifest.write_text(yaml.safe_dump([row | {"prompt": "a plain red ball on sand"}]))

    def measured() -> Any:
        main(["evaluate", str(folder), "--distances=[1]"])
        return json.loads((folder / "metrics.json").read_text())

    list_clip(video="in.mp4", start=1)
    main([
        "predict", f"--data.manifest={manifest}", f"--model.backbone={model_folder}",
        "--model.steps=1", "--model.cache=null", f"--output.folder={folder.parent}",
        "--trainer.accelerator=cpu",
    ])  # fmt: skip
    record = yaml.safe_load((folder / "run.yaml").read_text())["run"]["source"]
    assert record["video"] == str(tmp_path / "in.mp4")
    assert (record["start"], record["stop"], record["resolution"]) == (1, None, None)
    first = measured()
    assert first["frames"] == 5
    for row in ({"video": "other.mp4"}, {"video": "in.mp4", "stop": 5}):  # as many frames
        list_clip(**row)
        assert measured() == first
    manifest.unlink()
    assert measured() == first


def test_a_pair_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = read_clip(DEMO, max_frames=5)
    old, new = (
        write_clip(tmp_path / f"{name}.mp4", Clip.from_frames(frames), crf=0)
        for name, frames in (("old", source.frames), ("new", source.frames * 0.9))
    )
    for i in range(5):
        write_image(
            tmp_path / "mask" / f"{i}.png", (source.frames[i, 2:] > 0.5).float().expand(3, -1, -1)
        )
    main([
        "evaluate", f"--source={old}", f"--edited={new}", f"--mask={tmp_path / 'mask'}",
        "--flow=DIS", "--flow.preset=fast", f"--csv={tmp_path / 'table.csv'}",
    ])  # fmt: skip
    assert "new.mp4" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "table.csv").open())
    expected = -10 * (0.1 * source.frames).square().mean().log10()
    assert float(row["psnr"]) == pytest.approx(float(expected), abs=0.2)  # of 8 bits, in YUV
    assert float(row["structure"]) > 0.98
    assert float(row["psnr_outside"]) != float(row["psnr"])


def test_a_pair_leaves_what_a_run_does(
    run: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    source, _ = FinishedRun.read(run).clips()
    for number, frame in enumerate(source.frames):
        write_image(tmp_path / "in" / f"{number}.png", frame)
    options = ["--distances=[1,2]", "--device=cpu"]
    main(["evaluate", str(run), *options])
    main([
        "evaluate", f"--source={tmp_path / 'in'}", f"--edited={run / 'edited.mp4'}", *options,
        f"--json={tmp_path / 'new' / 'pair.json'}", f"--round_trip={model_folder}",
        "--prompt=a plain red ball on sand", "--source_prompt=a plain blue ball on sand",
    ])  # fmt: skip
    alone = json.loads((run / "metrics.json").read_text())
    pair = json.loads((tmp_path / "new" / "pair.json").read_text())
    assert pair.keys() == alone.keys() | {"edited"}
    assert pair["metrics"].keys() == alone["metrics"].keys()
    for name in ("psnr", "ssim", "structure"):  # flow of noise hangs on the bits that a PNG rounds
        assert pair["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-2), name
    assert pair["round_trip"].keys() == pair["metrics"].keys()
    assert (pair["frames"], pair["size"]) == (5, [30, 50])
    assert pair["options"]["prompt"] == "a plain red ball on sand"
    err = capsys.readouterr().err
    assert f"measuring 1/1, {run}\n" in err
    assert f"measuring 1/1, {run / 'edited.mp4'}\n" in err


def test_the_round_trip_of_a_video_of_odd_size(model_folder: Path, tmp_path: Path) -> None:
    frames = torch.rand(3, 3, 97, 65, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(3, 97, 65)
    hidden[:, 20:50, 20:40] = 1
    for i in range(3):
        write_image(tmp_path / "old" / f"{i}.png", frames[i])
        write_image(tmp_path / "new" / f"{i}.png", 0.9 * frames[i])
        write_image(tmp_path / "mask" / f"{i}.png", hidden[i].expand(3, -1, -1))
    main([
        "evaluate", f"--source={tmp_path / 'old'}", f"--edited={tmp_path / 'new'}",
        f"--round_trip={model_folder}", f"--mask={tmp_path / 'mask'}", "--distances=1",
        f"--csv={tmp_path / 'table.csv'}",
    ])  # fmt: skip
    floor, row = csv.DictReader((tmp_path / "table.csv").open())
    assert floor["video"] == f"VAE round trip of {tmp_path / 'old'}"
    assert all(floor.values())
    assert floor.keys() == row.keys()
    assert floor["psnr_outside"] != floor["psnr"]


def altered(original: Path, folder: Path, **groups: dict[str, object]) -> Path:
    """A copy of a run whose record says something else."""
    shutil.copytree(original, folder)
    record = yaml.safe_load((folder / "run.yaml").read_text())
    for name, values in groups.items():
        place = record["run"] if name == "source" else record
        place[name] |= values
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    return folder


def test_each_source_has_the_floor_of_its_own(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    same = altered(run, tmp_path / "same")
    earlier = altered(run, tmp_path / "earlier", source={"start": 0, "max_frames": 5})
    hidden = torch.zeros(5, 30, 50)
    hidden[:, 5:20, 10:30] = 1
    for i in range(5):
        write_image(tmp_path / "mask" / f"{i}.png", hidden[i].expand(3, -1, -1))
    main([
        "evaluate", str(run), str(same), str(earlier), f"--round_trip={model_folder}",
        f"--mask={tmp_path / 'mask'}", f"--csv={tmp_path / 'table.csv'}", "--flow=DIS",
        "--flow.preset=fast",
    ])  # fmt: skip
    rows = {row["video"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    floor = f"VAE round trip of {run.parents[1] / 'in.mp4'}"
    assert list(rows) == [
        floor, str(run), str(same), f"{floor}, as in {earlier}", str(earlier)
    ]  # fmt: skip
    found = [json.loads((f / "metrics.json").read_text()) for f in (run, same, earlier)]
    for left, name in zip(found, (floor, floor, f"{floor}, as in {earlier}"), strict=True):
        assert left["round_trip"]["psnr_outside"] == float(rows[name]["psnr_outside"])
    options = found[0]["options"]
    assert options["mask"] == str(tmp_path / "mask")
    assert (options["flow"], options["flow.preset"]) == ("DIS", "fast")


def test_the_floor_is_that_of_the_sources_own_prompt(
    run: Path, model_folder: Path, tmp_path: Path
) -> None:
    other = altered(run, tmp_path / "other", run={"inversion_prompt": "a red box on water"})
    measures = Measures(clip=str(write_tiny_clip(tmp_path / "clip")), device="cpu")
    sources = Sources(measures, Backbone.load(str(model_folder), "cpu", "float32"))
    floors = [
        measure_run(FinishedRun.read(folder), sources)["round_trip"] for folder in (run, other)
    ]
    assert floors[0]["clip_text"] != floors[1]["clip_text"]
    assert floors[0]["psnr"] == floors[1]["psnr"]


def test_one_run_that_fails_costs_no_other_its_row(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = altered(run, tmp_path / "bad", source={"video": "gone.mp4"})
    last = altered(run, tmp_path / "last")
    table = tmp_path / "table.csv"
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", str(run), str(bad), str(last), f"--csv={table}"])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert [row["video"] for row in csv.DictReader(table.open())] == [str(run), str(last)]
    assert str(last) in out.replace("\n", "")
    assert f"{bad} is not measured: the source gone.mp4 of" in err


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show({name: {"psnr": 20.0} for name in ("Title [dQw4w9WgXcQ]", "a[/x]", ":smile:")})
    out = capsys.readouterr().out
    for name in ("Title [dQw4w9WgXcQ]", "a[/x]", ":smile:"):
        assert name in out


def test_flicker_has_no_better_way(capsys: pytest.CaptureFixture[str]) -> None:
    """A blurred edit has less than its source, and is not the better for it."""
    show({"a": {"flicker": 0.5, "lpips": 0.5}})
    out = capsys.readouterr().out
    assert "share" in out
    assert out.count("↓") == 1


def test_an_overwritten_run_loses_its_metrics(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "in"))
    (other / "metrics.json").write_text("{}")
    main([
        "predict", f"--config={other / 'run.yaml'}", f"--output.folder={tmp_path}",
        "--output.overwrite=true", "--metrics.measure=false",
    ])  # fmt: skip
    assert not (other / "metrics.json").exists()


def test_a_run_that_cannot_be_measured_stays(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([
        "predict", f"--config={run / 'run.yaml'}", f"--output.folder={tmp_path}",
        "--metrics.judge=true",
    ])  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == [
        "compare.mp4", "contact_sheet.png", "edited.mp4", "features.json", "report.html",
        "run.yaml",
    ]  # fmt: skip
    assert "in is not measured: the judge knows" in capsys.readouterr().err


def test_a_metric_that_breaks_costs_no_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tokenflow.engine.lightning.metrics.measure_run", broken)
    main(["predict", f"--config={run / 'run.yaml'}", f"--output.folder={tmp_path}"])
    assert (tmp_path / "in" / "run.yaml").exists()
    assert "in is not measured: RuntimeError: out of memory" in capsys.readouterr().err


def refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", *words])
    err = capsys.readouterr().err
    assert (exit.value.code, message in err, "Traceback" in err) == (2, True, False), err


@pytest.mark.parametrize(("words", "message"), [
    ([], "expected folders of runs, or --source and --edited"),
    (["gone"], "gone: expected a finished run's folder"),
    (["RUN", "--prompt=a ball"], "--prompt and --source_prompt are for --source and --edited"),
    (["RUN", "--judge=true"], "of 128x128 pixels, got 5 frames of 50x30"),
    ([f"--source={DEMO}"], "expected folders of runs, or --source and --edited"),
    (["RUN", f"--edited={DEMO}"], "expected folders of runs, or --source and --edited"),
    ([f"--source={DEMO}", "--edited=gone.mp4"], "gone.mp4: expected a video file"),
    ([f"--source={DEMO}", "--edited=EDITED"], "of one size, got 5 frames of 50x30"),
    (["RUN", "--distances=[0]"], "distances of 1 frame or more"),
    (["RUN", "--distances=far"], "distances"),
    (["RUN", "--flow=Raft"], "flow"),
    (["RUN", "--flow=subprocess.Popen", "--flow.args=ls"], "flow"),
    (["RUN", f"--mask={DEMO}"], "expected a mask of 5 frames of 50x30"),
    (["RUN", "--round_trip=./gone"], "'./gone' does not exist"),
    (["RUN", "--csv=/dev/null/table.csv"], "choose another --csv"),
    (["RUN", "--json=all.json"], "--json is for --source and --edited"),
    (["--source=EDITED", "--edited=EDITED", "--json=/dev/null/x.json"], "choose another --json"),
    (["RUN", "--judges=true"], "judges"),
])  # fmt: skip
def test_bad_input_says_what_to_do(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(run), "EDITED": str(run / "edited.mp4")}
    for short, long in names.items():
        words = [word.replace(short, long) for word in words]
    refused(words, message, capsys)


@pytest.mark.parametrize(("change", "message"), [
    ({"source": {"video": "gone.mp4"}}, "the source gone.mp4 of"),
    ({"source": {"video": None}}, "is no record of a run of this version"),
    ({"source": {"colour": 1}}, "is no record of a run of this version"),
    ({"source": None}, "is no record of a run of this version"),
    ({"run": {"multiple": "x"}}, "was changed by hand"),
    ({"run": None}, "is no record of a run of this version"),
    (None, "expected a run's record"),
])  # fmt: skip
def test_a_record_that_cannot_be_used(
    change: dict[str, dict[str, object] | None] | None,
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "in"))
    record = yaml.safe_load((other / "run.yaml").read_text())
    for group, values in (change or {}).items():
        place = record["run"] if group == "source" else record
        place[group] = None if values is None else place[group] | values
    (other / "run.yaml").write_text(yaml.safe_dump(record if change else "nothing"))
    refused([str(other)], message, capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"source": 3},
        {"source": {"video": "in.mp4", "start": "x"}},
        {"source": {"video": "in.mp4", "max_frames": {}}},
        {"consistency": {}},
        {"multiple": 0},
        {"multiple": True},
        {"prompt": None},
    ],
)
def test_a_bad_record_costs_no_other_run_its_row(
    change: dict[str, object], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "in"))
    record = yaml.safe_load((other / "run.yaml").read_text())
    record["run"] |= change
    (other / "run.yaml").write_text(yaml.safe_dump(record))
    table = tmp_path / "table.csv"
    words = [str(other), str(run), f"--csv={table}", "--distances=[1]"]
    refused(words, f"{other} is not measured: ", capsys)
    (row,) = csv.DictReader(table.open())
    assert row["video"] == str(run)


def test_names_of_any_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, table = os.fsdecode(b"caf\xe9\x1b[2J"), tmp_path / "table.csv"
    show({name: {"psnr": 20.0}})
    write_csv(str(table), {name: {"psnr": 20.0}})
    out = capsys.readouterr().out
    assert r"caf\xe9\x1b[2J" in out
    assert "\x1b" not in out
    assert b"caf\xe9" in table.read_bytes()


def test_help_tells_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for words in ("tokenflow evaluate RUN", "--flow", "--distances", "--round_trip", "DIS", "RAFT"):
        assert words in out
