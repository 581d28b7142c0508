"""Greedy decoding from states against the slow way: a whole forward pass for every token."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config, ConfigError
from megatron_refine.data.tokenizer import train_tokenizer
from tests import parity
from tests.lanes import short
from tests.zygote import Zygote

LENGTHS = (1, 15, 16, 17, 40, 47)  # LaCT's chunks have 16 tokens: within one, at its end, beyond; the longest is full
NEW = 20  # crosses the end of a chunk whatever the length
MAX_NEW = (NEW, 3, NEW, 1, NEW, NEW)


def finished(sequence: int, written: list[int]) -> bool:
    """Ends the fifth prompt's answer early."""
    return sequence == 4 and len(written) == 7


def decoded(config: Config, slow: bool) -> list[list[int]]:
    """On a rank: the answers, from states or by whole passes."""
    from megatron_refine.trainer import forward, head
    from megatron_refine.trainer.generate import generate
    from megatron_refine.trainer.model import unwrap

    model, _ = parity.build(config, torch.float64)
    tokens = parity.batch(len(LENGTHS), max(LENGTHS)).tokens
    if not slow:
        return generate(model, tokens, torch.tensor(LENGTHS), MAX_NEW, finished)
    answers = []
    for i, length in enumerate(LENGTHS):
        text, count = tokens[i, :length].tolist(), MAX_NEW[i] if i != 4 else 7
        for _ in range(count):
            rows = forward.main_pass(model, torch.tensor([text])).rows
            token, _ = head.sample(unwrap(model), rows.local[len(text) - 1], torch.zeros(1), 0.0)
            text.append(int(token))
        answers.append(text[length:])
    return answers


def sampled(config: Config, slow: bool) -> list[list[int]]:
    """On a rank: answers at temperature 1 to two prompts, of the numbers 7 and 9; from states or by whole passes."""
    from megatron_refine.trainer import forward, head, random
    from megatron_refine.trainer.generate import Sampling, generate
    from megatron_refine.trainer.model import unwrap

    model, _ = parity.build(config, torch.float64)
    tokens, lengths, numbers, count = parity.batch(2, 20).tokens, (20, 13), (7, 9), 6
    if not slow:
        sampling = Sampling(1.0, seed=3)
        return generate(model, tokens, torch.tensor(lengths), [count] * 2, lambda *_: False, sampling, numbers)
    answers = []
    for i, length in enumerate(lengths):
        text = tokens[i, :length].tolist()
        for place in range(count):
            rows = forward.main_pass(model, torch.tensor([text])).rows
            uniform = random.uniform(3, random.TEXT, torch.tensor([numbers[i]]), place)
            token, _ = head.sample(unwrap(model), rows.local[len(text) - 1], uniform, 1.0)
            text.append(int(token))
        answers.append(text[length:])
    return answers


def test_every_token_has_a_draw_of_its_prompts_number_and_its_place(ranks: Zygote, tmp_path: Path) -> None:
    config = parity.small_config(tmp_path)
    assert ranks(1, sampled, config=config, slow=False) == ranks(1, sampled, config=config, slow=True)


@pytest.mark.parametrize(
    "model", short(["delta_net", "gated_delta_net", "lact", "lact muon"], lambda model: model in ("delta_net", "lact"))
)
def test_decoding_from_states_equals_whole_passes(model: str, ranks: Zygote, tmp_path: Path) -> None:
    """In fp64, at four layouts: ragged prompts, answers of different lengths."""

    def run(*overrides: str, slow: bool = False) -> list[Any]:
        config = parity.small_config(tmp_path, *overrides, model=model)
        return ranks(config.parallel.model_size, decoded, config=config, slow=slow)

    expected = run(slow=True)
    assert [len(answer) for answer in expected[0]] == [NEW, 3, NEW, 1, 7, NEW]
    assert run() == expected
    for overrides in (["parallel.tp=2", "parallel.sp=true"], ["parallel.cp=2"], ["parallel.pp=2"]):
        assert run(*overrides) == expected * 2, overrides


def drawn(config: Config, top_p: float, temperature: float) -> Any:
    """On a rank: tokens drawn after one row with many uniforms, and the row's probabilities at the temperature."""
    from megatron_refine.trainer import forward, head
    from megatron_refine.trainer.model import unwrap

    model, _ = parity.build(config, torch.float64)
    rows = forward.main_pass(model, parity.batch(1, 16).tokens).rows
    row = rows.local[15] if config.parallel.cp == 1 else rows.local[-1]
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logprobs = head.sample(unwrap(model), row.expand(4000, -1), uniform, temperature, top_p)
    with torch.no_grad():
        logits = head._gather(unwrap(model).logits(row[None]), unwrap(model).pg_collection.tp).flatten()
    return tokens, logprobs, (logits[: unwrap(model).real_vocab] / temperature).softmax(-1)


def answers(config: Config, tokenizer: str, batch_size: int) -> list[str]:
    """On a rank: sampled answers to five prompts, two of them equal."""
    from megatron_refine.data.tokenizer import load_tokenizer
    from megatron_refine.eval.answers import Answerer, Question
    from megatron_refine.trainer.generate import Sampling

    model, ranks = parity.build(config, torch.float64)
    loaded = load_tokenizer(Path(tokenizer), 300, "")
    answerer = Answerer(model, loaded, ranks, batch_size=batch_size, sampling=Sampling(1.0, seed=3))
    questions = [Question(text, 6) for text in ("def main", "import sys", "def main", "return", "x = 1")]
    found: dict[int, str] = {}
    for some in answerer(questions, answerer.encode(questions)):
        found |= some
    return [found[i] for i in range(5)]


def test_a_sampled_answer_is_the_same_in_any_batch_and_replica(ranks: Zygote, tmp_path: Path) -> None:
    """Its draws are of the question's number; equal questions get answers of their own."""
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer([Path(argparse.__file__).read_text(encoding="utf-8")], 300, tokenizer)
    found = []
    for world, batch_size, more in ((1, 1, []), (1, 4, []), (2, 2, ["train.micro_batch_size=1"])):
        config = parity.small_config(tmp_path, "model.vocab_size=300", *more)
        found += ranks(world, answers, config=config, tokenizer=str(tokenizer), batch_size=batch_size)
    assert all(each == found[0] for each in found) and found[0][0] != found[0][2]


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.1, 1e-9])
def test_the_nucleus_is_the_fewest_tokens_of_that_probability(top_p: float, ranks: Zygote, tmp_path: Path) -> None:
    """Against the definition, over the whole vocabulary; at two ranks the same draws."""
    configs = {tp: parity.small_config(tmp_path, f"parallel.tp={tp}") for tp in (1, 2)}
    found = [ranks(tp, drawn, config=config, top_p=top_p, temperature=0.7)[0] for tp, config in configs.items()]
    tokens, logprobs, probabilities = found[0]
    falling = probabilities.sort(descending=True)
    count = int((falling.values.cumsum(-1) - falling.values < top_p).sum())
    nucleus = falling.indices[:count]
    share = probabilities[nucleus].sum()
    for token in nucleus[:5].tolist():
        expected = float(probabilities[token] / share)
        assert float((tokens == token).double().mean()) == pytest.approx(expected, abs=1 / 4000)
        found_share = logprobs[tokens == token].exp()
        assert torch.allclose(found_share, torch.full_like(found_share, expected), rtol=1e-6)
    assert set(tokens.tolist()) <= set(nucleus.tolist())
    assert found[1][0].equal(tokens)


def test_only_line_ends_divide_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_refine.cli.generate import _check, _read, parse

    (tmp_path / "prompts").write_bytes("one\u2028still one\x0cand\x85on\r\n\n two\n".encode())
    assert _read(tmp_path / "prompts") == ["one\u2028still one\x0cand\x85on", " two"]
    options = parse(["tests/golden/delta_net", "--file", "-"])
    _check(options)
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    with pytest.raises(ConfigError, match="--file -: 2 ranks cannot share standard input; name a file"):
        _check(options)
