"""Chains that torch.compile makes a kernel of on a GPU, traced by it on the CPU: whole graphs, and the same gradients.

Its `aot_eager` backend runs what was traced, forward and backward, without writing code. What it writes needs a GPU.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_refine.config import Config
from tests.lanes import short
from tests.parity import batch, build, full_gradients, small_config
from tests.zygote import Zygote


def gradients(config: Config) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """On a rank: what was traced; every gradient of an NTP pass, as it is and traced."""
    from megatron_refine.kernels import fused
    from megatron_refine.trainer import forward

    first, names, found = torch.compile, list[str](), []

    def compile(function: Any) -> Any:
        names.append(function.__name__)
        return first(function, backend="aot_eager", fullgraph=True)

    for traced in (False, True):
        model, _ = build(config, torch.float64)
        with mock.patch.object(fused, "on_gpu", lambda x, traced=traced: traced), mock.patch("torch.compile", compile):
            (-forward.ntp_pass(model, batch(1).tokens).main.mean()).backward()
        found.append(full_gradients(model))
    return names, found[0], found[1]


EXPECTED = {
    "delta_net": {"write_strength"},
    "gated_delta_net": {"gates", "gate_output", "short_conv", "l2_normalize"},
    "lact": {
        "_prepared",
        "joined",
        "sides",
        "sides_backward",
        "moved",
        "moved_backward",
        "applied",
        "applied_backward",
    },
    "lact muon": {"_prepared", "joined", "gated", "gated_backward", "unit", "_between", "moved_backward"},
}


@pytest.mark.parametrize("model", short(EXPECTED, lambda model: model == "delta_net"))
def test_traced_chains_have_the_same_gradients(ranks: Zygote, tmp_path: Path, model: str) -> None:
    """fp64; what is traced may take sums apart."""
    config = small_config(tmp_path, "model.num_layers=1", model=model)
    names, plain, traced = ranks(1, gradients, config=config)[0]
    assert EXPECTED[model] <= set(names)
    for name, expected in plain.items():
        torch.testing.assert_close(traced[name], expected, rtol=1e-8, atol=1e-12, msg=name)
