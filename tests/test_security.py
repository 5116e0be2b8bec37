"""What someone else made runs no code: configurations and model folders, as an attacker writes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import jsonargparse
import pytest
import yaml
from jsonargparse import _common as jsonargparse_state
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.installing import install
from tokenflow.cli.allowlist import require_local, restrict
from tokenflow.cli.choices import Choices
from tokenflow.cli.configurations import split_allowed
from tokenflow.cli.main import main
from tokenflow.diffusion import Backbone, ModelError
from tokenflow.engine.lightning.manifest import read_manifest
from tokenflow.errors import InputError
from tokenflow.plugins import installed_plugins

MARK = "pwned"
TOUCH = ["touch", MARK]
# both call what they are told to: Lightning's own function with any arguments, and a process
INSTANTIATE = {
    "class_path": "lightning.pytorch.cli.instantiate_class",
    "init_args": {"args": [f"touch {MARK}"], "init": {"class_path": "os.system"}},
}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": TOUCH}}
SYSTEM = {"class_path": "os.system", "init_args": {"command": f"touch {MARK}"}}
FAMILY = "lightning.pytorch.callbacks"


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": arguments}]}}


def editor(name: str, **arguments: Any) -> dict[str, Any]:
    return {"model": {"editor": {"class_path": name, "init_args": arguments}}}


ATTACKS: dict[str, Any] = {
    "os.abort as a callback's function": callback(
        f"{FAMILY}.LambdaCallback", on_predict_start="os.abort"
    ),
    "the same by its short name": callback("LambdaCallback", on_predict_start="os.abort"),
    "a function of tokenflow": callback(
        f"{FAMILY}.LambdaCallback", on_predict_start="tokenflow.cli.main"
    ),
    "a function in place of a callable class": callback(
        f"{FAMILY}.ThroughputMonitor", batch_size_fn=INSTANTIATE
    ),
    "a function where any value may be": callback(
        f"{FAMILY}.RichProgressBar", console_kwargs={"file": INSTANTIATE}
    ),
    "a process as a callback": {"trainer": {"callbacks": [POPEN]}},
    "a process as a strategy": {"trainer": {"strategy": POPEN}},
    "a process as a plugin of the trainer": {"trainer": {"plugins": [POPEN]}},
    "os.system as the editor": {"model": {"editor": SYSTEM}},
    "os.system as the editor's option": editor("PnP", attention=SYSTEM),
    "a function as the editor": {"model": {"editor": INSTANTIATE}},
    "a process as the kernel's option": {
        "model": {"propagation": {"class_path": "FlowWeighted", "init_args": {"flow": POPEN}}}
    },
    "a module that an allowed one imports": {
        "model": {"editor": {"class_path": "tokenflow.editors.base.torch.hub.load"}}
    },
    "a class of Lightning with a function": {
        "trainer": {
            "strategy": {
                "class_path": "lightning.pytorch.strategies.DDPStrategy",
                "init_args": {"ddp_comm_hook": "os.abort"},
            }
        }
    },
    "a checkpoint": {"ckpt_path": "evil.ckpt"},
    "an unrestricted unpickler": {"weights_only": False},
    "a permission of its own": {"allow_imports": ["subprocess"], "trainer": {"callbacks": [POPEN]}},
}


@pytest.fixture(autouse=True)
def own_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test with the policy of a new process, in a folder of its own."""
    monkeypatch.setattr(
        jsonargparse_state, "parsing_settings", dict(jsonargparse_state.parsing_settings)
    )
    monkeypatch.chdir(tmp_path)


def configuration(text: str | dict[str, Any]) -> list[str]:
    """A run by a configuration; no frame is edited, as the model is none."""
    Path("evil.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    video = ROOT / "tokenflow/miniature/demo/blue_ball.mp4"
    own = [f"--data.video={video}", "--model.prompt=a ball", "--model.backbone=./none"]
    return ["predict", "--config=evil.yaml", *own, "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_configuration_runs_no_code(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(configuration(ATTACKS[attack]))
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert "'./none'" not in err, "it was not refused"
    assert not Path(MARK).exists()


CHOICES: dict[str, Any] = {
    "os.system as the editor": {"editor": SYSTEM},
    "a name alone": {"editor": "os.system"},
    "a function as the editor": {"editor": INSTANTIATE},
    "a process as an editor's option": {
        "editor": {"class_path": "ControlNet", "init_args": {"condition": POPEN}}
    },
    "a process as the kernel's option": {"propagation": "FlowWeighted", "propagation.flow": POPEN},
    "a module that would be imported": {"editor": {"class_path": "ownpackage.Marking"}},
    "a process in a grid": {"grid": {"editor": ["PnP", POPEN]}},
}


@pytest.mark.parametrize("attack", CHOICES)
def test_a_manifest_runs_no_code(
    attack: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ownpackage.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ownpackage", raising=False)
    shutil.copy(ROOT / "tokenflow/miniature/demo/blue_ball.mp4", "in.mp4")
    Path("clips.yaml").write_text(yaml.safe_dump([{"video": "in.mp4", **CHOICES[attack]}]))
    own = ["--data.manifest=clips.yaml", "--model.prompt=a ball", "--model.backbone=./none"]
    with pytest.raises(SystemExit) as exit:
        main(["predict", *own, "--trainer.accelerator=cpu"])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert "'./none'" not in err, "it was not refused"
    assert "clips.yaml, clip 1: " in err
    assert not Path(MARK).exists()
    assert not Path("imported").exists()


NESTED = {"class_path": "ControlVideo", "init_args": {"path": "/etc/passwd"}}
OUTSIDE: dict[str, Any] = {
    "nested": {"editor": {"class_path": "ControlNet", "init_args": {"condition": NESTED}}},
    "in a column": {"editor": "ControlNet", "editor.condition": NESTED},
    "in dotted columns": {
        "editor": "ControlNet",
        "editor.condition.class_path": "ControlVideo",
        "editor.condition.init_args.path": "/etc/passwd",
    },
    "in dotted options": {
        "propagation": {
            "class_path": "FlowWeighted",
            "init_args": {"flow.class_path": "FlowFiles", "flow.init_args.folder": "/etc"},
        }
    },
    "of a class that the run has chosen": {"propagation.flow.init_args.folder": "/etc"},
    "as text": {"editor": "ControlNet", "editor.condition": json.dumps(NESTED)},
    "in a list": {
        "editor": "ControlNet",
        "editor.condition": "Canny",
        "editor.further": [{"class_path": "Control", "init_args": {"condition": NESTED}}],
    },
    "in dict_kwargs": {
        "editor": "ControlNet",
        "editor.condition": {"class_path": "ControlVideo", "dict_kwargs": NESTED["init_args"]},
    },
    "above the root": {"editor": "ControlNet", "editor.condition": dict(
        class_path="ControlVideo", init_args={"path": "../control.mp4"}
    )},
    "weights": {"propagation": "FlowWeighted", "propagation.flow": {
        "class_path": "RAFT", "init_args": {"weights": "/etc/passwd"}
    }},
}  # fmt: skip
RUN_FLOW = {"class_path": "FlowFiles", "init_args": {"folder": "/flows"}}
RUN = {
    "editor": {"class_path": "tokenflow.PnP", "init_args": {}},
    "propagation": {"class_path": "tokenflow.FlowWeighted", "init_args": {"flow": RUN_FLOW}},
}


def settled(row: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """What a manifest's row chooses, as the run's record has it."""
    (tmp_path / "clips.yaml").write_text(yaml.safe_dump([{"video": "in.mp4", **row}]))
    (job,) = read_manifest(tmp_path / "clips.yaml", None, {})
    restrict([])
    Choices(RUN).settle(job)
    return {name: choice.spec["init_args"] for name, choice in job.plugins.items()}


@pytest.mark.parametrize("row", OUTSIDE)
def test_a_row_reads_no_file_outside_of_the_root(row: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clip 1: .*lies outside of"):
        settled(OUTSIDE[row], tmp_path)


def test_a_row_takes_no_options_that_a_signature_does_not_list(tmp_path: Path) -> None:
    canny = {"class_path": "Canny", "dict_kwargs": {"path": "/etc/passwd"}}
    with pytest.raises(InputError, match=r"clip 1: .*no dict_kwargs"):
        settled({"editor": "ControlNet", "editor.condition": canny}, tmp_path)


def test_a_row_reads_files_of_the_root_and_those_that_the_run_names(tmp_path: Path) -> None:
    one = settled({"propagation.inconsistency": 0.2}, tmp_path)["propagation"]
    assert one["flow"]["init_args"]["folder"] == "/flows"
    one = settled({"propagation.flow.init_args.folder": "own"}, tmp_path)["propagation"]
    assert one["flow"]["init_args"]["folder"] == str(tmp_path / "own")


URL = "reference::http://127.0.0.1:9/index.json"
REQUESTS: list[dict[str, Any]] = [
    {"default_root_dir": URL},
    {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": URL}}},
    {"logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "", "name": URL}}]},
    {"logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "s3://bucket"}}},
    {"profiler": {"class_path": "SimpleProfiler", "init_args": {"dirpath": URL}}},
]


@pytest.mark.parametrize("options", REQUESTS)
def test_a_configuration_makes_no_requests(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(configuration({"trainer": options}))
    assert exit.value.code == 2
    assert "expected local paths in the trainer's options, got '" in capsys.readouterr().err


class Server(BaseHTTPRequestHandler):
    """Has a configuration at every path, and notes what is asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"class_path: PnP\nbackbone: ./none\n")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Server.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.yaml"
        server.shutdown()


PLACES: list[Callable[[str], dict[str, Any]]] = [
    lambda url: {"config": url},
    lambda url: {"model": url},
    lambda url: {"data": url},
    lambda url: {"trainer": url},
    lambda url: {"model": {"editor": url}},
    lambda url: {"model": {"propagation": url}},
    lambda url: {"trainer": {"logger": url}},
    lambda url: {"trainer": {"callbacks": [url]}},
    lambda url: editor("ControlNet", condition=url),
    lambda url: editor("ControlNet", further=url),
]


@pytest.mark.parametrize("prefix", ["", "reference::", "simplecache::"])
@pytest.mark.parametrize("place", PLACES)
def test_no_place_of_a_configuration_is_fetched(
    place: Callable[[str], dict[str, Any]], prefix: str, url: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(configuration(place(prefix + url)))
    assert exit.value.code == 2
    assert not Server.asked


def test_what_the_command_line_allows_may_have_urls() -> None:
    kind, arguments = "lightning.pytorch.loggers.MLFlowLogger", {"tracking_uri": "http://there"}
    tracked = {"class_path": kind, "init_args": arguments}
    require_local({"logger": [tracked], "default_root_dir": Path("runs")})


PLUGIN = {
    "part/__init__.py": "",
    "part/__main__.py": f"from pathlib import Path\nPath({MARK!r}).touch()\nclass X: ...\n",
    "part/editor.py": "from tokenflow.editors import PnP\n"
    "class Mine(PnP):\n    interface = 2\n"
    f"def run() -> None:\n    open({MARK!r}, 'w')\n",
}


@pytest.mark.parametrize("path", ["part.__main__.X", "part.editor.run", "part.editor.Mine"])
def test_of_a_plugins_package_only_loaded_classes(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in PLUGIN.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    install(tmp_path / "site", "part", "[tokenflow.editors]\nMine = part.editor:Mine\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    installed_plugins.cache_clear()
    with pytest.raises(SystemExit):
        main(configuration({"model": {"editor": {"class_path": path}}}))
    installed_plugins.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "part"]:
        del sys.modules[name]
    assert not Path(MARK).exists()
    # allowed, the run goes on until it misses its model
    assert ("'./none'" in capsys.readouterr().err) is path.endswith("Mine")


def test_a_yaml_tag_makes_no_object(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"model:\n  guidance: !!python/object/apply:os.system ['touch {MARK}']\n"
    with pytest.raises(SystemExit):
        main(configuration(text))
    assert "could not determine a constructor" in capsys.readouterr().err
    assert not Path(MARK).exists()


def test_what_is_refused_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(configuration(callback("mine.Callback")))
    err = capsys.readouterr().err
    assert "mine.Callback" in err
    assert "--allow_imports" in err


def test_a_value_of_any_type_stays_data() -> None:
    from tokenflow.cli.allowlist import restrict

    restrict(["lightning", "os", "posix", "subprocess"])
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--any", type=Any)
    made = parser.instantiate(parser.parse_object({"any": POPEN}))
    assert not hasattr(made.any, "communicate")
    assert not Path(MARK).exists()


OWN = """
from pathlib import Path
from lightning.pytorch.callbacks import Callback

Path("imported").touch()

class Marking(Callback):
    pass
"""


@pytest.mark.parametrize("place", ["command line", "environment", "configuration", "nowhere"])
def test_only_the_command_line_allows_imports(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ownpackage.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ownpackage", raising=False)  # of another test
    text = callback("ownpackage.Marking")
    words = []
    if place == "command line":
        words = ["--allow_imports", "ownpackage"]
    elif place == "configuration":
        text["allow_imports"] = "ownpackage"
    elif place == "environment":
        for name in ("TOKENFLOW_ALLOW_IMPORTS", "TOKENFLOW_PREDICT__ALLOW_IMPORTS"):
            monkeypatch.setenv(name, "ownpackage")
    with pytest.raises(SystemExit):
        main([*configuration(text), *words])
    assert Path("imported").exists() is (place == "command line")
    # allowed, the run goes on until it misses its model
    assert ("'./none'" in capsys.readouterr().err) is (place == "command line")


def test_allowed_packages_are_taken_from_the_words() -> None:
    words = ["--allow_imports", "a.b", "--model.prompt=x", "--allow_imports=c"]
    assert split_allowed(words) == (["--model.prompt=x"], ["a.b", "c"])


@pytest.mark.parametrize("word", ["--allow_imports", "--allow_imports=*", "--allow_imports=a b"])
def test_a_package_that_is_none(word: str) -> None:
    with pytest.raises(InputError, match="expects a package or a class"):
        split_allowed([word])


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def test_no_code_of_a_model_folder_is_imported(folder: Path) -> None:
    named = {"auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
    for part, file in [
        ("unet", "config.json"),
        ("vae", "config.json"),
        ("text_encoder", "config.json"),
        ("tokenizer", "tokenizer_config.json"),
        ("scheduler", "scheduler_config.json"),
    ]:
        (folder / part / "evil.py").write_text(f"open({MARK!r}, 'w')\nclass Evil: ...\n")
        change(folder / part / file, **named)
    change(folder / "tokenizer/tokenizer_config.json", tokenizer_class="Evil")
    change(folder / "text_encoder/config.json", architectures=["Evil"])
    backbone = Backbone.load(folder, "cpu", "float32")
    assert backbone.embed(["a ball"])["embeddings"].isfinite().all()
    assert not Path(MARK).exists()


def test_no_attention_kernel_is_fetched_from_a_hub(folder: Path) -> None:
    change(folder / "text_encoder/config.json", attn_implementation="someone/kernel")
    backbone = Backbone.load(folder, "cpu", "float32")
    assert backbone.text_encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("part", "index"),
    [
        ("unet", "diffusion_pytorch_model.safetensors.index.json"),
        ("text_encoder", "model.safetensors.index.json"),
        ("unet", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ],
)
def test_an_index_leads_to_no_pickle(folder: Path, part: str, index: str) -> None:
    (weights,) = (folder / part).glob("*.safetensors")
    names = dict.fromkeys(load_file(weights), "evil.bin")
    weights.rename(weights.with_name("spare.fp16.safetensors"))
    (folder / part / "evil.bin").write_bytes(pickle.dumps({"a": Payload()}))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": names})
    (folder / part / index).write_text(text)
    with pytest.raises(ModelError, match=r"'evil\.bin', expected \*\.safetensors files"):
        Backbone.load(folder, "cpu", "float32")
    assert not Path(MARK).exists()


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (weights,) = (folder / "vae").glob("*.safetensors")
    weights.unlink()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError, match="pickled weights are not read"):
        Backbone.load(folder, "cpu", "float32")
    assert not Path(MARK).exists()


def test_weights_that_want_another_package(folder: Path) -> None:
    quantised = {"quant_method": "gptq", "bits": 4}
    change(folder / "text_encoder/config.json", quantization_config=quantised)
    with pytest.raises(ModelError, match=r"text_encoder of the model folder .* does not load"):
        Backbone.load(folder, "cpu", "float32")
