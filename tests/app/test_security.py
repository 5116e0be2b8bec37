"""What the page's address refuses, and what a page cannot name."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import pytest
from PIL import EpsImagePlugin

from tests.app.conftest import Served, given
from tests.video.making import make_video, noise
from tokenflow.app.edits import Device, Edit
from tokenflow.app.request import Requests
from tokenflow.app.server import Only, serve
from tokenflow.app.serving import LOCAL, Serving
from tokenflow.errors import InputError


class Answer:
    """What a server says to one request."""

    def __init__(self, served: Served, method: str, path: str, body: Any = None, **headers: str):
        where = urlsplit(served.url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        self.status, self.headers, self.text = answer.status, answer.headers, answer.read()
        connection.close()


def upload(served: Served, name: str, data: bytes) -> Answer:
    """Uploads a file as the page does."""
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + data + b"\r\n--b--\r\n"
    return Answer(
        served, "POST", "/gradio_api/upload", body,
        **{"Content-Type": "multipart/form-data; boundary=b"},
    )  # fmt: skip


def join(served: Served, target: str, given: dict[str, Any], event: str = "click") -> str:
    """Sends an event as the page does; the fields are as they are at first but for those given."""
    config = json.loads(Answer(served, "GET", "/config").text)
    props = {one["id"]: one["props"] for one in config["components"]}
    called = next(
        one
        for one in config["dependencies"]
        if any(e == event and props[i].get("elem_id") == target for i, e in one["targets"] if i)
    )
    fields = [props[i] for i in called["inputs"]]
    data = [given.get(one.get("elem_id"), one.get("value")) for one in fields]
    session = uuid4().hex[:10]
    body = {"data": data, "fn_index": called["id"], "session_hash": session}
    joined = Answer(
        served, "POST", "/gradio_api/queue/join", json.dumps(body),
        **{"Content-Type": "application/json"},
    )  # fmt: skip
    assert joined.status == 200
    return session


def hear(served: Served, session: str) -> str:
    """The server-sent events of a session, up to the end of its stream."""
    return Answer(served, "GET", f"/gradio_api/queue/data?session_hash={session}").text.decode()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file={folder}/secret/run.yaml",
        "/gradio_api/file={folder}/.uploads/../secret/run.yaml",
        "/gradio_api/file={folder}/.uploads/%2e%2e/secret/run.yaml",
        "/gradio_api/file={folder}/.uploads/link",
        "/gradio_api/file=http://127.0.0.1:1/a",
        "/gradio_api/proxy=http://127.0.0.1:1/a",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/run/edit",
        "/gradio_api/call/edit",
        "/gradio_api/vibe-code",
        "/gradio_api/deep_link",
        "/monitoring/summary",
        "/docs",
        "/..%2f..%2fetc/passwd",
    ],
)
def test_what_is_not_served(served: Served, path: str) -> None:
    secret = served.folder / "secret" / "run.yaml"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("hidden words")
    link = served.folder / ".uploads" / "link"
    if not link.is_symlink():
        link.symlink_to(secret)
    try:
        answer = Answer(served, "GET", path.format(folder=served.folder))
    finally:
        secret.unlink()
        secret.parent.rmdir()
    assert answer.status in (403, 404)
    assert b"hidden words" not in answer.text


def test_the_page_loads_nothing_from_elsewhere(served: Served) -> None:
    answer = Answer(served, "GET", "/")
    assert answer.status == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.headers["content-security-policy"]


def test_another_sites_name_for_this_machine_is_refused(served: Served) -> None:
    """So that a site cannot have its own name resolved to this machine (DNS rebinding)."""
    assert Answer(served, "GET", "/config", Host="evil.example:80").status == 404


def test_uploads_are_limited_and_stay_in_their_folder(served: Served) -> None:
    assert upload(served, "big.mp4", bytes(1_100_000)).status == 413
    for name in ("../../out.mp4", "/out.mp4", "..\\out.mp4", "a/../../../out.mp4"):
        (path,) = json.loads(upload(served, name, b"small").text)
        assert Path(path).resolve().is_relative_to(served.folder.resolve() / ".uploads")


@pytest.mark.parametrize("name", ["page.html", "picture.svg", "script.js"])
def test_what_is_uploaded_does_not_run_as_the_page(served: Served, name: str) -> None:
    (path,) = json.loads(upload(served, name, b"<script>alert(1)</script>").text)
    answer = Answer(served, "GET", f"/gradio_api/file={quote(path)}")
    assert answer.status == 200
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_picture_starts_ghostscript(served: Served) -> None:
    assert not EpsImagePlugin.has_ghostscript()


@pytest.mark.parametrize("path", ["http://127.0.0.1:1/a.mp4", "/etc/passwd", "../../../etc/passwd"])
def test_an_event_takes_only_uploads(served: Served, path: str) -> None:
    """Nothing is fetched or read for a field of a file that names something else."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    heard = hear(served, join(served, "video", {"video": file}, "change"))
    events = [json.loads(line[5:]) for line in heard.splitlines() if line.startswith("data:")]
    (ended,) = [one for one in events if one["msg"] == "process_completed"]
    assert not ended["success"]
    assert "root:" not in heard


def test_a_password_is_asked_for(tmp_path: Path) -> None:
    serving = Serving(str(tmp_path), host="127.0.0.1", password="a long one")
    blocks = serve(serving, block=False)
    try:
        where = Served(blocks.local_url, serving, [], blocks)
        assert Answer(where, "GET", "/config").status == 401
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for password, status in (("another", 400), ("a long one", 200)):
            words = f"username=tokenflow&password={quote(password)}"
            assert Answer(where, "POST", "/login", words, **form).status == status
    finally:
        blocks.close(verbose=False)


@pytest.mark.parametrize("options", [{"share": True}, {"host": "0.0.0.0"}])
def test_others_reach_it_only_with_a_password(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a --password"):
        Serving(**options)
    assert Serving(**options, password="a long one").admits("tokenflow", "a long one")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": "/etc"}, "model: expected one of miniature, miniature-lcm, got '/etc'"),
        ({"editor": "os.system"}, "there is no editor 'os.system'"),
        ({"editor": "tokenflow.editors.PnP"}, "there is no editor"),
        ({"editor": "IPAdapter"}, "there is no editor 'IPAdapter'"),
        ({"propagation": {"class_path": "os.system"}}, "there is no propagation"),
        ({"video": "/etc/passwd"}, "video: expected a file that was uploaded"),
        ({"video": "{uploads}/../../secret.mp4"}, "video: expected a file that was uploaded"),
        ({"video": "{uploads}/link.mp4"}, "video: expected a file that was uploaded"),
        ({"mask": "/etc/passwd"}, "mask: expected a file that was uploaded"),
        ({"video": "a\0b"}, "video: expected a file that was uploaded"),
        (
            {"mask": "{uploads}/large.mp4"},
            "mask: expected frames of at most 65536 pixels, got 258x",
        ),
        ({"depth": "{uploads}/clip.mp4"}, "depth: the model miniature takes none"),
        ({"mask": "{uploads}/clip.mp4", "auto": True}, "expected one mask, got one that was given"),
        ({"resolution": 0}, "resolution: expected at least 1 pixel, got 0"),
        ({"max_frames": 9}, "frames: expected 1 to 8, got 9"),
        ({"max_frames": 10**400}, "max_frames: expected a whole number"),
        (
            {"resolution": 65},
            "65 pixels at their shorter side and 65 at their longer one",
        ),
        ({"start": 801}, "start: expected 0 to 800, got 801; cut the clip out"),
        ({"start": -1}, "start: expected 0 to 800"),
        ({"steps": 11}, "steps: expected at most 10"),
        ({"inversion_steps": "1e9"}, "inversion_steps: expected at most 10"),
        ({"steps": "__import__('os')"}, "steps: expected a whole number"),
        ({"prompt": "a " * 1001 + "b"}, "prompt: expected at most 2000 characters"),
        ({"blend": "!!python/object"}, "blend: expected one of sigmoid, linear"),
        ({"editor.SDEdit.strength": float("nan")}, "strength: expected a finite number"),
        (
            {"editor": "ControlNet", "editor.ControlNet.model": "/etc"},
            "model: expected one of miniature",
        ),
        (
            {"editor": "ControlNet", "editor.ControlNet.condition": "os.system"},
            "condition: expected one of Canny, ControlVideo",
        ),
        (
            {"propagation": "FlowWeighted", "propagation.FlowWeighted.flow": "FlowFiles"},
            "flow: expected one of DIS, got 'FlowFiles'",
        ),
    ],
)
def test_what_a_page_cannot_ask_for(requests: Requests, other: dict[str, Any], said: str) -> None:
    (requests.folder.parent / "secret.mp4").write_bytes(
        (requests.uploads / "clip.mp4").read_bytes()
    )
    (requests.uploads / "link.mp4").symlink_to(requests.folder.parent / "secret.mp4")
    if "large" in str(other):
        make_video(requests.uploads / "large.mp4", noise(1, 256, 258))
    other = {
        name: value.format(uploads=requests.uploads) if isinstance(value, str) else value
        for name, value in other.items()
    }
    with pytest.raises(InputError) as error:
        requests.configuration(given(requests, **other))
    assert said in str(error.value)


def test_a_strip_is_limited_by_its_pixels(requests: Requests) -> None:
    """Not by its shorter side alone: 64 x 128 are the most."""
    strip = make_video(requests.uploads / "strip.mp4", noise(1, 16, 200))
    requests.configuration(given(requests, video=str(strip), resolution=24))
    with pytest.raises(InputError, match=r"26 pixels at their shorter side and 325 at .* 8192"):
        requests.configuration(given(requests, video=str(strip), resolution=26))


def test_what_is_not_an_option_is_not_taken(requests: Requests) -> None:
    """A plugin's files, a class that is no plugin, Lightning's trainer: none is in the result."""
    named = {
        "cache": "/", "backbone": "/", "output.folder": "/", "trainer": {}, "vae": "/",
        "editor.SDEdit.class_path": "os.system", "editor.PnP.attention": 0.1,
    }  # fmt: skip
    found = requests.configuration(given(requests, **named))
    assert found == requests.configuration(given(requests))
    assert found["model"]["editor"] == {"class_path": "SDEdit"}


def test_two_pages_at_once(served: Served, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One edit waits for the other, and each session receives its own events only."""
    begun, waits, running = Event(), Event(), list[Edit]()
    edit, place = Device.edit, Device.place

    def alone(self: Device, one: Edit) -> None:
        running.append(one)
        begun.set()
        assert waits.wait(60)
        edit(self, one)
        assert running.pop() is one

    def placed(self: Device, one: Edit) -> int:
        if self.running not in (None, one):
            waits.set()
        return place(self, one)

    monkeypatch.setattr(Device, "edit", alone)
    monkeypatch.setattr(Device, "place", placed)
    (path,) = json.loads(upload(served, "both.mp4", video.read_bytes()).text)
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    prompts = ("a plain red ball on sand", "a plain green ball on sand")
    fields = {"video": file, "editor": "SDEdit", "steps": 2, "frames": 2}
    sessions = [join(served, "edit", fields | {"prompt": prompts[0]})]
    assert begun.wait(60)
    sessions.append(join(served, "edit", fields | {"prompt": prompts[1]}))
    heard = [hear(served, session) for session in sessions]
    assert "Waiting: number 1 in the queue" in heard[1]
    for text, run, own, other in zip(
        heard, ("both", "both-2"), prompts, prompts[::-1], strict=True
    ):
        assert f"The run is {run}." in text
        assert own in text
        assert other not in text


def test_too_many_do_not_wait(requests: Requests) -> None:
    device = Device(requests)
    edit = Edit(requests.configuration(given(requests)))
    device.running = edit
    device.waiting.extend([edit] * 7)  # the device is not notified of them
    assert not device.full
    device.waiting.append(edit)
    with pytest.raises(InputError, match="8 edits wait already"):
        next(device.run(edit))


def test_who_waits_and_leaves_gives_up_the_place(requests: Requests) -> None:
    device = Device(requests)
    first, second = (Edit(requests.configuration(given(requests, steps=10))) for _ in range(2))
    running = device.run(first)
    while next(running).stage != "edit":
        pass
    waiting = device.run(second)
    assert next(waiting).stage == "waiting"
    second.stop.set()
    assert next(waiting).stage == "stopped"
    waiting.close()
    assert device.waiting == []
    assert second.over.is_set()
    running.close()
    assert first.over.wait(20)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://example.org"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_other_sites_pages_write_nothing(headers: dict[str, str]) -> None:
    page = Only(None, LOCAL)
    own = {"host": "127.0.0.1:7860"}

    def admitted(method: str, more: dict[str, str]) -> bool:
        sent = [(name.encode(), value.encode()) for name, value in (own | more).items()]
        return page.admits({"method": method, "path": "/gradio_api/upload", "headers": sent})

    assert admitted("POST", {"origin": "http://127.0.0.1:7860"})
    assert not admitted("POST", headers)
    assert admitted("GET", headers)
