"""What torch does not see into, counted as a whole: compiled functions, FlexAttention, and calls of other packages.

A function that torch.compile compiles is one kernel that reads its arguments and writes its results, once each. Its
backward pass is one kernel too, which reads arguments and gradients and writes gradients. A gradient that has far fewer
elements than the function's results (a weight's) is a sum over rows: two kernels more, which read everything again and
write it. A tensor that is handed through costs nothing.

The RMS norm is a kernel forward, and three backward: into its input, then into its weight in parts and their sum. Where
weight and input differ in dtype torch has none, and it is counted as the operators that it is made of.

FlexAttention is a kernel forward and two backward. Its products are those of all blocks of 128 x 128 that the mask
touches: two each forward, seven backward (scores and their gradients twice, once for queries, once for keys).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_refine.bench.launches.counter import Counter, Work, moved

BLOCK = 128  # of FlexAttention's mask
FEWER = 64  # times fewer elements than the results: a sum over rows


@dataclass(frozen=True)
class Call:
    """A call that is counted as a whole."""

    counter: Counter
    results: list[Tensor]  # new tensors alone
    forward: list[Work]
    backward: Callable[[Sequence[Any], Sequence[Any]], list[Work]]  # of gradients of results, gradients of arguments


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *given: Any) -> tuple[Tensor, ...]:
        for work in call.forward:
            call.counter.add(work)
        ctx.call, ctx.given = call, given
        ctx.set_materialize_grads(False)
        return tuple(call.results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        found = [torch.empty_like(x) if need else None for x, need in zip(ctx.given, needed, strict=True)]
        for work in ctx.call.backward(grads, found):
            ctx.call.counter.add(work)
        return None, *found


def whole(call: Call, given: Sequence[Any]) -> list[Tensor]:
    """The results of a call, in the graph of what it is given."""
    return list(_Whole.apply(call, *given))


def compiler(counter: Counter) -> Callable[..., Any]:
    """Stands in for torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    def compile(function: Any = None, **_: Any) -> Any:
        if function is None:
            return compile
        if function is flex_attention:
            return functools.partial(attend, counter)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled(counter, function, args, kwargs)

        return call

    return compile


def compiled(counter: Counter, function: Any, args: Any, kwargs: Any) -> Any:
    """A call of a compiled function, or the function itself within another one."""
    if counter.paused:
        return function(*args, **kwargs)
    given, _ = tree_flatten((args, kwargs))
    counter.paused = True
    try:
        with torch.no_grad():
            results, spec = tree_flatten(function(*args, **kwargs))
    finally:
        counter.paused = False
    through = {i: j for i, r in enumerate(results) for j, x in enumerate(given) if r is x}
    fresh = [r for i, r in enumerate(results) if i not in through]
    name, used = f"compiled {function.__name__}", [x for x in given if isinstance(x, Tensor)]
    if not any(isinstance(r, Tensor) for r in fresh):  # it writes into some of what it is given
        counter.add(Work(name, used[0].dtype, moved(used)))
        return None
    dtype = fresh[0].dtype

    def backward(grads: Sequence[Any], found: Sequence[Any]) -> list[Work]:
        largest = max(fresh, key=Tensor.numel)
        sums = [x for x in found if isinstance(x, Tensor) and x.numel() * FEWER <= largest.numel()]
        sums = [x for x in sums if x.shape[:2] != largest.shape[:2]]  # of a number a row nothing is summed over rows
        read = moved(used) + moved(grads)
        works = [Work(f"{name}, backward", dtype, read + moved([x for x in found if not _among(x, sums)]))]
        if sums:
            works.append(Work(f"{name}, backward to weights", dtype, read + moved(sums), 2))
        return works

    call = Call(counter, fresh, [Work(name, dtype, moved(used) + moved(fresh))], backward)
    new = iter(whole(call, given))
    return tree_unflatten([given[through[i]] if i in through else next(new) for i in range(len(results))], spec)


def _among(x: Any, tensors: Sequence[Tensor]) -> bool:
    return any(x is tensor for tensor in tensors)


def rms_norm(
    counter: Counter, function: Any, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """In the place of torch.nn.functional.rms_norm."""
    if weight is None or weight.dtype != x.dtype:
        found: Tensor = function(x, shape, weight, eps)
        return found
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    name = "rms_norm"

    def backward(grads: Sequence[Any], found: Sequence[Any]) -> list[Work]:
        into_x = Work(f"{name}, backward", x.dtype, moved([x, weight, scale, grads, found[:1]]))
        return [into_x, Work(f"{name}, backward to weights", x.dtype, moved([x, scale, grads, found[1:]]), 2)]

    call = Call(counter, [out], [Work(name, x.dtype, moved([x, weight, out, scale]))], backward)
    return whole(call, [x, weight])[0]


def attend(counter: Counter, q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, **_: Any) -> Tensor:
    """FlexAttention: q, k, v [N, h, T, d] -> [N, h, T, d]."""
    pairs = touched(block_mask) * BLOCK**2 * q.shape[0] * q.shape[1]
    product = 2.0 * pairs * q.shape[-1]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    io, name = moved([q, k, v, out, lse]), "flex_attention"

    def backward(grads: Sequence[Any], found: Sequence[Any]) -> list[Work]:
        rows = Work(f"{name}, backward", q.dtype, moved([out, *grads, lse]), products=True)
        return [rows, Work(f"{name}, backward", q.dtype, io + moved([grads, found, lse]), 1, 7 * product, True)]

    forward = [Work(name, q.dtype, io, 1, 2 * product, products=True)]
    return whole(Call(counter, [out], forward, backward), [q, k, v])[0]


_blocks: dict[int, tuple[Any, int]] = {}  # by mask, which is kept


def touched(mask: Any) -> int:
    """Blocks of a mask in which any key is seen, by the mask's own function."""
    if id(mask) not in _blocks:
        queries, keys = mask.seq_lengths
        total, columns = 0, np.arange(keys, dtype=np.int32)[None]
        for start in range(0, queries, BLOCK):
            rows = np.arange(start, min(start + BLOCK, queries), dtype=np.int32)[:, None]
            seen = mask.mask_mod(0, 0, rows, columns).any(0)
            total += int(np.add.reduceat(seen, np.arange(0, keys, BLOCK)).astype(bool).sum())
        _blocks[id(mask)] = mask, total
    return _blocks[id(mask)][1]


def recorder(counter: Counter) -> Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]:
    """Stands in for `hardware.record`: a replay is one launch of all that was recorded."""

    def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        counter.paused = True
        try:
            result = run()
        finally:
            counter.paused = False

        def replay() -> None:
            counter.add(Work("CUDA graph", torch.bfloat16, 0.0))
            counter.replaying = True
            try:
                run()
            finally:
                counter.replaying = False

        return replay, result

    return record
