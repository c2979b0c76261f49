# Two commands from a fresh checkout: `make report` and `make test`. Both set up .venv first.

PYTHON ?= python3
VENV ?= .venv
CORES ?= 2
CONFIG ?= config/config.yaml
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: report test check lint format clean

report: $(VENV)/.ready
	driftscope run --config $(CONFIG) --cores $(CORES)
	driftscope report $$(driftscope run --config $(CONFIG) --where)

test: $(VENV)/.ready-test check
	pytest -n $(CORES) --dist loadfile

check: $(VENV)/.ready-test
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	mypy
	driftscope contracts validate contracts
	driftscope contracts lint contracts

format: $(VENV)/.ready-test
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow

clean:
	rm -rf $(VENV) .snakemake .cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# torch first and by its exact version: an open range may bring a build of several gigabytes for GPUs.
$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python scripts/install_llama_cpp.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,transformers,llama-cpp]'
	touch $@
