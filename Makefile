# Everything sets itself up: python3.11 or newer and g++ are all it needs. `make` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

PY := $(VENV)/bin/python
# The stamp's name holds what was installed and from where, so only a real change installs again.
KEY   := $(shell (cat pyproject.toml constraints.txt; pwd) | cksum | cut -d' ' -f1)
READY := $(VENV)/.ready-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## compile a small model and show what it gained
	$(PY) examples/demo.py

test: $(READY) ## run every test (those that need a GPU skip where there is none)
	$(PY) -m pytest -n $(JOBS) --dist worksteal

lint: $(READY) ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY) ## measure slim beside the peers that are installed (benchmarks/cpu.py --install)
	$(PY) benchmarks/cpu.py

clean: ## remove the environment and everything generated
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "slim needs Python 3.11 or newer, and there is no '$(PYTHON)'. Name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "slim needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'setting up $(VENV): a few minutes the first time, nothing after that'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	@rm -f $(VENV)/.ready-*
	@touch $@
