"""What the page offers for a model, which is described without loading its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from tests.app.conftest import given
from tokenflow.app import fitting
from tokenflow.app.fitting import examined, plugins
from tokenflow.app.options import Option
from tokenflow.app.page import Page, switch
from tokenflow.app.request import Requests
from tokenflow.app.serving import Serving
from tokenflow.diffusion import Backbone
from tokenflow.diffusion.backbone import EMBEDDED, Defaults
from tokenflow.editors import SDEdit
from tokenflow.errors import InputError
from tokenflow.plugins import Plugin, installed_plugins

DDIM = {"_class_name": "DDIMScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
UNET = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sd": {"model_index": UNET, "unet/config": {}, "scheduler/scheduler_config": DDIM},
    "inpainting": {
        "model_index": UNET, "unet/config": {"in_channels": 9},
        "scheduler/scheduler_config": DDIM,
    },
    "few-step inpainting": {
        "model_index": UNET, "unet/config": {"in_channels": 9},
        "scheduler/scheduler_config": {"_class_name": "LCMScheduler"},
    },
    "depth": {
        "model_index": UNET, "unet/config": {"in_channels": 5},
        "scheduler/scheduler_config": DDIM,
    },
    "flux": {
        "model_index": {"_class_name": "FluxPipeline"},
        "transformer/config": {"guidance_embeds": True}, "scheduler/scheduler_config": FLOW,
    },
    "nothing": {},
    # for "sd", which has the defaults of the class as well
    "canny": {"config": {"_class_name": "ControlNetModel"}},
}  # fmt: skip
EVERY = ["ControlNet", "DDCM", "FlowEdit", "PnP", "SDEdit"]


class Broken(SDEdit):
    """An editor of somebody else's, whose types are not there."""

    def __init__(self, strength: Missing = 0.5) -> None:  # type: ignore[name-defined]
        super().__init__(strength)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models without weights."""
    made = tmp_path_factory.mktemp("models")
    for model, files in CONFIGURATIONS.items():
        (made / model).mkdir()
        for name, config in files.items():
            file = made / model / f"{name}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(config))
    (made / "canny" / "diffusion_pytorch_model.safetensors").touch()
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Page]:
    """A page with these models, and with an editor whose types are not there."""
    broken = Plugin("Broken", "tokenflow.editors", "theirs 1.0", "theirs.Broken", Broken)
    # others' plugins may be installed where tests run
    found = (*(plugin for plugin in installed_plugins() if plugin.ours), broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "installed_plugins", lambda: found)
        names = [*Serving().models, *(str(folder / name) for name in CONFIGURATIONS)]
        made = Page(Requests(Serving(str(folder / "runs"), names)))
        made.build()
        yield made


def fitted(page: Page, model: str, editor: str = "PnP") -> dict[str, dict[str, Any]]:
    """How the fields change for a model, by their names."""
    names = {field: name for name, field in page.fields.items()} | {
        page.notes: "notes", page.former: "former",
    }  # fmt: skip
    return {names[field]: change for field, change in page.fitted(model, editor).items()}


def test_a_model_may_change_more_fields_than_the_first_one(folder: Path) -> None:
    """No ControlNet fits Flux."""
    flux, unknown = str(folder / "flux"), str(folder / "nothing")
    page = Page(Requests(Serving(str(folder / "runs"), [flux, "miniature", unknown])))
    page.build()
    changed = {page.notes, page.former, *(page.fields[name] for name in page.suited)}
    assert page.fields["editor.ControlNet.model"] in changed
    for other in (flux, "miniature", unknown):
        assert set(page.fitted(other, "PnP")) <= changed


def test_defaults_that_are_not_known_are_not_shown_and_nothing_is_dropped(
    page: Page, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Theirs(Backbone):
        @property
        def defaults(self) -> Defaults:
            return Defaults(guidance=3.0)

    theirs = Theirs.traits_of("")
    for one in (page.requests, requests):
        monkeypatch.setitem(one.described, "miniature", theirs)
    assert fitted(page, "miniature")["guidance"]["value"] is None
    assert requests.configuration(given(requests, guidance=7.5))["model"]["guidance"] == 7.5


@pytest.mark.parametrize(("model", "editor"), [("flux", "PnP"), ("miniature", "ControlNet")])
def test_a_run_that_does_not_fit_the_page_comes_back_as_it_fits(
    page: Page, folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, editor: str
) -> None:
    """Its editor, its ControlNet, and all the frames of its video."""
    run = {
        "model": str(folder / model) if model in CONFIGURATIONS else model, "drawn": None,
        "editor": "ControlNet", "editor.ControlNet.model": str(folder / "canny"),
        "propagation": "NNField", "max_frames": None, "guidance": 2.0,
    }  # fmt: skip
    monkeypatch.setattr(page.runs, "values", lambda *_: dict(run))
    with pytest.warns(UserWarning, match="run") as warned:
        filled = page.again(None, "run")
    said = [str(one.message) for one in warned]
    assert said[0] == "The run edited all frames of its video; here 16 are chosen."
    wrong = "editor" if editor == "PnP" else "editor.ControlNet.model"
    assert said[1].startswith(f"{wrong} of the run, '")
    sent = {
        name: filled[field].get("value") for name, field in page.fields.items() if field in filled
    }
    assert (sent["editor"], sent["max_frames"], sent["guidance"]) == (editor, 16, 2.0)
    if editor == "ControlNet":
        assert sent["editor.ControlNet.model"] == "miniature"


def test_an_editor_that_exits_does_not_fit(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*args: Any) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(SDEdit, "check_model", leave)
    assert "SDEdit: SystemExit: 3" in fitted(page, "miniature")["notes"]["value"]


def test_every_embedded_model_is_offered() -> None:
    assert tuple(Serving().models) == tuple(EMBEDDED)


@pytest.mark.parametrize(
    ("model", "editors", "steps", "guidance", "features", "note"),
    [
        ("miniature", EVERY, 50, 3.0, 0.8, ""),
        ("miniature-lcm", EVERY, 8, 3.0, 0.8, "Made for few steps, such as 8;"),
        ("miniature-transformer", EVERY[1:], 50, 3.0, 0.0, ""),
        ("sd", EVERY, 50, 7.5, 0.8, ""),
        ("inpainting", EVERY[1:], 50, 7.5, 0.8, "This model needs a mask"),
        ("depth", EVERY[1:], 50, 7.5, 0.8, "This model needs the depth of the frames"),
        ("flux", EVERY[1:], 50, 3.5, 0.0, ""),
        (
            "few-step inpainting",
            EVERY[1:],
            8,
            7.5,
            0.8,
            "Made for few steps, such as 8; the editor DDCM suits it. This model needs a mask",
        ),
        ("nothing", EVERY, 50, 7.5, 0.8, "unet of the model folder"),
    ],
)
def test_what_fits_a_model(
    page: Page, folder: Path, model: str, editors: list[str], steps: int, guidance: float,
    features: float, note: str,
) -> None:  # fmt: skip
    changes = fitted(page, str(folder / model) if model in CONFIGURATIONS else model, "ControlNet")
    assert [name for name, _ in changes["editor"]["choices"]] == editors
    assert changes["editor"]["value"] == ("ControlNet" if "ControlNet" in editors else "PnP")
    values = [changes[name]["value"] for name in ("steps", "guidance", "editor.PnP.features")]
    assert values == [steps, guidance, features]
    said, names, reasons = re.split("<details><summary>|</summary>", changes["notes"]["value"])
    assert (said.startswith(note), bool(said)) == (True, bool(note))
    named = [] if "ControlNet" in editors else ["ControlNet"]
    named += [f"IPAdapter of tokenflow {version('tokenflow')}", "Broken of theirs 1.0"]
    assert names == f"Not offered: {', '.join(named)}"
    assert [line.partition(": ")[0] for line in reasons.split("<br>")] == named


def test_fields_of_files_say_who_takes_them(page: Page, folder: Path) -> None:
    control = page.fields["control"].parent
    for editor in ("PnP", "ControlNet"):
        shown = switch(page.groups["editor"], editor)[control]["visible"]
        assert shown == (editor == "ControlNet")
    labels = [
        fitted(page, model)["depth"]["label"] for model in ("miniature", str(folder / "depth"))
    ]
    assert [label.endswith(": this model takes none") for label in labels] == [True, False]


def test_the_controlnets_that_fit(page: Page, folder: Path) -> None:
    for model, controlnet in ((str(folder / "sd"), str(folder / "canny")), ("miniature",) * 2):
        changes = fitted(page, model)["editor.ControlNet.model"]
        assert changes["choices"] == [(controlnet, controlnet)]
        assert changes["value"] == controlnet


def test_a_plugin_whose_types_are_not_known_is_left_out(page: Page) -> None:
    assert "Broken" not in plugins("editor")
    (line,) = [one.reason for one in examined("editor") if one.name == "Broken"]
    assert line.startswith("the types of its options are not known: NameError: name 'Missing'")
    assert escape(f"Broken of theirs 1.0: {line}") in fitted(page, "miniature")["notes"]["value"]


def test_what_does_not_fit_is_refused_before_it_waits(requests: Requests, folder: Path) -> None:
    requests.serving.models.extend(str(folder / name) for name in ("flux", "inpainting"))  # type: ignore[attr-defined]
    flux, inpainting = requests.serving.models[2:]
    configuration = requests.configuration(given(requests, model=flux, editor="ControlNet"))
    with pytest.raises(InputError, match=r"ControlNets are for Stable Diffusion .* got a Flux"):
        requests.complete(configuration)
    options = {"editor": "PnP", "editor.PnP.features": 0.5}
    configuration = requests.configuration(given(requests, model=flux, **options))
    with pytest.raises(InputError, match="a Flux has none: set features to 0"):
        requests.complete(configuration)
    with pytest.raises(InputError, match="expected a mask for this model"):
        requests.complete(requests.configuration(given(requests, model=inpainting)))


def test_a_models_own_defaults_are_not_said_again(requests: Requests) -> None:
    options = {"editor": "PnP", "editor.PnP.features": 0.8, "guidance": 3.0}
    model = requests.configuration(given(requests, **options))["model"]
    assert model["editor"] == {"class_path": "PnP"}
    assert "guidance" not in model
    changed = options | {"editor.PnP.features": 0.5}
    model = requests.configuration(given(requests, **changed))["model"]
    assert model["editor"]["init_args"] == {"features": 0.5}


def test_a_switch_may_be_left_to_the_model(page: Page) -> None:
    field = page.fields["editor.PnP.inject_values"]
    option = Option("inject_values", "flag", None, "", optional=True)
    assert field.value == ""
    assert [option.checked(value) for _, value in field.choices] == [None, True, False]
