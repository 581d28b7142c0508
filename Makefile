# `make train` and `make test` do all set-up. Needs Python 3.11 or newer, with venv and pip; nothing else.
#   make train ARGS="train.steps=400"     overrides of configs/quickstart.yaml
#   make train MODEL=lact_tiny            another model of configs/models/
#   make test TORCH_INDEX=<url>           take PyTorch from this wheel index
#   make test PYTHON=/path/to/python3.11
#   make test CACHE=                      install the environment anew, keep none in ~/.cache/megatron_refine
# SGLang's CPU lane, in an environment of its own: make test-sglang, make train-sglang.
# The GPU's kernels on the CPU, with packages in a folder of their own: make test-kernels.
# The newest Python and Megatron-Core, in an environment of their own: make test-next.

TORCH := 2.13.0
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export OMP_NUM_THREADS := 1
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/megatron_refine
export TORCH_INDEX

.PHONY: help train train-sglang bench test test-all test-gpu test-kernels test-next test-sglang test-slurm test-chaos gpu-kit lint docs configuration clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 15

train: .venv/ready ## train a tiny model with REFINE on two CPU ranks; MODEL=a file of configs/models
	@$(BIN)/megatron-refine train --ranks 2 --config configs/quickstart.yaml \
		$(if $(MODEL),--config configs/models/$(MODEL).yaml run.dir=runs/quickstart_$(MODEL)) $(ARGS)

train-sglang: .venv/ready .venv-sglang/ready ## the same with rollouts from an SGLang server on the CPU
	@$(BIN)/megatron-refine train --ranks 2 --config configs/quickstart.yaml \
		$(if $(MODEL),--config configs/models/$(MODEL).yaml) --config configs/engines/quickstart_sglang.yaml \
		$(if $(MODEL),run.dir=runs/quickstart_sglang_$(MODEL)) $(ARGS)

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

# An environment that was made before from the same files is linked from CACHE (tools/environment.sh).
# setuptools first: the project itself is then built with it, not with one that pip fetches for the purpose.
PROJECT := --no-deps --no-build-isolation --editable .
MADE_FROM := setup.py constraints.txt Makefile
.venv/ready: setup.py constraints.txt
	@$(or $(PYTHON),false) -c '$(RECENT)' || { echo "needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@tools/environment.sh restore .venv "$(CACHE)" $(PYTHON) $(MADE_FROM) || { $(install_requirements); }
	@$(INSTALL) $(PROJECT)
	@$(BIN)/python -c 'import sys; from importlib.metadata import version as v; t = v("torch").split("+")[0]; \
		sys.exit(t != "$(TORCH)" and f"torch is {t}, not $(TORCH): make clean, then again")'
	@touch $@

define install_requirements
fresh=; test -x $(BIN)/python || { $(PYTHON) -m venv .venv && fresh=yes; }; \
$(INSTALL) setuptools && $(install_torch) && \
echo "installing the other requirements into .venv (two or three minutes)" && \
$(INSTALL) --no-build-isolation --editable ".[dev]" && \
{ test -z "$$fresh" || tools/environment.sh keep .venv "$(CACHE)" $(PYTHON) $(MADE_FROM); }
endef

# A folder of packages for PYTHONPATH. They are not in .venv: Megatron-Core imports flash-linear-attention where it finds
# it, and that imports transformers, seconds in every process.
KERNELS_FROM := constraints.txt Makefile
.venv-kernels/ready: constraints.txt | .venv/ready
	@tools/environment.sh restore .venv-kernels "$(CACHE)" $(PYTHON) $(KERNELS_FROM) || { $(install_kernels); }
	@touch $@

define install_kernels
echo "installing Triton and flash-linear-attention into .venv-kernels (a minute)"; rm -rf .venv-kernels; \
$(INSTALL) --no-deps --target .venv-kernels triton fla-core flash-linear-attention && \
tools/environment.sh keep .venv-kernels "$(CACHE)" $(PYTHON) $(KERNELS_FROM)
endef

# The newest Python: one on the PATH, or one that stands beside PYTHON's own, as pyenv puts them.
NEWEST = for v in 3.13 3.12; do for p in "$$(command -v python$$v)" \
	"$$($(BIN)/python -c 'import sys; print(sys.base_prefix)')"/../$$v*/bin/python$$v; do \
	"$$p" -c 'import sys, venv, ssl' 2>/dev/null && { echo "$$p"; exit; }; done; done
NEXT_FROM := setup.py constraints.txt Makefile
AS_NEXT := $(subst .venv,.venv-next,$(INSTALL))
.venv-next/ready: setup.py constraints.txt | .venv/ready
	@newest=$$($(NEWEST)); test -n "$$newest" || { echo "test-next: needs Python 3.12 or 3.13, and finds none" >&2; exit 1; }; \
	tools/environment.sh restore .venv-next "$(CACHE)" "$$newest" $(NEXT_FROM) || { $(install_next); }; \
	.venv-next/bin/python -m pip install --quiet --disable-pip-version-check $(PROJECT)
	@touch $@

define install_next
echo "making .venv-next of $$("$$newest" --version) (three to five minutes)"; \
rm -rf .venv-next && "$$newest" -m venv .venv-next && \
$(AS_NEXT) setuptools && $(subst .venv,.venv-next,$(install_torch)) && \
$(AS_NEXT) --no-build-isolation --editable . pytest pytest-timeout pytest-xdist && \
tools/environment.sh keep .venv-next "$(CACHE)" "$$newest" $(NEXT_FROM)
endef

# SGLang pins a CUDA stack of its own: on a CPU it is installed without dependencies, with those it imports in a list, and
# with stand-ins for what needs a GPU (tests/sglang_cpu). The project comes with it, as SGLang's plug-in.
LANE := .venv-sglang/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
LANE_FROM := tests/sglang_cpu/requirements.txt tests/sglang_cpu/sglang_cpu_stubs.py Makefile
.venv-sglang/ready: tests/sglang_cpu/requirements.txt tests/sglang_cpu/sglang_cpu_stubs.py setup.py | .venv/ready
	@tools/environment.sh restore .venv-sglang "$(CACHE)" $(PYTHON) $(LANE_FROM) || { $(install_sglang); }
	@$(LANE) --no-build-isolation --editable .
	@touch $@

define install_sglang
fresh=; test -x .venv-sglang/bin/python || { $(PYTHON) -m venv .venv-sglang && fresh=yes; }; \
echo "installing SGLang for CPU into .venv-sglang (two or three minutes)"; \
$(LANE) "$$($(BIN)/python -c 'import importlib.metadata as m; print("setuptools==" + m.version("setuptools"))')" && \
$(if $(TORCH_INDEX),$(LANE) --index-url "$(TORCH_INDEX)" "torch==$(TORCH)",\
	{ $(LANE) "torch==$(TORCH)+cpu" 2>/dev/null || $(LANE) "torch==$(TORCH)"; }) && \
$(LANE) --requirement tests/sglang_cpu/requirements.txt && \
packages="$$(.venv-sglang/bin/python -c 'import site; print(site.getsitepackages()[0])')" && \
cp tests/sglang_cpu/sglang_cpu_stubs.py "$$packages" && \
echo "import sglang_cpu_stubs" > "$$packages/sglang_cpu_stubs.pth" && \
{ test -z "$$fresh" || tools/environment.sh keep .venv-sglang "$(CACHE)" $(PYTHON) $(LANE_FROM); }
endef

# A wheel index of PyTorch has other packages in other versions: only torch itself comes from there.
define install_torch
if [ -n "$(TORCH_INDEX)" ]; then \
	echo "installing torch $(TORCH) from TORCH_INDEX into .venv"; \
	$(INSTALL) --no-deps --index-url "$(TORCH_INDEX)" "torch==$(TORCH)"; \
elif nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	echo "installing torch $(TORCH) for this GPU into .venv (several minutes)"; \
	$(INSTALL) "torch==$(TORCH)"; \
else \
	echo "installing torch $(TORCH) for CPU into .venv (a minute or two)"; \
	$(INSTALL) "torch==$(TORCH)+cpu" 2>/dev/null || { \
		echo "no CPU build on the index: taking torch $(TORCH), which may be the larger CUDA build" \
			"(make TORCH_INDEX=<url of a PyTorch wheel index> picks another)"; \
		$(INSTALL) "torch==$(TORCH)"; }; \
fi
endef
