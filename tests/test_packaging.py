"""What pip and uv read: the metadata in setup.cfg, and little else in pyproject.toml."""

import configparser
import tomllib

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
