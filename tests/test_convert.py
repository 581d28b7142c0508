"""Conversions: bit-exact round trips, runs that start from one, a run's checkpoint back, what --verify sees, memory."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_refine.config import Config, Data, Eval, Optimizer, Parallel, Refine, Run, Train
from megatron_refine.convert.fields import model_of
from megatron_refine.convert.mapping import Converter
from megatron_refine.models import family
from tests.conversions import (
    contents,
    convert,
    hf_folder,
    in_bf16,
    rewrite,
    shard_in_two,
    tensors,
    to_hf,
    to_megatron,
    write_random,
)
from tests.lanes import short
from tests.parity import batch
from tests.test_golden import FOLDERS, golden_model

ROOT = Path(__file__).parents[1]


def done(ranks: Any, *commands: list[str]) -> list[str]:
    """Run the commands; their output."""
    ends = [ranks(1, convert, arguments=command)[0] for command in commands]
    assert [end.code for end in ends] == [0] * len(ends), ends
    return [end.out for end in ends]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_round_trip_gives_every_file_back_bit_by_bit(ranks: Any, tmp_path: Path, name: str) -> None:
    source, megatron, back = hf_folder(tmp_path / "source", name), tmp_path / "megatron", tmp_path / "back"
    first, second = done(ranks, to_megatron(source, megatron, "--verify"), to_hf(megatron, back, "--verify"))
    assert contents(back) == contents(source)
    assert "verified: " in first and "verified: " in second
    section = (megatron / "model.yaml").read_text(encoding="utf-8")
    assert section in first and f"family: {golden_model(name).family}" in section
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "megatron", "source"]


@pytest.mark.parametrize("name", FOLDERS)
def test_mixed_dtypes_and_shards_go_back_as_they_came(ranks: Any, tmp_path: Path, name: str) -> None:
    """bf16 but for the vectors of one layer: parts that share a tensor of ours, layers that share a stack."""
    source, megatron, back = hf_folder(tmp_path / "source", name), tmp_path / "megatron", tmp_path / "back"
    odd = (
        "model.layers.1.attn.o_norm",
        "model.layers.0.attn.k_proj",
        "model.layers.1.attn.A_log",
        "model.layers.1.attn.w0",
        "lm_head",
    )
    rewrite(source, lambda found: {n: t if n.startswith(odd) else t.to(torch.bfloat16) for n, t in found.items()})
    shard_in_two(source)
    done(ranks, to_megatron(source, megatron, "--verify"), to_hf(megatron, back, "--verify"))
    assert contents(back) == contents(source)


def test_names_of_early_checkpoints_are_known_and_kept(ranks: Any, tmp_path: Path) -> None:
    source, megatron, back = hf_folder(tmp_path / "source"), tmp_path / "megatron", tmp_path / "back"
    rewrite(source, lambda found: {n.replace("o_norm", "norm"): t for n, t in found.items()})
    assert "model.layers.1.attn.norm.weight" in tensors(source)
    done(ranks, to_megatron(source, megatron, "--verify"), to_hf(megatron, back, "--verify"))
    assert contents(back) == contents(source)


def test_a_tensor_that_nothing_reads_is_kept(ranks: Any, tmp_path: Path) -> None:
    """Early checkpoints of Gated DeltaNet have a D."""
    source, megatron, back = hf_folder(tmp_path / "source", "gated_delta_net"), tmp_path / "megatron", tmp_path / "back"
    rewrite(source, lambda found: found | {f"model.layers.{i}.attn.D": torch.randn(4) for i in range(2)})
    done(ranks, to_megatron(source, megatron, "--verify"), to_hf(megatron, back, "--verify"))
    assert contents(back) == contents(source)
    done(ranks, to_hf(megatron, tmp_path / "cast", "--dtype", "bf16"))
    name = "model.layers.1.attn.D"
    assert tensors(tmp_path / "cast")[name].equal(tensors(source)[name].bfloat16())


SHAPES: dict[str, dict[str, Any]] = {  # unlike the golden checkpoints
    "delta_net": {
        "family": "delta_net", "num_heads": 4, "expand_k": 0.5, "expand_v": 2.0, "allow_neg_eigval": True,
        "conv_size": 3, "tie_embeddings": True,
    },
    "value heads": {"family": "gated_delta_net", "num_heads": 2, "num_v_heads": 6, "head_dim": 8, "use_gate": True},
    "lact, whole matrices": {
        "family": "lact", "num_lact_heads": 2, "num_attn_heads": 4, "w0_w2_low_rank": -1, "inter_multi": 1.5,
        "qkv_bias": True, "ttt_prenorm": True, "use_momentum": False, "no_v_silu": True, "tie_embeddings": True,
    },
    "lact, plain": {
        "family": "lact", "num_lact_heads": 4, "num_attn_heads": 4, "w0_w2_low_rank": 3, "learnable_ttt_scale": False,
        "qkv_silu": False, "use_muon": True, "ttt_prenorm": True, "ttt_nope": True,
    },
    "no gate": {
        "family": "gated_delta_net", "num_heads": 3, "num_v_heads": 6, "head_dim": 8, "expand_v": 1.0,
        "use_gate": False, "allow_neg_eigval": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_other_shapes(ranks: Any, tmp_path: Path, case: str) -> None:
    """Random weights in files as the library writes them, compared by logits in both directions."""
    common = {"vocab_size": 130, "hidden_size": 32, "num_layers": 3, "intermediate_size": 48, "norm_eps": 1e-5}
    model = family.FAMILIES[SHAPES[case]["family"]].model_validate(common | SHAPES[case])
    source, megatron, back = tmp_path / "source", tmp_path / "megatron", tmp_path / "back"
    write_random(source, model)
    done(ranks, to_megatron(source, megatron, "--verify"), to_hf(megatron, back, "--verify"))
    assert contents(back) == contents(source)


def test_tied_embeddings(ranks: Any, tmp_path: Path) -> None:
    source, megatron, back = tmp_path / "source", tmp_path / "megatron", tmp_path / "back"
    hf_folder(source, tie_word_embeddings=True)
    rewrite(source, lambda found: {n: t for n, t in found.items() if n != "lm_head.weight"})
    done(ranks, to_megatron(source, megatron, "--verify"), to_hf(megatron, back, "--verify"))
    assert contents(back) == contents(source)


def test_a_cast_and_the_size_of_shards(ranks: Any, tmp_path: Path) -> None:
    source, megatron, back = hf_folder(tmp_path / "source"), tmp_path / "megatron", tmp_path / "back"
    shard_in_two(source)  # its index is not that of the four
    options = ["--verify", "--dtype", "bf16", "--max-shard-size", "50KB"]
    done(ranks, to_megatron(source, megatron), to_hf(megatron, back, *options))
    found, expected = tensors(back), in_bf16(tensors(source))
    assert found.keys() == expected.keys() and all(found[n].equal(t) for n, t in expected.items())
    files = sorted(back.glob("*.safetensors"))
    assert [p.name for p in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert all(p.stat().st_size < 50_000 + 4_000 for p in files)  # the tensors, and a header
    index = json.loads((back / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == expected.keys()
    assert {*index["weight_map"].values()} == {path.name for path in files}
    done(ranks, to_hf(megatron, tmp_path / "one", "--max-shard-size", "1GB"))
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in expected.values())
    before, after = (json.loads((p / "config.json").read_text(encoding="utf-8")) for p in (source, back))
    assert after == before | {"torch_dtype": "bfloat16"}


def run_config(folder: Path, name: str, precision: str = "fp32", **parallel: Any) -> Config:
    """Of a run of a golden model in `folder/run`."""
    model = golden_model(name)
    train = Train(precision=precision, global_batch_size=4, micro_batch_size=2, steps=10)  # type: ignore[arg-type]
    refine = Refine(num_chunks=4, margin=6, enabled=False)
    optimizer = Optimizer(lr=1e-2)
    return Config(
        model=model, run=Run(dir=str(folder / "run")), train=train, refine=refine, optimizer=optimizer,
        data=Data(seq_length=64), parallel=Parallel(**parallel), eval=Eval(sequences=0),
    )  # fmt: skip


def started(config: Config, source: Path | None, hf: Path | None = None, steps: int = 0) -> Any:
    """On a rank: a run that starts from `source`, its weights compared with a conversion in memory, its checkpoint.

    Returns the names of weights that differ, and sums of squares of the weights and of the optimizer's copy.
    """
    from megatron_refine.checkpoint.checkpoints import Checkpoints, Progress
    from megatron_refine.checkpoint.source import find
    from megatron_refine.trainer.model import build_model, global_parameters
    from megatron_refine.trainer.optimizer import Updater
    from megatron_refine.trainer.parallel import init_parallel
    from megatron_refine.trainer.shards import shard

    ranks = init_parallel(config)
    updater = Updater(config, build_model(config, ranks), ranks)
    checkpoints = Checkpoints(Path(config.run.dir) / "checkpoints", config, ranks)
    different, sums = [], [0.0, 0.0]
    if source:
        checkpoints.load_weights(find(source), updater)
    if hf:
        read, converter = tensors(hf), Converter(config.model)
        for name, p in global_parameters(updater.model):
            expected = shard(converter.to_megatron(name, read), p, ranks.tp_rank, ranks.tp).to(p.dtype)
            different += [] if p.equal(expected) else [name]
            sums[0] += float(p.detach().double().square().sum())
        main = [p for part in updater.parts for group in part.optimizer.param_groups for p in group["params"]]
        sums[1] = sum(float(p.detach().double().square().sum()) for p in main)
    for i in range(steps):
        ntp_step(updater, i)
    checkpoints.save(Progress(steps, 4 * steps, "rows"), updater)
    return different, sums


def ntp_step(updater: Any, seed: int) -> None:
    """One optimizer step on random tokens, through Megatron's schedule."""
    from megatron_refine.trainer.forward import ntp_pass

    items = [Item(batch(2, 64, seed=2 * seed + i)) for i in range(2)]

    def loss(output: Any, item: Any) -> Any:
        value = -output.main.mean() / 2
        return value, value.detach()[None]

    updater.update(items, lambda model, item: ntp_pass(model, item.batch.tokens), loss, 64, 1)


@dataclasses.dataclass
class Item:
    batch: Any


STARTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # dtype of the weights, of the training, layout
    "fp32 to fp32 at tp2 sp": ("fp32", "fp32", {"tp": 2, "sp": True}),
    "bf16 to fp32 at pp2": ("bf16", "fp32", {"pp": 2}),
    "bf16 to bf16 at tp2 sp": ("bf16", "bf16", {"tp": 2, "sp": True}),
    "fp32 to bf16 at tp1": ("fp32", "bf16", {}),
}


@pytest.mark.parametrize(
    ("name", "start"),
    short(
        [("delta_net", start) for start in STARTS]
        + [(name, "bf16 to bf16 at tp2 sp") for name in FOLDERS if name != "delta_net"],
        lambda name, start: name == "delta_net" and start[:4] == "bf16",
    ),
)
def test_a_run_starts_from_a_conversion_and_its_checkpoint_goes_back(
    ranks: Any, tmp_path: Path, name: str, start: str
) -> None:
    dtype, precision, parallel = STARTS[start]
    source, megatron, back = hf_folder(tmp_path / "source", name), tmp_path / "megatron", tmp_path / "back"
    rewrite(source, in_bf16 if dtype == "bf16" else lambda found: found)
    done(ranks, to_megatron(source, megatron))
    config = run_config(tmp_path, name, precision, **parallel)
    for different, sums in ranks(config.parallel.model_size, started, config=config, source=megatron, hf=source):
        assert not different
        assert sums[0] == pytest.approx(sums[1], rel=1e-9)  # fp64 sums of the same numbers
    done(ranks, to_hf(tmp_path / "run/checkpoints/step_0000000", back, "--verify"))
    if precision == dtype:
        assert contents(back) == contents(source)
        return
    found = tensors(back)
    for own, tensor in tensors(source).items():
        assert found[own].equal(tensor.to(torch.bfloat16 if precision == "bf16" else torch.float32)), own
    told = json.loads((back / "config.json").read_text(encoding="utf-8"))["torch_dtype"]
    assert told == ("bfloat16" if precision == "bf16" else "float32")
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def logits_at(config: Config, folder: Path, tokens: Tensor) -> Tensor:
    """On a rank: of the model of a checkpoint; gathered over tp."""
    from megatron_refine.checkpoint.checkpoints import load_weights
    from megatron_refine.trainer.forward import main_pass
    from megatron_refine.trainer.model import build_model, unwrap
    from megatron_refine.trainer.parallel import init_parallel

    ranks = init_parallel(config)
    model = build_model(config, ranks)
    load_weights(unwrap(model), folder)
    with torch.no_grad():
        local = unwrap(model).logits(main_pass(model, tokens).rows.local[:, 0])
    parts = [torch.empty_like(local) for _ in range(ranks.tp)]
    dist.all_gather(parts, local, group=ranks.tp_group)
    return torch.cat(parts, 1)[:, : config.model.vocab_size]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "lact"])
def test_a_checkpoint_of_a_run_at_tp2_pp2_becomes_a_complete_model(ranks: Any, tmp_path: Path, name: str) -> None:
    """Trained here from random weights; the model folder is evaluated in plain torch."""
    folder, back = tmp_path / "run/checkpoints/step_0000002", tmp_path / "back"
    ranks(4, started, config=run_config(tmp_path, name, tp=2, sp=True, pp=2), source=None, steps=2)
    done(ranks, to_hf(folder, back, "--verify"))
    config = json.loads((back / "config.json").read_text(encoding="utf-8"))
    model = model_of(config, "back")
    assert model == golden_model(name) and config["torch_dtype"] == "float32"
    tokens = torch.randint(0, 97, (1, 64), generator=torch.Generator().manual_seed(0))
    expected = family.reference(model)(model, tensors(back), tokens)[0]
    found = ranks(2, logits_at, config=run_config(tmp_path, name, tp=2, sp=True), folder=folder, tokens=tokens)
    for logits in found:  # fp32 in another order
        assert (logits - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def refused_load(config: Config, source: Path) -> str:
    """On a rank: the error of a run that starts from a conversion of another model."""
    from megatron_refine.errors import CheckpointError

    with pytest.raises(CheckpointError) as error:
        started(config, source)
    return str(error.value)


def test_a_configuration_of_another_model_is_refused_by_key(ranks: Any, tmp_path: Path) -> None:
    source, megatron = hf_folder(tmp_path / "source"), tmp_path / "megatron"
    done(ranks, to_megatron(source, megatron))
    config = run_config(tmp_path, "delta_net")
    other = config.model_copy(update={"model": config.model.model_copy(update={"norm_eps": 1e-5})})
    message = ranks(1, refused_load, config=other, source=megatron)[0]
    assert ": of another model; set model.norm_eps=1e-06, or name another" in message


MEASURED = """
    import re, sys
    from pathlib import Path
    from megatron_refine.platform.megatron.install import install
    install()
    import torch
    from megatron_refine.checkpoint import conversion
    def peak():  # ru_maxrss would begin with that of the parent process
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
    torch.save(torch.ones(2), sys.argv[1] + "/warm")  # what torch itself keeps for a first file
    before = peak()
    getattr(conversion, sys.argv[2])(Path(sys.argv[3]), Path(sys.argv[4]))
    print(peak() - before)
"""


def growth(folder: Path, direction: str, source: Path, target: Path) -> int:
    """MiB by which a process's peak grows in a conversion."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), str(folder), direction, str(source), str(target)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 350 MiB whose largest tensor has 16 MiB: a few of these are held, never the model.

    Code loaded on the way takes some 70 MiB.
    """
    from megatron_refine.models.delta_net.config import DeltaNetConfig

    model = DeltaNetConfig(
        family="delta_net", vocab_size=4096, hidden_size=1024, num_layers=8, num_heads=8, intermediate_size=2048
    )
    source, megatron, back = tmp_path / "source", tmp_path / "megatron", tmp_path / "back"
    write_random(source, model)
    assert (source / "model.safetensors").stat().st_size > 350 * 2**20
    assert growth(tmp_path, "hf_to_megatron", source, megatron) < 200
    assert growth(tmp_path, "megatron_to_hf", megatron, back) < 200
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; import megatron_refine.cli.convert as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert "--max-shard-size" in out and out.splitlines()[-1] == "False"
