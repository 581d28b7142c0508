"""A family is one object: nothing else names one, and one of another package does all that ours do."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_refine.config import Config, ConfigError, Parallel
from megatron_refine.convert.fields import model_of
from megatron_refine.models import cost, family
from megatron_refine.models.layer import alike
from tests import runs
from tests.conversions import convert, to_hf, to_megatron, write_random
from tests.lanes import short
from tests.parity import small_config
from tests.test_checkpoint import all_plain, loaded_saved_continued, two_steps_saved
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]
TOY = {"family": "tests.toy", "vocab_size": 512, "hidden_size": 64, "num_layers": 4, "num_heads": 4,
       "intermediate_size": 128, "init_std": 0.05}  # fmt: skip


def test_no_file_outside_a_familys_folder_names_a_family() -> None:
    names = "|".join(re.escape(each.name) for each in family.every())
    found = []
    for folder in ("megatron_refine", "kernels", "models", "tools", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT).parts[:2] in {("models", each.name) for each in family.every()}
            linked = path.relative_to(ROOT).parts[:2] in {("megatron_refine", "models"), ("megatron_refine", "kernels")}
            if inside or linked:
                continue
            text = re.sub(r"kernels[./]lact|\"lact\"\)\.used", "", path.read_text(encoding="utf-8"))
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in re.finditer(rf"\b({names})\b", text)]
    assert not found, "\n".join(found)


def test_every_family_says_the_same_of_itself_everywhere() -> None:
    assert len(family.every()) >= 3
    for each in family.every():
        assert family.of(each.name) is each and family.FAMILIES[each.name] is each.config
        assert family.by_model_type(each.format.model_type) is each
        assert each.config.served == (each.serving is not None)
    assert family.of("tests.toy").name == "tests.toy" and "tests.toy" not in list(family.FAMILIES)
    for name in ("tests.nowhere", "tests.runs", "common", "nothing"):
        with pytest.raises(KeyError):
            family.of(name)


def configured(folder: Path, *overrides: str) -> Config:
    folder.mkdir(exist_ok=True)
    return small_config(folder, "optimizer.clip_grad=1000.0", *overrides, model=TOY)


def test_a_toy_trains_and_evaluates(ranks: Zygote, tmp_path: Path) -> None:
    """The command on two ranks, tensor parallel: rollouts, evaluation, checkpoints of layers that differ."""
    config = runs.write_config(tmp_path, tmp_path / "data", model=TOY, eval={"sequences": 2})
    ends = ranks(2, runs.command, arguments=["--config", str(config), *runs.TP2])
    assert [end.code for end in ends] == [0, 0], ends[0].err
    rows = runs.rows(tmp_path)
    assert len(rows) == 7 and "rollout/reward_mean" in rows[-1] and rows[-1]["eval/ntp_loss"] < rows[0]["eval/ntp_loss"]


@pytest.mark.parametrize("layout", short(["tp2 sp", "pp2 of 3 and 1"], lambda layout: layout == "tp2 sp"))
def test_a_toy_reshards(ranks: Zygote, tmp_path: Path, layout: str) -> None:
    """Saved on one rank after two steps, the third step elsewhere is the one here; and so are all tensors."""
    first = configured(tmp_path / "one")
    assert not alike(family.layers(first.model))
    expected = ranks(1, two_steps_saved, config=first)[0][0]
    overrides = (
        ["parallel.tp=2", "parallel.sp=true"] if layout == "tp2 sp" else ["parallel.pp=2", "parallel.stages=[3,1]"]
    )
    other = configured(tmp_path / "other", *overrides)
    saved = Path(first.run.dir) / "checkpoints/step_0000002"
    for metrics, counters, _ in ranks(2, loaded_saved_continued, config=other, source=saved):
        assert counters == {3}
        for key in ("train/ntp_loss", "train/grad_norm"):  # fp32 sums in another order
            assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
    before, after = ranks(1, all_plain, folders=[saved, Path(other.run.dir) / "checkpoints/step_0000002"])[0]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_toy_converts_both_ways(ranks: Zygote, tmp_path: Path) -> None:
    """Bit by bit, and its slow evaluation agrees with the trainer's model."""
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_random(hf, family.of("tests.toy").config.model_validate(TOY))
    for line in (to_megatron(hf, megatron, "--verify"), to_hf(megatron, back, "--verify")):
        refused = ranks(1, convert, arguments=line)[0]  # a file's word alone imports no package
        assert refused.code and "set MEGATRON_REFINE_FAMILIES=tests.toy" in refused.err
        end = ranks(1, convert, arguments=line, patch=name_the_toy)[0]
        assert end.code == 0, end.err
    before, after = load_file(hf / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def name_the_toy() -> None:
    os.environ[family.PACKAGES] = "tests.toy"


def parameters_of(config: Config) -> Any:
    """On a rank: parameters that it really has."""
    from megatron_refine.trainer.model import build_model
    from megatron_refine.trainer.parallel import init_parallel

    return sum(p.numel() for p in build_model(config, init_parallel(config)).parameters())


def test_a_toy_is_planned(ranks: Zygote, tmp_path: Path) -> None:
    from megatron_refine.estimate.hardware import Hardware
    from megatron_refine.estimate.plan import plan

    config = configured(tmp_path / "toy", "parallel.tp=2")
    assert ranks(2, parameters_of, config=config) == [cost.rank_parameters(config.model, Parallel(tp=2), 0)] * 2
    shapes = cost.operations(config.model)["delta_rule"]
    assert [shape.gated_rule for shape in shapes] == [False, True]  # type: ignore[attr-defined]
    assert "tests.toy, " in plan(config, 2, Hardware())


def test_the_page_shows_the_toy() -> None:
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert (ROOT / "tests/toy/__init__.py").read_text(encoding="utf-8") in page


def test_an_unknown_model_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no package is imported because a file names it."""
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers/__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    (tmp_path / "strangers/child.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tests.nowhere", "strangers.child", "json.decoder"):
        with pytest.raises(ConfigError, match=f"model_type='{name}': no such family.* set MEGATRON_REFINE_FAMILIES="):
            model_of({"model_type": name}, "config.json")
        with pytest.raises(KeyError):
            family.stored(name)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/lacking.py").write_text("import not_installed_anywhere", encoding="utf-8")
    with pytest.raises(ConfigError, match="model.family=a.lacking: No module named 'not_installed_anywhere'"):
        family.of("a.lacking")


def test_servers_need_no_megatron() -> None:
    """What SGLang's processes import of the project, where no Megatron-Core is installed."""
    code = """
import importlib.metadata as metadata, sys
found = metadata.version
def version(name):
    if name == "megatron-core":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import megatron_refine.kernels.delta_rule, megatron_refine.models.family as family, megatron_refine.convert.mapping
family.every()
sys.exit("megatron.core" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def epsilons(config: Config) -> dict[str, float]:
    """On a rank: of every norm of the model, by its last name."""
    from tests.parity import build

    model, _ = build(config, torch.float32)
    return {name.rpartition(".")[2]: each.eps for name, each in model.named_modules() if hasattr(each, "eps")}


@pytest.mark.parametrize(
    "model",
    short(("delta_net", "gated_delta_net", "lact", "qwen3_5", "olmo_hybrid"), lambda model: model == "olmo_hybrid"),
)
def test_every_norm_has_the_models_epsilon(model: str, ranks: Zygote, tmp_path: Path) -> None:
    """But for those that the original has fixed: of LaCT's reads, and of Olmo-Hybrid's linear heads."""
    own = {"lact": {"ttt_norm": 1e-5}, "olmo_hybrid": {"o_norm": 1e-5}}.get(model, {})
    found = ranks(1, epsilons, config=small_config(tmp_path, "model.norm_eps=0.03", model=model))[0]
    assert len(found) > 3 and found == dict.fromkeys(found, 0.03) | own
