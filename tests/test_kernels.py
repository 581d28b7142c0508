"""Triton's kernels without a GPU: compiled for one that is not there, pinned by tables, announced on the screen.

Those marked `kernels` need Triton and flash-linear-attention (`make test-kernels`); the others need neither.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_refine import extras
from megatron_refine.config import ConfigError, load
from megatron_refine.kernels import tuning
from megatron_refine.kernels.tuning import waiting
from megatron_refine.models.family import FAMILIES
from megatron_refine.platform import hardware
from megatron_refine.warm import choose, run
from megatron_refine.warm.driver import CARDS
from megatron_refine.warm.passes import KINDS, delta_rule, shape
from megatron_refine.warm.worker import claim

ROOT = Path(__file__).parents[1]
BENCH = str(ROOT / "configs/bench.yaml")
TINY = [BENCH, "model=delta_net_tiny", "data.seq_length=128", "train.precision=bf16"]


def row(kernel: str = "ops.a.kernel", kind: str = "main", **more: Any) -> dict[str, Any]:
    """A compiled candidate: of four warps and two stages that fit, unless `more` says otherwise."""
    config = {"BV": more.pop("BV", 32), "num_warps": more.pop("warps", 4), "num_stages": more.pop("stages", 2)}
    found = {
        "kernel": kernel, "config": config, "hit": False, "seconds": 1.0, "shared": 32768, "refused": False,
        "registers": 128, "spilled": 0, "grid": [64, 16, 1], "kind": kind,
    }  # fmt: skip
    return found | more


def chosen(*rows: dict[str, Any]) -> Any:
    return choose.choose(rows, "sm_90")["ops.a.kernel"]["BV"]


def test_a_candidate_that_spills_or_does_not_fit_is_taken_where_there_is_no_other() -> None:
    assert chosen(row(BV=1, spilled=8), row(BV=2), row(BV=3, refused=True)) == 2
    assert chosen(row(BV=1, refused=True), row(BV=2, spilled=64), row(BV=3, spilled=8)) == 3
    # clean in the main stream, not in branches: it is pinned for both
    assert chosen(row(BV=1), row(BV=1, kind="branch", spilled=8), row(BV=2), row(BV=2, kind="branch")) == 2


def test_of_clean_candidates_the_one_is_taken_that_fills_the_card() -> None:
    """32 blocks leave 100 of 132 SMs idle, 64 leave 68; with many blocks for each the larger ones move less."""
    assert chosen(row(BV=64, grid=[2, 16, 1]), row(BV=32, grid=[4, 16, 1])) == 32
    assert chosen(row(BV=64, grid=[200, 16, 1]), row(BV=32, grid=[400, 16, 1])) == 64
    slow = row(BV=1, registers=255, warps=2)  # four blocks of two warps: as busy as one needs
    assert chosen(slow, row(BV=2, shared=200_000, warps=2, grid=[64, 16, 1])) == 1  # one block of two warps at a time


def test_a_kernel_is_counted_once_for_each_of_its_specializations() -> None:
    rows = [row(BV=16), row(BV=16), row(BV=32), row(kernel="ops.b.other")]  # two with the first, when it was tuned
    assert choose.compilations(rows) == {"ops.a.kernel": 2, "ops.b.other": 1}


def test_a_kernel_without_candidates_is_not_in_the_table() -> None:
    assert choose.choose([row() | {"config": {}}], "sm_90") == {}


def compiled(folder: Path, *rows: dict[str, Any], name: str = "compiled.json") -> Path:
    path = folder / name
    found = {"architecture": "sm_90", "shape": "K64 V64", "versions": {"triton": "3"}, "rows": [*rows]}
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def measured(folder: Path, tile: int, name: str = "measured.json") -> Path:
    path = folder / name
    entry = {"config": {"BV": tile, "num_warps": 4, "num_stages": 2}, "microseconds": 7.5}
    found = {"architecture": "sm_90", "shape": "K64 V64", "versions": {"triton": "3"}, "card": "1 x H100"}
    path.write_text(json.dumps(found | {"measured": {"ops.a.kernel": entry}}), encoding="utf-8")
    return path


def entry(folder: Path) -> dict[str, Any]:
    table = json.loads((folder / "sm_90.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = table["shapes"]["K64 V64"]["kernels"]["ops.a.kernel"]
    return found


def test_what_was_measured_is_replaced_by_another_measurement_alone(tmp_path: Path) -> None:
    files = [compiled(tmp_path, row(BV=32)), measured(tmp_path, 64)]
    assert choose.update(tmp_path, files) == [f"{tmp_path / 'sm_90.json'}: K64 V64"]
    assert (entry(tmp_path)["by"], entry(tmp_path)["config"]["BV"]) == ("measured", 64)
    assert entry(tmp_path)["on"] == "1 x H100" and entry(tmp_path)["microseconds"] == 7.5
    choose.update(tmp_path, [compiled(tmp_path, row(BV=16), row(kind="decode", kernel="ops.b.other"))])
    assert entry(tmp_path)["config"]["BV"] == 64
    passes = json.loads((tmp_path / "sm_90.json").read_text(encoding="utf-8"))["shapes"]["K64 V64"]["passes"]
    assert passes == {"main": {"ops.a.kernel": 1}, "decode": {"ops.b.other": 1}}
    choose.update(tmp_path, [measured(tmp_path, 16)])
    assert entry(tmp_path)["config"]["BV"] == 16


def test_a_file_that_holds_no_kernels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"rows": []}', encoding="utf-8")
    for name, words in (("other.json", "holds no kernels"), ("none.json", "No such file or directory")):
        with pytest.raises(ConfigError, match=words):
            choose.update(tmp_path, [tmp_path / name])


@pytest.mark.parametrize("path", sorted(tuning.HERE.glob("*.json")), ids=lambda path: path.stem)
def test_a_table_is_what_runs_can_read(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem in CARDS and table["versions"].keys() == set(choose.PACKAGES)
    for name, found in table["shapes"].items():
        assert tuning._read(name) and found["passes"].keys() == set(KINDS)
        for kernel in found["kernels"].values():
            assert {"num_warps", "num_stages"} <= kernel["config"].keys() and kernel["by"] in ("compiled", "measured")
            assert all(isinstance(value, int) for value in kernel["config"].values())
        assert found["kernels"].keys() <= {kernel for names in found["passes"].values() for kernel in names}


@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "configs/models").glob("*.yaml")))
def test_every_preset_has_pinned_kernels(model: str) -> None:
    config = load([BENCH], [f"model={model}"], FAMILIES)
    rule = delta_rule(config)
    assert bool(rule) == (config.model.family != "lact") == bool(shape(config))
    if rule:
        assert tuning.choices("sm_90", shape(config)) and tuning.expected("sm_90", shape(config), "main")
        assert tuning.told("sm_90", shape(config)).startswith("pinned for sm_90, ")


def test_a_shape_takes_the_smallest_that_is_nowhere_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("K64 V64", "K128 V128", "K128 V256 gated")
    shapes = {name: {"kernels": {"a": {"config": {"of": name}, "by": "compiled"}}, "passes": {}} for name in names}
    monkeypatch.setattr(tuning, "table", lambda architecture: {"shapes": shapes})
    taken = {name: tuning.choices("sm_90", name).get("a", {}).get("of") for name in (
        "K64 V64", "K32 V64", "K64 V65", "K24 V48 gated", "K256 V128",
    )}  # fmt: skip
    assert taken == {
        "K64 V64": "K64 V64", "K32 V64": "K64 V64", "K64 V65": "K128 V128", "K24 V48 gated": "K128 V256 gated",
        "K256 V128": None,
    }  # fmt: skip
    assert tuning.told("sm_90", "K256 V128") == "searched: none is pinned for sm_90, K256 V128"


def candidate(tile: int) -> Any:
    return SimpleNamespace(kwargs={"BV": tile}, num_warps=4, num_stages=2)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Two kernels with three candidates each; the table has one for the first, and one for the second that it lacks."""
    found = {name: SimpleNamespace(configs=[candidate(tile) for tile in (16, 32, 64)]) for name in ("a", "b")}
    pinned = {
        name: {"config": {"BV": tile, "num_warps": 4, "num_stages": 2}, "by": "compiled"}
        for name, tile in (("a", 32), ("b", 128))
    }
    shapes = {"K64 V64": {"kernels": pinned, "passes": {"main": {"a": 2, "b": 1, "c": 1}, "decode": {"c": 1}}}}
    monkeypatch.setattr(tuning, "autotuners", lambda: found)
    monkeypatch.setattr(tuning, "table", lambda architecture: {"shapes": shapes if architecture == "sm_90" else {}})
    for name, value in (("_own", {}), ("_seen", set()), ("_pinned", ""), ("_search", False)):
        monkeypatch.setattr(tuning, name, value)
    yield found


def tiles(kernels: dict[str, Any]) -> list[list[int]]:
    return [[c.kwargs["BV"] for c in tuner.configs] for tuner in kernels.values()]


def test_an_autotuner_is_left_one_candidate_by_the_table_and_all_without(kernels: dict[str, Any]) -> None:
    assert tuning.pin("sm_90", "K64 V64") == ["a"] and tiles(kernels) == [[32], [16, 32, 64]]
    assert tuning.pin("sm_90", "K128 V64") == [] and tiles(kernels) == [[16, 32, 64]] * 2
    assert tuning.pin("sm_80", "K64 V64") == []
    tuning.configure(search=True)
    assert tuning.pin("sm_90", "K64 V64") == [] and tiles(kernels) == [[16, 32, 64]] * 2
    assert tuning.told("sm_90", "K64 V64") == "searched (train.autotune)"


def test_each_pass_is_made_ready_once(kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[dict[str, int]] = []
    monkeypatch.setattr(hardware, "architecture", lambda: "sm_90")
    monkeypatch.setattr(tuning._waiting, "expect", announced.append)
    for kind in ("main", "main", "decode", "main"):
        tuning.ready(64, 64, False, kind)
    assert announced == [{"a": 2, "b": 3, "c": 1}, {"c": 1}] and tiles(kernels)[0] == [32]
    tuning.ready(64, 64, True, "main")  # another shape: nothing is pinned for it
    assert tiles(kernels)[0] == [16, 32, 64]
    tuning.ready(64, 64, False, "main")
    assert tiles(kernels)[0] == [32] and len(announced) == 3


def test_without_a_gpu_nothing_is_pinned(kernels: dict[str, Any]) -> None:
    if hardware.has_gpu():
        pytest.skip("there is a GPU")
    tuning.ready(64, 64, False, "main")
    assert tiles(kernels) == [[16, 32, 64]] * 2


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Triton's hooks, without Triton."""
    runtime = SimpleNamespace(jit_cache_hook=None, jit_post_compile_hook=None)
    triton = ModuleType("triton")
    triton.knobs = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(waiting, "DELAY", 0.3)
    return runtime


def test_the_screen_names_what_is_left_while_it_compiles(
    hooks: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """What takes no time (it was in the cache) is not told; then the first that does, and the end."""
    line = waiting.Waiting()
    line.expect({"ops.a.quick": 1, "ops.a.slow": 2})
    for name, seconds in (("quick", 0.0), ("slow", 1.0), ("slow", 1.0)):
        fn = SimpleNamespace(module="fla.ops.a", name=name)
        assert not hooks.jit_cache_hook(fn=fn, key="", compile={})  # true would end the compilation
        time.sleep(seconds)
        hooks.jit_post_compile_hook(fn=fn, key="")
    said = capsys.readouterr().err
    assert said.splitlines()[0] == "compiling the GPU's kernels, 2 left: slow"
    assert said.splitlines()[-1].startswith("kernels compiled in ") and len(said.splitlines()) == 2


def test_hooks_of_others_stay(hooks: SimpleNamespace) -> None:
    hooks.jit_cache_hook = mine = lambda **_: False
    waiting.Waiting().expect({"ops.a.quick": 1})
    assert hooks.jit_cache_hook is mine


def test_a_compilation_is_done_by_the_first_that_asks(tmp_path: Path) -> None:
    assert [claim(tmp_path, key) for key in ("a", "b", "a", "a")] == [True, True, False, False]


def test_the_table_sums_the_candidates_of_a_kernel() -> None:
    rows = [row(seconds=2.0), row(BV=64, spilled=8, hit=True), row(kernel="ops.b.other", refused=True, kind="branch")]
    lines = run.table(rows, 3.0, 2).splitlines()
    assert lines[1].split() == ["kernel", "m", "2", "1", "2.0", "2.0", "32", "128", "1", "0"]
    assert lines[2].split() == ["other", "b", "1", "1", "1.0", "1.0", "32", "128", "0", "1"]
    assert lines[3].startswith("3 candidates of 2 kernels: 2 compiled, 1 in the cache; 3 CPU s, 3 s by 2 processes")


def command(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "megatron_refine", "kernels", *words]
    return subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["warm"], "--config: is missing"),
        (["warm", "--config", BENCH, "--jobs", "-1"], "--jobs=-1: must be 1 or more"),
        (["pin"], "pin: names no file"),
        (["pin", "nowhere.json"], "nowhere.json: No such file or directory"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], message: str) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(message), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, words in (("triton", "Triton is not installed: pip install"), ("fla", "pip install '.[gpu]'")):
        monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name, missing=missing: name != missing or None)
        with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
            extras.check_triton()


def test_lact_has_inductors_kernels_alone() -> None:
    done = command("warm", "--config", BENCH, "model=lact_760m")
    assert done.returncode == 0 and "launches no Triton kernels of its own" in done.stdout


@pytest.mark.kernels
def test_kernels_are_compiled_once_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """The recurrent kernel and the convolution, shared out between two processes; then none is left to compile."""
    out = tmp_path / "out.json"
    words = ["warm", "--config", *TINY, "--passes", "decode", "--json", str(out)]
    for fresh, jobs in ((True, "2"), (False, "1")):
        done = command(*words, "--jobs", jobs, TRITON_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        assert rows and all(r["hit"] != fresh and r["registers"] > 0 and not r["refused"] for r in rows)
        assert {r["kernel"].rpartition(".")[2] for r in rows} == {
            "fused_recurrent_gated_delta_rule_fwd_kernel", "forward_kernel",
        }  # fmt: skip
        assert all(r["grid"][0] * r["grid"][1] * r["grid"][2] >= 8 for r in rows)
    assert list((tmp_path / "cache").rglob("*.cubin"))


@pytest.mark.kernels
def test_a_first_step_compiles_one_candidate_of_each_pinned_kernel(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["warm", "--config", *TINY, "--passes", "main", "--pinned", "--json", str(out)]
    done = command(*words, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    theirs = Counter(r["kernel"] for r in rows if r["kernel"].startswith(choose.ANNOUNCED))
    assert theirs == tuning.expected("sm_90", "K32 V32", "main") and len(rows) == theirs.total() + 2  # the convolution
    pinned = tuning.choices("sm_90", "K32 V32")
    assert all(r["config"] == pinned.get(r["kernel"], {}) for r in rows)
    assert not any(r["refused"] or r["spilled"] for r in rows)


@pytest.mark.kernels
@pytest.mark.parametrize("word", ["--arch=sm_10", "--passes=forward"])
def test_what_is_not_known_is_one_line(word: str) -> None:
    done = command("warm", "--config", *TINY, word)
    assert done.returncode == 2 and done.stderr.startswith(word) and done.stderr.count("\n") == 1


@pytest.mark.kernels
def test_measuring_needs_a_gpu() -> None:
    if hardware.has_gpu():
        pytest.skip("there is a GPU")
    done = command("measure", "--config", *TINY)
    assert done.returncode == 2 and done.stderr.startswith("kernels measure: times kernels on a GPU")
