"""The folder of an evaluation: a file of answers for each task and length, from which it goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError
from megatron_refine.files import Appended, TornError, read_json, write, write_json

_IDENTITY, SCORES, TABLE = "evaluation.json", "scores.json", "scores.md"


class Results:
    """Rows by label, e.g. niah_single_1@4096. Written by one rank, read by all."""

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], writes: bool, say: Callable[[str], None] = lambda _: None
    ):
        """identity: what the answers depend on beside their questions (weights, tokenizer, precision). `say` is told
        what is damaged.

        Raises ConfigError where the folder holds the results of another one, or cannot be written.
        """
        self.folder, self.identity, self.writes, self.say = folder, dict(identity), writes, say
        path = folder / _IDENTITY
        known = self._known(path)
        for key in {**identity, **known}:
            if identity.get(key) != known.get(key):
                which = f"whose {key} is {known.get(key)}, not {identity.get(key)}"
                which = which if key in known else f"of an earlier version, without {key}"
                raise ConfigError(f"--out {folder}: holds an evaluation {which}; choose another folder")
        if writes:
            try:
                write_json(path, dict(identity))
            except OSError as error:
                raise ConfigError(f"--out {folder}: cannot be written: {error.strerror}; name another folder") from None

    def _known(self, path: Path) -> Mapping[str, Any]:
        """What evaluation.json says; of a damaged one what is asked: each row says by itself what it depends on."""
        if not path.exists():
            return self.identity
        try:
            known = read_json(path)
        except TornError:
            known = None
        if isinstance(known, dict):
            return known
        self.say(f"{path}: damaged; written anew, answers of other weights or settings are asked again")
        return self.identity

    def fingerprint(self, question: Sequence[Any]) -> str:
        """Hash all that an answer depends on: equal questions to equal models only are taken for equal."""
        text = json.dumps([self.identity, *question], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def done(self, label: str, inputs: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Rows of earlier attempts by place, those whose question is still that of the place: of other data they are
        not. Damaged lines, as a kill or a power cut leaves them, are passed over.

        inputs: the fingerprint of the question at each place.
        """
        path = self.folder / f"{label}.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        rows = [_row(line) for line in lines]
        if damaged := sum(row is None for row in rows):
            self.say(f"{path}: damaged lines passed over, their questions are asked again: {damaged}")
        return {
            row["place"]: row
            for row in rows
            if row and 0 <= row["place"] < len(inputs) and row["input"] == inputs[row["place"]]
        }

    def start(self, label: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the file of a label anew with the rows that are done: a torn last line goes."""
        if self.writes:
            write(self.folder / f"{label}.jsonl", "".join(map(_line, rows)))

    def append(self, label: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if self.writes:
            file = Appended(self.folder / f"{label}.jsonl")  # whose failure names it
            file.write("".join(map(_line, rows)))
            file.close()

    def finish(self, scores: Mapping[str, Any], table: str) -> None:
        """Write scores.json and scores.md."""
        if self.writes:
            write_json(self.folder / SCORES, dict(scores))
            write(self.folder / TABLE, table + "\n")


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None of a damaged one."""
    try:
        row = json.loads(line.decode())
        said = isinstance(row.get("prediction"), str) or all(
            isinstance(row.get(key), int | float) for key in ("tokens", "loss", "correct")
        )
        return row if said and type(row["place"]) is int and isinstance(row["input"], str) else None
    except (ValueError, AttributeError, KeyError, RecursionError):
        return None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
