"""The folder of an evaluation: a file of answers for each task and length, from which it goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError
from megatron_refine.files import write, write_json

_IDENTITY, SCORES, TABLE = "evaluation.json", "scores.json", "scores.md"


class Results:
    """Rows by label, e.g. niah_single_1@4096. Written by one rank, read by all."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], writes: bool):
        """identity: what the answers depend on beside their prompts (weights, tokenizer, precision).

        Raises ConfigError where the folder holds the results of another one, or cannot be written.
        """
        self.folder, self.writes = folder, writes
        path = folder / _IDENTITY
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else identity
        for key in identity.keys() | known.keys():
            if identity.get(key) != known.get(key):
                raise ConfigError(
                    f"--out {folder}: holds an evaluation with another {key} ({known.get(key)}, not "
                    f"{identity.get(key)}); name another folder"
                )
        if writes:
            try:
                write_json(path, dict(identity))
            except OSError as error:
                raise ConfigError(f"--out {folder}: cannot be written: {error.strerror}; name another folder") from None

    def done(self, label: str, inputs: list[str]) -> dict[int, dict[str, Any]]:
        """Rows of earlier attempts by place, those whose input is still that of the place: of other data they are not.

        inputs: the text at each place.
        """
        path = self.folder / f"{label}.jsonl"
        lines = (
            path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        )  # what follows the last line's end is torn
        rows = [json.loads(line) for line in lines]
        return {
            row["place"]: row
            for row in rows
            if row["place"] < len(inputs) and row["input"] == fingerprint(inputs[row["place"]])
        }

    def start(self, label: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the file of a label anew with the rows that are done: a torn last line goes."""
        if self.writes:
            write(self.folder / f"{label}.jsonl", "".join(map(_line, rows)))

    def append(self, label: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if self.writes:
            with (self.folder / f"{label}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(map(_line, rows))

    def finish(self, scores: Mapping[str, Any], table: str) -> None:
        """Write scores.json and scores.md."""
        if self.writes:
            write_json(self.folder / SCORES, dict(scores))
            write(self.folder / TABLE, table + "\n")


def fingerprint(text: str) -> str:
    """Of an input, short: equal inputs only are taken for equal."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
