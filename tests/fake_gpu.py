"""What is counted in a process that pretends to have a GPU, as JSON: python -m tests.fake_gpu FUNCTION ARGUMENT..."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_refine.bench.launches.steps import Steps
from megatron_refine.config import load
from megatron_refine.models.family import FAMILIES, of, serve


def rollouts(path: str, *overrides: str) -> dict[str, Any]:
    """Launches of the rollouts step by step and as graphs, and the host's reads in them."""
    steps, found = Steps(load(path, list(overrides), FAMILIES)), {}
    for name, graphs in (("steps", False), ("graphs", True)):
        counted = steps.count(["fused"], graphs)["fused"]
        reads = [place for stage, place in counted.reads if stage == "rollout"]
        found[name] = {"launches": counted.total(["rollout"]).launches, "reads": reads}
    return found


def served(mode: str, path: str, *overrides: str) -> dict[str, Any]:
    """The host's reads, and launches, of a pass of the model that SGLang serves. mode: `decode`, a token of four
    requests, or `extend`, parts of four prompts."""
    config = load(path, list(overrides), FAMILIES)
    steps = Steps(config)
    stand_in_for_sglang()
    family = serve(config.model.family)
    with steps.counting():
        slot = of(config.model.family).serving.slot(config.model, 1)
        pool = SimpleNamespace(cache_indices=torch.empty(4, dtype=torch.int64), has_initial_state=None)
        conv = [torch.empty(9, *shape) for shape in slot.conv]
        pool.layer_cache = SimpleNamespace(conv=conv, temporal=torch.empty(9, *slot.temporal))
        Backend.pool = lambda layer: pool
        given = SimpleNamespace(typed_model=config.model, hf_shapes={})
        model = family.MODEL(given)
        lengths = [1] * 4
        batch = SimpleNamespace(forward_mode=SimpleNamespace(is_decode_or_idle=lambda: mode == "decode"))
        if mode == "extend":
            lengths = [70, 1, 64, 5]
            pool.has_initial_state = torch.empty(4, dtype=torch.bool)
            batch.extend_seq_lens, batch.extend_seq_lens_cpu = torch.empty(4, dtype=torch.int64), lengths
        with torch.no_grad(), steps.counter(mode):
            steps.counter.clear()
            tokens = torch.empty(sum(lengths), dtype=torch.int64)
            out = model.model(tokens, tokens, batch)
    assert out.shape == (sum(lengths), config.model.hidden_size)
    launches = sum(each.launches for each in steps.counter.sums.values())
    return {"launches": launches, "reads": [place for _, place in steps.counter.reads]}


class Backend:
    pool: Any = None  # of a layer

    def conv_state_metadata(self, layer: int, batch: Any) -> Any:
        return type(self).pool(layer)


class _Linear(nn.Linear):
    """SGLang's linear layers return a bias beside the result."""

    def __init__(self, width: int, out: int, bias: bool = False, **_: Any):
        super().__init__(width, out, bias=bias)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class _Embedding(nn.Embedding):
    def __init__(self, count: int, width: int, **_: Any):
        super().__init__(count, width)


def stand_in_for_sglang() -> None:
    """Modules with what models/mixers/delta/serve.py imports of SGLang, on one rank."""
    contents: dict[str, dict[str, Any]] = {
        "distributed": {"divide": lambda a, b: a // b},
        "layers.linear": {"ColumnParallelLinear": _Linear, "RowParallelLinear": _Linear},
        "layers.logits_processor": {"LogitsProcessor": lambda config: None},
        "layers.vocab_parallel_embedding": {"ParallelLMHead": _Embedding, "VocabParallelEmbedding": _Embedding},
        "model_executor.forward_context": {"get_attn_backend": Backend},
        "model_loader.weight_utils": {"default_weight_loader": None},
        "runtime_context": {"get_parallel": lambda: SimpleNamespace(tp_size=1, tp_rank=0)},
    }
    for path, names in contents.items():
        module = ModuleType(f"sglang.srt.{path}")
        vars(module).update(names)
        sys.modules[module.__name__] = module
        for i in range(1, len(parts := module.__name__.split("."))):
            sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
