"""Qwen3-Next in Hugging Face's format, as transformers 5.24 writes it."""

from typing import Any

from megatron_refine.models.common import hybrid_hf as hybrid
from megatron_refine.models.common.qwen import hf as qwen
from megatron_refine.models.hf import ABSENT, Format

EXPERTS = 512  # where config.json does not say how many


def read(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the fields, without those that say which layers have experts; num_experts is 0 where none has."""
    found, dense = qwen.read(tree), tree.get("mlp_only_layers") or []
    every, experts = found.pop("decoder_sparse_step", None) or 1, found.get("num_experts", EXPERTS)
    found.pop("mlp_only_layers", None)
    sparse = [i for i in range(len(found["layer_types"])) if i not in dense and (i + 1) % every == 0]
    return found | {"num_experts": experts if sparse else 0}


FORMAT = Format(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    library="transformers",
    fields=qwen.FIELDS,
    constants=hybrid.CONSTANTS | {"num_experts": (0,)},
    ignored=qwen.IGNORED | dict.fromkeys(  # of the experts that there are none of
        ("moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok", "output_router_logits",
         "router_aux_loss_coef", "shared_expert_intermediate_size"), ABSENT,
    ),
    frame=hybrid.around,
    unused=("mtp.*",),
    read=read,
    write=qwen.write,
)  # fmt: skip
