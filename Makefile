# The recipe book. Every target prints the `lm` command that it runs, so `make data train` teaches the tool.
# The first use of any target makes .venv with the versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LM     := $(BIN)/lm
SET    ?= shards/stdlib
RUN    ?= runs/nano
PROMPT ?= def

.DEFAULT_GOAL := help
.PHONY: help env data train eval generate test test-all lint types check docs build clean

help:  ## Show this list
	@echo "make data train     a first model: tokenize, validate, split, train (about five minutes on two cores)"
	@echo
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

env: $(VENV)/.ready  ## Make the virtual environment and install the package (editable)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

data: env  ## Tokenize the interpreter's own standard library, check the shards, split off validation data
	$(LM) tokenize --dataset stdlib --out $(SET)
	$(LM) validate $(SET)
	$(LM) split $(SET)

train: env  ## Train a small model on it; run again to continue
	$(LM) train $(RUN) --preset nano --data $(SET)

eval: env  ## Loss, perplexity and bits per byte on the held-out documents
	$(LM) eval $(RUN)

generate: env  ## Let the model write: make generate PROMPT='import os'
	$(LM) generate --checkpoint $(RUN) --prompt '$(PROMPT)'

test: env  ## The test suite (about ten minutes on two cores; no GPU, no network)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m "not slow"

test-all: env  ## Everything, the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: env  ## Style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env  ## Static types, strict
	$(BIN)/mypy lmcore tools

check: lint types test  ## What CI runs

docs: env  ## Write docs/cli.md from the commands' help
	$(BIN)/python docs/make_cli.py

build: env  ## Build sdist and wheel into dist/
	rm -rf build dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build

clean:  ## Remove caches, runs and tokenized data (the environment stays)
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find shards -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
	find lmcore tools tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
