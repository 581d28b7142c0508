"""Softmax attention as a mixer, in a model of such layers: branches, layouts, decoding, checkpoints, official weights.

The layers stand in for those of a family; the rest of the model is the tests' small one.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.kernels.places import Places
from megatron_refine.models.mixers.attention.config import AttentionConfig
from tests import test_branches, test_checkpoint, test_layouts
from tests.lanes import short
from tests.parity import batch, build, relative, small_config

_QWEN = AttentionConfig(
    hidden=64, heads=4, kv_heads=2, head_dim=24, gate=True, qk_norm="head", zero_centred=True, rotary_dims=8
)
_OLMO = AttentionConfig(hidden=64, heads=4, kv_heads=4, head_dim=16, qk_norm="projection")
LAYERS = {
    "qwen": _QWEN,
    "qwen, one key head": replace(_QWEN, kv_heads=1),
    "olmo": _OLMO,
    "olmo, two key heads, rope": replace(_OLMO, kv_heads=2, rotary_dims=16),
    "olmo, one key head, zero-centred": replace(_OLMO, kv_heads=1, zero_centred=True),
    "plain": AttentionConfig(hidden=64, heads=4, kv_heads=2, head_dim=16),
}
LAYOUTS = {name: test_branches.LAYOUTS[name] for name in ("tp1", "tp2", "tp2 sp", "tp4 sp", "cp2", "cp4")} | {
    "tp2 cp2": (4, ["parallel.tp=2", "parallel.cp=2"]),
    "tp2 sp cp2": test_branches.LAYOUTS["tp2 sp cp2"],
    "tp2 sp selective": test_branches.LAYOUTS["tp2 sp selective"],
    "tp2 sp recompute": test_branches.LAYOUTS["tp2 sp recompute"],
}


def attending(layer: AttentionConfig, function: Callable[..., Any], **kwargs: Any) -> Any:
    """On a rank: `function`, with such layers in the models that it builds."""
    from megatron_refine.models.layer import Layer
    from megatron_refine.models.mixers.attention.mixer import AttentionMixer

    class Attending(AttentionMixer):
        def __init__(self, config: Any, layer_number: int, model: Any, pg_collection: Any, **_: Any):
            super().__init__(config, layer_number, layer, pg_collection)

    Layer.mixer_class = lambda self: Attending  # type: ignore[method-assign]
    return function(**kwargs)


@pytest.fixture(scope="module")
def reference(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """One rank, separate forwards of every prefix, plain backward; by layer."""

    @functools.cache
    def compute(layer: str) -> Any:
        config = small_config(tmp_path_factory.mktemp("reference"))
        job = {"config": config, "dtype": torch.float64, "names": ["separate"]}
        return ranks(1, attending, layer=LAYERS[layer], function=test_branches.run, **job)[0]["separate"]

    return compute


SHORT = {
    ("qwen", "tp1"), ("qwen", "tp2"), ("qwen", "tp2 sp"), ("qwen", "cp2"), ("qwen", "tp2 cp2"),
    ("qwen, one key head", "tp2"), ("qwen, one key head", "cp2"), ("olmo", "tp2 sp"),
    ("olmo, one key head, zero-centred", "tp2 cp2"), ("olmo, two key heads, rope", "tp4 sp"),
    ("plain", "tp2 sp selective"),
}  # fmt: skip


EVERYWHERE = ("qwen",)  # the others where ranks are more than key heads
CASES = [case for case in itertools.product(LAYERS, LAYOUTS) if case[0] in EVERYWHERE or case[1] in ("tp4 sp", "cp4")]
CASES += [case for case in sorted(SHORT) if case not in CASES]


@pytest.mark.parametrize(("layer", "layout"), short(CASES, lambda *case: case in SHORT))
def test_branches_equal_separate_forwards(ranks: Any, reference: Any, tmp_path: Path, layer: str, layout: str) -> None:
    """Packed, and main and branch passes, at every layout: log-probabilities and every parameter's whole gradient."""
    world, overrides = LAYOUTS[layout]
    job = {"config": small_config(tmp_path, *overrides), "dtype": torch.float64, "names": ["packed", "fused"]}
    main_expected, branch_expected, gradients_expected = reference(layer)
    largest = max(1.0, float(branch_expected.abs().max()))
    for result in ranks(world, attending, layer=LAYERS[layer], function=test_branches.run, **job):
        for name, (main, branch, gradients) in result.items():
            # fp64: a few hundred roundings of 1e-16 each
            assert (main - main_expected).abs().max() < 1e-10 * largest, name
            assert (branch - branch_expected).abs().max() < 1e-10 * largest, name
            errors = relative(gradients, gradients_expected)
            worst = max(errors, key=lambda key: errors[key])
            assert errors[worst] < 1e-10, (name, worst, errors[worst])


def decoded(config: Config) -> float:
    """On a rank: largest error of the rows of tokens fed one by one, from some of the places, each forked, and again
    after three tokens."""
    from megatron_refine.engine.decode import fixed
    from megatron_refine.models.layout import Branches
    from megatron_refine.trainer import forward

    model, _ = build(config, torch.float64)
    tokens, worst = batch(2).tokens, 0.0
    places = Places.read(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 1, 30, 64]))
    sequences, starts = (x[1:].repeat_interleave(2) for x in (places.sequences, places.tokens))
    with torch.no_grad():
        whole = forward._rows(model, tokens, Branches(main_len=192)).local
        states: dict[int, Any] = forward.main_pass(model, tokens).states(places)
        assert fixed(states, 4) is None  # no recording
        states = {layer: state.detach().part(slice(1, None)).fork(2) for layer, state in states.items()}
        for j in range(6):
            if j == 3:
                states = {layer: state.fork(2) for layer, state in states.items()}
                sequences, starts = sequences.repeat_interleave(2), starts.repeat_interleave(2)
            rows, states = forward.decode_step(model, tokens[sequences, starts + j], states)
            worst = max(worst, float((rows.local[:, 0] - whole[starts + j, sequences]).abs().max()))
    for state in states.values():  # the streams' keys are where they were, own ones as many as tokens were fed
        assert state.keys.shape[:2] == (2, 192) and state.own[0].shape[:2] == (12, 6)
    return worst


@pytest.mark.parametrize(("layer", "tp"), [("qwen", 1), ("olmo, two key heads, rope", 2)])
def test_decoding_equals_the_forward(ranks: Any, tmp_path: Path, layer: str, tp: int) -> None:
    job = {"function": decoded, "config": small_config(tmp_path, f"parallel.tp={tp}")}
    assert max(ranks(tp, attending, layer=LAYERS[layer], **job)) < 1e-10  # fp64, of values of about 1


def official(layer: AttentionConfig, hf: dict[str, Tensor], x: Tensor) -> Tensor:
    """x [B, T, hidden] -> the same, as the attention of Qwen3.5 and of Olmo-Hybrid, one head after the other."""
    dim, length = layer.head_dim, x.shape[1]

    def normed(y: Tensor, name: str) -> Tensor:
        return y * (y.square().mean(-1, keepdim=True) + layer.eps).rsqrt() * (hf[name] + layer.zero_centred)

    def turned(y: Tensor) -> Tensor:
        half = layer.rotary_dims // 2
        exponents = torch.arange(half, dtype=x.dtype) * 2 / max(layer.rotary_dims, 1)
        angles = torch.arange(length, dtype=x.dtype)[:, None] * layer.rope_theta**-exponents
        turns = torch.polar(torch.ones_like(angles), angles)  # pairs i, i + half as complex numbers
        pairs = torch.complex(y[..., :half], y[..., half : 2 * half]) * turns
        return torch.cat([pairs.real, pairs.imag, y[..., 2 * half :]], -1)

    q, k, v = (x @ hf[f"{name}_proj.weight"].T for name in "qkv")
    if layer.qk_norm == "projection":
        q, k = normed(q, "q_norm.weight"), normed(k, "k_norm.weight")
    found = []
    for head, columns in enumerate(q.split(layer.query_width, -1)):
        kv = slice(key := head // (layer.heads // layer.kv_heads) * dim, key + dim)
        query, keys, values = columns[..., :dim], k[..., kv], v[..., kv]
        if layer.qk_norm == "head":
            query, keys = normed(query, "q_norm.weight"), normed(keys, "k_norm.weight")
        scores = turned(query) @ turned(keys).mT / dim**0.5 + torch.full((length, length), -torch.inf).triu(1)
        found.append(scores.softmax(-1) @ values * (columns[..., dim:].sigmoid() if layer.gate else 1))
    return torch.cat(found, -1) @ hf["o_proj.weight"].T


def against_official(config: Config, shape: AttentionConfig, dtype: torch.dtype) -> tuple[float, int]:
    """On a rank: the relative error (L2) against the official layer in fp64 with the same weights in its format, which
    come back unchanged, and their number."""
    from megatron_refine.convert.mapping import Converter
    from megatron_refine.models import family
    from megatron_refine.models.layout import Branches
    from megatron_refine.models.mixers.attention.hf import tensors
    from megatron_refine.trainer.model import unwrap

    mixer = unwrap(build(config, dtype)[0]).decoder.layers[0].self_attention
    own = tuple(tensors(shape, "{}.", ""))
    first = replace(family.layers(config.model)[0], tensors=own)
    family.layers = lambda model: [first]
    converter, generator = Converter(config.model), torch.Generator().manual_seed(2)
    sizes = {name: size for mapping in own for name, size in mapping.sources().items()}
    hf = {name: 0.2 * torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    parameters = dict(mixer.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(full := converter.to_megatron(f"0.{name}", hf))
            assert all(hf[theirs].equal(back) for theirs, back in converter.to_hf(f"0.{name}", full))
        x = torch.randn(2, 40, 64, generator=generator).to(dtype)
        found = mixer(x.transpose(0, 1), packed_seq_params=Branches(main_len=40))[0].transpose(0, 1)
        expected = official(shape, hf, x.double())
    return float((found - expected).norm() / expected.norm()), len(hf)


OFFICIAL = {"qwen": 6, "olmo": 6, "olmo, two key heads, rope": 6, "plain": 4}  # tensors of a layer


# fp64: sums of up to 64 terms. bf16: weights, inputs and what lies between the products are rounded, 2^-9 each
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layer", OFFICIAL)
def test_the_layer_is_the_official_one(
    ranks: Any, tmp_path: Path, layer: str, dtype: torch.dtype, limit: float
) -> None:
    job = {"config": small_config(tmp_path), "shape": LAYERS[layer], "dtype": dtype}
    error, count = ranks(1, attending, layer=LAYERS[layer], function=against_official, **job)[0]
    assert error < limit and count == OFFICIAL[layer]


def kept(config: Config) -> list[int]:
    """On a rank: bytes that the packed passes of one layer keep."""
    from megatron_refine.bench.timing import saved_bytes
    from megatron_refine.models.layout import Branches
    from megatron_refine.trainer.model import unwrap

    mixer = unwrap(build(config, torch.float64)[0]).decoder.layers[0].self_attention

    def measured(length: int, count: int, n: int) -> int:
        places = Places.of_each(torch.linspace(1, length, count).long().repeat(2, 1))
        layout = Branches(main_len=length, num_positions=count, num_rollouts=n, branch_len=4, places=places)
        rows = torch.randn(layout.num_rows, 2, 64, dtype=torch.float64, requires_grad=True)
        return saved_bytes(lambda: mixer(rows, packed_seq_params=layout))

    return [measured(*size) for size in ((64, 2, 2), (128, 2, 2), (192, 2, 2), (64, 4, 2), (64, 2, 4), (128, 4, 2))]


@pytest.mark.parametrize("layer", ["qwen", "olmo"])
def test_memory_is_linear_in_the_rows(ranks: Any, tmp_path: Path, layer: str) -> None:
    """Memory grows with main rows and with branch rows, without a product of both."""
    job = {"function": kept, "config": small_config(tmp_path)}
    base, longer, longest, more, wider, both = ranks(1, attending, layer=LAYERS[layer], **job)[0]
    assert longest - longer == longer - base > 0
    assert both - longer == more - base > 0
    assert abs(wider - more) < 100  # the same rows from half as many places


@pytest.mark.slow
def test_replicated_key_heads_are_saved_as_cut_ones(ranks: Any, tmp_path: Path) -> None:
    """Two key heads: tp 4, each rank with both -> tp 2, each with its own -> one rank -> cp 4; weights and Adam's
    moments bit for bit, and the run goes on."""
    layer = LAYERS["olmo, two key heads, rope"]

    def config(name: str, *overrides: str) -> Config:
        (tmp_path / name).mkdir()
        ntp = ("refine.enabled=false", "train.micro_batch_size=1")
        return small_config(tmp_path / name, *ntp, *overrides)

    begun = config("tp4", "parallel.tp=4", "parallel.sp=true")
    job = {"function": test_checkpoint.two_steps_saved, "config": begun}
    uninterrupted = ranks(4, attending, layer=layer, **job)[0][0]
    source = Path(begun.run.dir) / "checkpoints/step_0000002"
    first = ranks(1, test_checkpoint.plain, folder=source)[0]
    assert any("kv_proj" in name for name in first)
    for world, overrides in ((2, ["parallel.tp=2"]), (1, []), (4, ["parallel.cp=4"])):
        target = config(f"on {world}", *overrides)
        job = {"function": test_checkpoint.loaded_saved_continued, "config": target, "source": source}
        for metrics, _, _ in ranks(world, attending, layer=layer, **job):
            for key in ("train/ntp_loss", "train/grad_norm"):  # fp32 sums in another order
                assert metrics[key] == pytest.approx(uninterrupted[key], rel=1e-5), key
        source = Path(target.run.dir) / "checkpoints/step_0000002"
        tensors = ranks(1, test_checkpoint.plain, folder=source)[0]
        assert tensors.keys() == first.keys()
        assert [name for name in first if not tensors[name].equal(first[name])] == []


def test_a_whole_step_is_the_same_at_another_layout(ranks: Any, tmp_path: Path) -> None:
    """Rollouts, losses, gradients and parameters after Adam's step; fused and two-pass; ranks that share a key head."""
    found = []
    for world, overrides in ((1, []), LAYOUTS["tp2 sp cp2"]):
        config = small_config(tmp_path, *test_layouts.SETTINGS, *overrides)
        found.append(ranks(world, attending, layer=LAYERS["qwen"], function=test_layouts.steps, config=config))
    test_layouts.compare(found[1], found[0][0])
