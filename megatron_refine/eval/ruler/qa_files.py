"""The REFINE paper's files of RULER-QA for any tokenizer: prompts with answers, to train on and to test with.

Columns and wording are those of the files in the paper's repository. As there, and as in RULER, documents are added ten
at a time while the length holds them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_refine.config import ConfigError
from megatron_refine.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from megatron_refine.eval.ruler import qa
from megatron_refine.eval.ruler.fit import largest_size
from megatron_refine.eval.ruler.sample import Case, Sample
from megatron_refine.files import digest, place
from megatron_refine.progress import counted

TASKS = {"ruler_squadqa": "qa_squad", "ruler_hotpotqa": "qa_hotpot"}  # each with the one that its questions are of
TEMPLATE = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}\nAnswer:"
)
ANSWER = 32  # tokens of an answer, EOS included
BOS = 1  # token that a prompt may begin with
TEN = 10  # documents
_SIDES = ("train", "test")
_FORMAT, _KEY = 1, b"megatron_refine"  # raise the former where the same arguments give other rows
_ANY = 1 << 31  # ids that a tokenizer may have: no model's vocabulary bounds them here
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """The files that are asked for. Field names are those of the options."""

    data: str
    tokenizer: Path
    lengths: Sequence[int]  # tokens
    out: Path
    name: str  # of the model whose tokenizer it is; may be empty
    train: int  # rows
    test: int
    seed: int


@dataclass(frozen=True)
class Table:
    """One of the files."""

    wanted: Wanted
    task: str
    length: int
    side: str  # train or test

    @property
    def rows(self) -> int:
        return int(getattr(self.wanted, self.side))

    @property
    def path(self) -> Path:
        parts = (self.task, self.wanted.name, self.length, self.rows, self.side)
        return self.wanted.out / f"{'_'.join(str(part) for part in parts if part != '')}.parquet"

    @cached_property
    def record(self) -> dict[str, Any]:
        """All that decides the rows."""
        source = Path(self.wanted.data, qa.FILES[TASKS[self.task]][0])
        hashes = {"questions": digest(source), "tokenizer": digest(self.wanted.tokenizer)}
        how = {"task": self.task, "length": self.length, "side": self.side, "rows": self.rows}
        return {"format": _FORMAT, "seed": self.wanted.seed, **how, **hashes}

    def done(self) -> bool:
        """Tell whether the file is there. Raises ConfigError where another one has its name."""
        if not self.path.exists():
            return False
        import pyarrow.parquet as pq  # late: takes a moment

        try:
            found = json.loads((pq.read_schema(self.path).metadata or {}).get(_KEY, b"null"))
        except (OSError, ValueError):
            found = None
        if found != self.record:
            raise ConfigError(f"--out: {self.path}: holds other rows than these; name another folder, or delete it")
        return True


def make(wanted: Wanted, say: Say) -> None:
    """Write the files that are not there yet; `say` is told each. Raises ConfigError before the first is written."""
    _check(wanted)
    wanted = replace(wanted, tokenizer=find_tokenizer(wanted.tokenizer, "--tokenizer"))
    tokenizer = load_tokenizer(wanted.tokenizer, _ANY, "--tokenizer")
    pools = {task: _pool(wanted, task) for task in TASKS}
    tables = [Table(wanted, t, n, side) for t in TASKS for n in sorted(set(wanted.lengths)) for side in _SIDES]
    missing = [table for table in tables if not table.done()]
    if not missing:
        say(f"{wanted.out}: all {len(tables)} files are there, made with the same arguments; nothing to do")
        return
    chosen = {}
    for task, length in dict.fromkeys((table.task, table.length) for table in missing):
        maker = Maker(pools[task], task, length, wanted.seed, tokenizer)
        chosen[task, length] = maker, maker.choose(wanted.train, wanted.test)
    for table in missing:
        maker, questions = chosen[table.task, table.length]
        rows = maker.rows(questions[table.side], f"making {table.path.name}")
        _write(table, rows)
        mean = sum(row["total_length"] for row in rows) / len(rows)
        say(f"{table.path}: {len(rows):,} rows, {mean:,.0f} tokens each on average")
    if len(missing) < len(tables):
        say(f"the other {len(tables) - len(missing)} files were there")


def _check(wanted: Wanted) -> None:
    if not wanted.lengths:
        raise ConfigError("--lengths: names no length; name some in tokens, 4096,8192")
    for side in _SIDES:
        if getattr(wanted, side) < 1:
            raise ConfigError(f"--{side}={getattr(wanted, side)}: must be 1 or more")
    if wanted.name and not (wanted.name.isidentifier() and wanted.name[0].islower() and wanted.name.isascii()):
        raise ConfigError(f"--name={wanted.name}: name a family or a model in small letters, digits and _")


def _pool(wanted: Wanted, task: str) -> qa.Pool:
    """Its questions, each text once. Raises ConfigError where they are too few."""
    pool = qa.read_pool(TASKS[task], wanted.data)
    questions = list({question.text: question for question in pool.questions}.values())
    if len(questions) < wanted.train + wanted.test:
        what = f"--data: {Path(wanted.data, qa.FILES[TASKS[task]][0])}: has"
        raise _too_few(what, len(questions), wanted.train, wanted.test)
    return qa.Pool(questions, pool.documents)


def _too_few(what: str, there: int, train: int, test: int) -> ConfigError:
    asked = f"--train {train} and --test {test}"
    return ConfigError(f"{what} {there} questions, fewer than {asked} together; ask for {there} at most")


@dataclass(frozen=True)
class Maker:
    """What makes the rows of a task at a length."""

    pool: qa.Pool
    task: str
    length: int
    seed: int
    tokenizer: Tokenizer

    @property
    def budget(self) -> int:
        """Tokens that a prompt may have."""
        return self.length - ANSWER - BOS

    def choose(self, train: int, test: int) -> dict[str, list[int]]:
        """Numbers of the questions that fit: for test the first of the drawn order, for training the last.

        So no question is in both, and with enough of them none is in a test and another length's training.
        Raises ConfigError where the length is too short, or too few fit.
        """
        numbers = range(len(self.pool.questions))
        self._check_length(numbers[:16])
        label = f"choosing questions of {self.task}@{self.length}"
        found = list(counted(self._fitting(numbers, test), label, test, "questions"))
        rest = [number for number in numbers[::-1] if number not in found]
        last = list(counted(self._fitting(rest, train), label, train, "questions"))
        if len(found) < test or len(last) < train:
            what = f"--lengths: {self.task} at length {self.length}: its tokens hold"
            raise _too_few(what, len(found) + len(last), train, test)
        return {"train": last, "test": found}

    def rows(self, numbers: Sequence[int], label: str) -> list[dict[str, Any]]:
        """The rows of a file, of questions by number."""
        guess, found = max(self.length // 1500, 1), []
        for i, number in enumerate(counted(numbers, label, len(numbers), "rows")):
            sample = self._sample(number)
            tens = largest_size(partial(self._cost, sample), self.budget, 1, max(sample.most // TEN, 1), guess)
            assert tens is not None, "questions that do not fit were left out"
            guess, prompt = tens, _prompt(sample, tens)
            answers = max(map(len, self.tokenizer.encode(list(sample.references))))
            tokens = self._count(prompt)
            found.append({
                "index": i, "prompt": prompt, "answer": list(sample.references), "prompt_length": tokens,
                "max_answer_length": answers, "total_length": tokens + answers, "max_seq_length": self.length,
                "task": self.task,
            })  # fmt: skip
        return found

    def _fitting(self, numbers: Iterable[int], most: int) -> Iterator[int]:
        """At most so many of the numbers, whose ten documents and answer fit."""
        for number in numbers:
            if not most:
                return
            sample = self._sample(number)
            longest = max(map(len, self.tokenizer.encode(list(sample.references))))
            if longest < ANSWER and self._cost(sample, 1) <= self.budget:
                most -= 1
                yield number

    def _check_length(self, numbers: Sequence[int]) -> None:
        costs = [self._cost(self._sample(number), 1) for number in numbers]
        if min(costs) > self.budget:
            enough = ((max(costs) + ANSWER + BOS) // 64 + 2) * 64
            raise ConfigError(
                f"--lengths: {self.task} at length {self.length}: ten documents, the question and the answer take "
                f"{min(costs) + ANSWER + BOS} tokens or more; name {enough} or more"
            )

    def _sample(self, number: int) -> Sample:
        return qa.draw(self.pool, Case(self.task, self.length, number, self.seed), TEMPLATE)

    def _cost(self, sample: Sample, tens: int) -> int:
        return self._count(_prompt(sample, tens))

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode([text])[0])


def _prompt(sample: Sample, tens: int) -> str:
    return sample.prompt(max(TEN * tens, sample.least))


def _write(table: Table, rows: list[dict[str, Any]]) -> None:
    """Write a file whole or not at all. Raises OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = pa.Table.from_pylist(rows)
    whole = whole.replace_schema_metadata({_KEY: json.dumps(table.record)})
    place(table.path, lambda unfinished: pq.write_table(whole, unfinished))
