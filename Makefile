# Everything starts here: `make up` serves a model, `make test` passes the tests. `make help` lists the rest.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: help setup model up test check format lint types contracts bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Create .venv and install the pinned dependencies (quick when done)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "SpotServe needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3"; exit 1; }
	@echo "==> creating $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> installing pinned dependencies (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

model: setup ## Fetch and convert the default model once
	@$(BIN)/spotserve model fetch

up: setup ## Serve the default model on three local instances: make up ARGS="--port 8123 --instances 4"
	@$(BIN)/spotserve up $(ARGS)

test: model ## Set up and run all tests
	@$(BIN)/python -m pytest $(ARGS)

format: setup ## Rewrite the source in the project's format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: setup
	@$(BIN)/mypy

contracts: setup
	@$(BIN)/lint-imports

check: lint types contracts test ## The gate: format, lint, types, import contracts, tests

bench: model ## Speed and pause figures (a quarter of an hour; close other programs)
	@$(BIN)/python -m loadtest $(ARGS)

clean: ## Remove .venv and caches of this directory
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
