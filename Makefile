# dlm: from a compute budget to a scaling law. `make` lists the targets; BUDGET, SWEEP, LAUNCHER and YES choose what runs.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Without BUDGET and SWEEP it is the demo; BUDGET alone selects isoflop and is its top budget.
SWEEP ?= $(if $(BUDGET),isoflop,demo)
LAUNCHER ?= auto
YES ?=
ALLOW_DIRTY ?=
DEFINITION = $(if $(wildcard sweeps/$(SWEEP).yaml),sweeps/$(SWEEP).yaml,$(SWEEP))
TOP = $(if $(BUDGET),--top-budget '$(BUDGET)')
# On a folder in workdir/ the later stages work from what was planned there.
FOLDER = $(if $(wildcard workdir/$(SWEEP)/plan.json),workdir/$(SWEEP),$(DEFINITION))

.DEFAULT_GOAL := help
.PHONY: help setup sweep plan status collect fit report cancel test test-slurm slurm-sandbox check format clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make a virtual environment with everything, from nothing (the other targets call it)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dlm needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dlm and its libraries into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

sweep: $(READY) ## plan, train, collect, fit and report: BUDGET=1e19 SWEEP=isoflop LAUNCHER=auto YES=1 ALLOW_DIRTY=1
	@$(BIN)/dlm sweep $(DEFINITION) $(TOP) --launcher $(LAUNCHER) $(if $(YES),--yes) $(if $(ALLOW_DIRTY),--allow-dirty)

plan: $(READY) ## show what a sweep would be, start nothing: BUDGET= SWEEP=
	@$(BIN)/dlm plan $(DEFINITION) $(TOP)

status: $(READY) ## what every cell is doing: SWEEP=
	@$(BIN)/dlm status $(FOLDER)

collect: $(READY) ## run directories and W&B files -> runs.csv: SWEEP=
	@$(BIN)/dlm collect $(FOLDER)

fit: $(READY) ## runs.csv -> the law, on the screen: SWEEP=
	@$(BIN)/dlm fit workdir/$(SWEEP)/runs.csv

report: $(READY) ## collect, fit and write report.html: SWEEP=
	@$(BIN)/dlm report $(FOLDER)

cancel: $(READY) ## stop what runs or waits: SWEEP=
	@$(BIN)/dlm cancel $(FOLDER) $(if $(YES),--yes)

test: $(READY) ## everything that needs no cluster and no GPU
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-slurm: $(READY) ## the tests on a real SLURM, installed (Debian, root) and booted here for them
	@$(BIN)/python tests/slurm/sandbox.py --install --nodes 1 true
	@$(BIN)/python -m pytest -m slurm tests/slurm

slurm-sandbox: $(READY) ## a shell on a throwaway SLURM cluster of this machine, gone when the shell ends
	@$(BIN)/python tests/slurm/sandbox.py --install

check: $(READY) ## format, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## format and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## remove the virtual environment and caches (workdir/ and data/ stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
