"""Built-in functions by name, others by import path `package.module:function`."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from megatron_refine.config import ConfigError


def resolve(key: str, name: str, builtin: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that the configuration key names. Raises ConfigError naming the key where there is none."""
    if name in builtin:
        return builtin[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"{key}={name}: unknown; choose one of {', '.join(builtin)} or an import path module:function"
        )
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}={name}: cannot be imported: {error}") from None
    if not callable(found):
        raise ConfigError(f"{key}={name}: is not a function")
    return found
