"""Finished runs as the page shows them: the gallery, one run, two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from markupsafe import Markup

from tokenflow.app.options import UPLOADED
from tokenflow.app.request import Requests
from tokenflow.engine.lightning.finished_run import FinishedRun
from tokenflow.engine.lightning.job import PLUGINS, PROMPTS
from tokenflow.engine.lightning.manifest import FILES
from tokenflow.engine.lightning.metrics import Sources, measure_run
from tokenflow.engine.region import AUTO
from tokenflow.errors import InputError, explained
from tokenflow.metrics import Measures
from tokenflow.report import Features, Run, read_run, write_comparison
from tokenflow.report.columns import column
from tokenflow.report.pictures import picture
from tokenflow.runs.files import EDITED, FEATURES, RECORD
from tokenflow.text import printable
from tokenflow.video import read_clip, resized

FILE_FIELDS = ("video", "mask", "depth", "control")
"""The fields of files that are uploaded."""
DRAWN = "mask.png"
"""The name of a mask that was drawn."""
MOST = 60
"""Runs that the gallery shows, the newest."""
THUMBNAIL = 120
"""Pixels of a thumbnail's height."""
STRIP = 8
"""Frames in a strip."""


class Runs:
    """The runs in the folder of the command line; a name from the page is one of theirs.

    Args:
        folder: Of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def names(self) -> list[str]:
        """The finished runs, the newest first."""
        records = [(written(one), one) for one in self.folder.glob(f"[!.]*/{RECORD}")]
        return [one.parent.name for _, one in sorted(records, reverse=True)[:MOST]]

    def run(self, name: Any) -> Run:
        """The run of a name.

        Raises:
            InputError: There is none.
        """
        if name not in self.names:
            raise InputError(f"there is no run {str(name)!r:.200}; choose one of the gallery")
        return read_run(self.folder / name)

    def cards(self) -> Markup:
        """The gallery: of each run its first frame, its prompt and its main settings."""
        shown = Markup("").join(self.card(name) for name in self.names)
        empty = Markup("<p>No runs yet: what you edit appears here.</p>")
        return Markup('<div class="tf-cards">{}</div>').format(shown) if shown else empty

    def card(self, name: str) -> Markup:
        """One run; of one that cannot be read, why."""
        try:
            run = self.run(name)
            file, came = run.folder / EDITED, run.settings
            image = thumbnail(file, file.stat().st_mtime_ns)
            facts = [came.get("editor"), f"{came.get('steps')} steps", f"seed {came.get('seed')}"]
            facts.append(f"{sum(run.seconds.values()):.0f} s")
            about = Markup("<p>{}</p><small>{}</small>").format(
                printable(came.get("prompt", "")), " · ".join(map(str, facts))
            )
        except Exception as error:  # whatever somebody has written into a run's files
            image, about = "", Markup("<small>{}</small>").format(printable(explained(error)))
        shown = '<figure><img src="{}" alt=""><figcaption><b>{}</b>{}</figcaption></figure>'
        return Markup(shown).format(image, printable(name), about)

    def comparison(self, names: Sequence[str]) -> Markup:
        """Two or more runs side by side, with what differs: the page of `tokenflow report`."""
        runs = [self.run(name) for name in names]
        with TemporaryDirectory() as folder:
            text = write_comparison(runs, Path(folder) / "page.html").read_text("utf-8")
        # with no more rights than its own
        frame = '<iframe class="tf-page" sandbox="allow-scripts" srcdoc="{}"></iframe>'
        return Markup(frame).format(text)

    def measure(self, name: str) -> None:
        """Leaves the metrics of a run in its folder."""
        run = FinishedRun.of(self.run(name))
        measure_run(run, Sources(Measures()))

    def values(self, name: Any, requests: Requests) -> dict[str, Any]:
        """What the page's fields were for a run, as `Requests.configuration` takes them."""
        run = self.run(name)
        data, model = run.record.get("data") or {}, run.record.get("model") or {}
        measured = bool((run.record.get("metrics") or {}).get("measure"))
        values = {**data, **model, "model": model.get("backbone")}
        values |= {"measure": measured, "auto": model.get("mask") == AUTO}
        values |= {name: run.settings.get(name, "") for name in PROMPTS}
        for one in PLUGINS:
            spec = model.get(one) or {}
            plugin = values[one] = str(spec.get("class_path", "")).rsplit(".", 1)[-1]
            for option, value in (spec.get("init_args") or {}).items():
                if isinstance(value, dict):  # a class is shown by its name, and a file in its field
                    files = value.get("init_args") or {}
                    values["control"] = files.get(FILES[UPLOADED], values.get("control"))
                    value = str(value.get("class_path", "")).rsplit(".", 1)[-1]
                values[f"{one}.{plugin}.{option}"] = value
        for file in FILE_FIELDS:
            path = Path(str(values.get(file) or ""))
            mine = path.is_file() and path.resolve().is_relative_to(requests.uploads.resolve())
            values[file] = str(path) if mine else None
        drawn = values["mask"] if Path(values["mask"] or "").name == DRAWN else None
        values |= {"drawn": drawn, "mask": None if drawn else values["mask"]}
        return values


def details(run: Run) -> Markup:
    """A run's correspondence and metrics."""
    parts = []
    if (run.folder / FEATURES).exists():
        seen = Features.load(run.folder / FEATURES)
        images = Markup("").join(
            Markup('<figure><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>').format(
                uri, caption, caption
            )
            for caption, uri in seen.links
        )
        parts.append(
            Markup(
                '<h4>Where tokens come from</h4><div class="tf-links">{}</div>'
                "<small>At {}, step {} of {}: a token of the frame has the colour of the places in "
                "the keyframes that it takes its features from.</small>"
            ).format(images, seen.site, seen.step + 1, seen.steps)
        )
    rows = [(shown, value) for k, value in run.metrics.items() if (shown := column(k))]
    if rows:
        cells = Markup("").join(
            Markup("<tr><th>{}</th><td>{}</td><td>{}</td></tr>").format(
                shown.heading, shown.text(value), shown.unit
            )
            for shown, value in rows
        )
        parts.append(Markup("<h4>Metrics</h4><table>{}</table>").format(cells))
    return Markup('<div class="tf-details">{}</div>').format(Markup("").join(parts))


def strip(path: str, start: int, count: int) -> Markup:
    """Some of a clip's frames beside each other, evenly spaced."""
    clip = read_clip(path, start=start, max_frames=count, in_memory=False)
    places = {round(i * (len(clip) - 1) / (STRIP - 1)) for i in range(STRIP)}
    frames = [clip.frames[place] for place in sorted(places)]
    height, width = clip.frames.shape[-2:]
    small = [resized(one, (72, max(1, round(72 * width / height)))) for one in frames]
    row = Markup("").join(Markup('<img src="{}" alt="">').format(picture(one)) for one in small)
    return Markup('<div class="tf-strip">{}</div>').format(row)


@lru_cache(MOST)
def thumbnail(file: Path, changed: int) -> str:
    """The first frame of a video, as the address of a picture, until the file changes."""
    frame = read_clip(file, max_frames=1).frames[0]
    height, width = frame.shape[1:]
    return picture(resized(frame, (THUMBNAIL, max(1, round(THUMBNAIL * width / height)))))


def written(file: Path) -> float:
    """When a file was written; 0 where it is just being replaced."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
