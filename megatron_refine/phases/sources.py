"""What a run learns from: documents, or prompts with answers, with the tokenizer of both."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_refine.checkpoint.checkpoints import Progress
from megatron_refine.config import Config
from megatron_refine.data.prepare import Prepared, prepare
from megatron_refine.data.prompts import Prompts, read_prompts
from megatron_refine.data.tokenizer import Tokenizer, bos_id, find_tokenizer, load_tokenizer, stated
from megatron_refine.eval.answers import Answerer
from megatron_refine.phases.midtrain import MidTraining
from megatron_refine.phases.posttrain import PostTraining
from megatron_refine.phases.testtime import TestTime
from megatron_refine.phases.tokenizer import with_tokenizer
from megatron_refine.step.refine import RefineStep


class Phase(Protocol):
    """What a run does with its batches."""

    total_steps: int
    num_samples: int | None  # None: any number
    fingerprint: str  # of the data

    def __call__(self, done: Progress, refine: bool) -> dict[str, float]:
        """One batch on this rank; its metrics, the same on all ranks."""
        ...


@dataclass(frozen=True)
class Sources:
    config: Config
    documents: Prepared | None  # None: a phase on prompts, without held-out documents
    prompts: Prompts | None  # None: mid-training
    tokenizer_path: Path
    tokenizer: Tokenizer
    bos: int | None

    @classmethod
    def of(cls, config: Config, say: Callable[[str], None] = lambda _: None) -> "Sources":
        """Read, and where need be write to data.cache_dir; `say` is told what is read, in lines.

        Raises ConfigError for any input that cannot be used.
        """
        midtrain = config.train.phase == "midtrain"
        config = with_tokenizer(config)
        documents = prepare(config, say) if midtrain or config.data.paths else None
        path = documents.tokenizer if documents else find_tokenizer(Path(config.data.tokenizer), "data.tokenizer")
        tokenizer = load_tokenizer(path, config.model.vocab_size, "data.tokenizer")
        if not documents:
            say(stated(path, tokenizer))
        bos = bos_id(tokenizer, path) if config.data.add_bos else None
        prompts = None if midtrain else read_prompts(config, tokenizer, bos, say)
        return cls(config, documents, prompts, path, tokenizer, bos)

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, BOS included."""
        return len(self.tokenizer.encode([text])[0]) + (self.bos is not None)

    def phase(self, step: RefineStep, answerer: Answerer, device: torch.device) -> Phase:
        """What the configuration's phase does with a batch."""
        if self.prompts is None:
            assert self.documents is not None
            return MidTraining(self.config, self.documents.train, step, device)
        if self.config.train.phase == "posttrain":
            return PostTraining(self.config, self.prompts, step, device)
        return TestTime(self.config, self.prompts, step, answerer, device)
