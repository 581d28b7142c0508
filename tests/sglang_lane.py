"""What the tests against real SGLang servers share: servers, a trainer at any layout, and the numbers of both sides."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_refine.config import Config, load
from megatron_refine.models.family import FAMILIES

PYTHON = Path(__file__).parents[1] / ".venv-sglang/bin/python"
INSTALLED = (PYTHON.parents[1] / "ready").exists()  # the interpreter is there before its packages are
MISSING = "needs SGLang in .venv-sglang: make test-sglang"
_COMMON = {"vocab_size": 509, "hidden_size": 128, "num_layers": 2, "intermediate_size": 256, "init_std": 0.08}
MODELS: dict[str, dict[str, Any]] = {
    "delta_net": _COMMON | {"family": "delta_net", "num_heads": 4},
    # two value heads a key head
    "gated_delta_net": _COMMON
    | {"family": "gated_delta_net", "num_heads": 4, "head_dim": 32, "num_v_heads": 8, "expand_v": 1.0},
    "lact": _COMMON
    | {"family": "lact", "num_lact_heads": 2, "num_attn_heads": 4, "lact_chunk_size": 48, "window_size": 40}
    | {"w0_w2_low_rank": 8},
    # a layer of each kind
    "qwen3_5": _COMMON
    | {"family": "qwen3_5", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e4}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 16}
    | {"layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 0.5},
}
# prompts above 128 tokens are prefilled in parts
SERVER_ARGS = ["--max-total-tokens", "16384", "--max-running-requests", "16", "--mem-fraction-static", "0.1"]
SERVER_ARGS += ["--chunked-prefill-size", "128"]
TOLERANCE = (
    1e-4  # nats: both compute in fp32, in another order, through two layers; a stale state is off by 0.1 and more
)


def lane_config(folder: Path, model: str, *overrides: str) -> Config:
    """Of a small run whose engine is SGLang; written to a file, as a user's would be."""
    import yaml

    tree = {
        "run": {"dir": str(folder / "run"), "timeout_minutes": 5.0},
        "model": MODELS[model],
        "data": {"seq_length": 192},
        "train": {"precision": "fp32", "global_batch_size": 4, "micro_batch_size": 4, "steps": 4},
        "refine": {"num_chunks": 4, "num_rollouts": 2, "rollout_len": 5, "rollout_temperature": 0.8},
        "eval": {"sequences": 0},
        "engine": {
            "kind": "sglang", "python": str(PYTHON), "args": SERVER_ARGS, "request_timeout": 60.0, "sync_timeout": 60.0,
        },
    }  # fmt: skip
    path = folder / f"lane_{os.getpid()}.yaml"  # every rank of a test writes one
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load(path, list(overrides), FAMILIES)


def attached(url: str, *overrides: str) -> list[str]:
    """Overrides for a server that runs already."""
    return ['engine.python=""', f"engine.urls=[{url}]", *overrides]


def export(folder: str, model: str, target: str) -> None:
    """On a rank: the weights of a new trainer, as the engine writes them for its servers."""
    with trainer(lane_config(Path(folder), model)) as (engine, _):
        Path(target).mkdir()
        engine.folder = Path(target)
        engine._export(0)


@contextlib.contextmanager
def trainer(config: Config) -> Iterator[tuple[Any, Any]]:
    """On a rank: the engine of a new trainer, and its model."""
    from megatron_refine.engine.sglang import SGLangEngine
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    model = build_model(config, ranks)
    lines: list[str] = []
    engine = SGLangEngine(config, model, ranks, lines.append)
    engine.lines = lines  # type: ignore[attr-defined]
    try:
        yield engine, model
    finally:
        engine.close()


@torch.no_grad()
def move_weights(model: Any, seed: int) -> None:
    """Another model of the same shape, the same at any layout: each weight times its own factor."""
    from megatron_refine.trainer.model import global_parameters

    for name, parameter in global_parameters(model):
        parameter.mul_(1 + 0.2 * ((hash_of(f"{name}{seed}") % 1000) / 1000 - 0.3))


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


def trainer_logprobs(
    folder: str, model: str, weights: str, sequences: list[list[int]], temperature: float = 1.0
) -> list[list[float]]:
    """On a rank: log-probability of every token from the second on, by the trainer with the weights of a folder."""
    from megatron_refine.convert.source import HFSource
    from megatron_refine.trainer import parity
    from megatron_refine.trainer.forward import score_pass

    with trainer(lane_config(Path(folder), model)) as (engine, module):
        parity.load(module, HFSource(Path(weights)), engine.ranks)
        with torch.no_grad():
            whole = [torch.tensor([tokens]) for tokens in sequences]
            return [
                score_pass(module, tokens, torch.full(tokens.shape, temperature)).logprobs[0, :-1].tolist()
                for tokens in whole
            ]


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, _COMMON["vocab_size"], (length,), generator=generator).tolist()


def answered(answer: dict[str, Any]) -> list[float]:
    """Log-probabilities of what a server wrote."""
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def largest_gap(ours: list[list[float]], prompts: list[list[int]], answers: list[dict[str, Any]]) -> float:
    """Between what the servers answered and the trainer's log-probabilities of prompt and answer."""
    gaps = [
        Tensor(answered(answer)).sub(Tensor(own[len(prompt) - 1 :])).abs().max()
        for own, prompt, answer in zip(ours, prompts, answers, strict=True)
    ]
    return float(max(gaps))
