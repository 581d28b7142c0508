"""Rollouts of a micro-batch from servers: token ids out, token ids and log-probabilities back."""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from megatron_refine.engine.client import Client
from megatron_refine.engine.errors import ServerError
from megatron_refine.engine.guard import check_label
from megatron_refine.records import RolloutRequest
from megatron_refine.trainer.head import scored_at

UNLIKELY = 60.0  # nats: a banned token is not drawn in a lifetime, and its log-probability is still told in fp32


class Begun:
    """Rollouts under way: a thread asks for them, on the ranks that talk to servers."""

    def __init__(self, request: RolloutRequest, version: int):
        self.request, self.version = request, version
        self.collector: Collector | None = None
        self._running: Future[None] | None = None

    def ask(self, clients: Sequence[Client], label: str, max_requests: int) -> None:
        """Ask for what is missing; for all of it where it was to be written with other weights."""
        if self.collector is None or self.collector.label != label:
            self.collector = Collector(self.request, label, max_requests)
        pool = ThreadPoolExecutor(1)
        self._running = pool.submit(self.collector.run, clients)
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Return when no request is under way."""
        if self._running:
            self._running.exception()

    def result(self) -> None:
        """Wait for all. Raises ServerError where a request failed, after the others have ended."""
        if self._running:
            self._running.result()


class Collector:
    """Keeps what it has, so that it can go on after servers were recovered.

    All prefixes of a sequence go to one server. First all but the last token of each, in the order of their lengths:
    SGLang keeps the state at the end of every prompt, so each is computed from where the one before it ended. Then all
    c * n rollouts at once: each starts from such a state, and computes one token of its prompt. Sequences go side by
    side, up to `max_requests` of them, so that a server computes them as one batch.
    """

    def __init__(self, request: RolloutRequest, label: str, max_requests: int):
        """label: the version of the weights that must answer."""
        self.request, self.label, self.max_requests = request, label, max_requests
        self.prefixes: list[list[int]] = request.tokens.tolist()
        self.positions: list[list[int]] = request.positions.tolist()
        self.found: dict[tuple[int, int], list[tuple[list[int], list[float]]]] = {}  # (sequence, chunk) -> n rollouts
        self.prompt_tokens = self.cached_tokens = 0
        self._counting = threading.Lock()

    def run(self, clients: Sequence[Client]) -> None:
        """Ask for all that is missing. Raises ServerError where a request failed, after the others have ended."""
        samples, size = self.request.sample_ids.tolist(), max(1, self.max_requests // len(clients))
        shares = [[i for i, sample in enumerate(samples) if sample % len(clients) == k] for k in range(len(clients))]
        with ThreadPoolExecutor(len(clients)) as pool:
            running = [pool.submit(self._share, *given, size) for given in zip(clients, shares, strict=True)]
        for future in running:
            future.result()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities, [B, c, n, k]."""
        order = [[self.found[i, j] for j in range(len(row))] for i, row in enumerate(self.positions)]
        tokens = torch.tensor([[[t for t, _ in rollouts] for rollouts in row] for row in order])
        logprobs = torch.tensor([[[p for _, p in rollouts] for rollouts in row] for row in order])
        return tokens, logprobs

    def _share(self, client: Client, sequences: list[int], size: int) -> None:
        for start in range(0, len(sequences), size):
            self._group(client, sequences[start : start + size])

    def _group(self, client: Client, sequences: list[int]) -> None:
        n, places = self.request.num_rollouts, [(i, j) for i in sequences for j in range(len(self.positions[i]))]
        missing = [place for place in places if place not in self.found]
        if not missing:
            return
        chains = [sorted({self.positions[i][j] for own, j in missing if own == i} - {0, 1}) for i in sequences]
        for level in zip_longest(*chains):
            prefixes = [self.prefixes[i][: p - 1] for i, p in zip(sequences, level, strict=True) if p]
            self._ask(client, prefixes, sampling_params={"max_new_tokens": 0}, return_logprob=False)
        prompts = [self.prefixes[i][: self.positions[i][j]] for i, j in missing for _ in range(n)]
        answers = self._ask(client, prompts, return_logprob=True, **self._drawing())
        rollouts = [self._rollout(client, answer) for answer in answers]
        for number, place in enumerate(missing):
            self.found[place] = rollouts[number * n : (number + 1) * n]

    def _drawing(self) -> dict[str, Any]:
        """How a rollout is drawn: from the whole distribution, whatever generation_config.json of the served folder
        says."""
        r = self.request
        sampling = {"max_new_tokens": r.rollout_len, "temperature": r.temperature, "ignore_eos": True, "top_p": 1.0}
        sampling |= {"top_k": -1, "min_p": 0.0}
        if not r.banned:
            return {"sampling_params": sampling}
        bias = {str(token): -UNLIKELY * scored_at(r.temperature) for token in r.banned}
        return {"sampling_params": sampling | {"logit_bias": bias}, "token_ids_logprob": list(r.banned)}

    def _ask(self, client: Client, prompts: list[list[int]], **how: Any) -> list[dict[str, Any]]:
        # the version is part of the cache's key: a state of other weights is never found
        answers = client.generate(input_ids=prompts, extra_key=self.label, **how)
        with self._counting:
            self.prompt_tokens += sum(answer["meta_info"]["prompt_tokens"] for answer in answers)
            self.cached_tokens += sum(answer["meta_info"]["cached_tokens"] for answer in answers)
        return answers

    def _rollout(self, client: Client, answer: dict[str, Any]) -> tuple[list[int], list[float]]:
        check_label(client.url, answer, self.label)
        tokens, meta = answer["output_ids"], answer["meta_info"]
        logprobs = [float("nan") if entry[0] is None else entry[0] for entry in meta["output_token_logprobs"]]
        if len(tokens) != self.request.rollout_len or len(logprobs) != len(tokens):
            reason = meta.get("finish_reason")
            raise ServerError(f"{client.url}: {len(tokens)} of {self.request.rollout_len} tokens: {reason}")
        if not self.request.banned:
            return tokens, logprobs
        if drawn := set(tokens) & set(self.request.banned):
            raise ServerError(f"{client.url}: drew token {min(drawn)} in spite of its logit_bias")
        apart = meta["output_token_ids_logprobs"]
        return tokens, [whole(own, entries) for own, entries in zip(logprobs, apart, strict=True)]


def whole(logprob: float, banned: list[Any]) -> float:
    """The log-probability over the whole vocabulary of a token that was drawn with banned ones at -UNLIKELY.

    banned: of each such token an entry (log-probability, ...), None where it is 0 in fp32. Where a banned token has
    odds o against all others, the server has it at o exp(-UNLIKELY), and the others are too likely by the factor 1 + o.
    """
    return logprob - math.log1p(sum(math.exp(entry[0] + UNLIKELY) for entry in banned if entry[0] is not None))
