"""Answers of a model to prompts: encoded, batched by length, decoded, ended by a token or a stop string."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from megatron_refine.config import ConfigError
from megatron_refine.data.tokenizer import Tokenizer
from megatron_refine.eval.batches import over_replicas, padded
from megatron_refine.platform import hardware
from megatron_refine.trainer.generate import GREEDY, Sampling, generate
from megatron_refine.trainer.parallel import Ranks


@dataclass(frozen=True)
class Question:
    prompt: str
    max_new_tokens: int
    stops: tuple[str, ...] = ()  # the answer ends before the first of them


class Answerer:
    """Answers any number of questions with one model, on all ranks of its layout at once."""

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, ranks: Ranks, *, batch_size: int, bos: int | None = None,
        sampling: Sampling = GREEDY, watch: Callable[[str], object] | None = None,
    ):  # fmt: skip
        """batch_size: prompts a pass and replica; bos: the token that begins every prompt; sampling: by default greedy;
        watch: is told what the first prompt of a batch has got so far, after each token."""
        self.model, self.tokenizer, self.ranks, self.batch_size = model, tokenizer, ranks, batch_size
        self.head, self.sampling, self.watch = [] if bos is None else [bos], sampling, watch

    def encode(self, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of each prompt. Raises ConfigError where one is empty."""
        prompts = [self.head + ids for ids in self.tokenizer.encode([q.prompt for q in questions])]
        for i, ids in enumerate(prompts):
            if not ids:
                raise ConfigError(f"prompt {i} is empty and there is no BOS token to begin with; leave it out")
        return prompts

    def __call__(self, questions: Sequence[Question], prompts: Sequence[list[int]]) -> Iterator[dict[int, str]]:
        """Answers by the question's number, as batches of all replicas get done, the longest prompts first.

        prompts: as of `encode`. The same on every rank; every rank gets all answers.
        """
        lengths = [len(ids) for ids in prompts]
        yield from over_replicas(
            lengths, self.batch_size, self.ranks,
            lambda mine: self._answer([questions[i] for i in mine], [prompts[i] for i in mine], mine),
        )  # fmt: skip

    def _answer(self, questions: list[Question], prompts: list[list[int]], numbers: Sequence[int]) -> list[str]:
        tokens, lengths = padded(prompts, hardware.device())

        def finished(i: int, written: list[int]) -> bool:
            if i == 0 and self.watch:
                self.watch(self._text(questions[0], written))
            if written[-1] in self.tokenizer.ends:
                return True
            stops = questions[i].stops
            return bool(stops) and any(stop in self.tokenizer.decode(written) for stop in stops)

        most = [q.max_new_tokens for q in questions]
        written = generate(self.model, tokens, lengths, most, finished, self.sampling, numbers)
        return [self._text(q, ids) for q, ids in zip(questions, written, strict=True)]

    def _text(self, question: Question, written: list[int]) -> str:
        if written[-1] in self.tokenizer.ends:
            written = written[:-1]
        text = self.tokenizer.decode(written)
        ends = [text.index(stop) for stop in question.stops if stop in text]
        return text[: min(ends)] if ends else text
