"""Built-in functions by name, others by import path `package.module:function`."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from megatron_refine.config import Config, ConfigError
from megatron_refine.platform import hardware


def resolve(key: str, name: str, builtin: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that the configuration key names. Raises ConfigError naming the key where there is none."""
    if name in builtin:
        return builtin[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}={name}: cannot be imported: {error}") from None
    if not callable(found):
        raise ConfigError(f"{key}={name}: is not a function")
    return found


def reading(reward: Callable[..., Any], decode: Callable[[list[int]], str] | None) -> Callable[..., Any]:
    """The reward as a function of four tensors, whether it reads text (has a parameter `decode`) or not."""
    return partial(reward, decode=decode) if "decode" in signature(reward).parameters else reward


def check_hooks(config: Config) -> None:
    """Call the functions of the user's own on small random input. Raises ConfigError where one cannot be used."""
    r, device = config.refine, hardware.device()
    shape = b, c, n, k = 2, r.num_chunks, r.num_rollouts, r.rollout_len
    if ":" in r.reward:
        tokens = torch.zeros(*shape, dtype=torch.int64, device=device)
        truth = torch.zeros(b, c, k, dtype=torch.int64, device=device)
        states = torch.rand(*shape, config.model.hidden_size, device=device)
        true_states = torch.rand(b, c, k, config.model.hidden_size, device=device)
        called = "(tokens [B, c, n, k], truth [B, c, k], h_pred [B, c, n, k, h], h_true [B, c, k, h])"
        _try("refine.reward", r.reward, called, (tokens, truth, states, true_states), (b, c, n), _numbers)
    for key, name in (("refine.selection", r.selection), ("eval.selection", config.eval.selection)):
        if ":" in name:
            length = max(64, config.shortest_refine_row)
            entropy = torch.rand(b, length, device=device)
            lengths = torch.full((b,), length, device=device)
            _try(key, name, "(entropy [B, T], lengths [B], rollout_len)", (entropy, lengths, k), (b, length))


def _numbers(ids: list[int]) -> str:
    """Stands in for the tokenizer, which is not there yet."""
    return " ".join(map(str, ids))


def _try(
    key: str, name: str, called: str, arguments: tuple[Any, ...], shape: tuple[int, ...],
    decode: Callable[[list[int]], str] | None = None,
) -> None:  # fmt: skip
    try:
        function = reading(resolve(key, name, {}), decode)
        with torch.no_grad():
            found = function(*arguments)
    except ConfigError:
        raise
    except Exception as error:  # whatever is wrong with it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{key}={name}: called as {called} it raises {reason}; correct it") from None
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape or not found.is_floating_point():
        held = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError(
            f"{key}={name}: returns {held} where a floating-point tensor {list(shape)} is due, one value for each "
            f"{'rollout' if key == 'refine.reward' else 'index'}; correct it"
        )
    if not bool(found.isfinite().all()):
        raise ConfigError(f"{key}={name}: returns a value that is not finite; correct it")
