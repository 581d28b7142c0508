"""Our scores of needles in haystacks against lm-evaluation-harness's, on its prompts and on ours.

Of its RULER tasks those with a haystack of noise or of needles run without a network; the others download essays.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.conversions import write_random
from tests.runs import MODEL
from tests.test_ruler import solve_niah
from tests.zygote import Zygote

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install megatron-refine[eval]")

OFFLINE = ["niah_single_1", "niah_multikey_2", "niah_multikey_3"]
LENGTH, SAMPLES = 4096, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and a tokenizer that knows the words of prompts."""
    from megatron_refine.data.tokenizer import train_tokenizer
    from megatron_refine.eval.ruler.haystack import NOISE, read_prose
    from megatron_refine.models.family import FAMILIES

    folder = tmp_path_factory.mktemp("ruler") / "model"
    write_random(folder, FAMILIES["delta_net"].model_validate(MODEL))
    train_tokenizer([*read_prose("").sentences[:300], NOISE], 512, folder / "tokenizer.json")
    return folder


def answer(prompt: str, number: int) -> str:
    """Of three questions one is answered right, one in other words and case, one wrong."""
    [value] = solve_niah(prompt)
    return [f" {value}.", f" it is {value.upper()}\nthen\x07 more", f" {value[:-1]}"][number % 3]


def scripted(model: Path) -> Any:
    """On a rank: the adapter, whose answers are those above."""
    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load
    from megatron_refine.eval.answers import Question
    from megatron_refine.eval.harness import HarnessLM
    from megatron_refine.eval.tasks import TASKS
    from megatron_refine.platform.megatron.install import install

    install()
    source, said = find(model), list[str]()
    lm = HarnessLM(load.load(source, load.layout(source), load.text(source)))

    def say(question: Question) -> str:
        assert question.max_new_tokens == TASKS["niah_single_1"].max_new_tokens and not question.stops
        said.append(question.prompt)
        return answer(question.prompt, len(said))

    lm.answerer._answer = lambda questions, *_: list(map(say, questions))  # type: ignore[method-assign]
    return lm


def harness_results(model: Path) -> Any:
    """On a rank: what the harness finds on a few of its own prompts."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.ruler import prepare_niah

    made = prepare_niah.generate_samples
    prepare_niah.generate_samples = lambda *a, **k: made(*a, **k | {"num_samples": SAMPLES})  # of 500
    folder, metadata = Path(prepare_niah.__file__).parent, {"tokenizer": str(model), "max_seq_lengths": [LENGTH]}
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(model=scripted(model), tasks=OFFLINE, task_manager=manager, bootstrap_iters=0)


def scores(model: Path) -> dict[str, Any]:
    """On a rank: mean scores of the harness and of ours, of its prompts and of ours."""
    from lm_eval.tasks.ruler import common_utils

    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load, ruler, tasks

    found, text, pairs = harness_results(model), load.text(find(model)), dict[str, Any]()
    for name in OFFLINE:
        task, samples = tasks.of(name), found["samples"][name]
        example = next(ruler.generate(name, LENGTH, [0], 1, text.count))
        said, wanted = [answer(example.prompt, i) for i in range(3)], list(example.references)
        theirs = [common_utils.process_results({"max_length": LENGTH, "outputs": wanted}, [each]) for each in said]
        pairs[name] = {
            "harness": found["results"][name][f"{LENGTH},none"],
            "own": [task.score(s["filtered_resps"][0], s["doc"]["outputs"]) for s in samples],
            "lengths": [text.count(s["arguments"][0][0]) for s in samples],
            "prompt": (samples[0]["arguments"][0][0], example.prompt),
            "theirs": [score[str(LENGTH)] for score in theirs],
            "ours": [task.score(each, example.references) for each in said],
        }
    return pairs


def without_digits(prompt: str) -> str:
    """What a prompt asks, without its haystack, key and value."""
    head, _, tail = prompt.partition("\n")
    return head + " ... " + tail.rpartition("\n")[2].partition(" for ")[0]


@pytest.mark.slow
def test_scores_agree_with_the_harness(model: Path, ranks: Zygote) -> None:
    """Exactly: both are means of 0 and 1 over the same answers."""
    with mock.patch.dict("os.environ", {"HF_HUB_OFFLINE": "1"}):
        found = ranks(1, scores, model=model)[0]
    for name, pair in found.items():
        assert pair["harness"] == sum(pair["own"]) / SAMPLES == pytest.approx(2 / 3), name
        assert pair["theirs"] == pair["ours"] == [1.0, 1.0, 0.0], name
        theirs, ours = map(without_digits, pair["prompt"])
        assert theirs == ours, name
        assert all(LENGTH / 2 < length < LENGTH for length in pair["lengths"])
