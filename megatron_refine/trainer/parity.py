"""A model at any layout held to what another implementation computed from the same weights."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_refine.config import Config
from megatron_refine.convert.errors import ConversionError
from megatron_refine.convert.source import HFSource
from megatron_refine.exchange import everyones_tensors
from megatron_refine.models import family
from megatron_refine.models.layout import Branches
from megatron_refine.records import Output
from megatron_refine.trainer import forward
from megatron_refine.trainer.gradients import accumulate
from megatron_refine.trainer.model import build_model, global_parameters
from megatron_refine.trainer.parallel import Ranks, init_parallel
from megatron_refine.trainer.rows import everywhere
from megatron_refine.trainer.shards import full_shape, shard, unshard

EXPECTED = "expected.safetensors"  # caseN.input_ids [B, T], .logits [B, T, V], .loss, .grad.<name of a tensor>
# fp32 rounds at 6e-8; two implementations add in another order, through all layers, and gradients are sums of terms of
# either sign. Newton-Schulz (Muon) turns small singular values up to one, and their rounding with them
LOGIT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


@dataclass(frozen=True)
class Errors:
    """Errors of one case."""

    logits: float  # largest difference
    logit_limit: float
    loss: float
    gradient: float  # largest relative error (L2) of a tensor's gradient
    gradient_limit: float
    worst: str  # that tensor, in Hugging Face's name

    @property
    def passed(self) -> bool:
        return self.logits <= self.logit_limit and self.gradient <= self.gradient_limit


def compare(folder: Path, config: Config) -> dict[str, Errors]:
    """Compare the model of `folder`, loaded through the converter, on every case, on each of the layout's ranks.

    The errors are the same on every rank. Raises ConfigError, ConversionError.
    """
    expected, found = _read_expected(folder / EXPECTED), {}
    source, ranks = HFSource(folder), init_parallel(config)
    model = build_model(config, ranks)
    load(model, source, ranks)
    for case in sorted(name.removesuffix(".input_ids") for name in expected if name.endswith(".input_ids")):
        logits, loss, gradients = evaluate(model, expected[f"{case}.input_ids"], ranks)
        found[case] = _errors(config, source, case, expected, logits, loss, gradients)
    return found


def _read_expected(path: Path) -> dict[str, Tensor]:
    try:
        expected = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not any(name.endswith(".input_ids") for name in expected):
        raise ConversionError(f"{path}: holds no caseN.input_ids; see tests/golden/README.md")
    return expected


@torch.no_grad()
def load(model: Any, source: HFSource, ranks: Ranks) -> None:
    """Put this rank's part of every tensor of `source` into the model."""
    for name, parameter in global_parameters(model):
        full = source.converter.to_megatron(name, source)
        assert full.shape == full_shape(parameter, ranks.tp), name
        parameter.copy_(shard(full, parameter, ranks.tp_rank, ranks.tp))


def evaluate(model: Any, tokens: Tensor, ranks: Ranks) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Logits [B, T, padded V], mean loss of the next tokens and every parameter's whole gradient, on every rank."""
    logits: list[Tensor] = []

    def run(model: Any, item: Any) -> Output:
        rows, hidden = forward.staged(model, tokens, Branches(main_len=tokens.shape[1]))
        if rows is None:
            return Output(hidden=hidden)
        inner = rows.model
        held = rows.span(tokens.shape[1])
        logits.append(_whole_logits(inner.logits(everywhere(inner, held.rows, held).detach()).detach(), ranks))
        return Output(forward.score_main(rows, tokens).logprobs[:, :-1])

    def loss(output: Output, item: Any) -> tuple[Tensor, Tensor]:
        assert output.main is not None
        value = -output.main.mean()
        return value, value[None]

    items = [SimpleNamespace(batch=SimpleNamespace(tokens=tokens))]
    value = accumulate(model, items, run, loss, tokens.shape[1], 1, ranks)
    gathered = everyones_tensors({"logits": logits[0]} if logits else {})
    whole = next(part["logits"] for part in gathered if part)
    return whole.unflatten(0, tokens.T.shape).transpose(0, 1), float(value), full_gradients(model, ranks)


def full_gradients(model: Any, ranks: Ranks) -> dict[str, Tensor]:
    """Every parameter's whole gradient of the last reduced backward pass, by global name, on every rank.

    For comparisons: gathers all of them.
    """
    shares = model.ddp_config.use_distributed_optimizer  # it leaves each rank its shard of the summed gradient
    for buffer in model.buffers if shares else ():
        for bucket in buffer.buckets:
            replicas, place = ranks.replica_group.size(), ranks.replica_group.rank()
            size = bucket.grad_data.numel() // replicas
            mine = bucket.grad_data[place * size : (place + 1) * size].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=ranks.replica_group)
    grads: dict[str, Tensor] = {}
    for name, parameter in global_parameters(model):
        grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        parts = [torch.empty_like(grad) for _ in range(ranks.tp)]
        dist.all_gather(parts, grad.contiguous(), group=ranks.tp_group)
        grads[name] = unshard(parts, parameter)
    return {name: grad for part in everyones_tensors(grads) for name, grad in part.items()}


def _whole_logits(local: Tensor, ranks: Ranks) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(ranks.tp)]
    dist.all_gather(parts, local, group=ranks.tp_group)
    return torch.cat(parts, 1)


def _errors(
    config: Config, source: HFSource, case: str, expected: dict[str, Tensor], logits: Tensor, loss: float,
    gradients: dict[str, Tensor],
) -> Errors:  # fmt: skip
    factor = family.of(config.model.family).error_factor(config.model)
    truth = expected[f"{case}.logits"]
    found = {hf: part for name, grad in gradients.items() for hf, part in source.converter.to_hf(name, grad)}
    truths = {name: _expected_gradient(expected, case, name, source.stored[name]) for name in found}
    # a gradient that should be 0 (of momentum before a second update) is rounding noise in either implementation
    floor = 1e-6 * max(float(t.norm()) for t in truths.values())
    errors = {n: float((found[n] - t).norm() / t.norm().clamp(min=floor)) for n, t in truths.items()}
    worst = max(errors, key=lambda name: errors[name])
    return Errors(
        logits=float((logits[..., : truth.shape[-1]] - truth).abs().max()),
        logit_limit=factor * LOGIT_TOLERANCE * max(1.0, float(truth.abs().max())),
        loss=abs(loss - float(expected[f"{case}.loss"])),
        gradient=errors[worst],
        gradient_limit=factor * GRADIENT_TOLERANCE,
        worst=worst,
    )


def _expected_gradient(expected: dict[str, Tensor], case: str, *names: str) -> Tensor:
    """By today's name, or by the one that the folder has for it."""
    for name in names:
        if f"{case}.grad.{name}" in expected:
            return expected[f"{case}.grad.{name}"]
    raise ConversionError(f"{EXPECTED}: {case}.grad.{names[0]}: missing; every tensor's gradient is compared")
