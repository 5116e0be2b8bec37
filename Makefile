# Two commands: `make demo` edits a video, `make test` runs everything that CI runs.
PYTHON ?= python3
BIN := .venv/bin
EXAMPLE := examples/tokenflow-local
# begun first, so that no core waits for another at the end
LONGEST := $(addprefix tests/,miniature/test_edits.py engine/test_resume.py \
  engine/ranks/test_group.py training/test_control.py)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations 40

.PHONY: demo test test-full suite checks docs setup
.DELETE_ON_ERROR:

demo: .venv/demo
	$(BIN)/tokenflow predict --config configs/demo.yaml --output.overwrite true

# What a style checker finds at once comes first; the rest runs side by side.
test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --jobs 2 --keep-going suite checks

# The long forms of tests, minutes each, which `make test` leaves out.
test-full: setup
	$(PYTEST) -m full tests

suite: setup
	$(PYTEST) $(LONGEST) tests $(EXAMPLE)

checks: export OMP_NUM_THREADS = 1
checks: setup
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/tokenflow plugins check LocalPnP
	$(BIN)/tokenflow plugins check LocalField
	$(BIN)/tokenflow predict --config $(EXAMPLE)/local.yaml --model.steps 2 --data.max_frames 9 \
	  --output.folder runs/example --output.overwrite true

# The documentation as static pages in site/; tests build it as well.
docs: .venv/docs
	$(BIN)/python docs/build.py

setup: .venv/test .venv/example

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/docs: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/example: $(EXAMPLE)/setup.cfg $(EXAMPLE)/pyproject.toml | .venv/test
	$(BIN)/python -m pip install --quiet --no-deps --editable $(EXAMPLE)
	touch $@
