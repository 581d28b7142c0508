"""A resumed run does what its configuration says: Adam's settings, the schedule, what is refused, what is told."""

import json
import math
import re
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest
import torch

from megatron_refine.checkpoint.manifest import complete_folders, read_manifest
from megatron_refine.checkpoint.resumption import Past, changes, past_of_checkpoint, past_of_run, refuse, told
from megatron_refine.config import Config, ConfigError
from tests import runs
from tests.parity import small_config
from tests.runs import Fault
from tests.test_checkpoint import part, start

OLD = ("refine.enabled=false", "train.micro_batch_size=1", "optimizer.schedule=cosine", "optimizer.warmup_steps=1",
       "optimizer.weight_decay=0.1")  # fmt: skip
NEW = {
    "rates": ("optimizer.lr=2e-3", "optimizer.min_lr=1e-3", "optimizer.schedule=linear", "optimizer.warmup_steps=0",
              "train.steps=40"),
    "Adam": ("optimizer.beta1=0.5", "optimizer.beta2=0.9", "optimizer.eps=1e-3", "optimizer.weight_decay=0.5"),
    "clip": ("optimizer.clip_grad=0.01",),
}  # fmt: skip


def rate(config: Config, step: int) -> float:
    """The learning rate after so many steps, by hand."""
    o, steps = config.optimizer, config.train.steps
    if o.warmup_steps and step <= o.warmup_steps:
        return o.lr * step / o.warmup_steps
    done = (step - o.warmup_steps) / (steps - o.warmup_steps)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[o.schedule]
    return o.lr if o.schedule == "constant" else o.min_lr + (o.lr - o.min_lr) * left


def groups(step: Any) -> list[dict[str, Any]]:
    return [group for part in step.updater.parts for group in part.optimizer.param_groups]


def adam(step: Any) -> list[torch.Tensor]:
    """Parameters, moments and counters of this rank's Adam."""
    found = []
    for each in step.updater.parts:
        for weight in (p for group in each.optimizer.param_groups for p in group["params"]):
            state = each.optimizer.state[weight]
            found += [weight.detach().clone(), *(state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step"))]
    return found


def set_by_hand(step: Any, config: Config, done: int) -> None:
    """Give an optimizer that runs the settings of a configuration, through torch's own names."""
    o, updater = config.optimizer, step.updater
    for group in groups(step):
        decays = any(p.dim() and group["wd_mult"] for p in group["params"])
        group |= {"betas": (o.beta1, o.beta2), "eps": o.eps, "lr": rate(config, done)}
        group["weight_decay"] = o.weight_decay if decays else 0.0
    clipped = updater.config.optimizer.model_copy(update={"clip_grad": o.clip_grad})
    updater.config = updater.config.model_copy(update={"optimizer": clipped})


def resumed_with(old: Config, new: dict[str, Config]) -> Any:
    """On a rank: for each of `new`, (settings, third step) of a run that is resumed with it, and of one that never
    stopped and was given its values by hand."""
    from megatron_refine.checkpoint.checkpoints import Progress

    step, checkpoints = start(old)
    for i in range(2):
        step(part(i, step), i, refine=False)
    folder = checkpoints.save(Progress(2, 8, "rows"), step.updater)
    before = adam(step)
    found = {}
    for name, config in new.items():
        resumed, again = start(config)
        again.load(folder, resumed.updater)
        same = all(a.equal(b) for a, b in zip(adam(resumed), before, strict=True))
        running, also = start(old)
        also.load(folder, running.updater)
        set_by_hand(running, config, 2)
        keys = ("lr", "betas", "eps", "weight_decay", "wd_mult")
        settings = [[{key: group[key] for key in keys} for group in groups(x)] for x in (resumed, running)]
        rates = [[x(part(2, x), 2, refine=False)["train/grad_norm"], adam(x)] for x in (resumed, running)]
        after = resumed.updater.lr
        found[name] = same, settings, rates, after
    return found


def test_every_setting_of_a_resumed_run_is_that_of_its_configuration(ranks: Any, tmp_path: Path) -> None:
    """On two data-parallel ranks: moments are the checkpoint's, the next step is that of a run with the new values."""
    old = small_config(tmp_path, *OLD)
    new = {name: small_config(tmp_path, *OLD, *overrides) for name, overrides in NEW.items()}
    for results in ranks(2, resumed_with, timeout=120, old=old, new=new):
        for name, (same, (settings, by_hand), (step, reference), after) in results.items():
            o = new[name].optimizer
            assert same, name
            assert [g["wd_mult"] for g in settings] == [1.0, 0.0], "norms do not decay"
            for group, other in zip(settings, by_hand, strict=True):
                assert group.pop("lr") == pytest.approx(other.pop("lr")) and group == other, name
                assert tuple(group["betas"]) == (o.beta1, o.beta2) and group["eps"] == o.eps
                assert group["weight_decay"] == o.weight_decay * group["wd_mult"]
            assert after == pytest.approx(rate(new[name], 3)), name
            assert step[0] == reference[0]
            for a, b in zip(step[1], reference[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def rates(configs: list[Config]) -> list[list[float]]:
    """On a rank: the learning rate before the first and after each step."""
    from types import SimpleNamespace

    from megatron_refine.trainer.optimizer import _build_scheduler

    found = []
    for config in configs:
        optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}])
        scheduler = _build_scheduler(config, optimizer)
        found.append([optimizer.param_groups[0]["lr"]])
        for _ in range(config.train.steps):
            scheduler.step(1)
            found[-1].append(optimizer.param_groups[0]["lr"])
    return found


def test_the_schedule_is_the_formula(ranks: Any, tmp_path: Path) -> None:
    """Warm-up from 0, then constant, or down to min_lr at train.steps."""
    schedules = [(kind, warmup) for kind in ("constant", "linear", "cosine") for warmup in (0, 3)]
    configs = [
        small_config(tmp_path, f"optimizer.schedule={kind}", f"optimizer.warmup_steps={warmup}",
                     "optimizer.min_lr=1e-3", "train.steps=11")
        for kind, warmup in schedules
    ]  # fmt: skip
    for config, found, schedule in zip(configs, ranks(1, rates, configs=configs)[0], schedules, strict=True):
        assert found == pytest.approx([rate(config, step) for step in range(12)]), schedule
        assert found[-1] == pytest.approx(1e-2 if schedule[0] == "constant" else 1e-3)
        assert max(found) == pytest.approx(1e-2)


def past(tmp_path: Path, *overrides: str, ranks: int | None = 1) -> Past:
    config = small_config(tmp_path, *overrides).model_dump(serialize_as_any=True)
    return Past(
        tmp_path, {f"{name}.{key}": value for name, part in config.items() for key, value in part.items()}, ranks
    )


TESTTIME = ("train.phase=testtime", "task.paths=[a]", "data.tokenizer=t")


@pytest.mark.parametrize(
    ("before", "now", "pattern"),
    [
        ((), ["run.seed=2"], r"run\.seed=2: .* was trained with 1, .*another run\.dir"),
        ((), ["train.precision=bf16"], r"train\.precision=bf16: .* was trained with fp32,"),
        ((), ["train.phase=posttrain", *TESTTIME[1:]], r"train\.phase=posttrain: .* was trained with midtrain,"),
        (TESTTIME, [*TESTTIME, "ttt.reset=online"], r"ttt\.reset=online: .* was trained with per_batch,"),
        (TESTTIME, [*TESTTIME, "train.global_batch_size=8"], r"train\.global_batch_size=8: .* was trained with 4,"),
        ((), ["data.seq_length=256"], r"trained on other data \(data\.seq_length 256, was 192"),
        ((), ["data.min_length=100"], r"trained on other data \(data\.min_length 100, was 0\)"),
    ],
)
def test_what_makes_another_run_is_refused_by_name(tmp_path: Path, before: Any, now: list[str], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as error:
        refuse(past(tmp_path, *before), small_config(tmp_path, *now))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (["optimizer.lr=1e-5"], "optimizer.lr 1e-5, was 0.01"),
        (["train.steps=20", "optimizer.beta2=0.95"], "optimizer.beta2 0.95, was 0.999; train.steps 20, was 10"),
        (["parallel.tp=2"], "parallel.tp 2, was 1; ranks 2, was 1"),
        (["train.global_batch_size=8"], "train.global_batch_size 8, was 4; the data go on with sample 12: none is "
         "skipped or repeated"),
        (["task.inner_step=false", "refine.enabled=false"], "task.inner_step false, was true; refine.enabled false, "
         "was true"),
        (["eval.sequences=3", "eval.selection=uniform"], "eval.sequences 3, was 0; eval.selection uniform, was "),
        (["eval.data=d", "eval.essays=e", "task.valid_paths=[v]"], "task.valid_paths ['v'], was []; eval.data d, was ; "
         "eval.essays e, was "),
        (["eval.every=3", "checkpoint.keep=5", "run.timeout_minutes=3.0", "train.recompute=full",
          "engine.max_requests=2", "data.paths=[elsewhere]", "data.min_length=192"], ""),
    ],
)  # fmt: skip
def test_what_changes_the_training_is_told_in_one_line(tmp_path: Path, now: list[str], line: str) -> None:
    config, before = small_config(tmp_path, *now), past(tmp_path)
    refuse(before, config)
    found = changes(before, config, ranks=config.parallel.tp)
    assert told(3, 12, found) == f"resumed at step 3 with {line}"
    assert bool(found) == bool(line)


def test_a_key_that_the_earlier_version_did_not_have_is_no_change(tmp_path: Path) -> None:
    before = past(tmp_path, ranks=None)
    for key in ("optimizer.clip_grad", "run.seed"):
        del before.values[key]
    config = small_config(tmp_path, "optimizer.clip_grad=3.0", "run.seed=3")
    refuse(before, config)
    assert changes(before, config, ranks=4) == []


SCHEDULE = {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1}


def test_a_run_that_is_interrupted_and_goes_on_with_another_rate_says_so(ranks: Any, tmp_path: Path) -> None:
    """Ctrl-C in step 2 of a run that saves by the clock: on the screen, in the folder, in the rates of the steps."""
    config = runs.write_config(
        tmp_path, tmp_path / "data", optimizer=SCHEDULE, train={"steps": 4}, checkpoint={"minutes": 1e-6},
        refine={"num_chunks": 2, "num_rollouts": 1, "rollout_len": 2},
    )  # fmt: skip
    command = ["--config", str(config)]
    first = ranks(1, runs.command, arguments=command, fault=Fault(2, SIGINT))[0]
    assert first.code == 75 and "stopped by SIGINT after step 2: run the same command to go on" in first.out
    assert (
        first.err == "Ctrl-C: the step under way is finished and saved; a second Ctrl-C ends at once, without saving\n"
    )
    run = tmp_path / "run"
    folders = complete_folders(run / "checkpoints")
    assert [folder.name for folder in folders] == ["step_0000001", "step_0000002"]
    assert past_of_checkpoint(folders[1]).values["optimizer.lr"] == 1e-3
    refused = ranks(1, runs.command, arguments=[*command, "run.seed=9"])[0]
    assert refused.code == 2 and re.match("run.seed=9: .* was trained with 1, ", refused.err), refused.err
    assert not (run / "logs/attempt_2").exists()
    second = ranks(1, runs.command, arguments=[*command, "optimizer.lr=1e-5"], saves=False)[0]
    line = "resumed at step 2 with optimizer.lr 1e-5, was 0.001"
    assert second.code == 0 and line in second.out.splitlines()
    assert line in (run / "logs/attempt_2/train.log").read_text(encoding="utf-8").splitlines()
    schedules = [SCHEDULE | {"lr": lr} for lr in (1e-3, 1e-5)]
    configs = [small_config(tmp_path, *(f"optimizer.{k}={v}" for k, v in schedule.items()), "train.steps=4")
               for schedule in schedules]  # fmt: skip
    found = [row["train/lr"] for row in runs.rows(tmp_path) if row["step"]]
    assert found == pytest.approx([rate(configs[step > 2], step) for step in range(1, 5)])
    facts = [json.loads((run / f"logs/attempt_{n}/attempt.json").read_text(encoding="utf-8")) for n in (1, 2)]
    assert [fact["step"] for fact in facts] == [0, 2]
    assert [fact["changed"] for fact in facts] == [{}, {"optimizer.lr": [1e-5, 1e-3]}]
    assert facts[1]["versions"]["torch"] == torch.__version__ and "megatron-core" in facts[1]["versions"]
    layout = {"tp": 1, "sp": False, "cp": 1, "pp": 1, "stages": [], "dp": 1}
    assert facts[1]["layout"] == layout and facts[1]["ranks"] == 1
    assert [past_of_run(run / f"logs/attempt_{n}").values["optimizer.lr"] for n in (1, 2)] == [1e-3, 1e-5]
    older_version(folders[1])
    assert past_of_checkpoint(folders[1]).values["optimizer.lr"] == 1e-5  # config.yaml says no more than the last one's


def older_version(folder: Path) -> None:
    """A checkpoint as it was written before it held the configuration."""
    from megatron_refine.checkpoint.manifest import complete

    manifest = read_manifest(folder)
    complete(folder, {key: value for key, value in manifest.items() if key not in ("config", "ranks")})
