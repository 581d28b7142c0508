"""The models that SGLang serves, with stand-ins for its layers: rows, slots and padding that its CPU never makes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_refine.config import load
from megatron_refine.models import family
from megatron_refine.models.family import FAMILIES
from tests.fake_gpu import Backend, stand_in_for_sglang
from tests.parity import MODELS
from tests.zygote import Zygote

SLOTS = 6  # of the pool, the one for padding included
SAME = {"rtol": 1e-4, "atol": 1e-4}  # fp32, in other sums; a wrong state is off by 0.1 and more


class Served:
    """A model with random weights, its pools of slots, and what stands in for SGLang around them."""

    def __init__(self, name: str):
        stand_in_for_sglang()
        section = MODELS[name] if name in MODELS else None
        config = load(["configs/bench.yaml"], [] if section else [f"model={name}"], FAMILIES)
        self.config = FAMILIES[section["family"]].model_validate(section) if section else config.model
        serving, generator = family.serve(self.config.family), torch.Generator().manual_seed(0)
        self.model = serving.MODEL(SimpleNamespace(typed_model=self.config, hf_shapes={}))
        for parameter in self.model.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
        slot = family.of(self.config.family).serving.slot(self.config, 1)
        self.pools = [
            SimpleNamespace(
                conv=[torch.full((SLOTS, *shape), 7.0) for shape in slot.conv],
                temporal=torch.full((SLOTS, *slot.temporal), 7.0),
            )
            for _ in range(self.config.num_layers)
        ]
        self.lengths = [0] * SLOTS  # tokens of the request in a slot
        pools = SimpleNamespace(get_mamba_indices=lambda slots: slots, mamba2_layer_cache=self.pools.__getitem__)
        Backend.linear_attn_backend = SimpleNamespace(req_to_token_pool=pools)

    @torch.no_grad()
    def run(self, slots: list[int], prompts: list[Tensor], fresh: bool | None = None) -> list[Tensor]:
        """Rows of the prompts. fresh: whether they begin; None: a token of each is decoded."""
        if fresh:
            self.lengths = [0 if i in slots else length for i, length in enumerate(self.lengths)]
        lengths, before = [len(prompt) for prompt in prompts], [self.lengths[i] for i in slots]
        has = None if fresh is None else torch.tensor([not fresh] * len(slots))
        Backend.pool = lambda layer: SimpleNamespace(
            layer_cache=self.pools[layer], cache_indices=torch.tensor(slots), has_initial_state=has
        )
        decoded = fresh is None
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode_or_idle=lambda: decoded, is_decode=lambda: decoded),
            extend_seq_lens=torch.tensor(lengths), extend_seq_lens_cpu=lengths, extend_prefix_lens_cpu=before,
            positions=torch.cat([torch.arange(b, b + n) for b, n in zip(before, lengths, strict=True)]),
            seq_lens_cpu=torch.tensor(before) + 1, req_pool_indices=torch.tensor(slots),
        )  # fmt: skip
        if hasattr(self.model, "prepare_for_forward"):
            self.model.prepare_for_forward(batch)
        rows = self.model.model(torch.cat(prompts), batch.positions, batch)
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] += length
        return list(rows.split(lengths))


def compare(name: str) -> None:
    """On a rank: batches of all kinds against each request alone."""
    one, many, parts = Served(name), Served(name), Served(name)
    prompts = [torch.randint(0, one.config.vocab_size, (length,)) for length in (70, 1, 16, 3)]
    slots = [2, 5, 1, 3]
    whole = [one.run([slot], [prompt], fresh=True)[0] for slot, prompt in zip(slots, prompts, strict=True)]
    for own, truth in zip(many.run(slots, prompts, fresh=True), whole, strict=True):
        torch.testing.assert_close(own, truth, **SAME)
    # last tokens of prompts, as rollouts have them; of LaCT one after a chunk's end; beside a longer part
    ends = [torch.randint(0, one.config.vocab_size, (length,)) for length in (1, 1, 1, 4)]
    apart = [one.run([slot], [end], fresh=False)[0] for slot, end in zip(slots, ends, strict=True)]
    for own, truth in zip(many.run(slots, ends, fresh=False), apart, strict=True):
        torch.testing.assert_close(own, truth, **SAME)
    rows = [parts.run([4], [part], fresh=i == 0)[0] for i, part in enumerate(prompts[0].split([1, 59, 10]))]
    torch.testing.assert_close(torch.cat(rows), whole[0], **SAME)
    # a captured batch of four for two requests: its other rows have slot -1, in torch the last one
    tokens = [torch.tensor([i]) for i in (3, 9)]
    alone = [one.run([slot], [token])[0] for slot, token in zip((2, 1), tokens, strict=True)]
    others = [[x[[3, -1]].clone() for x in (pool.temporal, pool.conv[0])] for pool in many.pools]
    padded = many.run([2, 1, -1, -1], [*tokens, torch.tensor([0]), torch.tensor([0])])
    for own, truth in zip(padded, alone, strict=False):
        torch.testing.assert_close(own, truth, **SAME)
    for pool, (state, tail) in zip(many.pools, others, strict=True):
        assert torch.equal(pool.temporal[[3, -1]], state) and torch.equal(pool.conv[0][[3, -1]], tail)


@pytest.mark.parametrize("name", ["delta_net_tiny", "gated_delta_net_tiny", "lact"])
def test_requests_of_a_batch_know_nothing_of_each_other(ranks: Zygote, name: str) -> None:
    ranks(1, compare, name=name)


def against_the_slow_evaluation(name: str, cuts: list[int], decoded: int) -> float:
    """On a rank: a text in parts, its last tokens decoded; the largest difference of logits, of the largest one."""
    served = Served(name)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, served.config.vocab_size, (sum(cuts) + decoded,), generator=generator)
    *parts, last = text.split([*cuts, decoded])
    rows = [served.run([2], [part], fresh=not i)[0] for i, part in enumerate(parts)]
    rows += [served.run([2], [token])[0] for token in last.split(1)]
    weights = dict(served.model.named_parameters())
    with torch.no_grad():
        truth = family.reference(served.config)(served.config, weights, text[None])[0]
        found = F.linear(torch.cat(rows), served.model.lm_head.weight)
    return float((found - truth).abs().max() / truth.abs().max())


CUTS = {  # chunks of 16 tokens, or 32 with Muon; a window of 24
    "within a chunk": ([9], 5),
    "to chunks' ends": ([16, 16], 20),
    "over chunks' ends": ([5, 30, 1, 29], 40),
    "token by token": ([1], 70),
}


@pytest.mark.parametrize("name", ["lact", "lact muon", "lact variant", "delta_net", "gated_delta_net variant"])
@pytest.mark.parametrize("cuts", CUTS)
def test_a_text_in_any_parts_is_the_slow_evaluation(ranks: Zygote, name: str, cuts: str) -> None:
    """States within chunks, at their ends and beyond, prompts and decoded tokens alike."""
    limit = 1e-3 if "muon" in name else 1e-4  # fp32; Newton-Schulz turns small singular values up to one
    assert ranks(1, against_the_slow_evaluation, name=name, cuts=CUTS[cuts][0], decoded=CUTS[cuts][1])[0] < limit
