"""The page: its fields, and what happens when they are used."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from gradio.processing_utils import save_file_to_cache
from markupsafe import Markup
from PIL import Image

from tokenflow.app.edits import ENDS, Device, Edit, News
from tokenflow.app.fitting import fitting, plugin_options, plugins
from tokenflow.app.options import UPLOADED, Option
from tokenflow.app.request import FRAMES, REACH, SETTINGS, Requests, command_of, yaml_of
from tokenflow.app.results import DRAWN, FILE_FIELDS, Runs, details, strip
from tokenflow.diffusion.backbone import Defaults
from tokenflow.engine.lightning.job import PLUGINS
from tokenflow.errors import InputError, explained
from tokenflow.plugins import Plugin
from tokenflow.report import Run, read_run
from tokenflow.runs.files import COMPARE, EDITED
from tokenflow.text import printable, printable_lines
from tokenflow.video import count_frames, read_clip

DEMO = Path(__file__).parents[1] / "miniature" / "demo" / "blue_ball.mp4"
DEMO_PROMPTS = ("a plain blue ball on grass", "a plain purple ball on sand")
PLAIN = {
    "strength": "How much changes (strength)",
    "n_max": "How much changes: steps that run (n_max)",
    "features": "How much layout is kept (features)",
    "attention": "How much layout is kept (attention)",
    "guidance": "How strongly the prompt counts (guidance)",
    "steps": "Steps",
    "seed": "Seed",
}
"""Options that are shown before all others, by what they do."""
STAGES = {
    "waiting": "Waiting",
    "loading": "Loading the model",
    "encode": "Encoding the frames",
    "cached": "Taking inverted frames from the cache",
    "invert": "Inverting the source",
    "mask": "Finding where the prompts differ",
    "reconstruct": "Reconstructing the source",
    "edit": "Editing",
    "decode": "Decoding the frames",
}
"""What the stages of an edit are called."""
EDITOR = "PnP"
FEW = 8  # steps, as in the configuration ddcm
NEEDED = {"mask": "a mask", "depth": "the depth of the frames"}
LOOKING = (
    "Looking at the model's files; the hub's are fetched, which without network takes a while."
)
DEPTH = "Depth as a video, bright where near"
WHITE: dict[str, Any] = {"colors": ["#ffffff"], "color_mode": "fixed"}
BRUSH = 0.05
"""The brush's radius as a share of the frame's shorter side; Gradio's is 25 pixels of any frame."""
KEEP = """(fit, ...values) => values.map((value, i) => {
  const {former, ...update} = fit[i];
  const fits = update.choices ? update.choices.some(([, one]) => one === value) : value !== former;
  if (fits) delete update.value;
  return update;
})"""
"""Fields change as `Page.fit` says, unless they were changed from the former model's values.

In the browser, as an answer of the server would overwrite what is typed until it comes.
"""
LIMIT = "(most, ...values) => values.map((value, i) => (value > most?.[i] ? most[i] : value))"
"""The values of sliders where they are not too large; in the browser, as above."""
FILL = f"(...written) => written.map((one, i) => one || {json.dumps(DEMO_PROMPTS)}[i])"
"""The bundled clip's prompts where none are written."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: the page alone calls it, and shows its progress itself."""


class Page:
    """The page over one device and one folder of runs.

    Args:
        requests: Checks what the page sends.
    """

    def __init__(self, requests: Requests) -> None:
        self.requests, self.device = requests, Device(requests)
        self.runs, self.serving = Runs(requests.folder), requests.serving
        self.fields: dict[str, Any] = {}
        self.groups: dict[str, list[tuple[list[str], Any]]] = {"editor": [], "propagation": []}
        """The groups of fields of editors and kernels, with the names of those that take them."""
        self.suited: list[str] = []
        """The fields that a model may change, by name."""
        self.own: dict[str, str] = {}
        """The fields of options that a model has its own default of, and how it calls them."""

    def build(self) -> gr.Blocks:
        """The page's components and events."""
        with gr.Blocks(title="tokenflow", analytics_enabled=False) as blocks:
            session = gr.State([])  # the edit that this page runs
            gr.Markdown("# tokenflow\nEdits a video by text, consistently over time.")
            with gr.Tabs() as tabs:
                with gr.Tab("Edit", id="edit"), gr.Row():
                    with gr.Column(min_width=320):
                        self.source()
                        self.choices()
                        with gr.Row():
                            start = gr.Button("Edit", variant="primary", elem_id="edit")
                            stop = gr.Button("Stop", elem_id="stop")
                    with gr.Column(min_width=320):
                        state = gr.HTML(elem_id="state")
                        result = Result(self, "result")
                with gr.Tab("Runs", id="runs") as gallery:
                    with gr.Row():
                        one = gr.Dropdown([], label="Run", elem_id="run", min_width=140)
                        other = gr.Dropdown([], label="Beside it", elem_id="other", min_width=140)
                    with gr.Row():
                        again = gr.Button("Again with another prompt", elem_id="again")
                        measure = gr.Button("Measure", elem_id="measure")
                    compared = gr.HTML(elem_id="compared")
                    single = Result(self, "single")
                    cards = gr.HTML(elem_id="cards")
            inputs, names = list(self.fields.values()), list(self.fields)

            # Gradio streams what generator functions yield, which a function whose types are
            # checked in tests is not
            start.click(
                lambda session, *values: (
                    yield from self.edit(
                        dict(zip(names, values, strict=True)), session, state, result
                    )
                ),
                [session, *inputs], [state, *result.outputs], concurrency_limit=None, **PRIVATE,
            )  # fmt: skip
            stop.click(self.stop, session, None, concurrency_limit=None, **PRIVATE)
            pair, shown = [one, other], [compared, *single.outputs]
            choose = functools.partial(self.choose, compared, single)
            listed = gallery.select(self.gallery, pair, [cards, *pair], **PRIVATE)
            measured = measure.click(self.measure, pair, None, **PRIVATE)
            # `change` follows every choice; of two inputs the second one is lost while one is shown
            for event in (listed.then, measured.then, one.change, other.change):
                event(choose, pair, shown, **PRIVATE)
            again.click(
                functools.partial(self.again, tabs), one,
                [tabs, self.notes, self.former, *inputs], postprocess=False, **PRIVATE,
            )  # fmt: skip
        return blocks

    def source(self) -> None:
        """The fields of the source: a video, its frames, what it shows."""
        longest = self.serving.max_frames
        video = gr.Video(label="Source video", sources=["upload"], height=260, elem_id="video")
        bundled = gr.Button("Take the bundled clip", size="sm", elem_id="bundled")
        thumbnails = gr.HTML(elem_id="strip")
        start, count, size = FRAMES
        with gr.Row():
            first = gr.Slider(0, 1, 0, step=1, label="First frame", min_width=140, elem_id="start")
            frames = gr.Slider(
                1, longest, min(16, longest), step=1, label="Frames", min_width=140,
                elem_id="frames",
            )  # fmt: skip
        self.add(size.name, size)
        before = gr.Textbox(
            label="What the source shows", placeholder="a woman running", elem_id="source-prompt"
        )
        after = gr.Textbox(
            label="What the edit shows", placeholder="a robot running", elem_id="prompt"
        )
        self.fields |= {
            "video": video, start.name: first, count.name: frames,
            "inversion_prompt": before, "prompt": after,
        }  # fmt: skip
        self.other_clip = [video.upload, video.clear, bundled.click]
        prompts = [before, after]
        bundled.click(lambda: self.served(DEMO), None, video, **PRIVATE)
        bundled.click(None, prompts, prompts, js=FILL, **PRIVATE)
        most, sliders = gr.JSON(visible=False), [first, frames]
        gr.on(
            [video.change, first.release, frames.release], self.look, [video, *sliders],
            [thumbnails, *sliders, most], **PRIVATE,
        ).success(None, [most, *sliders], sliders, js=LIMIT, **PRIVATE)  # fmt: skip

    def choices(self) -> None:
        """The fields of model, editor, kernel and settings; the plain ones first."""
        models = list(self.serving.models)
        with gr.Row():
            model = gr.Dropdown(models, label="Model", min_width=140, elem_id="model")
            editor = gr.Dropdown([EDITOR], label="Editor", min_width=140, elem_id="editor")
            self.fields |= {"model": model, "editor": editor}
        self.notes = gr.HTML(elem_id="notes")
        with gr.Group():
            self.plugin_fields("editor", plain=True)
            self.add("steps", SETTINGS["steps"])
            with gr.Row():
                for name in ("guidance", "seed"):
                    self.add(name, SETTINGS[name])
        with gr.Accordion("More", open=False, elem_id="more"):
            self.fields["negative_prompt"] = gr.Textbox(label="What the edit does not show")
            self.plugin_fields("editor", plain=False)
            self.fields["propagation"] = gr.Dropdown(
                list(plugins("propagation")), value="NNField", label="Propagation kernel"
            )
            self.plugin_fields("propagation", plain=False)
            with gr.Accordion("A part of the picture only", open=False, elem_id="part"):
                self.mask()
            takes = [one.name for one in plugins("editor").values() if self.takes_control(one)]
            with gr.Row(visible=EDITOR in takes, elem_id="control") as group:
                self.fields["control"] = gr.Video(
                    label="Control video, for ControlVideo", sources=["upload"], height=160
                )
            self.groups["editor"].append((takes, group))
            self.fields["depth"] = gr.Video(label=DEPTH, sources=["upload"], height=160)
            with gr.Accordion("Settings", open=False):
                for name, option in SETTINGS.items():
                    if name not in PLAIN:
                        self.add(name, option)
            self.fields["measure"] = gr.Checkbox(label="Measure the edit when it is done")
        for name, groups in self.groups.items():
            shown = [group for _, group in groups]
            self.fields[name].change(
                functools.partial(switch, groups), self.fields[name], shown, **PRIVATE
            )
        models_of_editors = [
            name for name in self.fields if re.fullmatch(r"editor\..*\.model", name)
        ]
        self.suited = ["editor", "steps", "depth", *self.own, *models_of_editors]
        self.former = gr.State({})
        first = self.fitted(models[0], EDITOR)
        self.former.value = first.pop(self.former)
        for field, changes in first.items():
            vars(field).update(changes)
        fit, suited = gr.JSON(visible=False), [self.fields[name] for name in self.suited]
        model.change(None, None, self.notes, js=f"() => {json.dumps(LOOKING)}", **PRIVATE)
        # not `input`, which a tab through the field dispatches as well
        model.change(
            self.fit, [model, self.former], [self.notes, self.former, fit], **PRIVATE
        ).success(None, [fit, *suited], suited, js=KEEP, **PRIVATE)

    def mask(self) -> None:
        """The field for a mask: drawn on the first frame, or a video."""
        drawn = gr.ImageEditor(
            label="White where every frame may change", type="pil", sources=(), transforms=(),
            layers=False, brush=gr.Brush(**WHITE), height=320, elem_id="mask",
        )  # fmt: skip
        take = gr.Button("Draw on the first frame", size="sm", elem_id="draw")
        video = gr.Video(label="Or a mask as a video", sources=["upload"], height=160)
        take.click(self.canvas, [self.fields["video"], self.fields["start"]], drawn, **PRIVATE)
        # a drawing on another clip does not stay; not `change`, which `again` dispatches as well
        gr.on(self.other_clip, None, None, drawn, js="() => [null]", **PRIVATE)
        auto = gr.Checkbox(label="Or wherever the two prompts differ")
        self.fields |= {"drawn": drawn, "mask": video, "auto": auto}

    def add(self, name: str, option: Option, ours: bool = True) -> None:
        """A field for an option, under its label and its docstring's words."""
        own = ours and option.optional and option.name in Defaults.__dataclass_fields__
        label = PLAIN.get(option.name, option.name.replace("_", " "))
        info = None if option.name in PLAIN else option.about
        about = {"label": label, "info": info, "min_width": 140, "elem_id": name}
        if option.kind == "flag" and not option.optional:
            field: Any = gr.Checkbox(value=option.default, **about)
        elif option.kind in ("choice", "class", "flag"):
            words: list[tuple[str, Any]] = [*pairs(option.choices)]
            words = words or [("yes", True), ("no", False)]
            words = [("the default", ""), *words] if option.optional else words
            field = gr.Dropdown(words, value=option.default or "", **about)
        elif name == "steps":
            field = gr.Slider(1, self.serving.max_steps, step=1, **about)
        elif option.optional and not own:  # a number's field has no empty value
            field = gr.Textbox(placeholder="the default", **about)
        elif option.share:
            field = gr.Slider(0, 1, option.default, step=0.05, **about)
        else:
            precision = 0 if option.kind == "whole" else None
            field = gr.Number(option.default, precision=precision, **about)
        self.fields[name] = field
        if own:
            self.own[name] = option.name

    def fitted(self, model: str, editor: str) -> dict[Any, Any]:
        """The fields as they suit a model: the editors that fit it, and its own defaults."""
        note, traits, steps = list[str](), None, SETTINGS["steps"].default
        try:
            traits = self.requests.traits(model)
        except InputError as error:  # the edit will say it again
            note = [str(error)]
        else:
            if traits.few_steps:
                note, steps = [f"Made for few steps, such as {FEW}; the editor DDCM suits it."], FEW
            if traits.further_channels is not None:
                needed = NEEDED[traits.further_channels]
                note.append(f"This model needs {needed}: give it under More.")
        takes_depth = traits is None or traits.further_channels == "depth"
        editors, left_out = fitting(traits, self.serving.models)
        chosen = next(one for one in (editor, EDITOR, *editors) if one in editors)
        found = {
            "editor": gr.update(choices=pairs(editors), value=chosen),
            "steps": gr.update(value=min(steps, self.serving.max_steps)),
            "depth": gr.update(label=DEPTH if takes_depth else f"{DEPTH}: this model takes none"),
        }
        for name, own in self.own.items():
            # no field but a number's can be empty
            empty = traits and traits.defaults is None and isinstance(self.fields[name], gr.Number)
            defaults = (traits and traits.defaults) or Defaults()
            found[name] = gr.update(value=None if empty else getattr(defaults, own))
        for name, models in editors.items():
            if models != [""]:
                found[f"editor.{name}.model"] = gr.update(choices=pairs(models), value=models[0])
        updates = {self.fields[name]: update for name, update in found.items()}
        lines = Markup("<br>").join(map(printable, left_out))  # escaped, as what is formatted is
        names = ", ".join(line.partition(":")[0] for line in left_out)
        said = Markup("{}<details><summary>Not offered: {}</summary>{}</details>")
        said = said.format(printable(" ".join(note)), names, lines)
        former = {name: update.get("value") for name, update in found.items()}
        return {self.notes: gr.update(value=said), self.former: former, **updates}

    def fit(self, model: str, former: Mapping[str, Any]) -> tuple[Any, ...]:
        """The notes and values of a model that is chosen, and for `KEEP` how the fields change.

        Args:
            model: Which is chosen.
            former: The values of the one before.
        """
        updates = self.fitted(model, EDITOR)
        changes = [
            {**gr.update(), **updates.get(self.fields[name], {}), "former": former.get(name)}
            for name in self.suited
        ]
        return updates[self.notes], updates[self.former], changes

    def plugin_fields(self, name: str, plain: bool) -> None:
        """The fields of every editor's or kernel's options; those of the chosen one are shown."""
        for plugin in plugins(name).values():
            options = plugin_options(plugin, self.serving.models)
            options = [one for one in options if (one.name in PLAIN) == plain]
            if not options:
                continue
            with gr.Row(visible=plugin.name == self.fields[name].value) as group:
                for one in options:
                    self.add(f"{name}.{plugin.name}.{one.name}", one, plugin.ours)
            self.groups[name].append(([plugin.name], group))

    def takes_control(self, plugin: Plugin) -> bool:
        """Whether one of a plugin's options is a control video, which is uploaded."""
        return any(UPLOADED in one.choices for one in plugin_options(plugin, self.serving.models))

    def served(self, file: Path) -> str:
        """A copy of a file among the uploads, which alone are served."""
        return save_file_to_cache(file, cache_dir=str(self.requests.uploads))

    def look(self, video: str | None, start: int | None, count: int | None) -> Any:
        """The thumbnails of the chosen frames, how far the sliders go, and the most for `LIMIT`."""
        most = self.serving.max_frames
        if not video:
            return "", gr.update(maximum=1), gr.update(), [0, most]
        try:
            path = self.requests.uploaded({"video": video}, "video")
            total = min(count_frames(path), REACH * most)
            frames = min(most, total)
            shown = strip(str(path), min(int(start or 0), total - 1), min(int(count or 1), frames))
        except Exception as error:  # whatever was uploaded
            return failed(explained(error)), gr.update(), gr.update(), None
        # a slider needs two places
        last, longest = (gr.update(maximum=one) for one in (max(total - 1, 1), max(frames, 2)))
        return shown, last, longest, [total - 1, frames]

    def canvas(self, video: str | None, start: int | None, drawn: str | None = None) -> Any:
        """The frame to draw a mask on, with one that was drawn before."""
        try:
            path = self.requests.uploaded({"video": video}, "video")
            start = int(start or 0)
            self.requests.check_start(start)
            frame = read_clip(path, start=start, max_frames=1).frames[0]
        except InputError as error:
            raise gr.Error(str(error)) from error
        image = Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy())
        layers, whole = [], image
        if drawn is not None:
            layers = [Image.new("RGBA", image.size, "white")]
            layers[0].putalpha(Image.open(drawn).convert("L"))
            whole = Image.alpha_composite(image.convert("RGBA"), layers[0])
        radius = max(1, round(BRUSH * min(image.size)))
        return gr.update(
            value={"background": image, "layers": layers, "composite": whole},
            brush=gr.Brush(radius, **WHITE), eraser=gr.Eraser(radius),
        )  # fmt: skip

    def drawn(self, value: Any) -> str | None:
        """The file of a mask that was drawn: black and white, of the frame's size."""
        layers = [one for one in (value or {}).get("layers", []) if one.getbbox() is not None]
        if not layers:
            return None
        size = layers[0].size
        white = Image.new("L", size)
        for layer in layers:
            white.paste(255, mask=layer.getchannel("A").point(lambda a: 255 * (a > 127)))
        file = BytesIO()
        white.save(file, "PNG")
        place = self.requests.uploads / sha256(file.getvalue()).hexdigest()
        place.mkdir(parents=True, exist_ok=True)
        (place / DRAWN).write_bytes(file.getvalue())
        return str(place / DRAWN)

    def edit(
        self, given: dict[str, Any], session: list[Edit], state: Any, result: Result
    ) -> Iterator[dict[Any, Any]]:
        """Runs an edit; yields what the page shows of it."""
        try:
            if drawn := self.drawn(given.pop("drawn")):
                if given["mask"]:
                    raise InputError("expected one mask, got a drawn one and a video; remove one")
                given["mask"] = drawn
            if session:
                raise InputError("this page's edit still runs; wait, or stop it")
            configuration = self.requests.configuration(given)
            self.requests.complete(configuration)
            edit = Edit(configuration)
            session.append(edit)
        except Exception as error:  # whatever the page sent
            yield {state: failed(explained(error))}
            return
        try:
            yield {state: progress(News("waiting")), **result.hidden()}
            for news in self.device.run(edit):
                shown = {state: progress(news)}
                if news.stage == "done" and edit.folder is not None:
                    shown |= result.of(read_run(edit.folder), configuration)
                yield shown
        except Exception as error:  # too many wait, or its files cannot be shown
            yield {state: failed(explained(error))}
        finally:
            session.remove(edit)

    def stop(self, session: list[Edit]) -> None:
        """Stops this page's edit where it can be resumed."""
        for edit in session:
            edit.stop.set()

    def gallery(self, one: str | None, other: str | None) -> tuple[Any, ...]:
        """The runs of the folder; the newest is chosen first."""
        names = self.runs.names
        chosen = one if one in names else next(iter(names), None)
        others = [("nothing", ""), *((name, name) for name in names)]
        return (
            self.runs.cards(),
            gr.update(choices=names, value=chosen),
            gr.update(choices=others, value=other if other in names else ""),
        )

    def choose(
        self, compared: Any, single: Result, one: str | None, other: str | None
    ) -> dict[Any, Any]:
        """Shows one run, or two beside each other."""
        try:
            if one and other and one != other:
                return {compared: self.runs.comparison([one, other]), **single.hidden()}
            return {compared: "", **(single.of(self.runs.run(one)) if one else single.hidden())}
        except Exception as error:  # whatever somebody has written into a run's files
            return {compared: failed(explained(error)), **single.hidden()}

    def measure(self, *names: str | None) -> None:
        """Measures the chosen runs."""
        try:
            for name in filter(None, names):
                self.runs.measure(name)
        except Exception as error:  # as above
            raise gr.Error(explained(error)) from error

    def again(self, tabs: Any, name: str | None) -> dict[Any, Any]:
        """Fills in the fields as they were for a run."""
        try:
            values, most = self.runs.values(name, self.requests), min(16, self.serving.max_frames)
            start = int(values.get("start") or 0)
            canvas, drawn = gr.update(value=None), values.pop("drawn")
            if drawn is not None:
                canvas = self.canvas(values["video"], start, drawn)
                canvas["value"] = self.sent("drawn", canvas["value"])
        except Exception as error:  # as above
            raise gr.Error(explained(error)) from error
        for what, known in (("model", self.serving.models), *((p, plugins(p)) for p in PLUGINS)):
            if values[what] not in known:
                gr.Warning(f"The run's {what}, {values[what]!r:.100}, is not on this page.")
                values[what] = next(iter(known))
        if values.get("max_frames") is None:
            gr.Warning(f"The run edited all frames of its video; here {most} are chosen.")
            values["max_frames"] = most
        updates = self.fitted(values["model"], values["editor"])
        for name, field in self.fields.items():
            own = name in self.own and values.get(name) is None  # the model's default stays
            choices = updates.get(field, {}).get("choices")
            if name in values and choices and (values[name], values[name]) not in choices:
                gr.Warning(f"{name} of the run, {values[name]!r:.100}, does not fit its model.")
            elif name in values and not own:
                value = self.sent(name, values[name])
                updates[field] = {**updates.get(field, {}), **gr.update(value=value)}
        updates[self.fields["drawn"]] = canvas
        # the slider does not know the clip yet
        updates[self.fields["start"]] = gr.update(value=start, maximum=max(start, 1))
        return {tabs: gr.Tabs(selected="edit"), **updates}

    def sent(self, name: str, value: Any) -> Any:
        """A field's value as the browser is sent it.

        A file stays as it is: Gradio would make another of what a browser cannot play.
        """
        if name in FILE_FIELDS:
            return value and FileData(path=value).model_dump()
        made = self.fields[name].postprocess(value)
        return made.model_dump() if hasattr(made, "model_dump") else made


class Result:
    """The components that show one run.

    Args:
        page: Which they are on.
        name: What their elements' ids begin with.
    """

    def __init__(self, page: Page, name: str) -> None:
        self.page = page
        with gr.Column(visible=False, elem_id=name) as self.whole:
            self.video = gr.Video(
                label="Source and edit", loop=True, autoplay=True, interactive=False, height=360,
                elem_id=f"{name}-video",
            )  # fmt: skip
            self.file = gr.DownloadButton("Download edited.mp4", elem_id=f"{name}-download")
            self.details = gr.HTML(elem_id=f"{name}-details")
            with gr.Accordion("The same edit by hand", open=False):
                self.command = gr.Textbox(
                    label="Command line", lines=3, max_lines=12, buttons=["copy"],
                    interactive=False, elem_id=f"{name}-command",
                )  # fmt: skip
                self.yaml = gr.Code(
                    language="yaml", label="For tokenflow predict --config", wrap_lines=True,
                    elem_id=f"{name}-yaml",
                )  # fmt: skip
        self.outputs = [
            self.whole, self.video, self.file, self.details, self.command, self.yaml
        ]  # fmt: skip

    def hidden(self) -> dict[Any, Any]:
        """Shows nothing."""
        return {self.whole: gr.update(visible=False)}

    def of(self, run: Run, configuration: Mapping[str, Any] | None = None) -> dict[Any, Any]:
        """Shows a run, and the configuration that made it, which by default is its record."""
        served: Callable[[Path], str] = self.page.served
        command = run.repeat if configuration is None else command_of(configuration)
        record = {k: v for k, v in run.record.items() if k != "run"}
        return {
            self.whole: gr.update(visible=True),
            self.video: served(run.folder / COMPARE),
            self.file: served(run.folder / EDITED),
            self.details: details(run),
            self.command: command,
            self.yaml: yaml_of(record if configuration is None else configuration),
        }


def pairs(words: Iterable[str]) -> list[tuple[str, str]]:
    """Choices as Gradio has them."""
    return [(word, word) for word in words]


def switch(groups: list[tuple[list[str], Any]], chosen: str) -> dict[Any, Any]:
    """Shows the options of the chosen plugin alone."""
    return {group: gr.update(visible=chosen in names) for names, group in groups}


def progress(news: News) -> Markup:
    """How far an edit is, with its preview."""
    if news.stage == "failed":
        return failed(news.reason)
    if news.stage in ENDS:
        said = f"{news.stage.capitalize()}. {news.reason}"
        return Markup('<div class="tf-state"><p>{}</p></div>').format(printable(said))
    said = STAGES[news.stage]
    if news.stage == "waiting" and news.steps:
        said = f"Waiting: number {news.steps} in the queue"
    elif news.steps:
        said = f"{said}: step {news.step} of {news.steps}"
    said = ", ".join(filter(None, (said, news.pace)))
    bar = Markup(
        '<div class="tf-bar" role="progressbar" aria-valuenow="{0}">'
        '<div style="width: {0}%"></div></div>'
    ).format(100 * news.step // max(news.steps, 1))
    image = Markup('<img src="{}" alt="Preview">').format(news.preview) if news.preview else ""
    return Markup('<div class="tf-state"><p>{}</p>{}{}</div>').format(said, bar, image)


def failed(reason: str) -> Markup:
    """Why something did not work."""
    return Markup('<div class="tf-failed" role="alert">{}</div>').format(printable_lines(reason))
