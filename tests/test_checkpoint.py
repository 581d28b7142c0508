"""Checkpoints: resharding with Adam's moments, weights alone, keeping and replacing."""

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.records import Batch
from tests.conversions import write_random
from tests.parity import batch, small_config
from tests.runs import TP2
from tests.test_step import make_step

LAYOUTS: dict[str, tuple[int, list[str]]] = {  # world size, overrides
    "tp1": (1, []), "dp2": (2, []), "pp2": (2, ["parallel.pp=2"]), "cp2": (2, ["parallel.cp=2"])
}  # fmt: skip


def start(config: Config) -> Any:
    """On a rank: (step, checkpoints) of a new model."""
    from megatron_refine.checkpoint.checkpoints import Checkpoints

    step = make_step(config, torch.bfloat16 if config.train.precision == "bf16" else torch.float32, optimizer=True)
    return step, Checkpoints(Path(config.run.dir) / "checkpoints", config, step.ranks)


def part(seed: int, step: Any) -> Batch:
    """This rank's sequences of a batch of four."""
    size = 4 // step.ranks.dp
    return batch(4, seed=seed).rows(slice(step.ranks.dp_rank * size, (step.ranks.dp_rank + 1) * size))


def adam_steps(step: Any) -> set[float]:
    """The values of all step counters of Adam on this rank."""
    return {float(state["step"]) for state in step.updater.optimizer.optimizer.state.values()}


def two_steps_saved(config: Config) -> Any:
    """On a rank: two steps, a checkpoint, a third step on next tokens; its metrics and Adam's counters."""
    from megatron_refine.checkpoint.checkpoints import Progress

    step, checkpoints = start(config)
    for i in range(2):
        step(part(i, step), i, refine=config.refine.enabled)
    checkpoints.save(Progress(2, 8, "rows"), step.updater)
    return step(part(2, step), 2, refine=False), adam_steps(step)


def loaded_saved_continued(config: Config, source: Path) -> Any:
    """On a rank: a checkpoint loaded, saved again, the third step; its metrics, Adam's counters and the progress."""
    step, checkpoints = start(config)
    progress = checkpoints.load(source, step.updater)
    checkpoints.save(progress, step.updater)
    return step(part(2, step), 2, refine=False), adam_steps(step), vars(progress)


def each_loaded(jobs: dict[str, tuple[Config, Path]]) -> Any:
    """On a rank: `loaded_saved_continued` of one job after the other."""
    return {name: loaded_saved_continued(config, source) for name, (config, source) in jobs.items()}


def without_cp(folder: Path) -> None:
    """Give a checkpoint the manifest that checkpoints had before theirs named cp."""
    reseal(folder, lambda manifest: manifest["layout"].pop())


def reseal(folder: Path, change: Callable[[Any], object]) -> None:
    """Change a checkpoint's manifest, which then is a valid one again."""
    from megatron_refine.checkpoint.manifest import complete, hashes, read_manifest

    manifest = read_manifest(folder) | {"files": hashes(folder)}
    change(manifest)
    complete(folder, manifest)


def all_plain(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    """On a rank: `plain` of each."""
    return [plain(folder) for folder in folders]


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, in one process."""
    from megatron_refine.platform.megatron.install import install

    install()
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}


def config_at(layout: str, folder: Path, *overrides: str) -> Config:
    folder.mkdir(exist_ok=True)
    return small_config(folder, *(TP2 if layout == "tp2" else LAYOUTS[layout][1]), *overrides)


@pytest.fixture(scope="module")
def saved(ranks: Any, tmp_path_factory: Any) -> Any:
    """(checkpoint after two steps at tp2 with sp, metrics of the third step)."""
    folder = tmp_path_factory.mktemp("saved")
    (metrics, counters), _ = ranks(2, two_steps_saved, config=config_at("tp2", folder))
    assert counters == {3}
    return folder / "run/checkpoints/step_0000002", metrics


@pytest.mark.slow
def test_every_single_change_of_the_layout_and_back_changes_no_bit(ranks: Any, tmp_path: Path, saved: Any) -> None:
    """tp2 with sp -> one rank -> tp2, dp2, pp2, cp2, each from the one rank -> one rank, from each; the run goes on.

    The one rank's first manifest is as those were that named no cp.
    """
    first, uninterrupted = saved
    folders = [first]

    def launch(world: int, jobs: dict[str, tuple[str, Path]]) -> dict[str, Path]:
        configs = {
            name: (config_at(layout, tmp_path / name, "train.micro_batch_size=1"), source)
            for name, (layout, source) in jobs.items()
        }
        for found in ranks(world, each_loaded, jobs=configs):
            for name, (metrics, counters, progress) in found.items():
                assert progress == {"step": 2, "consumed_samples": 8, "data": "rows"}
                assert counters == {3}, name
                for key in ("train/ntp_loss", "train/grad_norm"):  # fp32 sums in another order
                    assert metrics[key] == pytest.approx(uninterrupted[key], rel=1e-5), (name, key)
        written = {name: Path(config.run.dir) / "checkpoints/step_0000002" for name, (config, _) in configs.items()}
        folders.extend(written.values())
        return written

    one = launch(1, {"one": ("tp1", first)})["one"]
    without_cp(one)
    two = launch(2, {layout: (layout, one) for layout in ("tp2", "dp2", "pp2", "cp2")})
    launch(1, {f"back from {layout}": ("tp1", source) for layout, source in two.items()})

    expected, *others = ranks(1, all_plain, folders=folders)[0]
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        found = [t for name, t in expected.items() if f".{kind}." in name]
        assert len(found) == 11 and all(t.abs().sum() > 0 for t in found), kind  # layers are stacked
    for folder, tensors in zip(folders[1:], others, strict=True):
        assert tensors.keys() == expected.keys(), folder
        assert [name for name in expected if not tensors[name].equal(expected[name])] == [], folder


@pytest.mark.slow
@pytest.mark.parametrize("model", ["delta_net", "gated_delta_net", "lact"])
def test_every_family_reshards(ranks: Any, tmp_path: Path, model: str) -> None:
    """tp2 pp2 -> one rank -> cp2 dp2; weights and Adam's moments bit for bit."""

    def config(name: str, *overrides: str) -> Config:
        (tmp_path / name).mkdir()
        ntp = ("refine.enabled=false", "train.micro_batch_size=1")
        return small_config(tmp_path / name, *ntp, *overrides, model=model)

    start_config = config("2x2x1", *TP2, "parallel.pp=2")
    uninterrupted = ranks(4, two_steps_saved, config=start_config)[0][0]
    source = Path(start_config.run.dir) / "checkpoints/step_0000002"
    first = ranks(1, plain, folder=source)[0]
    for world, overrides in ((1, []), (4, ["parallel.cp=2"])):
        target = config(f"on {world}", *overrides)
        for metrics, counters, _ in ranks(world, loaded_saved_continued, config=target, source=source):
            assert counters == {3}
            for key in ("train/ntp_loss", "train/grad_norm"):  # fp32 sums in another order
                assert metrics[key] == pytest.approx(uninterrupted[key], rel=1e-5), key
        source = Path(target.run.dir) / "checkpoints/step_0000002"
        tensors = ranks(1, plain, folder=source)[0]
        assert tensors.keys() == first.keys()
        assert [name for name in first if not tensors[name].equal(first[name])] == []


def new_run(config: Config, source: Path) -> Any:
    """On a rank: a step from a checkpoint's weights; weights before and after, Adam's state, learning rate's step."""
    from megatron_refine.checkpoint.source import find
    from megatron_refine.trainer.model import unwrap

    step, checkpoints = start(config)
    checkpoints.load_weights(find(source), step.updater)
    assert not step.updater.optimizer.optimizer.state or adam_steps(step) == {0}
    before = {n: p.detach().clone() for n, p in unwrap(step.model).named_parameters()}
    step(part(2, step), 0, refine=False)
    after = {n: p.detach() for n, p in unwrap(step.model).named_parameters()}
    return before, after, adam_steps(step), step.updater.scheduler.num_steps


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0.9e-3, 1.1e-3), ("bf16", 0, 5e-3)])
def test_weights_alone_start_a_new_run(
    ranks: Any, tmp_path: Path, saved: Any, precision: str, least: float, most: float
) -> None:
    """In bf16 from their rounded values, of which the step moves one by at most a unit in the last place."""
    tensors = ranks(1, plain, folder=saved[0])[0]
    overrides = ("optimizer.weight_decay=0.0", "optimizer.lr=1e-3", f"train.precision={precision}")
    config = config_at("tp1", tmp_path, *overrides)
    before, after, counters, schedule = ranks(1, new_run, config=config, source=saved[0])[0]
    assert counters == {1} and schedule == 1
    for name, weight in before.items():
        stacked = re.fullmatch(r"(decoder\.layers\.)(\d)\.(.*)", name)
        expected = tensors[stacked[1] + stacked[3]][int(stacked[2])] if stacked else tensors[name]
        assert weight.equal(expected.to(weight.dtype)), name
        # Adam's first step is the learning rate, whatever the gradient: old moments would change it, old main weights
        # would show here in whole
        moved = (after[name] - weight).abs().max()
        assert least <= moved < most, name


def decayed(config: Config) -> Any:
    """On a rank: the weights before and after a step."""
    from megatron_refine.trainer.model import unwrap

    step, _ = start(config)
    before = {n: p.detach().clone() for n, p in unwrap(step.model).named_parameters()}
    step(part(0, step), 0, refine=False)
    return before, {n: p.detach() for n, p in unwrap(step.model).named_parameters()}


# three norms a layer, the final one; A_log and dt_bias; the biases of LaCT's projections
@pytest.mark.parametrize(("model", "vectors"), [("delta_net", 7), ("gated_delta_net", 11), ("lact", 9)])
def test_norms_and_other_vectors_do_not_decay(ranks: Any, tmp_path: Path, model: str, vectors: int) -> None:
    """A learning rate too small to see times a weight decay that makes it 0.1."""
    config = small_config(tmp_path, "optimizer.lr=1e-9", "optimizer.weight_decay=1e8", model=model)
    before, after = ranks(2, decayed, config=config)[0]
    assert sum(w.dim() == 1 for w in before.values()) == vectors
    for name, weight in before.items():
        kept = 1.0 if weight.dim() == 1 else 0.9
        assert torch.allclose(after[name], kept * weight, rtol=1e-5, atol=2e-9), name  # Adam itself moves by 1e-9


def faked_saves(config: Config, steps: list[int]) -> list[str]:
    """On a rank: checkpoints whose payload is the step and nothing else; the folders there in the end."""
    from megatron_refine.checkpoint import checkpoints as module

    def write(state: Any, folder: str) -> None:
        Path(folder, "payload").write_text(
            f"{state['progress']['step']} of {state['progress']['data']}", encoding="utf-8"
        )

    module.dist_checkpointing.save = write
    step, checkpoints = start(config)
    step(part(0, step), 0, refine=False)
    for i, number in enumerate(steps):
        checkpoints.save(module.Progress(number, 0, f"save {i}"), step.updater)
    found = sorted(checkpoints.root.iterdir())
    return [f"{p.name}: {(p / 'payload' if p.is_dir() else p).read_text('utf-8')}" for p in found]


def test_the_oldest_checkpoints_go_and_the_same_step_is_replaced(ranks: Any, tmp_path: Path) -> None:
    config = config_at("tp1", tmp_path, "checkpoint.keep=2")
    assert ranks(1, faked_saves, config=config, steps=[2, 4, 10, 10])[0] == [
        "latest: step_0000010", "step_0000004: 4 of save 1", "step_0000010: 10 of save 3"
    ]  # fmt: skip


def gone_back(config: Config) -> Any:
    """On a rank: the progress that is loaded, and what is said."""
    step, checkpoints = start(config)
    said: list[str] = []
    return checkpoints.load_latest(step.updater, said.append).step, said


def nowhere_to_go_back(config: Config) -> str:
    """On a rank: the error where every checkpoint is damaged."""
    from megatron_refine.errors import DamagedError

    with pytest.raises(DamagedError) as error:
        gone_back(config)
    return str(error.value)


def test_two_damaged_checkpoints_are_passed_over(ranks: Any, tmp_path: Path, saved: Any) -> None:
    config = config_at("tp1", tmp_path, "checkpoint.fallback=true")
    root = Path(config.run.dir) / "checkpoints"
    for number in (2, 4, 6):
        folder = root / f"step_000000{number}"
        shutil.copytree(saved[0], folder)
        reseal(folder, lambda manifest, step=number: manifest.update(step=step))
        if number > 2:
            (folder / "common.pt").write_bytes(b"torn")
    step, said = ranks(1, gone_back, config=config)[0]
    assert step == 2 and len(said) == 2
    for line, newer, older in zip(said, (6, 4), (4, 2), strict=True):
        assert f"step_000000{newer}" in line and line.endswith(f"going on from step_000000{older}")
    (root / "step_0000002/metadata.json").write_bytes(b"torn")
    assert "step_0000002/metadata.json: truncated: 4 bytes of" in ranks(1, nowhere_to_go_back, config=config)[0]


def refused(config: Config) -> str:
    """On a rank: the error where the newest checkpoint is whole, but nothing to resume from."""
    from megatron_refine.errors import CheckpointError, DamagedError

    with pytest.raises(CheckpointError) as error:
        gone_back(config)
    assert not isinstance(error.value, DamagedError)
    return str(error.value)


def test_a_checkpoint_that_is_refused_is_not_passed_over(ranks: Any, tmp_path: Path, saved: Any) -> None:
    """With checkpoint.fallback too: damage alone is."""
    config = config_at("tp1", tmp_path, "checkpoint.fallback=true")
    for number in (2, 4):
        folder = Path(config.run.dir) / f"checkpoints/step_000000{number}"
        shutil.copytree(saved[0], folder)
        reseal(folder, lambda manifest, step=number: manifest.update(step=step))
    reseal(folder, lambda manifest: manifest.update(weights_only=True))
    assert f"{folder}: holds weights only" in ranks(1, refused, config=config)[0]


def latest_of(config: Config) -> Any:
    return start(config)[1].latest()


def test_what_is_not_complete_is_neither_loaded_nor_in_the_way(ranks: Any, tmp_path: Path, saved: Any) -> None:
    config = config_at("tp1", tmp_path, "checkpoint.keep=3")
    root = Path(config.run.dir) / "checkpoints"
    old = root / "step_0000002"
    assert ranks(1, latest_of, config=config)[0] is None
    for name in ("step_0000002", "step_0000004", ".incomplete-step_0000006"):
        shutil.copytree(saved[0], root / name)
    (root / "step_0000004" / "COMPLETE").unlink()
    assert ranks(1, latest_of, config=config)[0] == old
    (old / "payload").write_text("old", encoding="utf-8")
    assert ranks(1, faked_saves, config=config, steps=[4, 6])[0] == [
        "latest: step_0000006", "step_0000002: old", "step_0000004: 4 of save 0", "step_0000006: 6 of save 1"
    ]  # fmt: skip


def kept_and_measured(config: Config, source: Path) -> Any:
    """On a rank: weights of a converted checkpoint, drawn with another init_std; three saves, the last measured, and
    two more by an attempt that goes on from it.

    (files of hf/ after each, the error without the model, estimated and real bytes)
    """
    from megatron_refine.checkpoint.checkpoints import Checkpoints, Progress
    from megatron_refine.checkpoint.manifest import ORIGIN, payload, read_manifest
    from megatron_refine.checkpoint.source import find
    from megatron_refine.errors import CheckpointError

    step, checkpoints = start(config)
    checkpoints.load_weights(find(source), step.updater)
    moved = contextlib.ExitStack()
    if step.ranks.is_main:  # a run whose weights these are may remove them before the first save
        (source / ORIGIN).rename(source / "gone")
        moved.callback((source / "gone").rename, source / ORIGIN)
    step(part(0, step), 0, refine=False)
    kept = []
    for number in range(1, 4):
        moved.close() if number == 2 else None
        folder = checkpoints.save(Progress(number, 0, "rows"), step.updater)
        kept.append({path.name: path.read_bytes() for path in (folder / ORIGIN).iterdir()})
    real = sum((folder / name).stat().st_size for name in payload(folder) if not name.startswith(ORIGIN))
    with pytest.raises(CheckpointError, match="holds weights only, so a run cannot resume from it; move it out"):
        checkpoints.load(source, step.updater)
    assert read_manifest(folder)["ranks"] == 2
    later = Checkpoints(checkpoints.root, config, step.ranks)
    assert later.load(folder, step.updater).step == 3 and later.loaded == folder
    for number in (4, 5):  # what the fourth was made from is gone at the fifth
        kept_in = later.save(Progress(number), step.updater) / ORIGIN
        kept.append({path.name: path.read_bytes() for path in kept_in.iterdir()})
    return kept, later._bytes(step.updater), real


@pytest.mark.parametrize("layout, precision", [("cp2", "fp32"), ("dp2", "bf16")])
def test_what_a_model_came_with_survives_and_the_estimate_is_that_of_the_files(
    ranks: Any, tmp_path: Path, layout: str, precision: str
) -> None:
    from megatron_refine.checkpoint.conversion import hf_to_megatron

    write_random(tmp_path / "hf", config_at("tp1", tmp_path / "own").model)
    (tmp_path / "hf/tokenizer.json").write_text("{}", encoding="utf-8")
    hf_to_megatron(tmp_path / "hf", tmp_path / "converted")
    came = {path.name: path.read_bytes() for path in (tmp_path / "converted/hf").iterdir()}
    overrides = ["checkpoint.keep=1", "model.init_std=0.7", f"train.precision={precision}", "refine.enabled=false"]
    config = config_at(layout, tmp_path / "run", *overrides)
    found = ranks(2, kept_and_measured, config=config, source=tmp_path / "converted")
    for kept, estimate, real in found:
        assert kept == [came] * 5 and "tokenizer.json" in came
        assert 0.8 < estimate / real < 1.05, (estimate, real)
