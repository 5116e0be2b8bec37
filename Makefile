# `make demo` edits a video, `make test` and `make test-full` are what CI runs, `make app` opens a page.
PYTHON ?= python3
BIN := .venv/bin
EXAMPLE := examples/tokenflow-local
CONSTRAINTS := constraints.txt
# a path file: a folder named tokenflow in the working directory does not hide the package
INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) \
  --config-settings editable_mode=compat --editable
# a worker more than cores: some tests wait for processes that they have started
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal \
  --durations 40

.PHONY: demo app test test-full suite checks docs setup constraints
.DELETE_ON_ERROR:

demo: .venv/demo
	$(BIN)/tokenflow predict --config configs/demo.yaml --output.overwrite true

app: .venv/app
	$(BIN)/tokenflow app --open true

# What a style checker finds at once comes first; the rest runs side by side.
test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(MAKE) --jobs 2 --keep-going suite checks

# The long forms of tests, and those that start programs anew, which `make test` leaves out.
test-full: setup
	$(PYTEST) -m full tests

suite: setup
	$(PYTEST) tests $(EXAMPLE)

checks: export OMP_NUM_THREADS = 1
checks: setup
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/tokenflow predict --config $(EXAMPLE)/local.yaml --model.steps 2 --data.max_frames 9 \
	  --output.folder runs/example --output.overwrite true

# The documentation as static pages in site/; tests build it as well.
docs: .venv/docs
	$(BIN)/python docs/build.py

setup: .venv/test .venv/example

# Newest releases of everything, in a new environment; run the tests before you keep them.
# torch brings its own exact versions of NVIDIA's libraries and triton, where it has any.
constraints:
	rm -rf .venv
	$(MAKE) setup CONSTRAINTS=/dev/null
	$(BIN)/python -m pip freeze --exclude-editable | \
	  sed -E 's/\+[a-z0-9.]+$$//; /^(cuda|nvidia|triton)/d' > constraints.txt

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: setup.cfg pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(INSTALL) .
	touch $@

.venv/app: .venv/demo
	$(INSTALL) '.[app]'
	touch $@

.venv/docs: .venv/demo
	$(INSTALL) '.[docs]'
	touch $@

.venv/test: .venv/demo
	$(INSTALL) '.[test]'
	touch $@

.venv/example: $(EXAMPLE)/setup.cfg $(EXAMPLE)/pyproject.toml | .venv/test
	$(INSTALL) $(EXAMPLE) --no-deps
	touch $@
