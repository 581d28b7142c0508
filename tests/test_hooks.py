"""Rewards and selections of the user's own: what they are called with, what they may return, and how a bad one ends."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_refine.config import ConfigError, training
from megatron_refine.step.hooks import check_hooks, reading, resolve
from megatron_refine.step.reward import REWARDS
from megatron_refine.step.select import SELECTIONS, select_positions
from tests import parity, runs
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]


def length_of_match(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    """How many tokens are right before the first wrong one."""
    b, c, n, k = tokens.shape
    assert truth.shape == (b, c, k) and h_pred.shape[:4] == tokens.shape and h_true.shape == (b, c, k, h_pred.shape[-1])
    return (tokens == truth[:, :, None]).float().cumprod(-1).sum(-1)


def first_of_chunk(entropy: Tensor, lengths: Tensor, rollout_len: int) -> Tensor:
    """The first indices of a sequence weigh the most."""
    assert entropy.ndim == 2 and lengths.shape == entropy.shape[:1] and isinstance(rollout_len, int)
    return -100.0 * torch.arange(entropy.shape[1]).expand_as(entropy)


def one_number(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> float:
    return 1.0


def of_each_token(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    return (tokens == truth[:, :, None]).float()


def whole_numbers(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    return (tokens == truth[:, :, None]).sum(-1)


def no_number(tokens: Tensor, truth: Tensor, h_pred: Tensor, h_true: Tensor) -> Tensor:
    """For one rollout alone."""
    return torch.zeros(tokens.shape[:3]).index_put_((torch.tensor(0),) * 3, torch.tensor(torch.nan))


def of_two(tokens: Tensor, truth: Tensor) -> Tensor:
    return tokens


def of_one_row(entropy: Tensor, lengths: Tensor, rollout_len: int) -> Tensor:
    return entropy[0]


def hook(function: Any) -> str:
    return f"{__name__}:{function.__name__}"


def test_own_functions_pass(tmp_path: Path) -> None:
    own = (f"refine.reward={hook(length_of_match)}", f"refine.selection={hook(first_of_chunk)}")
    check_hooks(parity.small_config(tmp_path, *own))
    for reward in REWARDS.values():  # those with a name keep the contract too
        check_hooks(parity.small_config(tmp_path, f"refine.reward={reward.__module__}:{reward.__name__}"))
    for selection in SELECTIONS.values():
        check_hooks(parity.small_config(tmp_path, f"refine.selection={selection.__module__}:{selection.__name__}"))


@pytest.mark.parametrize(
    "key, function, words",
    [
        ("reward", one_number, "returns float where a floating-point tensor [2, 3, 2] is due, one value for each"),
        ("reward", of_each_token, "returns torch.float32 [2, 3, 2, 5] where a floating-point tensor [2, 3, 2] is due"),
        ("reward", whole_numbers, "returns torch.int64 [2, 3, 2] where"),
        ("reward", no_number, "returns a value that is not finite"),
        ("reward", of_two, "called as (tokens [B, c, n, k], truth [B, c, k], h_pred [B, c, n, k, h], h_true "),
        ("selection", of_one_row, "one value for each index"),
    ],
)  # fmt: skip
def test_bad_ones_are_one_line(key: str, function: Any, words: str, tmp_path: Path) -> None:
    shape = ("refine.num_chunks=3", "refine.num_rollouts=2", "refine.rollout_len=5")
    config = parity.small_config(tmp_path, *shape, f"refine.{key}={hook(function)}")
    with pytest.raises(ConfigError) as error:
        check_hooks(config)
    message = str(error.value)
    assert message.startswith(f"refine.{key}={hook(function)}: ") and words in message and "\n" not in message
    assert message.endswith("; correct it")


def test_a_bad_one_ends_the_run_before_it_starts(ranks: Zygote, tmp_path: Path) -> None:
    config = runs.write_config(tmp_path, tmp_path / "cache", refine={"reward": hook(of_each_token)})
    end = ranks(1, runs.command, arguments=["--config", str(config)])[0]
    assert end.code == 2 and end.err.count("\n") == 1 and "one value for each rollout" in end.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_own_functions_are_what_a_run_uses(ranks: Zygote, tmp_path: Path) -> None:
    """Positions are the first of each chunk; rewards count tokens."""
    own = {"reward": hook(length_of_match), "selection": hook(first_of_chunk), "num_chunks": 4, "rollout_len": 5}
    config = runs.write_config(tmp_path, tmp_path / "cache", refine=own, train={"steps": 1})
    drawn = tmp_path / "draws"
    assert ranks(1, runs.command, arguments=["--config", str(config)], record=drawn, saves=False)[0].code == 0
    for draw in runs.draws(drawn):
        assert all(positions == [20, 49, 97, 145] for positions in draw["positions"])  # margin, chunks of 192 / 4
        values = [x for sequence in draw["rewards"] for chunk in sequence for x in chunk]
        assert set(values) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


@pytest.mark.parametrize("key", ["refine.reward", "refine.selection", "eval.selection"])
def test_a_name_that_nobody_knows_is_refused_with_those_there_are(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}=.?entropie.*choose one of .*, or an import path") as error:
        parity.small_config(tmp_path, f"{key}=entropie")
    assert "\n" not in str(error.value)


def test_names_of_the_configuration_are_those_there_are() -> None:
    assert set(training.REWARDS) == REWARDS.keys() and set(training.SELECTIONS) == SELECTIONS.keys()


def test_an_evaluation_has_positions_of_its_own(ranks: Zygote, tmp_path: Path) -> None:
    """By the rule of eval.selection; training and its draws stay as they are."""
    found = {}
    for rule in ("", hook(first_of_chunk)):
        folder = tmp_path / f"own{bool(rule)}"
        folder.mkdir()
        sizes = {"train": {"steps": 1}, "refine": {"num_chunks": 4}, "eval": {"sequences": 2, "selection": rule}}
        config = runs.write_config(folder, tmp_path / "cache", **sizes)
        given = {"arguments": ["--config", str(config)], "record": folder / "draws", "saves": False}
        assert ranks(1, runs.command, **given)[0].code == 0
        sample = json.loads((folder / "run/samples.json").read_text(encoding="utf-8"))
        found[rule] = runs.draws(folder / "draws"), sample["positions"]
    (plain, drawn), (own, first) = found.values()
    assert plain == own and first == [20, 49, 97, 145] != drawn


WORDS = ["", "a", "ab", "abc", "abd", " ", "xyz", "b"]


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize("name", ["edit_similarity", "ngram_overlap"])
def test_rewards_that_read_text(name: str, tmp_path: Path) -> None:
    """They pass the check that a run makes, and are what their words say, on all texts of up to two words."""
    path = f"megatron_refine.step.text_rewards:{name}"
    check_hooks(parity.small_config(tmp_path, f"refine.reward={path}"))
    reward = reading(resolve("refine.reward", path, REWARDS), decode)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    tokens, truth = pairs[None, None].expand(1, 8, -1, -1), torch.tensor([[[i, (3 * i) % 8] for i in range(8)]])
    found = reward(tokens, truth, None, None)
    for j, n in torch.cartesian_prod(torch.arange(8), torch.arange(64)).tolist():
        a, b = decode(tokens[0, j, n].tolist()), decode(truth[0, j].tolist())
        if name == "edit_similarity":
            expected = 1 - distance(a, b) / max(len(a), len(b)) if a or b else 1.0
        else:
            grams = [{text[i : i + 3] for i in range(len(text) - 2)} or {text} for text in (a, b)]
            expected = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        assert float(found[0, j, n]) == pytest.approx(expected, abs=1e-6), (a, b)


def test_a_run_hands_its_tokenizer_to_a_reward_that_reads_text(ranks: Zygote, tmp_path: Path) -> None:
    own = {"reward": "megatron_refine.step.text_rewards:edit_similarity", "num_chunks": 4, "rollout_len": 5}
    config = runs.write_config(tmp_path, tmp_path / "cache", refine=own, train={"steps": 1})
    assert ranks(1, runs.command, arguments=["--config", str(config)], saves=False)[0].code == 0
    row = next(row for row in runs.rows(tmp_path) if "rollout/reward_mean" in row)
    assert 0 < row["rollout/reward_mean"] < 1


def test_the_documented_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code) == 1
    (tmp_path / "my_hooks.py").write_text(code[0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = re.findall(r"refine\.(?:reward|selection)=my_hooks:\w+", page)
    assert len(names) == 2
    config = parity.small_config(tmp_path, *names)
    check_hooks(config)
    uniform = torch.full((1, 4), 0.5)
    found = select_positions(
        torch.rand(1, 200), torch.tensor([200]), uniform, selection=config.refine.selection, rollout_len=5, margin=20,
        temperature=1.0,
    )  # fmt: skip
    assert found.shape == (1, 4)
