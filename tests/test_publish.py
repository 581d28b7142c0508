"""From a run to a model that others use, and back: exported, loaded by transformers and fla, trained on, asked."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_refine.checkpoint.source import find
from megatron_refine.config import ConfigError
from megatron_refine.errors import CheckpointError
from tests import parity, runs
from tests.conversions import contents, convert, to_hf
from tests.lanes import short
from tests.runs import End
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]
TEXT = "def f(a):\n    return 'é' + a  # naïve\n"


def trained(ranks: Zygote, folder: Path, model: str, *overrides: str) -> Path:
    """A run of one step, with its checkpoint."""
    folder.mkdir(exist_ok=True)
    own = parity.small_config(folder, model=model).model.model_dump() | {"vocab_size": 512}
    sections = {"train": {"steps": 1}, "refine": {"enabled": False}, "checkpoint": {"every": 1}}
    config = runs.write_config(folder, folder / "cache", **sections)
    tree = yaml.safe_load(config.read_text(encoding="utf-8")) | {"model": own}  # in place of that of all runs
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    end = ranks(1, runs.command, arguments=["--config", str(config), *overrides])[0]
    assert end.code == 0, end.err
    return folder / "run"


def asked(arguments: list[str]) -> End:
    """On a rank: `megatron-refine generate`."""
    from megatron_refine.cli.generate import main

    with runs._captured() as texts:
        code = main(arguments)
    return End(code, *texts)


@pytest.mark.parametrize("model", short(["delta_net", "gated_delta_net", "lact"], lambda model: model == "delta_net"))
def test_an_export_is_a_model(ranks: Zygote, tmp_path: Path, model: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install megatron-refine[eval]")
    from megatron_refine.data.tokenizer import load_tokenizer

    run, hf = trained(ranks, tmp_path, model), tmp_path / "hf"
    end = ranks(1, convert, arguments=to_hf(run, hf, "--verify"))[0]
    assert end.code == 0, end.err
    config = json.loads((hf / "config.json").read_text(encoding="utf-8"))
    own = load_tokenizer(run / "tokenizer.json", 512, "")
    assert (config["bos_token_id"], config["eos_token_id"]) == (own.bos_id, own.eos_id) == (0, 1)
    assert config["max_position_embeddings"] == 192
    generation = json.loads((hf / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}
    card = (hf / "README.md").read_text(encoding="utf-8")
    assert "argparse.py, ast.py" in card and "| steps | 1 |" in card and "next-token prediction only" in card

    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == own.encode([TEXT])[0]
    assert theirs.decode(own.encode([TEXT])[0]) == TEXT
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    loaded = transformers.AutoConfig.from_pretrained(hf, trust_remote_code=True)
    assert {key: getattr(loaded, key) for key in config if key != "torch_dtype"} == {
        key: value for key, value in config.items() if key != "torch_dtype"
    }
    line = ["--prompt", "def f", "--max-new-tokens", "5", "--temperature", "0"]
    first, second = (ranks(1, asked, arguments=[str(place), *line])[0] for place in (run, hf))
    assert first.code == second.code == 0 and first.out == second.out != "\n", (first.err, second.err)


def fla_class(model: str) -> Any:
    """The configuration class of the installed flash-linear-attention, without what needs a GPU beside it."""
    spec = importlib.util.find_spec("fla")
    assert spec and spec.submodule_search_locations, "make test-kernels installs flash-linear-attention"
    name = model.replace("gated_delta_net", "gated_deltanet")
    path = next(Path(p) / f"models/{name}/configuration_{name}.py" for p in spec.submodule_search_locations)
    found = importlib.util.spec_from_file_location(f"fla_{name}", path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return next(c for n, c in vars(module).items() if n.endswith("NetConfig"))


@pytest.mark.kernels
@pytest.mark.parametrize("model", ["delta_net", "gated_delta_net"])
def test_flas_class_takes_every_field(tmp_path: Path, model: str) -> None:
    """What we write is what it says afterwards; it fills in no other width or number of heads."""
    from megatron_refine.convert.fields import fresh_config

    written = fresh_config(parity.small_config(tmp_path, model=model).model, "float32")
    theirs = fla_class(model)(**{k: v for k, v in written.items() if k not in ("model_type", "torch_dtype")})
    assert {key: getattr(theirs, key) for key in written if key != "torch_dtype"} == {
        key: value for key, value in written.items() if key != "torch_dtype"
    }


def test_a_run_a_checkpoint_and_an_export_are_found(ranks: Zygote, tmp_path: Path) -> None:
    """By one function; training starts from any of them, with the same weights."""
    run, hf = trained(ranks, tmp_path, "delta_net"), tmp_path / "hf"
    assert ranks(1, convert, arguments=to_hf(run, hf))[0].code == 0
    step = run / "checkpoints/step_0000001"
    places = {run: step, run / "checkpoints": step, step: step, hf: hf}
    sources = [find(place) for place in places]
    assert [source.folder for source in sources] == [*places.values()]
    assert [source.is_checkpoint for source in sources] == [True, True, True, False]
    assert len({source.model for source in sources}) == 1
    losses = []
    for i, place in enumerate((run, hf)):
        other = tmp_path / f"other{i}"
        trained(ranks, other, "delta_net", f"checkpoint.load={place}", f"data.tokenizer={run}/tokenizer.json")
        losses.append([row["train/loss"] for row in runs.rows(other) if row["step"]])
    assert losses[0] == losses[1]
    kept = tmp_path / "other1/run/checkpoints/step_0000001/hf"
    assert (kept / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    back = tmp_path / "back"
    assert ranks(1, convert, arguments=to_hf(tmp_path / "other1/run", back))[0].code == 0
    assert contents(back).keys() == contents(hf).keys()


def test_where_no_model_is_one_line_says_what_to_name(ranks: Zygote, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("run: {}\n", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/manifest.json").write_text("{}", encoding="utf-8")
    what = "name a run, a checkpoint or a folder in Hugging Face's format"
    lines = {
        tmp_path / "nope": f"no such folder; {what}", tmp_path / "file": f"is a file; {what}",
        tmp_path: f"holds no model; {what}", run: "is a run without a checkpoint yet; train it to its first save",
    }  # fmt: skip
    for path, line in lines.items():
        with pytest.raises(ConfigError) as error:
            find(path, "checkpoint.load")
        assert str(error.value) == f"checkpoint.load={path}: {line}"
    with pytest.raises(CheckpointError, match="half: not a complete checkpoint"):
        find(tmp_path / "half")


def test_another_tokenizer_than_the_model_came_with_goes_out(ranks: Zygote, tmp_path: Path) -> None:
    """And a model that was only converted goes back as it came, without a card of ours."""
    run, hf = trained(ranks, tmp_path, "delta_net"), tmp_path / "hf"
    assert ranks(1, convert, arguments=to_hf(run, hf))[0].code == 0
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    shutil.rmtree(hf / "__pycache__", ignore_errors=True)
    for arguments in (["hf-to-megatron", "--hf", str(hf), "--megatron", str(megatron)], to_hf(megatron, back)):
        assert ranks(1, convert, arguments=arguments)[0].code == 0
    assert contents(back) == contents(hf)
    other = tmp_path / "other"
    again = trained(ranks, other, "delta_net", f"checkpoint.load={megatron}", "data.tokenizer=", "data.add_bos=false")
    out = tmp_path / "out"
    assert ranks(1, convert, arguments=to_hf(again, out))[0].code == 0
    assert (out / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def weights_of(run: str, folder: str) -> Path:
    """On a rank: the folder that a server of a run reads."""
    from megatron_refine.cli.serve import _weights

    return _weights(find(Path(run), "--model"), Path(folder))


def test_a_run_that_is_trained_anew_is_served_anew(ranks: Zygote, tmp_path: Path) -> None:
    """Its checkpoint has the old one's name; as long as it is the same, it is exported once."""
    run, folder = trained(ranks, tmp_path, "delta_net"), str(tmp_path / "served")
    first, again = (ranks(1, weights_of, run=str(run), folder=folder)[0] for _ in range(2))
    assert first == again
    shutil.rmtree(run)
    trained(ranks, tmp_path, "delta_net", "run.seed=7")
    other = ranks(1, weights_of, run=str(run), folder=folder)[0]
    files = [path / "model.safetensors" for path in (first, other)]
    assert other != first and files[0].read_bytes() != files[1].read_bytes()


def test_two_models_of_a_folder_are_served_each_as_itself(tmp_path: Path) -> None:
    """Serve a family that servers know by another name; a server reads its folder long after its start."""
    from megatron_refine.cli.serve import _known

    first, second = (tmp_path / name for name in ("a", "b"))
    for folder in (first, second):
        shutil.copytree(ROOT / "tests/golden/qwen3_5", folder)
    found = [_known(folder, find(folder, "--model"), tmp_path) for folder in (first, second, first)]
    assert found[0] == found[2] != found[1] and not list(tmp_path.glob(".*"))
    for folder, known in zip((first, second), found[:2], strict=True):
        assert (known / "model.safetensors").resolve() == folder / "model.safetensors"
        assert json.loads((known / "config.json").read_text(encoding="utf-8"))["model_type"].startswith("refine_")
