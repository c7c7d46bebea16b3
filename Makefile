# Two commands set everything up on a fresh machine: git clone, make quickstart.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: quickstart test test-all check bench models clean
.DEFAULT_GOAL := quickstart

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "lit-moe needs Python 3.11 or newer, found " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[plots,dev]'
	touch $@

quickstart: $(READY) ## prune, repair and export the embedded model
	$(BIN)/lightning fit --config configs/quickstart.yaml

test: $(READY) ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(READY) ## the tests, the heavy ones included
	$(BIN)/python -m pytest

check: $(READY) ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(READY) ## the tables of the README
	$(BIN)/python -m tests.benchmarks

models: $(READY) ## train the benchmark models into the cache folder
	$(BIN)/python -m tests.benchmarks.models

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
