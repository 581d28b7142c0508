"""Log-likelihoods against the slow way: all logits of one text at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from tests import parity
from tests.zygote import Zygote

# (context, continuation) lengths: LaCT's chunks have 16 tokens; one-token contexts and continuations, none, equal ones
LENGTHS = ((1, 1), (1, 40), (15, 1), (16, 5), (17, 16), (30, 3), (7, 0), (30, 3), (2, 9))
FIRST, BATCH = 3, 2


def pairs() -> list[tuple[list[int], list[int]]]:
    rows = parity.batch(len(LENGTHS), 60).tokens.tolist()
    return [(row[:a], row[a : a + b]) for row, (a, b) in zip(rows, LENGTHS, strict=True)]


def greedy(model: Any, context: list[int], count: int) -> list[int]:
    """The continuation that the model itself would write."""
    from megatron_refine.trainer.generate import generate

    return generate(model, torch.tensor([context]), torch.tensor([len(context)]), [count], lambda *_: False)[0]


def likelihoods(config: Config) -> dict[str, Any]:
    """On a rank: of pairs, of whole texts, of continuations that are greedy but for the last token."""
    from megatron_refine.eval.likelihood import loglikelihoods, text_loglikelihoods

    model, ranks = parity.build(config, torch.float64)
    seen: list[int] = []
    found = loglikelihoods(model, ranks, pairs(), BATCH, lambda batch: seen.extend(batch))
    texts = text_loglikelihoods(model, ranks, [after for _, after in pairs()], FIRST, BATCH)
    own = greedy(model, pairs()[3][0], 5)
    other = [*own[:-1], (own[-1] + 1) % 97]
    written = loglikelihoods(model, ranks, [(pairs()[3][0], own), (pairs()[3][0], other)], BATCH)
    try:
        loglikelihoods(model, ranks, [([1], [2]), ([], [2])], BATCH)
    except ValueError as error:
        refused = str(error)
    return {
        "pairs": found, "texts": texts, "written": written, "seen": sorted(seen), "refused": refused,
        "none": loglikelihoods(model, ranks, [], BATCH),
    }  # fmt: skip


def reference(config: Config) -> dict[str, Any]:
    """On one rank: log_softmax of whole logits, a text at a time."""
    from megatron_refine.trainer import forward
    from megatron_refine.trainer.model import unwrap

    model, _ = parity.build(config, torch.float64)

    def one(context: list[int], after: list[int]) -> tuple[float, bool]:
        rows = forward.main_pass(model, torch.tensor([context + after])).rows.local[:, 0]
        logits = unwrap(model).logits(rows).detach()[len(context) - 1 :]
        targets = torch.tensor(after, dtype=torch.int64)
        logprobs = logits.log_softmax(-1)[range(len(after)), targets]
        return float(logprobs.sum()), bool((logits[: len(after)].argmax(-1) == targets).all())

    return {"pairs": [one(*pair) for pair in pairs()], "texts": [one([FIRST], after)[0] for _, after in pairs()]}


@pytest.mark.parametrize("model", ["delta_net", "lact"])
def test_likelihoods_equal_whole_logits(model: str, ranks: Zygote, tmp_path: Path) -> None:
    """In fp64, on one rank, two of tp with sp, two replicas: more pairs than fit a pass, and a replica without one."""
    [expected] = ranks(1, reference, config=parity.small_config(tmp_path, model=model))
    for layout in ((), ("parallel.tp=2", "parallel.sp=true"), ("train.micro_batch_size=1",)):
        world = 2 if layout else 1
        for found in ranks(world, likelihoods, config=parity.small_config(tmp_path, *layout, model=model)):
            totals, hits = zip(*found["pairs"], strict=True)
            assert totals == pytest.approx([total for total, _ in expected["pairs"]], rel=1e-12)
            assert list(hits) == [hit for _, hit in expected["pairs"]]
            assert found["texts"] == pytest.approx(expected["texts"], rel=1e-12)
            assert [hit for _, hit in found["written"]] == [True, False]
            assert found["refused"] == "pair 1: its context is empty; begin it with the BOS or EOS token"
            assert found["seen"] == list(range(len(LENGTHS))) and found["none"] == []
    assert expected["pairs"][6] == (0.0, True)
