"""What pip and uv read: the metadata in setup.cfg, and little else in pyproject.toml."""

import configparser
import tomllib
from itertools import chain

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT

# a field that pyproject.toml does not call dynamic is not taken from setup.cfg
FIELDS = {
    "version": ("metadata", "version"),
    "description": ("metadata", "description"),
    "readme": ("metadata", "long_description"),
    "license": ("metadata", "license"),
    "classifiers": ("metadata", "classifiers"),
    "requires-python": ("options", "python_requires"),
    "dependencies": ("options", "install_requires"),
    "optional-dependencies": ("options.extras_require", "test"),
    "scripts": ("options.entry_points", "console_scripts"),
    "entry-points": ("options.entry_points", "tokenflow.editors"),
}


def test_pyproject_holds_only_what_pip_and_uv_need() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(pyproject) == {"build-system", "project"}
    assert pyproject["build-system"]["build-backend"] == "setuptools.build_meta"
    project = pyproject["project"]
    assert set(project) == {"name", "dynamic"}
    assert project["name"] == setup["metadata"]["name"]
    assert sorted(project["dynamic"]) == sorted(FIELDS)
    for section, option in FIELDS.values():
        assert setup[section][option], option


def test_constraints_pin_what_setup_requires() -> None:
    """Exactly, with versions that setup.cfg accepts, and that every index has (no +cpu)."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, version = line.split("==")
        pins[canonicalize_name(name)] = Version(version)
        assert Version(version).local is None, line
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"].values()
    for line in chain(setup["options"]["install_requires"].splitlines(), *map(str.split, extras)):
        if line and not line.startswith("tokenflow["):
            required = Requirement(line)
            assert pins[canonicalize_name(required.name)] in required.specifier, line
