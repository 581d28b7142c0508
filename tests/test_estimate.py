"""The estimate of parameters, memory and work, and the DeltaNet configuration it starts from."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_refine.config import (
    Config,
    ConfigError,
    Data,
    ModelConfig,
    Parallel,
    Refine,
    Train,
    Update,
    load,
)
from megatron_refine.estimate import estimate, render, step_flops
from megatron_refine.estimate.memory import rank_memory
from megatron_refine.kernels.delta_rule.chunk import chunk_delta_rule
from megatron_refine.models import cost, family
from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.models.gated_delta_net.config import GatedDeltaNetConfig
from megatron_refine.models.mixers.delta.cost import rule_elements
from tests.parity import MODELS, small_config

SMALL = DeltaNetConfig(
    family="delta_net", vocab_size=1024, hidden_size=256, num_layers=4, intermediate_size=688, num_heads=4
)
LAYER = family.layers(SMALL)[0]
WEIGHTS = ("in_proj", "out_proj", "mlp")
GATED = GatedDeltaNetConfig(
    family="gated_delta_net", vocab_size=32000, hidden_size=2048, num_layers=21, intermediate_size=5632, num_heads=6
)
LARGE = DeltaNetConfig(
    family="delta_net", vocab_size=32000, hidden_size=2048, num_layers=24, intermediate_size=5632, num_heads=16
)


def small(mode: str, rollouts: int = 1) -> Config:
    return Config(
        model=SMALL,
        data=Data(seq_length=4096),
        train=Train(global_batch_size=2, precision="fp32"),
        refine=Refine(num_rollouts=rollouts),
        update=Update.model_validate({"mode": mode}),
    )


@pytest.mark.parametrize(
    ("mode", "rollouts", "measured"), [("fused", 1, 1.014), ("fused", 8, 1.086), ("two_pass", 1, 1.344)]
)
def test_step_flops_equal_measured_ratios(mode: str, rollouts: int, measured: float) -> None:
    assert step_flops(small(mode, rollouts)).ratio == pytest.approx(measured, rel=0.02)


def test_step_flops_by_hand() -> None:
    """2 sequences of 4096, 4 layers; 8 positions of 3 rollouts of 5 tokens, whose first a main row predicts."""
    layer = {stream: sum(cost.layer_flops(SMALL, LAYER, stream).values()) for stream in (4096, 5, 1)}
    head, fork = cost.head_flops(SMALL), LAYER.cost.fork_flops()
    main, forks = 4096 * (4 * layer[4096] + head), 8 * 4 * fork
    branch = 24 * (5 * 4 * layer[5] + 4 * head)
    for mode, passes in (("fused", 2), ("two_pass", 3)):
        work = step_flops(small(mode, rollouts=3))
        assert (work.ntp, work.score, work.rescore) == (6 * main, 2 * (main + forks), 2 * branch)
        config = small(mode, rollouts=3)
        lagging = config.model_copy(update={"engine": config.engine.model_copy(update={"lag": 1})})
        assert step_flops(lagging).score == 2 * (2 * main + forks)  # the next batch too, for its positions
        assert work.rollout == 2 * (24 * (5 * 4 * layer[1] + 4 * head) + 8 * head)
        assert work.update == 2 * passes * (main + forks + branch)
        assert work.refine == work.score + work.rollout + work.rescore + work.update


def test_step_flops_scale_with_the_batch_and_match_6n_per_token() -> None:
    work, config = step_flops(small("fused")), small("fused")
    weights, tokens = cost.parameters(SMALL) - 1024 * 256, 2 * 4096  # the embedding is looked up
    rule = sum(count for name, count in cost.layer_flops(SMALL, LAYER, 4096).items() if name not in WEIGHTS)
    assert work.ntp == pytest.approx(tokens * (6 * weights + 3 * 4 * rule), rel=0.01)
    double = config.model_copy(update={"train": Train(global_batch_size=4)})
    assert step_flops(double).ntp == 2 * work.ntp
    ntp_only = config.model_copy(update={"refine": Refine(enabled=False)})
    assert step_flops(ntp_only).refine == step_flops(ntp_only).ntp == work.ntp


@pytest.mark.parametrize("model", [SMALL, GATED.model_copy(update={"num_v_heads": 12})], ids=["delta", "gated"])
def test_delta_rule_flops_equal_those_torch_counts(model: ModelConfig) -> None:
    gate = isinstance(model, GatedDeltaNetConfig)
    heads, k, v = (12, 256, 512) if gate else (4, 64, 64)
    length, matmuls = 128, family.layers(model)[0].cost.flops(128)
    q, keys, values = (torch.randn(1, length, heads, width) for width in (k, k, v))
    with FlopCounterMode(display=False) as counter:
        chunk_delta_rule(q, keys, values, torch.rand(1, length, heads), -torch.rand(1, length, heads) if gate else None)
    rule = sum(matmuls[name] for name in ("k k^T", "q k^T", "W S", "q S", "(q k^T) u", "k^T u"))
    assert counter.get_total_flops() == length * rule
    assert matmuls["solve"] > 0  # no counter sees it


@pytest.mark.parametrize("decay", [False, True])
def test_saved_bytes_cover_what_autograd_keeps_of_the_delta_rule(decay: bool) -> None:
    heads, length, k, v = 4, 256, SMALL.head_dim_k, SMALL.head_dim_v
    q, keys, values = (torch.randn(1, length, heads, width, requires_grad=True) for width in (k, k, v))
    beta, g = torch.rand(1, length, heads, requires_grad=True), torch.zeros(1, length, heads, requires_grad=True)
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = chunk_delta_rule(q, keys, values, beta, g if decay else None)
    assert output[0].requires_grad
    assert sum(storages.values()) / length == pytest.approx(4 * heads * rule_elements(k, v, decay), rel=0.2)


def test_parameters_of_delta_net_1_3b() -> None:
    hidden, layers, heads, ffn = 2048, 24, 16, 5632
    mixer = 4 * hidden * hidden + heads * hidden + 3 * hidden * 4 + 128  # q, k, v, o; beta; three convolutions; o_norm
    layer = mixer + 3 * hidden * ffn + 2 * hidden
    assert cost.parameters(LARGE) == 2 * 32000 * hidden + hidden + layers * layer == 1_365_677_056


def test_parameters_of_gated_delta_net_1_3b() -> None:
    hidden, heads, key, value = 2048, 6, 256, 512
    widths = 2 * heads * key + 2 * heads * value + 2 * heads  # q, k; v, gate; a, beta
    mixer = hidden * (widths + heads * value) + 4 * heads * (2 * key + value) + 2 * heads + value
    layer = mixer + 3 * hidden * 5632 + 2 * hidden
    assert cost.parameters(GATED) == 2 * 32000 * hidden + hidden + 21 * layer
    assert cost.parameters(GATED) == pytest.approx(1.3873e9, rel=1e-4)  # flash-linear-attention's default model


def parameters_of(config: Config) -> int:
    """On a rank: parameters that the model really has there."""
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.parallel import init_parallel

    return sum(p.numel() for p in build_model(config, init_parallel(config)).parameters())


@pytest.mark.parametrize("model", MODELS)
def test_rank_parameters_are_those_of_the_model(ranks: Any, tmp_path: Path, model: str) -> None:
    for tp in (1, 2):
        config = small_config(tmp_path, f"parallel.tp={tp}", model=model)
        assert ranks(tp, parameters_of, config=config) == [cost.rank_parameters(config.model, Parallel(tp=tp), 0)] * tp


@pytest.mark.parametrize("tied", [False, True])
def test_rank_parameters_add_up(tied: bool) -> None:
    model = LARGE.model_copy(update={"tie_embeddings": tied, "vocab_size": 31990})
    whole = cost.parameters(model)
    table, norms = 32000 * 2048, 24 * (2 * 2048 + 128) + 2048
    assert whole == cost.parameters(LARGE) - tied * table
    assert 4 * cost.rank_parameters(model, Parallel(tp=4), stage=0) == whole + 3 * norms
    stages = [cost.rank_parameters(model, Parallel(pp=3), stage=stage) for stage in range(3)]
    assert sum(stages) == whole + tied * table  # the last stage has its own copy of a tied embedding
    assert stages[0] - stages[1] == table and stages[2] - stages[1] == table + 2048


def test_memory_follows_precision_and_layout() -> None:
    config = Config(model=LARGE, parallel=Parallel(tp=2, sp=True))
    ours = estimate(config, world_size=8)
    count = cost.rank_parameters(LARGE, Parallel(tp=2), stage=0)
    assert (ours.dp, ours.parameters) == (4, 1_365_677_056)
    assert (ours.memory.weights, ours.memory.gradients, ours.memory.optimizer) == (2 * count, 4 * count, 3 * count)
    rows = config.data.seq_length + 8 * 5
    assert ours.memory.head == 2 * rows * 16000 * 2  # logits and their gradient, in bf16
    assert rank_memory(config, dp=4, stage=0, gpu=False).head == 3 * (1 << 22) * 4  # of a chunk, with probabilities
    more = config.model_copy(update={"data": Data(seq_length=4 * config.data.seq_length)})
    summed = 16000 * 2048 * 4  # the weight's gradient, in fp32
    assert rank_memory(more, dp=4, stage=0).head == 2 * (1 << 26) * 2 + summed
    state = 16 * 128 * 128 * 4 + 3 * 3 * 2048 * 2  # S in fp32, the tail of the convolution in bf16
    assert ours.memory.states == 8 * (1 + 1) * 24 * state // 2
    fp32 = rank_memory(config.model_copy(update={"train": Train(precision="fp32")}), dp=4, stage=0)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * count, 4 * count, 2 * count)
    single = rank_memory(config.model_copy(update={"parallel": Parallel()}), dp=4, stage=0)
    assert single.activations == pytest.approx(2 * ours.memory.activations, rel=0.01)  # the head's rows are whole
    recomputed = rank_memory(config.model_copy(update={"train": Train(recompute="full")}), dp=4, stage=0)
    assert 0 < recomputed.activations < ours.memory.activations / 10


@pytest.mark.parametrize(("section", "change"), [("refine", {"start_step": 1}), ("train", {"phase": "posttrain"})])
def test_steps_on_a_whole_batch_fill_the_pipeline(section: str, change: dict[str, Any]) -> None:
    """Without REFINE, or on answers: the first of two stages then holds two micro-batches, whatever a mini-batch is."""
    changed = {"parallel": Parallel(pp=2), "update": Update(mode="two_pass", mini_batch_size=1)}
    config = small("two_pass").model_copy(update=changed)
    whole = config.model_copy(update={section: getattr(config, section).model_copy(update=change)})
    one, two = (rank_memory(each, 1, 0).activations for each in (config, whole))
    assert 1.5 * one < two <= 2 * one


def test_first_pipeline_stage_holds_most_activations() -> None:
    config = Config(model=LARGE, parallel=Parallel(pp=4), refine=Refine(enabled=False))
    held = [rank_memory(config, dp=1, stage=stage) for stage in range(4)]
    assert held[0].activations > held[1].activations > held[2].activations > held[3].activations
    assert [memory.head > 0 for memory in held] == [False, False, False, True]
    assert estimate(config, world_size=4).memory == held[0]


def test_render_names_layout_memory_and_work() -> None:
    text = render(estimate(small("two_pass"), world_size=1))
    assert text.startswith("delta_net, 3.7053 M parameters, on 1 rank: tp 1, pp 1, dp 1\n")
    for line in ("weights, fp32 ", "activations, 1 x 4096 tokens + 1 x 40 ", "total ", "REFINE step, two-pass "):
        assert f"\n  {line}" in text
    assert "1.35" in text.splitlines()[-1]
    assert "REFINE" not in render(estimate(small("fused").model_copy(update={"refine": Refine(enabled=False)}), 1))


def test_estimate_refuses_a_world_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="no multiple of"):
        estimate(Config(model=LARGE, parallel=Parallel(tp=2)), world_size=3)


def test_estimate_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, megatron_refine.estimate; from megatron_refine.models import family; family.every();"
    code += "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_head_widths_are_whole_numbers(tmp_path: Path) -> None:
    model = DeltaNetConfig.model_validate(SMALL.model_dump() | {"expand_v": 2.0})
    assert (model.head_dim_k, model.head_dim_v, model.tp_limit()) == (64, 128, 4)
    path = tmp_path / "config.yaml"
    sizes = "vocab_size: 512, hidden_size: 256, num_layers: 2, intermediate_size: 512, num_heads: 3"
    path.write_text(f"model: {{family: delta_net, {sizes}}}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.expand_k=1\.0: .*256\*1/3 = 85\.33 is the width of a head"):
        load(path, [], family.FAMILIES)
    assert load(path, ["model.num_heads=8"], family.FAMILIES).model.tp_limit() == 8
    assert issubclass(family.FAMILIES["delta_net"], ModelConfig)


def initial_decay(config: Config) -> dict[str, Any]:
    """On a rank: A_log and dt_bias of the first layer, whole."""
    import torch.distributed as dist

    from megatron_refine.trainer.model import build_model, unwrap
    from megatron_refine.trainer.parallel import init_parallel

    mixer = unwrap(build_model(config, init_parallel(config))).decoder.layers[0].self_attention
    found = {}
    for name in ("A_log", "dt_bias"):
        parts = [torch.empty(mixer.heads) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, getattr(mixer, name).data)
        found[name] = torch.cat(parts)
    return found


def test_gated_delta_net_starts_with_mamba2s_decay(ranks: Any, tmp_path: Path) -> None:
    wide = ["model.num_heads=16", "model.num_v_heads=64"]
    one = ranks(1, initial_decay, config=small_config(tmp_path, *wide, model="gated_delta_net"))[0]
    two = ranks(2, initial_decay, config=small_config(tmp_path, "parallel.tp=2", *wide, model="gated_delta_net"))[0]
    assert all(one[name].equal(two[name]) for name in one)
    decay, step = one["A_log"].exp(), torch.nn.functional.softplus(one["dt_bias"])
    assert 1e-3 <= decay.min() < 2 and 14 < decay.max() <= 16
    assert 0.99e-3 <= step.min() < 2e-3 and 5e-2 < step.max() <= 0.101


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.num_v_heads=6", "model.num_v_heads=6: must be a multiple of model.num_heads=4"),
        ("model.expand_v=1.3", "head_dim*expand_v = 20.8, the width of a value head, must be whole"),
        ("model.num_v_head=4", "did you mean model.num_v_heads?"),
    ],
)
def test_shapes_that_a_gated_delta_net_cannot_have(tmp_path: Path, override: str, says: str) -> None:
    small_config(tmp_path, model="gated_delta_net")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "small.yaml", [override], family.FAMILIES)
    assert says in str(caught.value)


def test_tensor_parallel_sizes_of_the_default_gated_delta_net(tmp_path: Path) -> None:
    small_config(tmp_path, model="gated_delta_net")
    with pytest.raises(
        ConfigError, match="parallel.tp=4: must divide the 6 heads of the model; choose one of 1, 2, 3, 6"
    ):
        load(tmp_path / "small.yaml", ["model.num_heads=6", "parallel.tp=4"], family.FAMILIES)
