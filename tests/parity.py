"""What the parity tests share: a small model at any layout, its full gradients, and the step written the slow way."""

from typing import Any

import torch
from torch import Tensor

from megatron_refine.config import Config, load
from megatron_refine.models.family import FAMILIES
from megatron_refine.records import Batch, Experience

_COMMON = {"vocab_size": 97, "hidden_size": 64, "num_layers": 2, "intermediate_size": 96, "init_std": 0.1}
_LACT = {"family": "lact", "num_lact_heads": 4, "num_attn_heads": 8, "lact_chunk_size": 16, "window_size": 24}
_GATED = {"family": "gated_delta_net", "num_heads": 4, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "delta_net": _COMMON | {"family": "delta_net", "num_heads": 4},
    "gated_delta_net": _COMMON | _GATED,
    # two value heads a key head, wider eigenvalues
    "gated_delta_net variant": _COMMON | _GATED | {"num_v_heads": 8, "expand_v": 1.0, "allow_neg_eigval": True},
    "gated_delta_net no gate": _COMMON | _GATED | {"use_gate": False},
    # one layer of each kind
    "qwen3_5": _COMMON
    | {"family": "qwen3_5", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e4}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    | {"layer_types": ["linear_attention", "full_attention"]},
    # with positions; attention layers normed behind
    "olmo_hybrid": _COMMON
    | {"family": "olmo_hybrid", "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 24}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "lact": _COMMON | _LACT | {"w0_w2_low_rank": 8},
    "lact muon": _COMMON | _LACT | {"w0_w2_low_rank": 8, "use_muon": True, "lact_chunk_size": 32},
    "lact variant": _COMMON
    | _LACT
    | {"w0_w2_low_rank": -1, "inter_multi": 1.5, "ttt_nope": True, "ttt_prenorm": True, "use_momentum": False}
    | {"learnable_ttt_scale": False, "no_v_silu": True, "qkv_bias": True},
}
REFINE = {"num_chunks": 4, "num_rollouts": 2, "rollout_len": 5, "margin": 6, "nsp_coef": 0.7}


def small_config(tmp_path: Any, *overrides: str, model: str | dict[str, Any] = "delta_net") -> Config:
    """A config of a small model, of MODELS or its section; written to a file, as a user's would be."""
    import yaml

    path = tmp_path / "small.yaml"
    section = MODELS[model] if isinstance(model, str) else model
    train = {"precision": "fp32", "global_batch_size": 4, "micro_batch_size": 2, "steps": 10}
    tree = {
        "run": {"dir": str(tmp_path / "run"), "timeout_minutes": 5.0}, "model": section, "refine": REFINE,
        "train": train, "data": {"seq_length": 192}, "optimizer": {"lr": 1e-2}, "eval": {"sequences": 0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load(path, list(overrides), FAMILIES)


def batch(size: int, length: int = 192, seed: int = 0, vocab: int = 97) -> Batch:
    """Random tokens; the rows have different numbers of real tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (size, length), generator=generator)
    lengths = length - torch.arange(size) * 7
    return Batch(tokens, lengths, torch.arange(size) + 100 * seed)


def experience(size: int, dtype: torch.dtype, length: int = 192) -> Experience:
    """Branches at the edges: the first tokens (convolution), kernel chunks, repeated and last positions; n = 2."""
    generator = torch.Generator().manual_seed(5)
    edges = torch.tensor([[1, 2, 3, 64], [65, 128, 187, 187], [63, 1, 127, 150], [10, 10, 129, 186]])
    positions = edges[torch.arange(size) % 4].clamp(max=length - 5)
    tokens = torch.randint(0, 97, (size, 4, 2, 5), generator=generator)
    old = -2 - torch.rand(size, 4, 2, 5, generator=generator, dtype=dtype)
    advantages = torch.randn(size, 4, 2, generator=generator, dtype=dtype)
    weights = 2 * torch.rand(size, 4, 2, 5, generator=generator, dtype=dtype)
    weights[:, 1, 0] = 0  # a masked rollout
    return Experience(positions, tokens, old, advantages, weights, torch.arange(size) != 3)


def full_gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's whole gradient under its global name, on every rank: of the last reduced backward pass."""
    from megatron_refine.trainer import parity
    from megatron_refine.trainer.parallel import current_ranks

    return parity.full_gradients(model, current_ranks())


def full_parameters(model: Any) -> dict[str, Tensor]:
    """Every whole parameter under its global name, on every rank."""
    import torch.distributed as dist

    from megatron_refine.trainer.model import global_parameters
    from megatron_refine.trainer.parallel import current_ranks
    from megatron_refine.trainer.shards import unshard

    ranks, found = current_ranks(), {}
    for name, p in global_parameters(model):
        parts = [torch.empty_like(p.data) for _ in range(ranks.tp)]
        dist.all_gather(parts, p.data, group=ranks.tp_group)
        found[name] = unshard(parts, p)
    everyone: list[Any] = [None] * ranks.world
    dist.all_gather_object(everyone, found)
    return {name: value for part in everyone for name, value in part.items()}


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each parameter's gradient."""
    assert found.keys() == expected.keys()
    return {n: float((found[n] - e).norm() / e.norm().clamp(min=1e-30)) for n, e in expected.items()}


def build(config: Config, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, ranks) with norm weights away from one and other vectors moved, the same at any layout."""
    import zlib

    from megatron_refine.trainer.model import build_model, global_parameters
    from megatron_refine.trainer.parallel import init_parallel
    from megatron_refine.trainer.shards import full_shape, shard

    ranks = init_parallel(config)
    model = build_model(config, ranks, dtype)
    with torch.no_grad():
        for name, parameter in global_parameters(model):
            if parameter.dim() == 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = 0.2 * torch.randn(full_shape(parameter, ranks.tp), generator=generator).to(dtype)
                if name.endswith("in_bias"):  # of LaCT's learning rates: fast weights should move
                    noise = 3 + 10 * noise
                parameter.add_(shard(noise, parameter, ranks.tp_rank, ranks.tp))
    return model, ranks
