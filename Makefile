# `make demo` and `make test` do everything on a bare machine that has make and Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Which torch to install, e.g. make demo TORCH="torch==2.13.0". A later call keeps the choice of an earlier one.
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),torch)
export TORCH
# Test processes. Each computes on one thread, so that two of them fill two cores and no more.
WORKERS ?= 2

# Where the demo leaves its model, its numbers and its figure.
RUN ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check format bench clean FORCE

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.train ## install, then train a small model on real text and show what it learnt
	@if [ -e $(RUN) ]; then echo "$(RUN) exists: going on with it. To train anew: rm -r $(RUN), or make demo RUN=runs/another"; fi
	$(BIN)/sparse-moe train --preset demo --out $(RUN) $(if $(wildcard $(RUN)/run_config.json),--resume)

test: $(VENV)/.dev ## install, then run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-gpu: $(VENV)/.dev ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.dev ## rewrite the code in the one format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.train ## the benchmark tables of benchmarks/, quick settings
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.layer --quick

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment: each stamp is written when its step has succeeded ----

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("sparse-moe needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name a newer one: make demo PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@touch $@

# Runs always, but installs and touches its file only when TORCH has changed.
$(VENV)/.torch: FORCE | $(VENV)/.pip
	@[ "$$(cat $@ 2>/dev/null)" = "$$TORCH" ] || { echo "installing $$TORCH" && $(PIP) install $$TORCH && echo "$$TORCH" > $@; }

$(VENV)/.train: pyproject.toml $(VENV)/.torch
	$(PIP) install --editable '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.train $@

FORCE:
