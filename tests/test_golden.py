"""The Megatron model against the original implementation: logits, loss and every gradient from released-format weights.

How the files were made is in tests/golden/README.md.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron_refine.config import Config, load
from megatron_refine.models.family import FAMILIES
from tests.parity import full_gradients
from tests.zygote import Zygote

GOLDEN = Path(__file__).parent / "golden" / "delta_net"
VOCAB, PADDED = 97, 128
HEADS, KEY, VALUE = 4, 16, 16
LAYOUTS = {
    "tp1": [],
    "tp2": ["parallel.tp=2"],
    "tp2-sp": ["parallel.tp=2", "parallel.sp=true"],
    "tp2-sp-recompute": ["parallel.tp=2", "parallel.sp=true", "train.recompute=full"],
}
# Megatron name -> HF name, of tensors that differ in nothing but the name; {} is the layer
WHOLE = {"decoder.final_layernorm.weight": "model.norm.weight"}
PADDED_ROWS = {
    "embedding.word_embeddings.weight": "model.embeddings.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "self_attention.o_norm.weight": "attn.o_norm.weight",
    "self_attention.out_proj.weight": "attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
# Megatron name -> (HF name, rows a head) of the tensors that it holds head by head
BY_HEAD = {
    "self_attention.in_proj.weight": (("q_proj", KEY), ("k_proj", KEY), ("v_proj", VALUE), ("b_proj", 1)),
    "self_attention.conv": (("q_conv1d", KEY), ("k_conv1d", KEY), ("v_conv1d", VALUE)),
}
GATE_UP = "mlp.linear_fc1.weight"


def to_megatron(hf: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Full Megatron tensors by global name."""
    full = {ours: hf[theirs] for ours, theirs in WHOLE.items()}
    full |= {ours: F.pad(hf[theirs], (0, 0, 0, PADDED - VOCAB)) for ours, theirs in PADDED_ROWS.items()}
    for i in range(layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        full |= {ours + a: hf[theirs + b] for a, b in LAYER.items()}
        for name, parts in BY_HEAD.items():
            blocks = [hf[f"{theirs}attn.{part}.weight"].unflatten(0, (HEADS, rows)) for part, rows in parts]
            full[ours + name] = torch.cat(blocks, 1).flatten(0, 1)
        full[ours + GATE_UP] = torch.cat([hf[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    return full


def to_hf(full: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of `to_megatron`; drops the padding rows."""
    hf = {theirs: full[ours] for ours, theirs in WHOLE.items()}
    hf |= {theirs: full[ours][:VOCAB] for ours, theirs in PADDED_ROWS.items()}
    for i in range(layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        hf |= {theirs + b: full[ours + a] for a, b in LAYER.items()}
        for name, parts in BY_HEAD.items():
            blocks = full[ours + name].unflatten(0, (HEADS, -1)).split([rows for _, rows in parts], 1)
            hf |= {
                f"{theirs}attn.{part}.weight": block.flatten(0, 1)
                for (part, _), block in zip(parts, blocks, strict=True)
            }
        gate, up = full[ours + GATE_UP].chunk(2)
        hf |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
    return hf


def golden_config(folder: Path, overrides: list[str]) -> Config:
    """The released config.json as ours."""
    import yaml

    hf = json.loads((GOLDEN / "config.json").read_text())
    names = ["vocab_size", "hidden_size", "num_heads", "intermediate_size", "norm_eps"]
    model = {name: hf[name] for name in [*names, "conv_size", "expand_k", "expand_v"]}
    model |= {"family": "delta_net", "num_layers": hf["num_hidden_layers"], "tie_embeddings": hf["tie_word_embeddings"]}
    train = {"precision": "fp32", "global_batch_size": 2, "micro_batch_size": 2}
    path = folder / "golden.yaml"
    path.write_text(yaml.safe_dump({"model": model, "train": train, "data": {"seq_length": 100}}))
    return load(path, overrides, FAMILIES)


def compute(config: Config) -> dict[str, Any]:
    """On a rank: what the Megatron model makes of the golden weights and tokens; gathered over tp."""
    from megatron_refine.trainer.forward import main_pass
    from megatron_refine.trainer.gradients import finalize_gradients
    from megatron_refine.trainer.model import build_model, global_parameters, unwrap
    from megatron_refine.trainer.parallel import init_parallel
    from megatron_refine.trainer.shards import shard

    ranks = init_parallel(config)
    model = build_model(config, ranks)
    full = to_megatron(load_file(GOLDEN / "model.safetensors"), config.model.num_layers)
    with torch.no_grad():
        for name, parameter in global_parameters(model):
            parameter.copy_(shard(full.pop(name), parameter, ranks.tp_rank, ranks.tp))
    tokens = load_file(GOLDEN / "expected.safetensors")["case0.input_ids"]
    done = main_pass(model, tokens)
    local = unwrap(model).logits(done.rows.detach().flatten(0, 1)).detach()
    parts = [torch.empty_like(local) for _ in range(ranks.tp)]
    dist.all_gather(parts, local, group=ranks.tp_group)
    loss = -done.scores.logprobs[:, :-1].mean()
    model.zero_grad_buffer()
    loss.backward()
    finalize_gradients([model])
    logits = torch.cat(parts, 1).unflatten(0, tokens.T.shape).transpose(0, 1)
    return {"logits": logits, "loss": loss.detach(), "gradients": full_gradients(model), "left": sorted(full)}


def test_every_tensor_is_accounted_for() -> None:
    hf, expected = load_file(GOLDEN / "model.safetensors"), load_file(GOLDEN / "expected.safetensors")
    back = to_hf(to_megatron(hf, 2), 2)
    assert back.keys() == hf.keys() and all(torch.equal(back[name], hf[name]) for name in hf)
    cases = {"case0.input_ids", "case0.logits", "case0.loss"}
    assert expected.keys() == cases | {f"case0.grad.{name}" for name in hf}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_original_implementation(layout: str, ranks: Zygote, tmp_path: Path) -> None:
    config = golden_config(tmp_path, LAYOUTS[layout])
    expected = load_file(GOLDEN / "expected.safetensors")
    for found in ranks(config.parallel.tp, compute, config=config):
        assert not found["left"], "weights without a parameter"
        logits, truth = found["logits"], expected["case0.logits"]
        # fp32 rounds at 6e-8; the two implementations add in another order, through two layers
        assert (logits[..., :VOCAB] - truth).abs().max() <= 2e-5 * max(1.0, float(truth.abs().max()))
        assert (logits[..., VOCAB:] < -1e30).all()  # ids of the padding can never be drawn
        assert float(found["loss"]) == pytest.approx(float(expected["case0.loss"]), rel=1e-6)  # a mean of 198 tokens
        for name in PADDED_ROWS:
            assert not found["gradients"][name][VOCAB:].any()
        for name, gradient in to_hf(found["gradients"], config.model.num_layers).items():
            theirs = expected[f"case0.grad.{name}"]
            # the same roundings, forward and backward, relative to gradients that are sums of terms of either sign
            assert (gradient - theirs).norm() <= 1e-4 * theirs.norm(), name
