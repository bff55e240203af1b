# Everything starts here: `make up` serves a model, `make test` passes the tests. `make help` lists the rest.
SHELL := bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Quiet but for what takes its time; pip's errors and warnings go to standard error as they are.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
SHOW_PROGRESS := { grep --line-buffered -E '^ *(Downloading|Installing collected)' | cut -c 1-110 || true; }

.PHONY: help setup model up test check format lint types contracts bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Create .venv and install the pinned dependencies (quick when done)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "SpotServe needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "==> creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); } \
		|| { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: python3-venv)"; exit 1; }
	@echo "==> installing the pinned dependencies (some minutes the first time)"
	@set -o pipefail; $(PIP_INSTALL) torch | $(SHOW_PROGRESS)
	@set -o pipefail; $(PIP_INSTALL) -e '.[dev]' | $(SHOW_PROGRESS)
	@touch $@
	@echo "==> ready: make up, make test, make help"

model: setup ## Fetch and convert the default model once
	@$(BIN)/spotserve model fetch

# exec: the terminal's Ctrl-C reaches the supervisor itself, and make waits until it has stopped everything.
up: setup ## Serve the default model on three local instances: make up ARGS="--port 8123 --instances 4"
	@exec $(BIN)/spotserve up $(ARGS)

# Three workers on two cores, since the tests of running stacks mostly wait; a file at a time: its tests share a stack.
# In the order of their folders: the files that take long have few tests, and would come last in xdist's own order.
test: model ## Set up and run all tests: make test ARGS="-k planner"
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

format: setup ## Rewrite the source in the project's format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: setup
	@echo "==> format and lint" && $(BIN)/ruff format --check . && $(BIN)/ruff check .

types: setup
	@echo "==> types" && $(BIN)/mypy

contracts: setup
	@echo "==> import contracts" && $(BIN)/lint-imports

check: lint types contracts test ## The gate: format, lint, types, import contracts, tests

bench: model ## Speed and pause figures (close other programs)
	@$(BIN)/python -m loadtest $(ARGS)

clean: ## Remove .venv and caches of this directory
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
