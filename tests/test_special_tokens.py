"""Special tokens: those that the files beside a tokenizer declare, wherever it is copied to, and what they end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_refine.checkpoint.manifest import ORIGIN
from megatron_refine.checkpoint.source import Source
from megatron_refine.config import ConfigError
from megatron_refine.data.prepare import prepare
from megatron_refine.data.special_tokens import KEPT, OWN
from megatron_refine.data.tokenizer import bos_id, keep_tokenizer, load_tokenizer, stated
from megatron_refine.eval import load
from megatron_refine.eval.answers import Answerer, Question
from megatron_refine.eval.evaluation import identity
from megatron_refine.models.delta_net.config import DeltaNetConfig
from megatron_refine.publish import _declared
from tests.test_tokenizer import config_of, trained

VOCAB = 280
NAMES = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_end|>", "<pad>"]  # their ids are their places
Declared = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    """A tokenizer.json that knows several usual names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=NAMES, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(["some text to learn from, some more text to learn from"], trainer)
    path: Path = tmp_path_factory.mktemp("plain") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def declare(tokenizer: Path, folder: Path, **files: Any) -> Path:
    """A folder with the tokenizer and files that declare: config -> config.json."""
    folder.mkdir(parents=True)
    shutil.copy(tokenizer, folder / f"tokenizer{tokenizer.suffix}")
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def found(path: Path) -> tuple[int | None, int | None, int | None, tuple[int, ...]]:
    tokenizer = load_tokenizer(path, 1000, "data.tokenizer")
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.ends


ENDS: list[tuple[Declared, tuple[int | None, int | None, int | None, tuple[int, ...]]]] = [
    ({}, (1, 2, 5, (2,))),  # the usual names
    ({"tokenizer_config": {}, "config": {"eos_token_id": None}}, (1, 2, 5, (2,))),
    ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, (1, 3, 5, (3,))),
    ({"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}}, (1, 4, 5, (4,))),
    ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<unk>"}}, (0, 4, 5, (4,))),
    ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, (1, 2, 5, (2,))),
    ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, (1, 4, 5, (4,))),
    ({"config": {"eos_token_id": 3, "bos_token_id": 0, "pad_token_id": 4}}, (0, 3, 4, (3,))),
    ({"generation_config": {"eos_token_id": 4}, "config": {"eos_token_id": 3}}, (1, 4, 5, (4, 3))),
    ({"generation_config": {"eos_token_id": [4, 3]}}, (1, 4, 5, (4, 3))),
    ({"config": {"eos_token_id": [3, 4, 3]}}, (1, 3, 5, (3, 4))),
    ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [4, 2]}}, (1, 2, 5, (2, 4))),
    ({"tokenizer_config": {"bos_token": None, "eos_token": None, "pad_token": ""}}, (None, None, None, ())),
    ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 4}}, (1, 4, 5, (4,))),
    ({"tokenizer_config": {"pad_token": "[gone]"}, "config": {"pad_token_id": 900}}, (1, 2, 5, (2,))),
    ({"config": {"text_config": {"eos_token_id": 3, "bos_token_id": 0}}}, (0, 3, 5, (3,))),
    ({"config": {"eos_token_id": 4, "text_config": {"eos_token_id": 3}}}, (1, 4, 5, (4,))),
    ({"config": {"pad_token_id": -1, "eos_token_id": []}}, (1, 2, 5, (2,))),
    ({"tokenizer_config": {"pad_token": "</s>"}}, (1, 2, 2, (2,))),
    ({"tokenizer_config": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}}, (3, 3, 5, (3,))),
]


@pytest.mark.parametrize(("files", "wanted"), ENDS, ids=lambda value: str(value)[:60])
def test_declared_tokens_come_first(tmp_path: Path, plain: Path, files: Declared, wanted: Any) -> None:
    folder = declare(plain, tmp_path / "model", **files)
    assert found(folder) == found(folder / "tokenizer.json") == wanted
    (folder / "tokenizer.json").rename(folder / "other.json")
    assert found(folder / "other.json") == wanted
    # and stay the same where a run keeps the tokenizer: the files that declare them are not there
    tokenizer = load_tokenizer(folder / "other.json", 1000, "")
    keep_tokenizer(folder / "other.json", tokenizer, tmp_path / "run")
    own = set(tokenizer.special.origin.values()) == {OWN}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [KEPT] * (not own) + ["tokenizer.json"]
    assert found(tmp_path / "run") == found(tmp_path / "run/tokenizer.json") == wanted
    keep_tokenizer(tmp_path / "run/tokenizer.json", load_tokenizer(tmp_path / "run", 1000, ""), tmp_path / "next")
    assert found(tmp_path / "next") == wanted


WRONG: list[tuple[Declared, str]] = [
    ({"tokenizer_config": {"eos_token": "<|gone|>"}},
     "tokenizer_config.json: declares eos_token '<|gone|>', which tokenizer.json does not have; correct it"),
    ({"special_tokens_map": {"bos_token": {"content": "a\nb"}}}, r"declares bos_token 'a\nb', which"),
    ({"tokenizer_config": {"eos_token": 7}}, "declares eos_token 7, which"),
    ({"tokenizer_config": {"bos_token": ["<s>"]}}, "declares bos_token ['<s>'], which"),
    ({"config": {"eos_token_id": 900}},
     "config.json: declares eos_token_id 900, but tokenizer.json has ids up to 279; correct it, or move the tokenizer"),
    ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [2, 280]}},
     "generation_config.json: declares eos_token_id 280, but tokenizer.json has ids up to 279"),
    ({"config": {"bos_token_id": "1"}}, "config.json: declares bos_token_id '1', but tokenizer.json has ids"),
    ({"config": {"eos_token_id": True}}, "declares eos_token_id True"),
    ({"config": {"eos_token_id": 2.0}}, "declares eos_token_id 2.0"),
    ({"generation_config": [1]}, "generation_config.json: holds no JSON object; correct it"),
    ({"special_tokens": {"eos": 1}}, "special_tokens.json: is not what a run keeps of its tokenizer; delete it"),
    ({"special_tokens": {"ends": [1], "more": 1}}, "special_tokens.json: is not what a run keeps"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_declared_tokens_that_are_not_there(tmp_path: Path, plain: Path, files: Declared, words: str) -> None:
    folder = declare(plain, tmp_path / "model", **files)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(folder, 1000, "data.tokenizer")
    assert str(caught.value).startswith(f"data.tokenizer: {folder}/") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", bytes(64), b"\xff"])
@pytest.mark.parametrize("name", ["tokenizer_config", "config", "special_tokens"])
def test_torn_files_are_named(tmp_path: Path, plain: Path, name: str, content: bytes) -> None:
    folder = declare(plain, tmp_path / "model")
    (folder / f"{name}.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"--tokenizer: {folder}/{name}.json: damaged: "):
        load_tokenizer(folder, 1000, "--tokenizer")


def test_what_is_said_of_a_tokenizer(tmp_path: Path, plain: Path) -> None:
    def said(path: Path) -> str:
        return stated(path, load_tokenizer(path, 1000, ""))

    assert said(plain) == f"tokenizer {plain}: BOS 1, EOS 2, PAD 5"
    files = {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": None}, "config": {"eos_token_id": [4, 3, 2]}}
    path = declare(plain, tmp_path / "model", **files) / "tokenizer.json"
    from_config = "EOS 4 (tokenizer_config.json), PAD none (tokenizer_config.json); 3, 2 end answers too"
    assert said(path) == f"tokenizer {path}: BOS 1, {from_config}"


def test_a_declared_none_is_no_bos(tmp_path: Path, plain: Path) -> None:
    path = declare(plain, tmp_path / "model", tokenizer_config={"bos_token": None}) / "tokenizer.json"
    with pytest.raises(
        ConfigError, match=r"has no BOS token, says tokenizer_config\.json beside it; set data\.add_bos"
    ):
        bos_id(load_tokenizer(path, 1000, ""), path)


def test_a_sentencepiece_model_s_own_come_last(tmp_path: Path) -> None:
    """It knows its tokens by itself; what is added to it stands in tokenizer_config.json alone."""
    model = trained(tmp_path / "tokenizer.model", pad_id=3, control_symbols=["<|im_end|>"])
    assert found(model) == (1, 2, 3, (2,))
    end = {"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}}
    assert found(declare(model, tmp_path / "a", tokenizer_config=end)) == (1, 4, 3, (4,))
    assert found(declare(model, tmp_path / "b", config={"eos_token_id": 1, "bos_token_id": 2})) == (2, 1, 3, (1,))
    assert found(declare(model, tmp_path / "c", tokenizer_config={"bos_token": None})) == (None, 2, 3, (2,))
    added = {"eos_token": "<|new|>", "added_tokens_decoder": {"400": {"content": "<|new|>"}, "x": 1, "5": {}}}
    folder = declare(model, tmp_path / "d", tokenizer_config=added)
    assert found(folder) == (1, 400, 3, (400,))
    with pytest.raises(ConfigError, match=r"up to 400, but model\.vocab_size=400 allows 399 at most; set .*=401"):
        load_tokenizer(folder, 400, "data.tokenizer")
    begins = declare(model, tmp_path / "f", tokenizer_config={**added, "eos_token": "</s>", "bos_token": "<|new|>"})
    assert found(begins) == (400, 2, 3, (2,))
    with pytest.raises(ConfigError, match=r"up to 400, but model\.vocab_size=400 allows 399 at most"):
        load_tokenizer(begins, 400, "data.tokenizer")
    with pytest.raises(ConfigError, match=r"declares eos_token '<\|gone\|>', which tokenizer\.model does not have"):
        found(declare(model, tmp_path / "e", tokenizer_config={"eos_token": "<|gone|>"}))
    assert load_tokenizer(folder, 1000, "").special.names == {"eos": "<|new|>"}
    keep_tokenizer(model, load_tokenizer(folder, 1000, ""), tmp_path / "run")
    kept = load_tokenizer(tmp_path / "run/tokenizer.model", 1000, "")
    declared = _declared(tmp_path / "run/tokenizer.model", kept, {})  # as an export does, without the first folder
    assert (declared["eos_token"], declared["bos_token"]) == ("<|new|>", "<s>")
    assert declared["added_tokens_decoder"] == {"400": {"content": "<|new|>", "special": True}}
    (tmp_path / "spiece.bpe").write_bytes(model.read_bytes())
    keep_tokenizer(tmp_path / "spiece.bpe", load_tokenizer(folder, 1000, ""), tmp_path / "run")
    assert found(tmp_path / "run/tokenizer.model") == (1, 400, 3, (400,))


def test_a_run_keeps_one_tokenizer(tmp_path: Path, plain: Path) -> None:
    """The one it trains with, not that of an earlier attempt, which a reader would prefer."""
    model = trained(tmp_path / "tokenizer.model")
    other = declare(plain, tmp_path / "other", tokenizer_config={"eos_token": "<|im_end|>"}) / "tokenizer.json"
    for path in (plain, model, plain, other, model):
        keep_tokenizer(path, load_tokenizer(path, 1000, ""), tmp_path / "run")
        kept = [file for file in (tmp_path / "run").iterdir() if file.name != KEPT]
        assert [file.read_bytes() for file in kept] == [path.read_bytes()]
        assert found(tmp_path / "run") == found(path)


def test_rows_follow_the_declared_bos(tmp_path: Path, plain: Path) -> None:
    """Their fingerprint changes where the id does, and only there."""
    paths = [declare(plain, tmp_path / name, **files) for name, files in {
        "none": {}, "same": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "<|im_end|>"}},
        "other": {"tokenizer_config": {"bos_token": "<|endoftext|>"}},
    }.items()]  # fmt: skip
    prepared = [prepare(config_of(tmp_path, path, 300, add_bos=True)) for path in paths]
    assert [p.train.row(0)[0] for p in prepared] == [1, 1, 3]
    prints = [p.train.fingerprint for p in prepared]
    assert prints[0] == prints[1] != prints[2]
    without = {prepare(config_of(tmp_path, path, 300)).train.fingerprint for path in paths}
    assert len(without) == 1


def test_every_declared_end_ends_an_answer(tmp_path: Path, plain: Path) -> None:
    files = {"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [3, 4]}}
    tokenizer = load_tokenizer(declare(plain, tmp_path / "model", **files), 1000, "")
    answerer = Answerer(None, tokenizer, None, batch_size=1)  # type: ignore[arg-type]
    text = tokenizer.encode(["an answer"])[0]
    for end in (2, 3, 4):
        assert answerer._text(Question("?", 9), [*text, end]) == "an answer"
    for other in (1, 5):
        assert answerer._text(Question("?", 9), [*text, other]) == "an answer" + NAMES[other]


def test_an_answer_ends_before_the_first_of_its_stops(tmp_path: Path, plain: Path) -> None:
    tokenizer = load_tokenizer(declare(plain, tmp_path / "model"), 1000, "")
    answerer = Answerer(None, tokenizer, None, batch_size=1)  # type: ignore[arg-type]
    written = tokenizer.encode(["one, two. three, four"])[0]
    for stops, text in (((".", ","), "one"), ((",", "."), "one"), ((".", "five"), "one, two"), (("five",), None)):
        assert answerer._text(Question("?", 9, stops), written) == (text or "one, two. three, four")


def test_an_evaluation_takes_the_tokenizer_that_the_run_trained_with(tmp_path: Path, plain: Path) -> None:
    """Not the one of the model that it started from, which its checkpoints carry along. Special tokens are a part of
    what answers depend on."""
    sizes: Any = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    model = DeltaNetConfig(family="delta_net", vocab_size=VOCAB, **sizes)
    checkpoint = tmp_path / "run/checkpoints/step_0000001"
    declare(plain, checkpoint / ORIGIN, tokenizer_config={"eos_token": "<|im_end|>"})
    source = Source(checkpoint, model, is_checkpoint=False, run=tmp_path / "run")
    first = load.text(source)
    assert first.path == checkpoint / ORIGIN / "tokenizer.json" and first.tokenizer.ends == (4,)
    trained_with = declare(plain, tmp_path / "other", config={"eos_token_id": [4, 3]}) / "tokenizer.json"
    keep_tokenizer(trained_with, load_tokenizer(trained_with, VOCAB, ""), tmp_path / "run")
    second = load.text(source)
    assert second.path == tmp_path / "run/tokenizer.json" and second.tokenizer.ends == (4, 3)
    found = [identity(source, text, "fp32") for text in (first, second)]
    assert [key for key in found[0] if found[0][key] != found[1][key]] == ["ends"]
    wider = Source(checkpoint, model.model_copy(update={"norm_eps": 1e-3}), is_checkpoint=False)
    assert identity(wider, first, "fp32")["model"] != found[0]["model"]
