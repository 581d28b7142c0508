"""Every class of bad configuration is one line that names the key and the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_refine.config import Config, ConfigError, check_world_size, load
from megatron_refine.config.load import absolute_file
from megatron_refine.models.family import FAMILIES

TREE = {
    "model": {
        "family": "delta_net",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 128,
    },
    "data": {"seq_length": 256},
    "train": {"global_batch_size": 8},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE), encoding="utf-8")
    return path


def read(path: Path, *overrides: str) -> Config:
    return load(path, list(overrides), FAMILIES)


def problem(path: Path, *overrides: str) -> str:
    """The message of a configuration with one problem."""
    with pytest.raises(ConfigError) as caught:
        read(path, *overrides)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


def test_a_key_with_its_section_in_a_file_is_told_how(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE) + "optimizer.lr: 3\n", encoding="utf-8")
    assert problem(path).endswith("optimizer.lr: in a file a key stands in its section; write optimizer: {lr: ...}")


def test_defaults_are_valid(path: Path) -> None:
    config = read(path)
    assert config.model.num_layers == 2 and config.refine.num_chunks == 8 and config.fused


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=3", "train.stepz: unknown key; did you mean train.steps?"),
        ("model.num_head=4", "model.num_head: unknown key; did you mean model.num_heads?"),
        ("train.steps=many", "train.steps='many': input should be a valid integer"),
        ("train.steps=1.5", "train.steps=1.5: input should be a valid integer"),
        ("train.steps=true", "train.steps=True: input should be a valid integer"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("optimizer.lr=fast", "optimizer.lr='fast': input should be a valid number"),
        ("refine.enabled=1", "refine.enabled=1: input should be a valid boolean"),
        ("train.precision=fp16", "train.precision='fp16': input should be 'fp32' or 'bf16'"),
        ("data.paths=a.txt", "data.paths='a.txt': input should be a valid list"),
    ],
)
def test_unknown_key_or_wrong_type(path: Path, override: str, says: str) -> None:
    message = problem(path, override)
    assert message.startswith(f"{path}: ") and says in message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.tp=8"], ("parallel.tp=8", "4 heads", "1, 2, 4")),
        (["parallel.tp=4", "model.intermediate_size=126"], ("parallel.tp=4", "model.intermediate_size=126")),
        (["parallel.pp=3"], ("parallel.pp=3", "model.num_layers=2")),
        (["parallel.tp=2", "parallel.cp=4"], ("parallel.cp=4", "tp*cp = 8", "4 heads", "1, 2, 4")),
        (["parallel.pp=2", "update.mode=fused"], ("update.mode=fused", "parallel.pp=2", "two_pass")),
        (["parallel.sp=true"], ("parallel.sp=true", "parallel.tp > 1")),
        (["data.seq_length=39"], ("data.seq_length=39", "refine.num_chunks=8", "at least 40")),
        (
            ["data.seq_length=65", "refine.rollout_len=46"],
            ("refine.margin=20", "refine.rollout_len=46", "at least 66"),
        ),
        (["refine.num_chunks=300"], ("data.seq_length=256", "refine.num_chunks=300", "at least 300")),
        (["data.min_length=300"], ("data.min_length=300", "data.seq_length=256")),
        (["update.mini_batch_size=3"], ("update.mini_batch_size=3", "train.global_batch_size=8")),
        (
            ["update.mode=fused", "update.mini_batch_size=4"],
            ("update.mode=fused", "update.mini_batch_size=0", "two_pass"),
        ),
        (["refine.start_step=101"], ("refine.start_step=101", "train.steps=100", "refine.enabled=false")),
        (["refine.group=position"], ("refine.group=position", "refine.num_rollouts=1", "refine.group=sequence")),
        (["optimizer.min_lr=1e-3"], ("optimizer.min_lr=0.001", "optimizer.lr=1e-06")),
        (["parallel.pp=2", "parallel.stages=[2]"], ("parallel.stages=[2]", "2 numbers", "add up to 2")),
        (["parallel.pp=2", "parallel.stages=[1,2]"], ("parallel.stages=[1, 2]", "2 numbers", "add up to 2")),
        (["train.match=optimizer_steps"], ("train.match=optimizer_steps", "refine.enabled=false")),
        (["train.match=compute"], ("train.match=compute", "refine.enabled=false")),
    ],
)
def test_contradicting_keys(path: Path, overrides: list[str], says: tuple[str, ...]) -> None:
    message = problem(path, *overrides)
    assert all(part in message for part in says), message


def test_a_limit_itself_is_no_contradiction(path: Path) -> None:
    overrides = ["refine.start_step=100", "optimizer.min_lr=1e-6", "data.min_length=256", "data.valid_min_length=256"]
    assert read(path, *overrides).refine.start_step == 100
    assert read(path, "data.seq_length=40").data.seq_length == 40
    assert read(path, "data.seq_length=66", "refine.rollout_len=46").data.seq_length == 66


def test_short_rows_are_fine_without_refine(path: Path) -> None:
    assert read(path, "data.seq_length=39", "refine.enabled=false").data.seq_length == 39


def test_several_problems_are_one_line_each(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(path, "train.steps=0", "train.stepz=1", "optimizer.lr=-1")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    "override", ["train.steps", "steps=3", "=3", "train..steps=3", "--train.steps=3", "Train.steps=3"]
)
def test_override_syntax(path: Path, override: str) -> None:
    assert problem(path, override) == f"{override}: an override reads section.key=value"


def test_override_below_a_value(path: Path) -> None:
    assert "seq_length is a value, not a section" in problem(path, "data.seq_length.x=3")


def test_override_values_are_yaml(path: Path) -> None:
    config = read(path, "optimizer.lr=1e-3", "data.paths=[a.txt, b c.txt]", "run.dir=runs/a=b", "refine.enabled=false")
    assert config.optimizer.lr == 1e-3
    assert config.data.paths == ["a.txt", "b c.txt"]
    assert config.run.dir == "runs/a=b"
    assert not config.refine.enabled


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.0e-3", "1.e-3", "0.001"])
def test_floats_without_a_point(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + f"optimizer: {{lr: {text}}}\n", encoding="utf-8")
    assert read(path).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"model: [1", "not valid YAML"),
        (b"model:\n\tfamily: delta_net", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"- model", "must hold sections"),
        (b"", "must hold sections"),
        (b"train: {steps: 1}", "model.family: missing; choose one of delta_net"),
        (b"model: {vocab_size: 8}", "model.family: missing; choose one of delta_net"),
        (b"model: {family: gpt}", "model.family=gpt: unknown; choose one of delta_net"),
    ],
)
def test_bad_file(path: Path, content: bytes, says: str) -> None:
    path.write_bytes(content)
    message = problem(path)
    assert message.startswith(f"{path}: ") and says in message


def test_later_files_win(path: Path, tmp_path: Path) -> None:
    """Key by key; a model that names its family is a whole one."""
    longer, model = tmp_path / "longer.yaml", tmp_path / "model.yaml"
    longer.write_text("train: {steps: 7}\nmodel: {num_layers: 4}\n", encoding="utf-8")
    other = {"family": "gated_delta_net", "vocab_size": 128, "hidden_size": 32, "num_layers": 1}
    model.write_text(yaml.safe_dump({"model": other | {"num_heads": 2, "intermediate_size": 64}}), encoding="utf-8")
    config = load([str(path), str(longer)], [], FAMILIES)
    assert (config.train.steps, config.train.global_batch_size, config.model.num_layers) == (7, 8, 4)
    config = load([str(path), str(longer), str(model)], ["train.steps=9"], FAMILIES)
    assert config.model.family == "gated_delta_net" and config.model.num_layers == 1 and config.train.steps == 9
    with pytest.raises(ConfigError, match=r"run\.yaml \+ .*longer\.yaml: train\.stepz: unknown key"):
        load([str(path), str(longer)], ["train.stepz=9"], FAMILIES)


PRESETS = sorted(
    p for p in (Path(__file__).parents[1] / "configs").rglob("*.yaml")
    if p.parent.name not in ("scaling", "study") and p.name != "official.yaml"  # it goes over others
)  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_presets_are_valid(preset: Path) -> None:
    base = {"models": "midtrain_delta_net_1.3b.yaml", "engines": "quickstart.yaml"}.get(preset.parent.name)
    files = [str(preset.parents[1] / base), str(preset)] if base else [str(preset)]
    overrides = []
    if preset.parent.name == "engines":
        overrides = [f"engine.python={sys.executable}"]  # the lane's may be absent
    elif preset.stem.startswith(("posttrain", "testtime")):  # what no preset can name
        overrides = ["task.paths=[train.parquet]", "data.tokenizer=tokenizer.model"]
    assert load(files, overrides, FAMILIES).model.num_layers >= 4
    if preset.stem.startswith(("midtrain", "posttrain", "testtime")):
        official = load([*files, str(preset.parent / "official.yaml")], overrides, FAMILIES)
        assert official.train.micro_batch_size == 2 and official.task.answer_mean == "micro_batch"


def test_missing_file(tmp_path: Path) -> None:
    assert problem(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"


def test_the_packages_own_files_are_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder has none of the name, which comes first; and a submitted job is given their place."""
    monkeypatch.chdir(tmp_path)
    name = "configs/quickstart.yaml"
    assert load([name], [], FAMILIES).train.steps == 210
    assert Path(absolute_file(name)).samefile(Path(__file__).parents[1] / name)
    (tmp_path / "configs").mkdir()
    text = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text.replace("steps: 210", "steps: 200"), encoding="utf-8")
    assert load([name], [], FAMILIES).train.steps == 200 and absolute_file(name) == str(tmp_path / name)


def test_missing_key(path: Path) -> None:
    path.write_text(
        path.read_text(encoding="utf-8").replace("vocab_size: 512", "tie_embeddings: true"), encoding="utf-8"
    )
    assert "model.vocab_size: missing; set it in the file or with model.vocab_size=..." in problem(path)


def test_world_size(path: Path) -> None:
    config = read(path, "parallel.tp=2", "train.micro_batch_size=2")
    assert [check_world_size(config, n) for n in (2, 4, 8)] == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"world size 3 .* tp\*cp\*pp = 2\*1\*1 = 2: start a multiple of 2"):
        check_world_size(config, 3)
    with pytest.raises(ConfigError, match=r"train.global_batch_size=8 .* dp\*train.micro_batch_size = 8\*2"):
        check_world_size(config, 16)
    with pytest.raises(ConfigError, match=r"update.mini_batch_size=4 .* dp\*train.micro_batch_size = 4\*2"):
        check_world_size(read(path, "update.mini_batch_size=4", "train.micro_batch_size=2"), 4)


def test_automatic_update_mode(path: Path) -> None:
    assert read(path).fused
    assert not read(path, "update.mini_batch_size=4").fused
    assert not read(path, "update.mode=two_pass").fused
    assert not read(path, "parallel.pp=2").fused
    assert read(path, "parallel.cp=2").fused


def test_resolved_copy_is_the_same_configuration(path: Path) -> None:
    config = read(path, "optimizer.lr=3e-5", "train.precision=fp32", "run.wandb='off'", "data.paths=[a, b]")
    text = config.to_yaml()
    path.write_text(text, encoding="utf-8")
    again = read(path)
    assert again.to_yaml() == text
    assert again.model_dump(serialize_as_any=True) == config.model_dump(serialize_as_any=True)
    assert yaml.safe_load(text)["model"]["num_heads"] == 4


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, megatron_refine.config.document, megatron_refine.models.family\n"
        "print(*sorted({'torch', 'megatron', 'numpy'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == []
