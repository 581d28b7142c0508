"""Packages of setup.py's extras in a version that cannot be used: said before they are imported.

Transformer Engine raises RuntimeError or AssertionError from its import where a part is missing or of another version,
and Megatron-Core, which imports it wherever it is, catches ImportError alone. Nothing here imports any of them, nor
torch.
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megatron_refine.config import Config, ConfigError

FLA = "0.6.0"  # as setup.py: the tables of kernels/tuning are of its kernels
TE = SpecifierSet(">=2.9,<2.12")  # that Megatron-Core 0.16.1 takes
TE_REMEDY = (
    "pip install --no-build-isolation '.[te]', which compiles it (docs/gpus.md#transformer-engine), or pip uninstall "
    "{packages}"
)
PARTS = {  # each as a package of its own, or as a library of what was built from a checkout
    "transformer-engine-cu13": "libtransformer_engine*.so",
    "transformer-engine-torch": "transformer_engine_torch*.so",
}
TRITON = {
    "triton": "Triton is not installed: pip install 'triton==3.7.1'; PyTorch's build for CPUs brings none",
    "fla": "flash-linear-attention is not installed: pip install '.[gpu]'",
}
_TE = ("transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13", "transformer-engine-torch")


def check_transformer_engine() -> None:
    """Raise ConfigError where Transformer Engine is installed and would fail, or Megatron-Core would with it."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    found = {name: version for name in _TE if (version := _version(name))}
    for name, version in found.items():
        if not TE.contains(version, prereleases=True):
            raise _refused(f"{name} {version} is installed, and Megatron-Core takes {TE}", found)
    if len(set(found.values())) > 1:
        parts = ", ".join(f"{name} {version}" for name, version in found.items())
        raise _refused(f"its parts are of different versions: {parts}", found)
    for part, library in PARTS.items():
        if not _has(found, part, library):
            raise _refused(f"{part} is missing", found)


def _has(found: dict[str, str], part: str, library: str) -> bool:
    """Whether a part of PARTS is there."""
    if part in found or (part == "transformer-engine-cu13" and "transformer-engine-cu12" in found):
        return True
    spec = importlib.util.find_spec("transformer_engine")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    return any(path for place in places for path in [*place.rglob(library), *place.parent.glob(library)])


def _refused(what: str, found: dict[str, str]) -> ConfigError:
    remedy = TE_REMEDY.format(packages=" ".join(found) or "transformer-engine")
    return ConfigError(f"Transformer Engine: {what}: {remedy}")


def check_optimizer(config: Config) -> None:
    """Raise ConfigError where Muon is asked for and Megatron-Core is too old for it, or the package is missing."""
    from megatron_refine.platform.megatron.version import VERSION, since  # servers have no Megatron-Core

    if config.optimizer.kind != "muon":
        return
    if not since(0, 19):
        missing = f"needs Megatron-Core 0.19, not {VERSION}: run on Python 3.12 or later"
    elif importlib.util.find_spec("emerging_optimizers") is None:
        missing = "needs NVIDIA's package emerging_optimizers: install it from its repository (docs/compatibility.md)"
    else:
        return
    raise ConfigError(f"optimizer.kind=muon: {missing}, or choose adam")


def check_fla() -> None:
    """Raise ConfigError where flash-linear-attention is missing, or not the version that the kernels were tried in."""
    loaded = sys.modules.get("fla")  # what counts launches stands in for it
    version = loaded.__version__ if loaded else _version("flash-linear-attention")
    if version is None:
        raise ConfigError(
            "a GPU is visible but flash-linear-attention is not installed, and the torch path would be an order of "
            "magnitude slower: pip install '.[gpu]', or hide the GPU with CUDA_VISIBLE_DEVICES="
        )
    if version.partition("+")[0] != FLA:
        raise ConfigError(
            f"flash-linear-attention {version} is installed, and its kernels were tried in {FLA} alone: "
            f"pip install 'flash-linear-attention=={FLA}'"
        )


def check_triton() -> None:
    """Raise ConfigError where Triton or flash-linear-attention is missing, which compile and measure kernels."""
    for package, remedy in TRITON.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"kernels: {remedy} (docs/gpu.md)")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
