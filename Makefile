# `make train` and `make test` do all set-up. Needs Python 3.11 or newer, with venv and pip; nothing else.
#   make train ARGS="train.steps=400"     overrides of configs/quickstart.yaml
#   make train MODEL=lact_tiny            another model of configs/models/
#   make test TORCH_INDEX=<url>           take PyTorch from this wheel index
#   make test PYTHON=/path/to/python3.11
#   make test CACHE=                      install the environment anew, keep none in ~/.cache/megatron_refine
# SGLang's CPU lane, in an environment of its own: make test-sglang, make train-sglang.
# The GPU's kernels on the CPU, with packages in a folder of their own: make test-kernels.
# The newest Python and Megatron-Core, in an environment of their own: make test-next.

RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export OMP_NUM_THREADS := 1

.PHONY: help train train-sglang study bench test test-all test-gpu test-kernels test-next test-sglang test-slurm test-chaos gpu-kit lint docs configuration clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

QUICKSTART := runs/quickstart$(MODEL:%=_%)
START = $(BIN)/megatron-refine train --ranks 2 --config configs/quickstart.yaml \
	$(if $(MODEL),--config configs/models/$(MODEL).yaml) run.dir=$(QUICKSTART)
train: .venv/ready ## train a tiny model with REFINE on two CPU ranks; MODEL=a file of configs/models
	@$(if $(ARGS),,test -f $(QUICKSTART)_ntp/report.html || { \
		echo "first NTP alone, to compare with: once, in $(QUICKSTART)_ntp"; \
		$(START) run.dir=$(QUICKSTART)_ntp refine.start_step=210; })
	@$(START) $(if $(ARGS),$(ARGS),run.baseline=$(QUICKSTART)_ntp)

train-sglang: .venv/ready .venv-sglang/ready ## the same with rollouts from an SGLang server on the CPU
	@$(BIN)/megatron-refine train --ranks 2 --config configs/quickstart.yaml \
		$(if $(MODEL),--config configs/models/$(MODEL).yaml) --config configs/engines/quickstart_sglang.yaml \
		$(if $(MODEL),run.dir=runs/quickstart_sglang_$(MODEL)) $(ARGS)

STUDY := full
study: .venv/ready ## does REFINE teach? an hour on two cores, resumed; STUDY=small: minutes
	@$(BIN)/megatron-refine study configs/study/$(STUDY).yaml $(if $(filter full,$(STUDY)),--page docs/learning.md) $(ARGS)

bench: .venv/ready ## time steps of the quickstart: NTP-only, fused and two-pass in turn
	@$(BIN)/torchrun --standalone --nproc-per-node 2 -m megatron_refine bench step --config configs/quickstart.yaml $(ARGS)

# Several tests at once: one that has a single rank leaves the other cores idle. JOBS=0 runs them in this process.
JOBS := logical
PYTEST := $(BIN)/python -m pytest tests -q -rs
PARALLEL := -n $(JOBS) --maxprocesses 8 --dist worksteal

test: .venv/ready ## what every change should pass; GPU tests skip where there is no GPU, and say so
	@$(PYTEST) $(PARALLEL) -m "not slow and not kernels and not sglang and not slurm" --durations=15 $(ARGS)
	@echo "the full matrix: make test-all; on their own: make test-kernels, make test-sglang, make test-slurm, make test-chaos"

test-all: .venv/ready ## the same in every family, layout and precision
	@$(PYTEST) $(PARALLEL) -m "not kernels and not sglang and not slurm" --durations=25 $(ARGS)

test-gpu: .venv/ready ## the tests that need a GPU
	@$(PYTEST) -m gpu $(ARGS)

test-kernels: .venv/ready .venv-kernels/ready ## the tests of the GPU's Triton kernels, in Triton's interpreter on the CPU
	@PYTHONPATH=$(CURDIR)/.venv-kernels TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m kernels --durations=15 $(ARGS)

NEXT := golden updates branches overlap offload checkpoint layouts pickles platform
test-next: .venv/ready .venv-next/ready ## the core's tests and a short run on the newest Python and Megatron-Core
	@.venv-next/bin/python -m pytest $(NEXT:%=tests/test_%.py) tests/test_next.py -q -rs $(PARALLEL) -m "not slow" \
		--durations=15 $(ARGS)

test-sglang: .venv/ready .venv-sglang/ready ## the tests against real SGLang servers on the CPU
	@$(PYTEST) -n $(JOBS) --maxprocesses 2 --dist worksteal -m sglang --durations=15 $(ARGS)

test-slurm: .venv/ready ## as root: the tests on a real SLURM cluster and between two hosts, both on this machine
	@command -v slurmctld slurmd munged ip > /dev/null || { \
		echo "installing SLURM and munge from the distribution"; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge iproute2 > /dev/null; }
	@$(PYTEST) -n $(JOBS) --maxprocesses 2 --dist worksteal -m slurm --durations=15 $(ARGS)

KILLS := 20
test-chaos: .venv/ready ## kill ranks at random moments, KILLS=20 times; SEED= repeats a run
	@CHAOS_KILLS=$(KILLS) $(if $(SEED),CHAOS_SEED=$(SEED)) $(BIN)/python -m pytest tests/test_chaos.py -q -rs $(ARGS)

# KERNELS: an interpreter with the GPU machine's Python and Triton, PyTorch and flash-linear-attention (docs/gpu.md).
gpu-kit: .venv/ready .venv-kernels/ready ## a folder .gpu-kit for a GPU machine without network: wheels, compiled kernels, stages
	@$(if $(KERNELS),,PYTHONPATH="$(CURDIR)/.venv-kernels") launch/kit/build.sh .gpu-kit "$(or $(KERNELS),$(BIN)/python)"

lint: .venv/ready ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The generator has an environment of its own: without PyTorch it is there in seconds. DOCS is the extra docs of setup.py.
# Material is maintained until May 2027; its makers go on with Zensical, which reads the same mkdocs.yml.
DOCS := mkdocs-material
docs: .venv-docs/ready ## build the documentation as a site, in site/
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	@echo "site/index.html"

.venv-docs/ready: setup.py constraints.txt
	@test -x .venv-docs/bin/python || $(or $(PYTHON),false) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$(DOCS)"
	@touch $@

configuration: .venv/ready ## write docs/configuration.md, from the schema and docs/configuration.md.in
	@$(BIN)/python -m megatron_refine.config.document $(ARGS)

clean: ## remove the environments, the site and all caches; runs/ stays
	rm -rf .venv .gpu-kit .venv-kernels .venv-next .venv-sglang .venv-docs site .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include tools/environments.mk
