# Two commands: `make demo` edits a video, `make test` runs everything that CI runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup
.DELETE_ON_ERROR:

demo: .venv/demo
	$(BIN)/tokenflow predict --config configs/demo.yaml --output.overwrite true

test: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

setup: .venv/test

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
