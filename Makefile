# The commands of the house. `make demo` and `make test` need only Python 3.11 and make: they set up the rest.
#
#   make setup    .venv with the package installed
#   make demo     the main job, end to end, on real data
#   make test     all tests
#   make check    format, lint, types
#   make bench    speed beside the rivals
#   make chaos    50 trainings killed at random moments and resumed to the byte
#   make clean    remove what was made here; .venv, other runs and what was fetched stay (make clean-all: those go too)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Python 3.11 is what is tested, so it is preferred to a newer python3.
ifndef PYTHON
PYTHON := $(shell for name in python3.11 python3 python; do \
  if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v $$name; break; fi; done)
endif
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
DEMO_RUN := runs/addresses

.PHONY: help setup demo test check bench chaos clean clean-all

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.installed

# The stamp is newer than what it was made from, so a second `make` calls no pip and needs no network.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; install it, or say where: make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed but $(PYTHON) is $$("$(PYTHON)" -V); say where one is: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; rm -rf $(VENV); exit 2; }
	@echo "installing into $(VENV) (about 1 GB, mostly torch; a few minutes once)" >&2
	$(PIP) -e '.[test]'
	@touch $@

# The extras that only some targets need, each with a stamp of its own.
$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) -e '.[$*]'
	@touch $@

demo: setup
	$(BIN)/tunesmith models pull smollm2-135m-instruct
	$(BIN)/python examples/addresses/prepare.py
	@rm -rf $(DEMO_RUN)
	$(BIN)/tunesmith run recipes/addresses.yaml --run $(DEMO_RUN)

test: setup
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/train.py

chaos: setup
	$(BIN)/python tests/chaos/kills.py 50

clean:
	rm -rf build dist $(DEMO_RUN) benchmarks/out examples/*/data .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-all: clean
	rm -rf $(VENV) .cache runs
