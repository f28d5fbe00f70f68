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
# What needs a GPU installs nothing: the packages, with triton, pytest and hypothesis, may be those of $(PYTHON).
GPU_PYTHON = PYTHONPATH=.:kernels $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# Most of the time of the tests on a GPU is Triton's compiler: a process for each file, so many at once.
GPU_WORKERS ?= 8
# Another version of Triton, whose interpreter runs the tests of the kernels: make test-triton VERSION=3.8.0
VERSION ?= 3.6.0
OTHER := .venv-triton-$(VERSION)
# lm-eval brings half a gigabyte of packages, so its tests have an environment of their own.
EVAL := .venv-eval
# Another version of transformers, with which the tests of the bridge run: make test-hf VERSION=5.17.0
HF_VERSION := $(if $(filter command environment,$(firstword $(origin VERSION))),$(VERSION),5.17.0)
OTHER_HF := .venv-hf-$(HF_VERSION)

# Where the demo leaves its model, its numbers and its figure.
RUN ?= runs/demo
# Where the benchmarks of the kernels leave their records. COMMIT=name names it in a copy without its history.
RESULTS ?= benchmarks/results
# Text for the haystacks of `make bench-gpu-needle`: TEXT=folder; else source of the installed packages.
TEXT ?=
# The senses of `make bench-gpu-senses`, and its run folder.
MODALITIES ?= text,image,video,audio
SENSES ?= runs/senses-gpu
# Where `make kernel-package` leaves its folder.
PACKAGE ?= build/kernel-package

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-triton test-hf test-eval conformance check format bench bench-gpu bench-gpu-attention bench-gpu-needle bench-gpu-senses kernel-package clean FORCE

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-19s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.train ## install, then train a small model on real text and show what it learnt
	@if [ -e $(RUN) ]; then echo "$(RUN) exists: going on with it. To train anew: rm -r $(RUN), or make demo RUN=runs/another"; fi
	$(BIN)/sparse-moe train --preset demo --out $(RUN) $(if $(wildcard $(RUN)/run_config.json),--resume)

test: $(VENV)/.dev ## install, then run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/triton

test-gpu: ## the tests of the kernels and of Muon on a CUDA device; installs nothing
	@ls tests/test_optim.py tests/triton/test_*.py | OMP_NUM_THREADS=2 xargs -P $(GPU_WORKERS) -I FILE sh -c \
		'out=$$($(GPU_PYTHON) -m pytest -m gpu FILE 2>&1); code=$$?; echo "$$out"; exit $$code'

test-triton: $(OTHER)/.ready ## the tests of the kernels with another Triton, e.g. VERSION=3.6.0
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=.:kernels $(OTHER)/bin/python -m pytest -n $(WORKERS) tests/triton

test-eval: $(EVAL)/.ready ## the tests of the lm-eval adapter
	OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest tests/test_probes.py tests/test_lm_eval.py

test-hf: $(OTHER_HF)/.ready ## the tests of moe.hf with another transformers, e.g. VERSION=5.17.0
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(OTHER_HF)/bin/python -m pytest -n $(WORKERS) tests/hf

conformance: $(VENV)/.dev ## what of ours works with which Hugging Face family, to docs/hf.md
	OMP_NUM_THREADS=2 $(BIN)/python -W ignore tests/hf/conformance.py docs/hf.md

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

bench-gpu: ## the benchmark tables of the kernels on a CUDA device, records to RESULTS=folder; installs nothing
	$(GPU_PYTHON) -m benchmarks.gpu --results $(RESULTS) $(if $(COMMIT),--commit $(COMMIT))

bench-gpu-attention: ## attention over a long cache on a CUDA device, beside torch's; installs nothing
	$(GPU_PYTHON) -m benchmarks.gpu_attention --results $(RESULTS) $(if $(COMMIT),--commit $(COMMIT))

bench-gpu-needle: ## needles in 1 and 10 million tokens on a CUDA device; RUN=folder asks a trained run; installs nothing
	$(GPU_PYTHON) -m benchmarks.gpu_needle --results $(RESULTS) $(if $(COMMIT),--commit $(COMMIT)) \
		$(if $(filter command environment,$(firstword $(origin RUN))),--run $(RUN)) $(if $(TEXT),--folder $(TEXT))

bench-gpu-senses: ## needles of every sense in 1 and 10 million tokens on a CUDA device, to SENSES=folder; installs nothing
	$(GPU_PYTHON) -m moe needle train --modalities $(MODALITIES) --device cuda --out $(SENSES) \
		train.batch_size=8 train.precision=float32 train.steps=2000 train.checkpoint_every=500
	$(GPU_PYTHON) -m moe needle eval $(SENSES) --modalities $(MODALITIES) --device cuda --length 1M,10M \
		$(if $(TEXT),--folder $(TEXT))

kernel-package: ## moe_triton as a folder for the Hugging Face kernel hub, PACKAGE=folder; installs nothing
	$(PYTHON) kernels/package.py $(PACKAGE)

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) .venv-triton-* .venv-hf-* $(EVAL) build dist .pytest_cache .ruff_cache .hypothesis
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

# torch first: some builds of it name one triton, which the next line replaces. The interpreter of triton 3.6
# fails in numpy 2.4.
$(OTHER)/.ready:
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet $$TORCH 'numpy<2.4'
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet \
		triton==$(VERSION) 'numpy<2.4' pytest pytest-xdist hypothesis einops safetensors
	@touch $@

$(EVAL)/.ready: pyproject.toml
	$(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip --disable-pip-version-check install --quiet $$TORCH
	$(EVAL)/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[eval]' pytest hypothesis
$(OTHER_HF)/.ready:
	$(PYTHON) -m venv $(OTHER_HF)
	$(OTHER_HF)/bin/python -m pip --disable-pip-version-check install --quiet $$TORCH \
		transformers==$(HF_VERSION) peft accelerate pytest pytest-xdist hypothesis einops safetensors numpy
	@touch $@

FORCE:
