"""The mixers' operations, forward and backward: in chunks, and a token after the other."""

from collections.abc import Callable
from typing import Any

from megatron_refine.bench.timing import Timings
from megatron_refine.config import Config


def run(config: Config, rounds: int) -> str:
    """`rounds` of each way on one layer's heads and data.seq_length tokens, on one process. Returns a table."""
    import torch

    torch.manual_seed(config.run.seed)
    make = _lact if config.model.family == "lact" else _delta

    def timed(function: Callable[[], Any]) -> Callable[[int], None]:
        return lambda _: function().sum().backward()

    timings = Timings({name: timed(function) for name, function in make(config).items()}, rounds)
    title = f"{config.model.family} hidden {config.model.hidden_size}, one layer, T {config.data.seq_length}"
    return f"{title}, forward and backward, fp32; medians of {rounds}\n{timings.table('chunks')}"


def _delta(config: Config) -> dict[str, Callable[[], Any]]:
    import torch

    from megatron_refine.kernels.delta_rule import delta_rule, l2_normalize
    from megatron_refine.kernels.delta_rule.reference import recurrent_delta_rule
    from megatron_refine.platform import hardware

    m: Any = config.model
    gated = m.family == "gated_delta_net"
    heads, keys = (m.value_heads, m.head_dim) if gated else (m.num_heads, m.head_dim_k)
    shape = 1, config.data.seq_length, heads
    device = hardware.device()
    q, k = (l2_normalize(torch.randn(*shape, keys, device=device)).requires_grad_() for _ in range(2))
    v = torch.randn(*shape, m.head_dim_v, device=device, requires_grad=True)
    beta = torch.rand(shape, device=device, requires_grad=True)
    g = -torch.rand(shape, device=device) if gated else None
    return {
        "chunks": lambda: delta_rule(q, k, v, beta, g)[0],
        "recurrence": lambda: recurrent_delta_rule(q, k, v, beta, g)[0],
    }


def _lact(config: Config) -> dict[str, Callable[[], Any]]:
    import torch

    from megatron_refine.kernels.lact import Rule, Tokens, chunk_lact, stacked
    from megatron_refine.kernels.lact.reference import recurrent_lact
    from megatron_refine.platform import hardware

    m: Any = config.model
    heads, width, inner, device = m.num_lact_heads, m.head_dim, m.inner_dim, hardware.device()
    shape = 1, config.data.seq_length, heads
    q, k, v = (torch.randn(*shape, width, device=device, requires_grad=True) for _ in range(3))
    rates, momentum = 1e-3 * torch.rand(*shape, 3, device=device), torch.rand(shape, device=device)
    w0, w1, w2 = (torch.randn(heads, *size, device=device, requires_grad=True) * width**-0.5
                  for size in ((inner, width), (width, inner), (inner, width)))  # fmt: skip
    initial = w0.detach().requires_grad_(), w1.detach().requires_grad_(), w2.detach().requires_grad_()
    rule = Rule(m.lact_chunk_size, m.use_muon, m.ttt_prenorm)
    return {
        "chunks": lambda: chunk_lact(stacked(*initial), q, Tokens.of(k, v, rates, momentum), rule)[0],
        "recurrence": lambda: recurrent_lact(initial, q[0], k[0], v[0], rates[0], momentum[0], rule),
    }
