"""After every sync: has each server the trainer's weights, and does it compute what the trainer computes?

Checksums compare every tensor, on every rank of a server. They cannot see a wrong computation or a stale cache, which
the probe does: fixed prompts, scored and continued by the server, several requests at once and from states that it has
kept, whose log-probabilities the trainer computes too. Wrong states were met under just these conditions (sglang#32555,
#31833, #37836).
"""

import math
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

PROMPTS, WRITTEN = (70, 41), 3  # tokens: past a chunk of the kernels and within one, and some of decoding
CONTINUED = ((1, 1), (2, 2), (3, 1), (4, 3))  # a token, and how often it follows the text that was written
HIT = 2  # tokens written behind those: one from the state that was computed, one from the state that it left
DEFAULT_GAP = {"fp32": 1e-3, "bf16": 0.05}
Sums = dict[str, list[str]]
"""Name of a tensor -> its checksum on each rank of a server."""
Probed = tuple[str, str, list[int], int, int, list[float]]
"""(URL, part of the probe, text, first, written, log-probabilities of text[first:]); the server wrote text[written:]"""


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


def ask_probe(server: Server, config: Config, label: str) -> list[Probed]:
    """Have a server score and continue two prompts at once, then continue the longer text, several times at once, from
    the state that it has kept of it. Raises ServerError."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, config.model.vocab_size, (n,), generator=generator).tolist() for n in PROMPTS]
    sampling = {"temperature": config.refine.rollout_temperature, "ignore_eos": True}

    def ask(kind: str, prompts: list[list[int]], first: list[int], tokens: int, **more: Any) -> list[Probed]:
        answers = server.client.generate(
            input_ids=prompts, sampling_params=sampling | {"max_new_tokens": tokens}, return_logprob=True,
            extra_key=label, **more,
        )  # fmt: skip
        found = []
        for answer, prompt, start in zip(answers, prompts, first, strict=True):
            check_label(server.url, answer, label)
            meta = answer["meta_info"]
            read = [] if start == len(prompt) else meta["input_token_logprobs"][start:]
            entries = read + meta["output_token_logprobs"]
            logprobs = [math.nan if entry[0] is None else entry[0] for entry in entries]
            text = prompt + answer["output_ids"]
            found.append((server.url, kind, text, start, len(prompt), logprobs))
        return found

    scored = ask("prompts", prompts, [1] * len(prompts), WRITTEN, logprob_start_len=0)  # a first token has none
    kept = scored[0][2]
    continued = [kept + [token % config.model.vocab_size] * number for token, number in CONTINUED]
    return scored + ask("prefix hits", continued, [len(text) for text in continued], HIT)


def check_label(url: str, answer: dict[str, Any], label: str) -> None:
    """Raises ServerError where an answer comes from other weights than those announced."""
    served = answer["meta_info"].get("weight_version")
    if served != label:
        raise ServerError(f"{url}: serves weights {served!r}, not {label!r}")


@torch.no_grad()
def check_probes(model: nn.Module, config: Config, answers: list[list[Probed]]) -> None:
    """Every rank: what each server said against the trainer's own log-probabilities.

    A server scores a prompt at temperature 1, what it wrote at that of the rollouts. Raises ServerError, on all ranks
    alike, where the mean gap of a part of a probe exceeds engine.probe_gap.
    """
    probes = [probe for each in answers for probe in each]
    longest = max(len(tokens) for _, _, tokens, *_ in probes)
    texts = torch.zeros(len(probes), longest, dtype=torch.int64)
    at = torch.ones(texts.shape, dtype=torch.float64)
    for row, (_, _, tokens, _, written, _) in enumerate(probes):
        texts[row, : len(tokens)] = torch.tensor(tokens)
        at[row, written - 1 :] = head.scored_at(config.refine.rollout_temperature)  # rows that predict what was written
    ours = forward.score_pass(model, texts.to(hardware.device()), at.to(hardware.device())).logprobs.cpu()
    gaps: dict[tuple[str, str], list[Tensor]] = {}
    for (url, kind, tokens, first, _, theirs), own in zip(probes, ours, strict=True):
        gap = (own[first - 1 : len(tokens) - 1] - torch.tensor(theirs, dtype=own.dtype)).abs()
        gaps.setdefault((url, kind), []).append(gap)
    limit = config.engine.probe_gap or DEFAULT_GAP[config.train.precision]
    for (url, kind), found in gaps.items():
        mean = float(torch.cat(found).mean())
        if not mean <= limit:  # a NaN fails too
            raise ServerError(
                f"{url}: the probe's log-probabilities ({kind}) are {mean:.2g} nats from the trainer's in the mean, "
                f"above {limit:g} (engine.probe_gap)"
            )
