"""Questions on many documents, of which one (SQuAD) or two (HotpotQA) hold the answer. The wording is RULER's."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from megatron_refine.config import ConfigError
from megatron_refine.data.formats import reading
from megatron_refine.eval.ruler.sample import Case, Sample

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query} Answer:"
)
FILES = {
    "qa_squad": ("squad.json", "SQuAD 2.0's dev-v2.0.json"),
    "qa_hotpot": ("hotpotqa.json", "HotpotQA's hotpot_dev_distractor_v1.json"),
}


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple[str, ...]
    own: tuple[str, ...]  # documents that come with it
    near: tuple[str, ...] = ()  # those to add first: the other paragraphs of the same article


@dataclass(frozen=True)
class Pool:
    questions: list[Question]
    documents: list[str]  # all that come with a question, each once


def read_pool(task: str, folder: str) -> Pool:
    """The questions and documents of the file in `folder` that `task` needs. Raises ConfigError naming that file."""
    name, wanted = FILES[task]
    path = Path(folder, name)
    if not folder or not path.is_file():
        where = f"{path}: no such file" if folder else "no data folder is named"
        raise ConfigError(f"{task}: {where}; it needs {wanted} as {name}")
    with reading(path, task):
        content = path.read_bytes()
    try:
        tree = json.loads(content)
        questions = list(_squad(tree) if task == "qa_squad" else _hotpot(tree))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{task}: {path}: not in the form of {wanted} ({reason:.80}); replace it") from None
    if not questions:
        raise ConfigError(f"{task}: {path}: holds no questions with an answer; replace it")
    return Pool(questions, sorted({text for question in questions for text in (*question.own, *question.near)}))


def _squad(tree: dict[str, Any]) -> Iterator[Question]:
    for article in tree["data"]:
        paragraphs = dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            near = tuple(text for text in paragraphs if text != paragraph["context"])
            for question in paragraph["qas"]:
                answers = tuple(dict.fromkeys(_text(answer["text"]) for answer in question["answers"]))
                if answers and not question.get("is_impossible", False):
                    yield Question(_text(question["question"]), answers, (paragraph["context"],), near)


def _hotpot(tree: list[dict[str, Any]]) -> Iterator[Question]:
    for question in tree:
        own = tuple(dict.fromkeys(f"{title}\n{''.join(sentences)}" for title, sentences in question["context"]))
        yield Question(_text(question["question"]), (_text(question["answer"]),), own)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r:.20} where a text belongs")
    return value


@lru_cache(maxsize=4)
def _order(seed: str, count: int) -> list[int]:
    order = list(range(count))
    Random(seed).shuffle(order)
    return order


def draw(pool: Pool, case: Case, template: str = TEMPLATE) -> Sample:
    """A sample; its size counts documents. Question `index` is the same at every length: lengths are to be compared.

    Raises ConfigError for an index beyond the questions.
    """
    order = _order(f"{case.seed}/{case.task}/questions", len(pool.questions))
    if case.index >= len(order):
        raise ConfigError(f"{case.task}: sample {case.index} of {len(order)} questions; ask for fewer samples")
    question = pool.questions[order[case.index]]
    rng = case.random("documents")
    near = rng.sample(question.near, len(question.near))
    far = rng.sample(pool.documents, min(len(pool.documents), max(case.length, 0)))  # a document has a token or more
    documents = list(dict.fromkeys([*question.own, *near, *far]))

    def prompt(size: int) -> str:
        shown = documents[:size]
        case.random("order").shuffle(shown)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(shown, 1))
        return template.format(context=context, query=question.text)

    return Sample(prompt, question.answers, least=len(question.own), most=len(documents))
