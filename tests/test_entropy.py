"""megatron-refine entropy: its numbers against those of the logits, and the selection's chances against its draws."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.cli.asking import text_of
from megatron_refine.cli.entropy import _check, parse
from megatron_refine.config import ConfigError, Refine
from megatron_refine.step.select import position_chances, select_positions, smoothed_entropy
from tests.lanes import short
from tests.runs import End, _captured
from tests.test_ruler_qa import random_model
from tests.zygote import Zygote

TEXT = "A règle – one rule — of the test: the text has more than a few tokens, and 東京 too.\n" * 6
C, K, MARGIN = 4, 3, 5
OPTIONS = ["--chunks", str(C), "--rollout-len", str(K), "--margin", str(MARGIN), "--temperature", "0.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "hf")


def command(arguments: list[str]) -> End:
    """On a rank: the command."""
    from megatron_refine.cli.entropy import main

    with _captured() as texts:
        code = main(arguments)
    return End(code, *texts)


def slow(model: Path, text: str) -> tuple[list[int], list[float]]:
    """On a rank: the tokens, and the entropy after each from the logits' own softmax in fp64."""
    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.model import unwrap

    source = find(model)
    loaded = load.load(source, load.layout(source), load.text(source))
    ids = loaded.tokenizer.encode([text])[0]
    with torch.no_grad():
        rows = forward.main_pass(loaded.model, torch.tensor([ids])).rows
        logits = unwrap(loaded.model).logits(rows.local[: len(ids), 0])[:, :512].double()
    return ids, (-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)).tolist()


@pytest.mark.parametrize("world", short([1, 2], lambda world: world == 1))
def test_the_numbers_are_those_of_the_logits(model: Path, ranks: Zygote, tmp_path: Path, world: int) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "entropy.svg"
    file.write_text(TEXT, encoding="utf-8")
    more = ["--tp", "2"] if world == 2 else []
    ends = ranks(world, command, arguments=[str(model), "--text", str(file), "--out", str(out), *OPTIONS, *more])
    assert [end.code for end in ends] == [0] * world and not any(end.out for end in ends[1:]), ends[0].err
    ids, entropy = ranks(1, slow, model=model, text=TEXT)[0]
    rows = [json.loads(line) for line in (tmp_path / "entropy.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["index"] for row in rows] == list(range(len(ids)))
    assert rows[0]["entropy"] is rows[0]["smoothed"] is None
    assert [row["entropy"] for row in rows[1:]] == pytest.approx(entropy[:-1], abs=1e-5)
    padded = [0.0, *entropy, 0.0]
    means = [sum(padded[i : i + K]) / K for i in range(len(ids) - 1)]
    assert [row["smoothed"] for row in rows[1:]] == pytest.approx(means, abs=1e-5)
    assert sum(row["probability"] for row in rows) == pytest.approx(C)
    assert not any(row["probability"] for row in (*rows[:MARGIN], *rows[-MARGIN + 1 :]))
    whole = "".join(row["text"] for row in rows)
    assert whole.replace("\N{REPLACEMENT CHARACTER}", "").startswith("A r") and "one rule" in whole
    said = ends[0].out.splitlines()
    assert said[0] == f"{len(ids):,} tokens, mean entropy {sum(entropy[:-1]) / (len(ids) - 1):.4f} nats"
    highest = max(range(1, len(ids)), key=lambda i: rows[i]["entropy"])
    assert int(said[2].split()[0]) == highest and said[-1] == f"{out}, {tmp_path / 'entropy.jsonl'}"
    svg = out.read_text(encoding="utf-8")
    assert svg.startswith("<svg") and "smoothed, as positions are selected" in svg and "<style>" in svg


def test_chances_are_those_of_the_draws() -> None:
    """How often positions are drawn at evenly spread uniforms. One sequence is padded; one is so short that its chunks
    lie within the margins, and share positions."""
    generator = torch.Generator().manual_seed(3)
    entropy, lengths = torch.rand(3, 50, generator=generator) * 5, torch.tensor([50, 37, 12])
    how: dict[str, Any] = {"rollout_len": K, "margin": MARGIN, "temperature": 0.7}
    found = position_chances(entropy, lengths, C, **how)
    draws = 20_000
    counts = torch.zeros(3, C, 50, dtype=torch.float64)
    for uniform in ((torch.arange(draws) + 0.5) / draws).split(1000):
        at = select_positions(
            entropy.repeat(1000, 1), lengths.repeat(1000), uniform[:, None].expand(-1, 3).reshape(-1, 1).expand(-1, C),
            selection="entropy", **how,
        )  # fmt: skip
        for b in range(3):
            counts[b].scatter_add_(1, at[b::3].T, torch.ones(C, 1000, dtype=torch.float64))
    assert torch.allclose(found, 1 - (1 - counts / draws).prod(1), atol=1e-3)
    assert smoothed_entropy(entropy, lengths, K).shape == found.shape


def test_the_defaults_are_those_of_the_configuration() -> None:
    options, refine = parse(["model", "--text", "a.txt", "--out", "a.svg"]), Refine()
    given = (options.chunks, options.rollout_len, options.margin, options.temperature)
    assert given == (refine.num_chunks, refine.rollout_len, refine.margin, refine.temperature)


def test_a_short_text_and_a_cut_one(model: Path, ranks: Zygote, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    line = [str(model), "--text", str(file), "--out", str(tmp_path / "a.svg"), "--length", "30"]
    line += ["--tokenizer", str(model)]  # a folder
    end = ranks(1, command, arguments=line)[0]
    assert end.code == 0 and "too short for rollouts" in end.out and "the first 30 of " in end.err, end.err
    rows = [json.loads(row) for row in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 30 and not any(row["probability"] for row in rows)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa text")
    assert text_of("--text", tmp_path / "text", Path.read_bytes) == "a text"


@pytest.mark.slow
def test_ranks_that_do_not_meet_are_a_line_and_code_8(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text", encoding="utf-8")
    line = [str(model), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "a.svg"), "--tp", "2"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [sys.executable, "-m", "megatron_refine", "entropy", *line]
        done = subprocess.run(words, env=os.environ | place, capture_output=True, encoding="utf-8")
    said = [row for row in done.stderr.splitlines() if not row.startswith("[")]  # torch's own lines of its sockets
    assert done.returncode == 8 and len(said) == 1, done.stderr
    assert said[0].startswith(f"rank 0: the 2 ranks did not meet at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: ")


def test_the_text_is_not_overwritten(tmp_path: Path) -> None:
    for name in ("book.jsonl", "book.svg"):
        text = tmp_path / name
        text.write_text("a text", encoding="utf-8")
        options = parse(["tests/golden/delta_net", "--text", str(text), "--out", str(tmp_path / "book.svg")])
        with pytest.raises(ConfigError, match="is the text itself; name another picture"):
            _check(options)


BAD: list[tuple[list[str], str]] = [
    (["--text", "gone.txt"], "--text gone.txt: cannot be read: No such file or directory"),
    (["--text", "{bytes}"], "cannot be read: not UTF-8 text"),
    (["--text", "{empty}"], "has 0 tokens; two or more have an entropy"),
    (["--out", "a.png"], "--out a.png: is no .svg; name one"),
    (["--out", "gone/a.svg"], "--out gone/a.svg: gone is not a folder; create it"),
    (["--length", "1"], "--length=1: must be 2 or more"),
    (["--tokenizer", "gone"], "--tokenizer: gone: no such file; name a tokenizer.json"),
    (["--temperature", "0"], "--temperature=0.0: must be 1e-6 or more"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=lambda value: " ".join(value)[:20])
def test_what_cannot_be_drawn(
    change: list[str], words: str, model: Path, ranks: Zygote, tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "empty").write_text("", encoding="utf-8")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe a")
    (tmp_path / "text").write_text("a text", encoding="utf-8")
    filled = [word.format(bytes=tmp_path / "bytes", empty=tmp_path / "empty") for word in change]
    line = [str(model), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "a.svg"), *filled]
    end = ranks(1, command, arguments=line)[0]
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1) and words in end.err, end.err
    assert not (tmp_path / "a.svg").exists()
