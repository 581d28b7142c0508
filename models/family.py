"""Model families. Each is a folder beside this file, whose package has one `FAMILY`; nothing else names it.

A family that lives elsewhere goes by its package: `model.family: my.package`, with a `FAMILY` in it. What a file says
that may be a stranger's imports nothing: there a package counts that the user's configuration has named, or the
environment, in MEGATRON_REFINE_FAMILIES. Importing this pulls in neither torch nor Megatron.
"""

import functools
import math
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from megatron_refine import models
from megatron_refine.config import ConfigError, ModelConfig
from megatron_refine.models.hf import Format
from megatron_refine.models.layer import Layer, named


class Slot(NamedTuple):
    """What SGLang keeps of a request in each layer that has a state, on a rank of a server."""

    conv: list[tuple[int, ...]]  # shapes; the last rows before a convolution, or a window
    temporal: tuple[int, ...]  # shape of the memory

    @property
    def bytes(self) -> int:
        """Count those of a layer: all of it is fp32."""
        return 4 * sum(math.prod(shape) for shape in (*self.conv, self.temporal))


@dataclass(frozen=True)
class Serving:
    """How SGLang serves a family."""

    module: str  # offers MODEL, the class that SGLang loads; needs SGLang
    slot: Callable[[Any, int], Slot]  # of a model, on each of tp ranks
    by_columns: tuple[str, ...] = ("o_proj.weight", "down_proj.weight")  # ends of names that its ranks cut so
    whole: tuple[str, ...] = ("norm.weight",)  # ends of names that each of its ranks has whole; others: cut by rows
    alias: bool = False  # SGLang has a class of its own for the model type: servers know the family by another
    blocks: Callable[[Any], Mapping[str, Sequence[int]]] = lambda model: {}  # ends of names -> rows cut by themselves


@dataclass(frozen=True)
class Family:
    """All that the rest of the project knows of a family."""

    name: str
    config: type[ModelConfig]
    layers: Callable[[Any], list[Layer]]  # of a configuration; equal layers may be one object
    format: Format
    reference: str  # `module:function` of the slow evaluation: (model, weights in Hugging Face's format, tokens [B, T])
    serving: Serving | None = None  # None: the native engine alone
    error_factor: Callable[[Any], float] = lambda model: 1.0  # of rounding errors, against those of the other families


PACKAGES = "MEGATRON_REFINE_FAMILIES"  # of the environment: packages of families, separated by commas
_named: set[str] = set()  # packages that this process's configuration has named


def of(name: str) -> Family:
    """Return a family by its folder's name, or by its package's, which it imports.

    Raises KeyError where there is none, ConfigError where its package lacks another one.
    """
    if "." not in name and name not in _folders():
        raise KeyError(name)
    package = name if "." in name else f"{models.__name__}.{name}"
    try:
        found = getattr(import_module(package), "FAMILY", None)
    except ModuleNotFoundError as error:
        if error.name and f"{package}.".startswith(f"{error.name}."):
            raise KeyError(name) from None
        raise ConfigError(f"model.family={name}: {error}; install it") from None
    if not isinstance(found, Family):
        raise KeyError(name)
    if "." in name:
        _named.add(name)
    return found


def stored(name: str) -> Family:
    """Return the family that a checkpoint names: one that has a folder here, or that the user has named.

    Raises KeyError.
    """
    if "." in name and name not in _packages():
        raise KeyError(name)
    return of(name)


def every() -> list[Family]:
    """Return the families that have a folder here, then those that the user has named."""
    return [of(name) for name in (*_folders(), *_packages())]


def by_model_type(model_type: object) -> Family | None:
    """Return the family, one of `every`, that has a config.json's model_type."""
    for x in every():
        if model_type in (x.format.model_type, *x.format.also, served_as(x)["model_type"]):
            return x
    return None


def hint(name: object) -> str:
    """Return what to add to the refusal of a family that a file names."""
    package = isinstance(name, str) and "." in name
    return f"; if it is a package that you trust, set {PACKAGES}={name}" if package else ""


def _packages() -> list[str]:
    return sorted({*_named, *filter(None, os.environ.get(PACKAGES, "").replace(" ", "").split(","))})


def served_as(each: Family) -> dict[str, Any]:
    """Return the fields of config.json by which SGLang knows a family."""
    told = each.format.model_type, each.format.architecture
    if each.serving and each.serving.alias:
        told = f"refine_{told[0]}", f"Refine{told[1]}"
    return {"model_type": told[0], "architectures": [told[1]]}


def layers(model: ModelConfig) -> Sequence[Layer]:
    """Return the model's layers, the first one first."""
    return _layers(_Itself(model))


class _Itself:
    """A key of a cache: this very object. (A configuration with lists has no hash.)"""

    def __init__(self, model: ModelConfig):
        self.model = model

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.model is self.model


@functools.lru_cache(maxsize=8)
def _layers(key: _Itself) -> tuple[Layer, ...]:
    return tuple(of(key.model.family).layers(key.model))


def reference(model: ModelConfig) -> Callable[..., Any]:
    """Return the slow evaluation of the model's family: logits(model, weights in Hugging Face's format, tokens)."""
    found: Callable[..., Any] = named(of(model.family).reference)
    return found


def serve(name: str) -> Any:
    """Import what a family offers SGLang: `MODEL`, the class that it loads. Needs SGLang."""
    serving = of(name).serving
    assert serving, name
    return import_module(serving.module)


@functools.cache
def _folders() -> tuple[str, ...]:
    """Names of the packages beside this file that have a FAMILY."""
    packages = sorted(each.name for each in pkgutil.iter_modules(models.__path__) if each.ispkg)
    return tuple(name for name in packages if hasattr(import_module(f"{models.__name__}.{name}"), "FAMILY"))


class _Schemas(Mapping[str, type[ModelConfig]]):
    def __getitem__(self, name: str) -> type[ModelConfig]:
        return of(name).config

    def __iter__(self) -> Iterator[str]:
        return iter(_folders())

    def __len__(self) -> int:
        return len(_folders())


FAMILIES: Mapping[str, type[ModelConfig]] = _Schemas()
"""Name -> class of the `model` section; iterates over the folders, and knows other packages too."""
