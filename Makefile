# dlm: from a compute budget to a scaling law. `make` lists the targets.
# BUDGET, SWEEP, LAUNCHER, YES and ALLOW_DIRTY choose what runs and how.
SHELL := /bin/bash

# What a user gives is text: make expands nothing in it, as in SWEEP='$(shell ...)', and `quoted` passes it to the shell.
GIVEN := PYTHON VENV TORCH_INDEX BUDGET SWEEP LAUNCHER YES ALLOW_DIRTY UPGRADE
define NEWLINE


endef
as_text = $(if $(findstring $(NEWLINE),$(value $(1))),$(error $(1) has a line break),$(eval override $(1) := $$(value $(1))))
$(foreach name,$(GIVEN),$(if $(filter undefined,$(origin $(name))),,$(call as_text,$(name))))
quoted = '$(subst ','\'',$(1))'

PYTHON ?= python3
VENV ?= .venv
# The package index from which torch comes, if it is not the usual one (docs/set_up.md).
TORCH_INDEX ?=
# The name of a target: make reads these characters in another way.
HASH := \#
ODD := ; : | % & ' " ` $$ ( ) { } < > ? * [ ] \ ! = ~
ifneq ($(words $(VENV)) $(strip $(foreach char,$(ODD),$(findstring $(char),$(VENV))) $(findstring $(HASH),$(VENV))),1 )
$(error VENV is '$(VENV)': it must be the path of one folder, without spaces and special characters)
endif
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)-oldest
# The resolver of `make lock`, apart from the packages that it pins.
LOCKER := $(VENV)/uv-0.13.9

# Without BUDGET and SWEEP the sweep is the demo. BUDGET alone selects isoflop and is its top budget.
SWEEP ?= $(if $(BUDGET),isoflop,demo)
LAUNCHER ?= auto
YES ?=
ALLOW_DIRTY ?=
UPGRADE ?=
DEFINITION = $(if $(wildcard sweeps/$(SWEEP).yaml),sweeps/$(SWEEP).yaml,$(SWEEP))
TOP = $(if $(BUDGET),--top-budget $(call quoted,$(BUDGET)))
# The later stages work on the folder in workdir/ once the sweep has been planned there.
FOLDER = $(if $(wildcard workdir/$(SWEEP)/plan.json),workdir/$(SWEEP),$(DEFINITION))

.DEFAULT_GOAL := help
.PHONY: help setup sweep plan status collect fit report cancel docs notebook test test-slurm test-long slurm-sandbox check format clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make a virtual environment with everything in it (the other targets do this too): TORCH_INDEX=

$(READY): pyproject.toml constraints.txt
	@$(call quoted,$(PYTHON)) tools/setup.py --venv $(VENV) --torch-index=$(call quoted,$(TORCH_INDEX))
	@touch $@

sweep: $(READY) ## plan, train, collect, fit and report: BUDGET=1e19 SWEEP=isoflop LAUNCHER=auto YES=1 ALLOW_DIRTY=1
	@$(BIN)/dlm sweep $(call quoted,$(DEFINITION)) $(TOP) --launcher $(call quoted,$(LAUNCHER)) $(if $(YES),--yes) $(if $(ALLOW_DIRTY),--allow-dirty)

plan: $(READY) ## show what a sweep would train and cost; start nothing: BUDGET= SWEEP=
	@$(BIN)/dlm plan $(call quoted,$(DEFINITION)) $(TOP)

status: $(READY) ## show what every cell is doing: SWEEP=
	@$(BIN)/dlm status $(call quoted,$(FOLDER))

collect: $(READY) ## gather run directories and W&B files into runs.csv: SWEEP=
	@$(BIN)/dlm collect $(call quoted,$(FOLDER))

fit: $(READY) ## fit a law to runs.csv and print it: SWEEP=
	@$(BIN)/dlm fit $(call quoted,workdir/$(SWEEP)/runs.csv)

report: $(READY) ## collect, fit and write report.html: SWEEP=
	@$(BIN)/dlm report $(call quoted,$(FOLDER))

cancel: $(READY) ## stop the cells that run or wait: SWEEP= YES=1
	@$(BIN)/dlm cancel $(call quoted,$(FOLDER)) $(if $(YES),--yes)

docs: $(VENV)/.docs ## build the documentation into site/, which needs no network
	@$(BIN)/python tools/reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "documentation: site/index.html; to search it too: $(BIN)/python -m http.server --directory site"

$(VENV)/.docs: $(READY)
	@echo "installing mkdocs into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

notebook: $(READY) ## open the notebooks of analysis/ in Jupyter Lab, which is installed the first time
	@test -x $(BIN)/jupyter-lab || { echo "installing Jupyter Lab into $(VENV) ..."; $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'jupyterlab>=4'; }
	@$(BIN)/jupyter-lab --notebook-dir=analysis

test: $(READY) ## run the tests that need neither a cluster nor a GPU
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-slurm: $(READY) ## run the tests on a real SLURM, which is installed and booted here (Debian, root)
	@$(BIN)/python tests/slurm/sandbox.py --install --nodes 1 true
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slurm and not long' tests/slurm

# pytest exits with 5 when it finds no test of a kind.
test-long: $(READY) ## run campaigns and repetitions, for hours; those on SLURM only as root
	@$(BIN)/python -m pytest -m 'long and not slurm and not gpu' || test $$? -eq 5
	@$(BIN)/python tests/long/kills.py
	@$(BIN)/python tests/long/kills_history.py
	@$(BIN)/python tests/long/kills_sweep.py
	@test "$$(id -u)" -ne 0 || $(MAKE) --no-print-directory test-long-slurm

.PHONY: test-long-slurm
test-long-slurm: $(READY)
	@$(BIN)/python tests/slurm/sandbox.py --install --nodes 1 true
	@$(BIN)/python -m pytest -m 'slurm and long' tests/slurm || test $$? -eq 5
	@$(BIN)/python tests/slurm/campaign.py

slurm-sandbox: $(READY) ## open a shell on a temporary SLURM cluster on this machine (Debian, root)
	@$(BIN)/python tests/slurm/sandbox.py --install

check: $(READY) ## check format, lint, types and the walls between the rooms
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## format, and mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# These two need no $(READY), which cannot be made while constraints.txt and pyproject.toml contradict each other.
.PHONY: lock audit
lock: $(LOCKER)/bin/uv ## pin all packages in constraints.txt and requirements.lock: UPGRADE=NAME or UPGRADE=all updates
	@$(call quoted,$(PYTHON)) tools/lock.py --uv $< $(if $(UPGRADE),--upgrade $(call quoted,$(UPGRADE)))

$(LOCKER)/bin/uv:
	@$(call quoted,$(PYTHON)) -m venv $(LOCKER)
	@$(LOCKER)/bin/python -m pip install --quiet --disable-pip-version-check $(subst uv-,uv==,$(notdir $(LOCKER)))

.PHONY: test-oldest
test-oldest: $(LOCKER)/bin/uv ## run dlm with the oldest packages that pyproject.toml allows, but torch; takes minutes
	@$(call quoted,$(PYTHON)) tools/oldest.py --uv $< --venv $(OLDEST)

audit: ## ask a public list whether packages of constraints.txt have known vulnerabilities
	@$(call quoted,$(PYTHON)) tools/audit.py

clean: ## remove the virtual environment, the built documentation and the caches; workdir/ and data/ stay
	rm -rf $(VENV) $(OLDEST) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
