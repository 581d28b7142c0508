"""After every sync: has each server the trainer's weights, and does it compute what the trainer computes?

Checksums compare every tensor, on every rank of a server. They cannot see a wrong computation or a stale cache, which
the probe does: a fixed prompt, scored and continued by the server, whose log-probabilities the trainer computes too.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_refine.config import Config
from megatron_refine.engine.checksum import checksum
from megatron_refine.engine.errors import ServerError
from megatron_refine.engine.server import Server
from megatron_refine.models.family import Serving
from megatron_refine.platform import hardware
from megatron_refine.trainer import forward, head

PROMPT, CONTINUATION = 70, 6  # tokens: past a chunk of the kernels, and some of decoding
DEFAULT_GAP = {"fp32": 1e-3, "bf16": 0.05}
Sums = dict[str, list[str]]
"""Name of a tensor -> its checksum on each rank of a server."""


def server_part(serving: Serving, model: Any, name: str, whole: Tensor, rank: int, tp: int) -> Tensor:
    """Return what a server's rank holds of a tensor in Hugging Face's format."""
    if tp == 1 or name.endswith(serving.whole):
        return whole
    if name.endswith(serving.by_columns):
        return whole.chunk(tp, 1)[rank]
    for end, rows in serving.blocks(model).items():
        if name.endswith(end):
            return torch.cat([part.chunk(tp)[rank] for part in whole.split(list(rows))])
    size = -(-len(whole) // tp)  # a vocabulary that tp does not divide is padded with zeros
    part = whole[rank * size : (rank + 1) * size]
    return torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])


def expected_checksums(
    serving: Serving, model: Any, tensors: Iterable[tuple[str, Tensor]], kinds: set[tuple[int, str]]
) -> dict[Any, Sums]:
    """Return, for each kind of server (tp, device), the checksums that the trainer's tensors should have there."""
    found: dict[Any, Sums] = {kind: {} for kind in kinds}
    for name, whole in tensors:
        for (tp, device), sums in found.items():
            sums[name] = [checksum(server_part(serving, model, name, whole, rank, tp), device) for rank in range(tp)]
    return found


def server_checksums(server: Server, seconds: float) -> Sums:
    """Return the checksums of the weights that the server has. Raises ServerError."""
    answer = server.client.post("/weights_checker", seconds, action="checksum")
    ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
    return {name: [rank["checksums"].get(name, "") for rank in ranks] for name in ranks[0]["checksums"]}


def compare_checksums(url: str, found: Sums, expected: Sums) -> None:
    """Raises ServerError naming the tensors that differ."""
    wrong = [name for name in sorted(expected.keys() | found.keys()) if found.get(name) != expected.get(name)]
    if wrong:
        raise ServerError(
            f"{url}: {len(wrong)} of {len(expected)} tensors are not the trainer's: {', '.join(wrong[:3])}"
        )


def ask_probe(server: Server, config: Config, label: str) -> tuple[list[int], list[float]]:
    """The probe's tokens and their log-probabilities, from the second token on. Raises ServerError.

    A server scores a prompt at temperature 1, what it wrote at that of the rollouts.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, config.model.vocab_size, (PROMPT,), generator=generator).tolist()
    sampling = {"max_new_tokens": CONTINUATION, "temperature": config.refine.rollout_temperature, "ignore_eos": True}
    (answer,) = server.client.generate(
        input_ids=[prompt], sampling_params=sampling, return_logprob=True, logprob_start_len=0, extra_key=label
    )
    check_label(server.url, answer, label)
    meta = answer["meta_info"]
    scored = meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]  # the first token has none
    return prompt + answer["output_ids"], [entry[0] for entry in scored]


def check_label(url: str, answer: dict[str, Any], label: str) -> None:
    """Raises ServerError where an answer comes from other weights than those announced."""
    served = answer["meta_info"].get("weight_version")
    if served != label:
        raise ServerError(f"{url}: serves weights {served!r}, not {label!r}")


@torch.no_grad()
def check_probes(model: nn.Module, config: Config, answers: list[tuple[str, list[int], list[float]]]) -> None:
    """Every rank: the probes [(url, tokens, log-probabilities)] against the trainer's own.

    Raises ServerError, on all ranks alike, where the mean gap of a server exceeds engine.probe_gap.
    """
    tokens = torch.tensor([tokens for _, tokens, _ in answers], device=hardware.device())
    at = torch.ones(tokens.shape, dtype=torch.float64, device=tokens.device)
    at[:, PROMPT - 1 :] = head.scored_at(config.refine.rollout_temperature)  # rows that predict the continuation
    ours = forward.score_pass(model, tokens, at).logprobs[:, :-1].cpu()
    limit = config.engine.probe_gap or DEFAULT_GAP[config.train.precision]
    for (url, _, theirs), own in zip(answers, ours, strict=True):
        gap = float((own - torch.tensor(theirs, dtype=own.dtype)).abs().mean())
        if not gap <= limit:  # a NaN fails too
            raise ServerError(
                f"{url}: the probe's log-probabilities are {gap:.2g} nats from the trainer's in the "
                f"mean, above {limit:g} (engine.probe_gap)"
            )
