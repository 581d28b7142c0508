"""Prompts with their answers as token ids, and batches of them. No prompt is ever cut: it holds the question."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_refine.config import Config, ConfigError
from megatron_refine.data.examples import Columns, Example, read_examples
from megatron_refine.data.tokenizer import Tokenizer
from megatron_refine.records import Batch

_MULTIPLE = 64  # rows are padded to a multiple: few shapes, for kernels that are tuned by shape


@dataclass(frozen=True)
class Prompts:
    """Examples and their ids, in the order of the files."""

    examples: list[Example]
    prompts: list[np.ndarray]  # [length] int32, BOS included
    answers: list[np.ndarray]  # [length] int32, of the first reference
    skipped: int  # rows left out as too long

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def fingerprint(self) -> str:
        """Hash of all ids and texts."""
        total = hashlib.sha256()
        for example, *ids in zip(self.examples, self.prompts, self.answers, strict=True):
            total.update(repr(example).encode(errors="surrogatepass"))
            for part in ids:
                total.update(part.tobytes() + b"|")
        return total.hexdigest()

    def batch(
        self, rows: Sequence[int], samples: Sequence[int], everyone: Sequence[int], shortest: int, answers: bool
    ) -> tuple[Batch, Tensor]:
        """Return the prompts `rows` [B] as a batch, each with its answer behind it if `answers`; and whole lengths [B].

        A row -1 holds no token: it fills up a batch. Rows are padded to the longest of `everyone`, the rows that all
        replicas have together, and to `shortest` at least.
        """
        longest = max([shortest, *(self._length(row, answers) for row in everyone)])
        tokens = np.zeros((len(rows), -(-longest // _MULTIPLE) * _MULTIPLE), np.int64)
        lengths = torch.zeros(2, len(rows), dtype=torch.int64)
        for b, row in enumerate(rows):
            if row >= 0:
                prompt, whole = len(self.prompts[row]), self._length(row, answers)
                tokens[b, :prompt] = self.prompts[row]
                tokens[b, prompt:whole] = self.answers[row][: whole - prompt]
                lengths[:, b] = torch.tensor([prompt, whole])
        samples_of = torch.tensor(np.array(samples, np.int64))
        return Batch(torch.from_numpy(tokens), lengths[0], samples_of), lengths[1]

    def _length(self, row: int, answers: bool) -> int:
        return 0 if row < 0 else len(self.prompts[row]) + len(self.answers[row]) * answers


def read_prompts(
    config: Config, tokenizer: Tokenizer, bos: int | None, say: Callable[[str], None] = lambda _: None
) -> Prompts:
    """Read the rows of task.paths. `say` is told what was read.

    In posttrain a prompt and its answer fit data.seq_length together, in testtime the prompt does.

    Raises ConfigError naming the row where one is too long, or a prompt or an answer has no token.
    """
    task, post = config.task, config.train.phase == "posttrain"
    columns = Columns(task.prompt_column, task.answer_column)
    examples = read_examples(task.paths, columns, "task.paths", max_new_tokens=task.max_new_tokens, say=say)
    head, tail = ([] if bos is None else [bos]), []
    if post and task.add_eos:
        if tokenizer.eos_id is None:
            raise ConfigError(f"task.add_eos=true: {config.data.tokenizer} has no EOS token; set task.add_eos=false")
        tail = [tokenizer.eos_id]
    found = Prompts([], [], [], 0)
    texts = [e.prompt for e in examples], [e.references[0] for e in examples]
    skipped = 0
    for example, prompt, answer in zip(examples, *map(tokenizer.encode, texts), strict=True):
        needed = len(head + prompt) + len(answer + tail) * post
        if needed > config.data.seq_length and task.skip_too_long:
            skipped += 1
            continue
        _check(example, needed, len(head + prompt), len(answer), config)
        found.examples.append(example)
        found.prompts.append(np.array(head + prompt, np.int32))
        found.answers.append(np.array(answer + tail, np.int32))
    length = config.data.seq_length
    if not found.examples:
        raise ConfigError(f"task.paths: all {skipped} rows are longer than data.seq_length={length}; raise it")
    if skipped:
        say(f"task.paths: {skipped:,} of {len(examples):,} rows left out: longer than data.seq_length={length}")
    return Prompts(found.examples, found.prompts, found.answers, skipped)


def _check(example: Example, needed: int, prompt: int, answer: int, config: Config) -> None:
    where = f"task.paths: row {example.index} of task {example.task}"
    if needed > config.data.seq_length:
        raise ConfigError(
            f"{where}: has {needed} tokens{', its answer included' if needed > prompt else ''}, more than "
            f"data.seq_length={config.data.seq_length}; raise it, or leave such rows out with task.skip_too_long=true"
        )
    if not prompt or not answer:
        raise ConfigError(f"{where}: its {'answer' if prompt else 'prompt'} has no token; correct the row or remove it")
