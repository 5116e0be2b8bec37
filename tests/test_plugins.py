from importlib.metadata import EntryPoint

import pytest

from tokenflow import plugins
from tokenflow.editors import PnP
from tokenflow.plugins import describe, installed_plugins, load
from tokenflow.propagation import NNField


class Old(PnP):
    interface = 0


def test_the_built_in_ones_come_through_entry_points() -> None:
    kinds = {plugin.name: plugin.kind for plugin in installed_plugins()}
    assert kinds["PnP"] is PnP
    assert kinds["NNField"] is NNField


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("Gone", "no.such.module:Gone", "ModuleNotFoundError"),
        ("Path", "pathlib:Path", "no subclass of Editor"),
        ("Other", "tokenflow.editors:PnP", "named 'Other' but its class 'PnP'"),
        ("Old", "tests.test_plugins:Old", "interface 0"),
    ],
)
def test_an_unusable_plugin_is_listed_with_its_reason(name: str, value: str, reason: str) -> None:
    plugin = load(EntryPoint(name, value, "tokenflow.editors"))
    assert plugin.kind is None
    assert reason in plugin.reason
    assert f"unusable: {name} of unknown distribution: " in describe([plugin])


def test_a_name_offered_twice_is_used_by_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("PnP", "tokenflow.editors:PnP", "tokenflow.editors")
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [entry, entry] if "editors" in group else []
    )
    for plugin in installed_plugins.__wrapped__():
        assert plugin.kind is None
        assert "uninstall one" in plugin.reason
