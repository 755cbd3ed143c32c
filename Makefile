# Two commands: `make demo` runs the main job, `make test` lints and passes the tests. Each sets itself up.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
START := $(shell date +%s)
# ARGS goes to the demo (make demo ARGS="--preset qwen3-30b-a3b --layers 2"), PYTEST_ARGS to pytest, which runs the files
# of tests in WORKERS processes; with WORKERS=0 in one, as a debugger needs it.
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

# An interpreter that is asked for and is not the one in $(VENV) makes a new one.
WHICH := -c 'import sys; print(sys.base_prefix, sys.version)'
CLEAR :=
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) $(WHICH) 2>&1),$(shell $(BIN)/python $(WHICH) 2>&1))
CLEAR := --clear
$(STAMP): FORCE
endif
endif

elapsed = @echo "$(1): $$(( $$(date +%s) - $(START) )) s"

.PHONY: help demo test lint format clean FORCE

help:
	@echo "make demo    build, train, compile and compare a small MoE model (no GPU needed)"
	@echo "make test    lint, type check, spell check and all tests that need no GPU"
	@echo "make lint    the first part of make test;  make format  lets ruff rewrite files;  make clean  removes .venv and caches"

demo: $(STAMP)
	@$(BIN)/python -m diffulex demo $(ARGS)
	$(call elapsed,make demo (set-up included))

test: lint
	@$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)
	$(call elapsed,make test (set-up included))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Done once, and again when what is to be installed changes.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; Python 3.11 or newer is needed (PYTHON=... picks one)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed; set PYTHON, e.g. make test PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; torch and triton are large downloads)"
	@$(PYTHON) -m venv $(CLEAR) $(VENV) || { echo "error: $(PYTHON) cannot create $(VENV); on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@
	$(call elapsed,set-up)
