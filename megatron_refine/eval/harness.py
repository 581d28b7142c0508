"""Our models in lm-evaluation-harness: `lm_eval.simple_evaluate(model=HarnessLM(loaded), tasks=[...])`, on every rank.

The harness knows nothing of the layout. Every rank runs it on the same requests as a world of one; HarnessLM splits
them over the replicas, and every rank gets all results. Text is never cut: a fast-weight model has no longest context.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_refine.config import ConfigError
from megatron_refine.eval.answers import Answerer, Question
from megatron_refine.eval.likelihood import Pair, loglikelihoods, text_loglikelihoods
from megatron_refine.eval.load import Loaded
from megatron_refine.exchange import everyone
from megatron_refine.progress import Progress

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ConfigError(f"lm_eval is not usable ({error}); pip install megatron-refine[eval]") from None

MAX_NEW_TOKENS = 256  # of a task that names no limit: what the harness's own models take
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one limit's names, by precedence
_WITHOUT_EFFECT = {"top_p", "top_k"}  # on the most probable token


class HarnessLM(TemplateLM):
    """A loaded model as the harness asks it: greedy answers, log-likelihoods of continuations and of whole texts."""

    def __init__(self, loaded: Loaded, *, batch_size: int = 8, tokenizer_name: str = ""):
        """batch_size: requests a pass and replica; tokenizer_name: tells the harness's caches of requests apart."""
        super().__init__()  # rank 0 of a world of one
        self.model, self.ranks, self.bos, self.batch_size = loaded.model, loaded.ranks, loaded.bos, batch_size
        self.encoder, self._tokenizer_name = loaded.tokenizer, tokenizer_name
        self.answerer = Answerer(
            loaded.model, loaded.tokenizer, loaded.ranks, batch_size=batch_size, bos=loaded.bos
        )  # fmt: skip

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer_name

    @property
    def eot_token_id(self) -> int | None:
        return self.encoder.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What begins a text without a context: BOS of a model that was trained with it, else EOS, which ends the
        document before. Raises ConfigError where there is neither."""
        first = self.encoder.eos_id if self.bos is None else self.bos
        if first is None:
            raise ConfigError("a text has no context and the tokenizer no EOS token to begin it with; drop the task")
        return first

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model beside its scores."""
        return {"tensor_parallel": self.ranks.tp, "replicas": self.ranks.dp, "bos": self.bos}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; it begins with BOS where the model was trained so, unless `add_special_tokens` is False."""
        head = [] if self.bos is None or add_special_tokens is False else [self.bos]
        return head + self.encoder.encode([string])[0]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether greedy decoding writes it) of each request."""
        self._check_agreement(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self.ranks.is_main)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = []
        for (context_text, text), context, continuation in requests:
            if not continuation:  # would count as certain
                raise ConfigError(
                    f"answer {text!r} adds no token to the prompt that ends in {context_text[-40:]!r}, so it cannot be "
                    "scored; leave this task out of --tasks"
                )
            pairs.append((context or [self.prefix_token_id], continuation))
        with self._progress("loglikelihood", [texts for texts, _, _ in requests], disable_tqdm) as found:
            return loglikelihoods(self.model, self.ranks, pairs, self.batch_size, found)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, in one piece."""
        self._check_agreement(requests)
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        with self._progress("loglikelihood_rolling", [r.args for r in requests], disable_tqdm) as found:
            return text_loglikelihoods(
                self.model, self.ranks, texts, self.prefix_token_id, self.batch_size,
                lambda batch: found({i: total for i, (total, _) in batch.items()}),
            )  # fmt: skip

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answer to each request, ended by EOS, before the first of its `until` strings, or by its limit."""
        self._check_agreement(requests)
        questions = [question(*request.args) for request in requests]
        answers: dict[int, str] = {}
        with self._progress("generate_until", [r.args for r in requests], disable_tqdm) as found:
            for batch in self.answerer(questions, self.answerer.encode(questions)):
                answers |= batch
                found(batch)
        return [answers[i] for i in range(len(questions))]

    @contextmanager
    def _progress(
        self, kind: str, arguments: Sequence[Any], hidden: bool
    ) -> Iterator[Callable[[Mapping[int, Any]], None]]:
        """Told each batch of results: moves a bar on the first rank, fills the harness's cache."""
        show = self.ranks.is_main and not hidden
        with Progress(kind, len(arguments), "requests", show=show) as progress:

            def found(batch: Mapping[int, Any]) -> None:
                for i, result in batch.items():
                    self.cache_hook.add_partial(kind, arguments[i], result)
                progress.add(len(batch))

            yield found

    def _check_agreement(self, requests: Sequence[Any]) -> None:
        """Ranks that answer different requests would wait for one another without end, or mix them up."""
        digest = hashlib.sha256()
        for request in requests:
            digest.update(repr(request.args).encode())
        digests = everyone(digest.hexdigest())
        others = [rank for rank, found in enumerate(digests) if found != digests[0]]
        if others:
            raise ConfigError(
                f"rank {others[0]} has other requests than rank 0; start all ranks with the same arguments, files and "
                "PYTHONHASHSEED=0, and without a cache of earlier answers"
            )


def question(prompt: str, settings: Mapping[str, Any]) -> Question:
    """A request to generate, of a prompt and its task's generation_kwargs. Raises ConfigError where these want what is
    not greedy decoding."""
    wanted = dict(settings)
    until = wanted.pop("until", None) or []
    limits = [value for name in _LIMITS if (value := wanted.pop(name, None)) is not None]
    do_sample, temperature = wanted.pop("do_sample", None), wanted.pop("temperature", None)
    if do_sample or (do_sample is None and temperature):
        raise ConfigError(
            f"the task wants samples (do_sample={do_sample}, temperature={temperature}), and only greedy decoding is "
            "offered; set the generation setting do_sample=false"
        )
    if wanted.pop("num_beams", 1) != 1 or wanted.keys() - _WITHOUT_EFFECT:
        raise ConfigError(
            f"generation settings {settings}: only until, {_LIMITS[0]} and greedy decoding are offered; drop the task"
        )
    limit = int(limits[0]) if limits else MAX_NEW_TOKENS
    if limit < 1:
        raise ConfigError(f"{_LIMITS[0]}={limit}: an answer has one token or more; raise it")
    stops = [until] if isinstance(until, str) else until
    return Question(prompt, limit, tuple(stop for stop in stops if stop))
