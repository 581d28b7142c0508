# How the environments are made, apart from the Makefile: what they are made from is the key of their copies in the cache.

TORCH := 2.13.0
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/megatron_refine
export TORCH_INDEX

# An environment that was made before from the same files is linked from CACHE (tools/environment.sh).
# setuptools first: the project itself is then built with it, not with one that pip fetches for the purpose.
PROJECT := --no-deps --no-build-isolation --editable .
MADE_FROM := setup.py constraints.txt tools/environments.mk
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
KERNELS_FROM := constraints.txt tools/environments.mk
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
NEXT_FROM := setup.py constraints.txt tools/environments.mk
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
LANE_FROM := tests/sglang_cpu/requirements.txt tests/sglang_cpu/sglang_cpu_stubs.py tools/environments.mk
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
