"""Words of the command line and of YAML files mean what they look like; paths are expanded wherever they stand."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_refine.cli import convert, evaluate, generate, lm_eval
from megatron_refine.config import Config, ConfigError, Data, Engine, Eval, absolute, files_and_overrides, read_as
from megatron_refine.config.paths import resolved
from megatron_refine.config.words import spell
from megatron_refine.estimate.hardware import read_hardware
from megatron_refine.models.family import FAMILIES
from megatron_refine.scaling.sweep import points, read_sweep
from megatron_refine.slurm.site import Site
from tests.test_config import TREE, problem, read

ROOT = Path(__file__).parents[1]
# To YAML 1.1 a comment, octal, hexadecimal, sexagesimal, booleans, dates, nothing, a mapping, a list
TEXTS = ["runs/exp #2", "#2", "007", "1e3", "0x10", "1:30", "on", "No", "2024-01-01", "2024-13-45", "null", "a: b",
         "a, b", "runs/a=b", " x ", "-", "=", "<<", "*a", "&a", "!a", "%j", "@x", "`x`", "{a", "it's", "ü", "1_000",
         "a'", 'say "x"', "don't 'x'", ".5", "0_"]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE), encoding="utf-8")
    return path


def appended(path: Path, text: str) -> Path:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_the_text(path: Path, text: str) -> None:
    """For keys of text and of lists of text; the resolved copy says the same."""
    config = read(path, f"run.dir={text}", f"data.text_column={text}", f"data.paths={spell([text, 'b'])}",
                  f"engine.args={spell([text])}")  # fmt: skip
    assert config.run.dir == config.data.text_column == text
    assert config.data.paths == [text, "b"] and config.engine.args == [text]
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert read(path) == config


@pytest.mark.parametrize("text", ["007", "1e3", "0x10", "1:30", "on", "No", "2024-01-01", "2024-13-45", "1_000", ".5"])
def test_text_in_a_file_is_the_text(path: Path, text: str) -> None:
    appended(path, f"run: {{dir: {text}}}\neval: {{tasks: [{text}, 'a #2']}}\nengine: {{env: {{A: {text}}}}}\n")
    for config in (read(path), read(path, f"engine.env={{A: {text}}}")):
        assert config.run.dir == text and config.eval.tasks == [text, "a #2"] and config.engine.env == {"A": text}


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("'runs/x'", "runs/x"), ('"runs/x y"', "runs/x y"), ("''", ""), ('"a\\tb"', "a\tb"), ("'it''s'", "it's"),
        ("'a' 'b'", "'a' 'b'"), ("'", "'"), ('"', '"'),
    ],
)  # fmt: skip
def test_quotes_around_all_of_a_text_are_not_its_own(path: Path, written: str, found: str) -> None:
    assert read(path, f"data.text_column={written}").data.text_column == found
    assert read(path, f"data.text_column={spell(found)}").data.text_column == found


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("[]", []), ("[a]", ["a"]), ("[ a , b ,]", ["a", "b"]), ("[runs/exp #2, b c]", ["runs/exp #2", "b c"]),
        ("['a, b', \"c]\"]", ["a, b", "c]"]), ("[007, on, ~/x]", ["007", "on", "~/x"]), ("['', ' a']", ["", " a"]),
        ("[it's, a=b]", ["it's", "a=b"]), ('["a\\"b"]', ['a"b']),
    ],
)  # fmt: skip
def test_lists_of_text(path: Path, written: str, found: list[str]) -> None:
    assert read(path, f"engine.args={written}").engine.args == found
    assert read(path, f"engine.args={spell(found)}").engine.args == found


def test_lists_of_numbers(path: Path) -> None:
    assert read(path, "eval.lengths=[512, 1024]").eval.lengths == [512, 1024]
    assert read(path, f"parallel.stages={spell([2])}").parallel.stages == [2]
    assert "eval.lengths.1=010: YAML reads this as 8" in problem(path, "eval.lengths=[512, 010]")
    assert "eval.lengths.0='512'" in problem(path, "eval.lengths=['512']")


@pytest.mark.parametrize("written", ["[a,,b]", "[,a]", "['a]", "['a' b]", "[a[1], b]", "[[a]]", "[{a: b}]"])
def test_a_list_that_cannot_be_read_is_refused(path: Path, written: str) -> None:
    message = problem(path, f"engine.args={written}")
    assert f"engine.args={written}: cannot be read from" in message and "put the item into quotes" in message


NUMBERS = [("010", "8"), ("1_000", "1000"), ("0x10", "16"), ("0b11", "3"), ("1:30", "90"), ("-010", "-8")]


@pytest.mark.parametrize(("text", "reading"), [*NUMBERS, ("1_0.5", "10.5"), ("1:30.5", "90.5")])
@pytest.mark.parametrize("key", ["run.seed", "optimizer.lr", "refine.enabled"])
def test_a_number_that_yaml_reads_otherwise_is_refused(path: Path, key: str, text: str, reading: str) -> None:
    says = f"{path}: {key}={text}: YAML reads this as {reading}; write the number in plain decimal digits"
    with pytest.raises(ConfigError) as caught:
        read(path, f"{key}={text}")
    assert says in str(caught.value).splitlines()
    section, name = key.split(".")
    with pytest.raises(ConfigError) as caught:
        read(appended(path, f"{section}: {{{name}: {text}}}\n"))
    assert says in str(caught.value).splitlines()


def test_such_a_number_is_refused_in_every_file(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    for text, reader in (
        ("retries: 010", lambda: read_as(file, Site)),
        ("memory_bytes: 1_000", lambda: read_hardware(file)),
        ("config: [x]\nout: x\nwarm_up: 0x2", lambda: read_sweep(file)),
        ("config: [x]\nout: x\ngrid: {ranks: [010]}", lambda: points(read_sweep(file), file)),
        ("config: [x]\nout: x\npoints: [{run.seed: 1:30}]", lambda: points(read_sweep(file), file)),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"^\S*file\.yaml: \S+: YAML reads this as \d+; write the number"):
            reader()


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("run.seed", "10", 10), ("run.seed", "0", 0), ("run.seed", "+7", 7), ("run.seed", " 7 ", 7),
        ("optimizer.lr", "3", 3), ("optimizer.lr", ".5", 0.5), ("optimizer.lr", "5.", 5.0),
        ("optimizer.lr", "1e-3", 1e-3),
        ("optimizer.lr", "1.5E+2", 150.0), ("optimizer.lr", "01.5", 1.5), ("refine.enabled", "no", False),
        ("refine.enabled", "True", True), ("engine.port", "08000", None), ("run.seed", "0o17", None),
        ("run.seed", "1e3", None), ("run.seed", "7 # seven", None), ("run.seed", "1,000", None), ("run.seed", "", None),
        ("run.seed", "٣", None), ("run.seed", "2024-01-01", None), ("run.seed", "0b_", None),
        ("run.seed", "9" * 5000, None),
        ("optimizer.lr", ".inf", None), ("optimizer.lr", "nan", None), ("refine.enabled", "0", None),
        ("refine.enabled", "yes # really", None),
    ],
)  # fmt: skip
def test_other_numbers_are_read_or_refused_as_they_look(path: Path, key: str, text: str, found: Any) -> None:
    section, name = key.split(".")
    if found is None:
        assert f"{key}=" in problem(path, f"{key}={text}") and "input should be" in problem(path, f"{key}={text}")
    else:
        assert getattr(getattr(read(path, f"{key}={text}"), section), name) == found


def test_yaml_that_does_not_end(path: Path) -> None:
    assert "task.paths.0=" in problem(appended(path, "task: {paths: &a [*a]}\n"))
    path.write_text("task: {paths: " + "[" * 2000 + "]" * 2000 + "}\n", encoding="utf-8")
    assert problem(path).endswith("not valid YAML: it is nested too deeply")


PATHS = ["run.dir", "data.paths", "data.valid_paths", "data.tokenizer", "data.cache_dir", "task.paths",
         "task.valid_paths", "engine.python", "engine.sync_dir", "eval.data", "eval.essays",
         "checkpoint.load"]  # fmt: skip
LISTS = ("data.paths", "data.valid_paths", "task.paths", "task.valid_paths")


def of(config: Config, key: str) -> Any:
    """A key's value; the first of a list."""
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize("key", PATHS)
def test_paths_are_expanded(path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """From overrides and from files alike; what cannot be is refused by name."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK", "/a b")
    monkeypatch.setenv("TWICE", "$WORK")
    monkeypatch.setenv("EMPTY", "")
    section, name = key.split(".")
    clean = path.read_text(encoding="utf-8")

    def both(text: str) -> list[Any]:
        """The value, or the error, from the command line and from the file."""
        found: list[Any] = []
        written = yaml.safe_load(clean)
        written.setdefault(section, {})[name] = [text] if key in LISTS else text
        for tree, overrides in (
            (yaml.safe_load(clean), [f"{key}={spell([text] if key in LISTS else text)}"]),
            (written, []),
        ):
            path.write_text(yaml.safe_dump(tree), encoding="utf-8")
            try:
                found.append(of(read(path, *overrides), key))
            except ConfigError as error:
                found.append(str(error).splitlines()[0])
        return found

    if section != "task":  # which midtrain refuses, after the paths were read
        for text, expected in (
            ("~/x", "/home/me/x"), ("$WORK/x", "/a b/x"), ("${WORK}/x", "/a b/x"), ("a/~/x", "a/~/x"), ("./~x", "./~x"),
            ("x$", "x$"), ("x$5", "x$5"),
        ):  # fmt: skip
            assert both(text) == [expected, expected]
    for text, says in (
        ("$NOT_SET/x", "the variable NOT_SET is not set; export it"), ("${EMPTY}/x", "the variable EMPTY is not set"),
        ("${WORK:-x}", "${WORK:-x}: only $VAR and ${VAR} are replaced"), ("~nobody-here/x", "'nobody-here'; write ./~"),
        ("$TWICE", "holds a variable again: $WORK"),
    ):  # fmt: skip
        assert all(says in found and key in found for found in both(text)), both(text)


def test_the_schema_knows_its_paths(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, relative: each is made absolute, but for an interpreter that PATH finds, and what is empty."""
    monkeypatch.chdir(tmp_path)
    config = read(path).model_copy(update={
        "data": Data(paths=["a", "/b"], valid_paths=["c"], tokenizer="t"), "eval": Eval(data="d", essays="e"),
        "engine": Engine(python="bin/python", sync_dir="s"), "checkpoint": read(path, "checkpoint.load=l").checkpoint,
        "task": read(path).task.model_copy(update={"paths": ["p"], "valid_paths": ["v"]}),
    })  # fmt: skip
    found = dict(resolved(config, {}))
    assert sorted(found) == sorted(PATHS)
    assert found["data.paths"] == [f"{tmp_path}/a", "/b"] and found["engine.python"] == f"{tmp_path}/bin/python"
    assert dict(resolved(read(path, "run.dir=/r", "data.cache_dir=/c", "engine.python=python3"), {})) == {}


def test_empty_paths(path: Path) -> None:
    for override in ("run.dir=", "data.cache_dir=''", "data.paths=['']"):
        assert "is empty; name a path" in problem(path, override)
    assert read(path, "data.tokenizer=", 'engine.python=""').data.tokenizer == ""


def test_a_file_may_have_an_equals_sign_in_its_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1.yaml").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    words = ["run.yaml", "lr=0.1.yaml", "runs/lr=1/config.yaml", "train.steps=3", "model=lact_tiny", "lr=0.2.yaml",
             "run.dir=" + "x" * 300]  # fmt: skip
    assert files_and_overrides(words) == (words[:3], words[3:])
    assert problem(path, "lr=0.1.yaml") == (
        "lr=0.1.yaml: an override reads section.key=value; name a file with --config"
    )


def test_the_model_of_a_file(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model alone: the configuration of another run does not bring that run's folder with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    other = tmp_path / "lr=1"
    other.mkdir()
    tree = {"model": TREE["model"] | {"num_layers": 7}, "run": {"dir": "theirs"}, "train": {"steps": 77}}
    (other / "m.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (tmp_path / "plain").write_text(yaml.safe_dump(tree), encoding="utf-8")
    for name in ("lr=1/m.yaml", "~/lr=1/m.yaml", "plain"):
        config = read(path, "run.dir=mine", f"model={name}")
        assert config.model.num_layers == 7 and config.run.dir == "mine"
        assert config.train == read(path).train
    found = absolute([str(path)], ["model=lr=1/m.yaml", "model=lact_tiny"], FAMILIES)
    assert found[:2] == [f"model={tmp_path}/lr=1/m.yaml", "model=lact_tiny"]
    (tmp_path / "empty.yaml").write_text("run: {dir: x}\n", encoding="utf-8")
    assert "model=empty.yaml: has no section model" in problem(path, "model=empty.yaml")
    assert "model=lact: unknown; choose one of delta_net_1.3b, " in problem(path, "model=lact")


def test_tools_expand_what_the_shell_did_not(monkeypatch: pytest.MonkeyPatch, capsys: Any, path: Path) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    home = path.parent
    found = evaluate.parse(["~/m", "--tasks=niah", "--out=~/o", "--data=~/d", "--heldout", "~/h", "--tokenizer=~/t"])
    assert (found.model, found.out, found.data) == (home / "m", home / "o", f"{home}/d")
    assert (found.heldout, found.tokenizer, found.essays) == ([f"{home}/h"], f"{home}/t", "")
    found = lm_eval.parse(["m", "--tasks=x", "--out=~/o", "--include-path=$HOME/i"])
    assert (found.model, found.out, found.include_path) == (Path("m"), home / "o", [f"{home}/i"])
    found = convert.parse(["hf-to-megatron", "--hf=~/h", "--megatron=~/m"])
    assert (found.hf, found.megatron) == (home / "h", home / "m")
    with pytest.raises(SystemExit):
        evaluate.parse(["m", "--tasks=niah", "--out=$NOT_SET/o"])
    assert "argument --out: the variable NOT_SET is not set" in capsys.readouterr().err
    assert read(Path("~/run.yaml")).run.dir == "runs/default"
    assert "the variable NOT_SET is not set" in problem(Path("$NOT_SET/run.yaml"))


def test_presets_come_with_the_package(tmp_path: Path, path: Path) -> None:
    """As a wheel installs it, away from the checkout; without them a line says so."""
    library, out = tmp_path / "library", tmp_path / "out"
    build = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(library)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    line = [sys.executable, "-m", "megatron_refine.train", "--config", str(path), "model=lact_tiny", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(library)}
    out.mkdir()
    done = subprocess.run(line, cwd=out, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "family: lact" in done.stdout, done.stderr
    presets = library / "megatron_refine/configs/models"
    assert {p.name for p in presets.iterdir()} == {p.name for p in (ROOT / "configs/models").iterdir()}
    presets.rename(tmp_path / "elsewhere")
    done = subprocess.run(line, cwd=out, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr == (
        f"model=lact_tiny: the presets are not installed: no files in {presets}; name a YAML file\n"
    )


@pytest.mark.parametrize("key", ["run.seed", "optimizer.lr", "refine.nsp_coef"])
def test_a_number_that_no_computer_holds_is_refused(path: Path, key: str) -> None:
    for text in (str(2**63), "-99999999999999999999", "1e39") if key != "run.seed" else (str(2**63),):
        assert f"{key}={text}: is larger than a computer's number can be; write a smaller one" in str(
            pytest.raises(ConfigError, read, path, f"{key}={text}").value
        )
    assert read(path, f"run.seed={2**63 - 1}").run.seed == 2**63 - 1


def test_a_temperature_that_makes_logits_infinite_is_refused(path: Path) -> None:
    assert "must be 0, for greedy rollouts, or 1e-6 or more" in problem(path, "refine.rollout_temperature=1e-40")
    assert "greater than or equal to 0.000001" in problem(path, "refine.temperature=1e-40")  # of positions
    for right in ("0", "1e-6"):
        assert read(path, f"refine.rollout_temperature={right}").refine.rollout_temperature == float(right)


@pytest.mark.parametrize("key", ["run.timeout_minutes", "engine.sync_timeout", "engine.request_timeout"])
def test_a_deadline_that_no_clock_holds_is_refused(path: Path, key: str) -> None:
    assert f"{key}=1e+30: input should be less than or equal to 1000000" in problem(path, f"{key}=1e30")


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir", "data.tokenizer", "checkpoint.load"])
def test_a_path_that_is_not_utf8_is_refused_unless_it_is_of_documents(path: Path, key: str) -> None:
    assert problem(path, f"{key}=a\udcff").endswith("is not UTF-8; give the file or the folder another name")
    assert read(path, "data.paths=[a\udcff]").data.paths == ["a\udcff"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "1e-320"], "--temperature=1e-320: must be 0, or 1e-6 or more"),
        (["--temperature", "nan"], "--temperature=nan: must be 0"),
        (["--seed", str(2**63)], f"--seed={2**63}: must be a number of 64 bits"),
        (["--prompt", "a\udcff"], "--prompt: is not UTF-8 text; write it into a file"),
    ],
)
def test_what_no_text_can_be_drawn_with_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        generate.run(generate.parse(["model", "--prompt", "hi", *words]), True)
    assert str(caught.value).startswith(says)
