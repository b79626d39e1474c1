# Two commands: `make demo` and `make test`. Each makes the environment it needs; the second run starts at once.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.crosskd_hf_dev
LOWEST ?= .venv-lowest
LOWEST_STAMP := $(LOWEST)/.crosskd_hf_lowest

.PHONY: demo test test-lowest lint types imports unit parity presets slow format clean

demo: $(STAMP)  ## train a teacher, a student and a distilled student on synthetic data, and compare them
	$(BIN)/python examples/distill_coco.py

test: lint types imports unit  ## everything that a pull request has to pass

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-lowest: $(LOWEST_STAMP)  ## the tests with the lowest versions that setup.cfg allows, in an environment of their own
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# Images of coco_tiny; where they are absent, the files that need them are left out.
COCO_TINY ?= ../shared/data/coco_tiny
KINDS := configs postprocess $(if $(wildcard $(COCO_TINY)),evaluation pipeline)

parity: $(STAMP)  ## every golden case and every file of the protocol: the authors' figures beside ours
	$(BIN)/python -m tests.parity.steps tests/golden/*.json
	$(BIN)/python -m tests.parity.protocol --coco $(COCO_TINY) $(foreach kind,$(KINDS),tests/golden/protocol/$(kind)/*.json)

presets: $(STAMP)  ## every published experiment in small: two updates and one evaluation, six minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/presets_dry.py

slow: $(STAMP)  ## long tests: trainings, kills, signals, several processes; about fifteen minutes together
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m slow $(MORE)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what runs and tools leave behind, but not the environment
	rm -rf outputs runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing crosskd_hf and its requirements into $(VENV); the first time that takes a few minutes."
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	@touch $@

$(LOWEST_STAMP): setup.cfg
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	sed -nE 's/^    ([[:alnum:]_-]+)>=([0-9.]+)$$/\1==\2/p' setup.cfg > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --quiet --constraint $(LOWEST)/constraints.txt --editable ".[dev]"
	@touch $@
