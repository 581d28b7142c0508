"""The models that SGLang serves, with stand-ins for its layers: rows, slots and padding that its CPU never makes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_refine.config import load
from megatron_refine.models import family
from megatron_refine.models.family import FAMILIES
from tests.fake_gpu import Backend, stand_in_for_sglang
from tests.zygote import Zygote

SLOTS = 6  # of the pool, the one for padding included


def served(name: str) -> Any:
    """A model with random weights, its pools of slots, and `run`, which hands it tokens and returns its rows."""
    stand_in_for_sglang()
    config = load(["configs/bench.yaml"], [f"model={name}"], FAMILIES)
    serving = family.serve(config.model.family)
    shape, generator = serving.state_shape(config.model), torch.Generator().manual_seed(0)
    model = serving.MODEL(SimpleNamespace(typed_model=config.model, hf_shapes={}))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    pools = [
        SimpleNamespace(
            conv=[torch.full((SLOTS, shape.channels, shape.conv_size - 1), 7.0)],
            temporal=torch.full((SLOTS, shape.heads, shape.key_dim, shape.value_dim), 7.0),
        )
        for _ in range(config.model.num_layers)
    ]

    @torch.no_grad()
    def run(slots: list[int], prompts: list[Tensor], fresh: bool | None = None) -> list[Tensor]:
        """fresh: whether prompts begin; None: a token of each is decoded."""
        lengths = [len(prompt) for prompt in prompts]
        has = None if fresh is None else torch.tensor([not fresh] * len(slots))
        Backend.pool = lambda layer: SimpleNamespace(
            layer_cache=pools[layer], cache_indices=torch.tensor(slots), has_initial_state=has
        )
        batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode_or_idle=lambda: fresh is None),
            extend_seq_lens=torch.tensor(lengths), extend_seq_lens_cpu=lengths,
        )  # fmt: skip
        return list(model.model(torch.cat(prompts), batch).split(lengths))

    return SimpleNamespace(run=run, pools=pools, vocab=config.model.vocab_size)


def compare(name: str) -> None:
    """On a rank: batches of all kinds against each request alone."""
    one, many = served(name), served(name)
    prompts = [torch.randint(0, one.vocab, (length,)) for length in (70, 1, 3, 3)]
    slots = [2, 5, 1, 3]
    whole = [one.run([slot], [prompt], fresh=True)[0] for slot, prompt in zip(slots, prompts, strict=True)]
    for own, truth in zip(many.run(slots, prompts, fresh=True), whole, strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-4, atol=1e-4)
    parts = served(name)  # a prompt in three parts
    cuts = [prompts[0][:1], prompts[0][1:60], prompts[0][60:]]
    rows = [parts.run([4], [part], fresh=i == 0)[0] for i, part in enumerate(cuts)]
    torch.testing.assert_close(torch.cat(rows), whole[0], rtol=1e-4, atol=1e-4)
    # a captured batch of four for two requests: its other rows have slot -1
    tokens = [torch.tensor([i]) for i in (3, 9)]
    alone = [one.run([slot], [token])[0] for slot, token in zip((2, 1), tokens, strict=True)]
    untouched = [[p.temporal[3].clone(), p.conv[0][3].clone()] for p in many.pools]
    last = [[p.temporal[-1].clone(), p.conv[0][-1].clone()] for p in many.pools]
    padded = many.run([2, 1, -1, -1], [tokens[0], tokens[1], *[torch.tensor([0])] * 2])
    for own, truth in zip(padded, alone, strict=False):
        torch.testing.assert_close(own, truth, rtol=1e-4, atol=1e-4)
    for pool, (state, tail), (end, end_tail) in zip(many.pools, untouched, last, strict=True):
        assert torch.equal(pool.temporal[3], state) and torch.equal(pool.conv[0][3], tail)
        assert torch.equal(pool.temporal[-1], end) and torch.equal(pool.conv[0][-1], end_tail)  # -1 in torch


@pytest.mark.parametrize("name", ["delta_net_tiny", "gated_delta_net_tiny"])
def test_requests_of_a_batch_know_nothing_of_each_other(ranks: Zygote, name: str) -> None:
    ranks(1, compare, name=name)
