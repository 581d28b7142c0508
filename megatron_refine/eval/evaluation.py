"""An evaluation from start to end: answers task by task, kept as they come, then scores and tables."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_refine.checkpoint.manifest import MANIFEST
from megatron_refine.config import ConfigError
from megatron_refine.data.corpus import find_corpus
from megatron_refine.data.tokenizer import encode_all
from megatron_refine.eval.answers import Answerer
from megatron_refine.eval.documents import heldout
from megatron_refine.eval.load import Loaded, Source, Text
from megatron_refine.eval.results import Results
from megatron_refine.eval.suite import Part, Score, answers, predictions, questions
from megatron_refine.eval.table import Scored, markdown
from megatron_refine.files import digest
from megatron_refine.progress import Progress

HELDOUT = "heldout"


@dataclass(frozen=True)
class Documents:
    """Held-out documents: ids [length >= 2] of the first tokens of each, BOS included."""

    ids: list[list[int]]


def weights_of(source: Source) -> list[str]:
    """Return a digest of the manifest of a checkpoint, or of each file of weights in Hugging Face's format."""
    files = [source.folder / MANIFEST] if source.is_checkpoint else sorted(source.folder.glob("*.safetensors"))
    return [digest(path)[:16] for path in files]


def identity(source: Source, text: Text, precision: str) -> dict[str, Any]:
    """What answers depend on beside their questions."""
    return {
        "weights": weights_of(source),
        "model": hashlib.sha256(source.model.model_dump_json().encode()).hexdigest()[:16],
        "tokenizer": digest(text.path)[:16],
        "precision": precision,
        "bos": text.bos,
        "ends": list(text.tokenizer.ends),
    }


def read_documents(
    paths: Sequence[str], column: str, text: Text, length: int, count: int, say: Callable[[str], None] = lambda _: None
) -> Documents:
    """The first `count` documents of the files, cut after `length` tokens; `say` is told which files these are.

    Raises ConfigError where there is no document.
    """
    found, head = Documents([]), [] if text.bos is None else [text.bos]
    corpus = find_corpus(list(paths), column, "--heldout")
    say(corpus.summary)
    for _, ids in encode_all(text.tokenizer, corpus.documents()):
        row = [*head, *ids[: length - len(head)].tolist()]
        if len(row) > 1:
            found.ids.append(row)
        if len(found.ids) == count:
            return found
    if not found.ids:
        raise ConfigError(f"--heldout {' '.join(paths)}: no document of two tokens or more; name other files")
    return found


def evaluate(
    name: str, parts: Sequence[Part], documents: Documents | None, loaded: Loaded, results: Results, batch_size: int
) -> tuple[dict[str, Any], str]:
    """Answer what is not answered yet, on all ranks. Returns the scores as JSON and as Markdown; writes both."""
    answerer = Answerer(loaded.model, loaded.tokenizer, loaded.ranks, batch_size=batch_size, bos=loaded.bos)
    scored = [Scored(part.task, part.length, _answer(part, answerer, results)) for part in parts]
    held = _heldout(documents, loaded, results, batch_size) if documents else {}
    scores = {
        "model": name,
        "tasks": {
            part.label: asdict(s.score) | ({"note": part.note} if part.note else {})
            for part, s in zip(parts, scored, strict=True)
        },
        HELDOUT: {key: asdict(score) for key, score in held.items()},
    }
    notes = dict.fromkeys(f"Haystacks: {part.note}" for part in parts if part.note)
    table = "\n\n".join([markdown(name, scored, held), *notes])
    results.finish(scores, table)
    return scores, table


def _answer(part: Part, answerer: Answerer, results: Results) -> Score:
    """Answers are kept, scores are not: references and metrics may have changed since."""
    inputs = [results.fingerprint([*vars(question).values()]) for question in questions(part.examples)]

    def run(skip: frozenset[int]) -> Any:
        for found in answers(part, answerer, skip):
            yield {place: vars(prediction) for place, prediction in found.items()}

    def scored(place: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return vars(predictions([part.examples[place]], [row["prediction"]])[0])

    rows = _resumed(part.label, inputs, results, run, scored)
    return Score.of([row["score"] for row in rows])


def _heldout(documents: Documents, loaded: Loaded, results: Results, batch_size: int) -> dict[str, Score]:
    """Loss in nats a token and accuracy: means over tokens, errors by documents (of a ratio, linearized)."""
    inputs = [results.fingerprint([ids]) for ids in documents.ids]

    def run(skip: frozenset[int]) -> Any:
        for found in heldout(loaded.model, loaded.ranks, documents.ids, batch_size, skip):
            yield {place: vars(sums) for place, sums in found.items()}

    rows = _resumed(HELDOUT, inputs, results, run, lambda _, row: row)
    tokens = np.array([row["tokens"] for row in rows], np.float64)
    return {key: _ratio(np.array([row[field] for row in rows]), tokens)
            for key, field in (("loss", "loss"), ("accuracy", "correct"))}  # fmt: skip


def _ratio(sums: np.ndarray, tokens: np.ndarray) -> Score:
    mean, n = float(sums.sum() / tokens.sum()), len(sums)
    spread = sums - mean * tokens
    error = float(np.sqrt((spread**2).sum() * n / max(n - 1, 1)) / tokens.sum())
    return Score(mean, error if n > 1 else 0.0, n)


def _resumed(
    label: str,
    inputs: list[str],
    results: Results,
    run: Callable[[frozenset[int]], Any],
    renewed: Callable[[int, Mapping[str, Any]], Mapping[str, Any]],
) -> list[Mapping[str, Any]]:
    """The rows of all places, in order: those of earlier attempts, `renewed`, and those that `run` makes of others."""
    done: dict[int, Mapping[str, Any]] = {
        place: {"place": place, "input": inputs[place], **renewed(place, row)}
        for place, row in results.done(label, inputs).items()
    }
    results.start(label, done.values())
    with Progress(label, len(inputs), "rows", done=len(done), show=results.writes) as progress:
        for found in run(frozenset(done)):
            rows = [{"place": p, "input": inputs[p]} | row for p, row in found.items()]
            results.append(label, rows)
            done |= {row["place"]: row for row in rows}
            progress.add(len(rows))
    return [done[place] for place in range(len(inputs))]
