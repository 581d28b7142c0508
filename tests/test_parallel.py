"""Where a rank stands, and who tells whom: each rank's own number over the groups of the layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from tests.parity import small_config
from tests.zygote import Zygote

# (tp, cp, dp, pp), tp innermost, as Megatron numbers its ranks
LAYOUTS = {
    "cp2 pp2": (["parallel.cp=2", "parallel.pp=2"], (1, 2, 1, 2)),
    "tp2 dp2": (["parallel.tp=2", "train.micro_batch_size=1"], (2, 1, 2, 1)),
}


def told(config: Config) -> dict[str, Any]:
    """On a rank: its place, and its number after each way to share it."""
    from megatron_refine.trainer.export import is_source
    from megatron_refine.trainer.parallel import from_last_stage, init_parallel, over_replica, sum_over

    ranks = init_parallel(config)
    own = torch.tensor([float(ranks.rank)])
    return {
        "place": (ranks.tp_rank, ranks.cp_rank, ranks.dp_rank, ranks.pp_rank),
        "sizes": (ranks.tp, ranks.cp, ranks.dp, ranks.pp),
        "leads": ranks.leads_replica, "main": ranks.is_main, "last": ranks.is_last_stage, "source": is_source(ranks),
        "over replica": float(over_replica(own.clone(), ranks)),
        "from last stage": float(from_last_stage(own.clone(), ranks.pp_group)),
        "sum over dp": float(sum_over(own, ranks.dp_group)), "own": float(own),
        "sum over replicas": float(sum_over(own, ranks.replica_group)),
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_tells_whom(layout: str, ranks: Zygote, tmp_path: Path) -> None:
    overrides, sizes = LAYOUTS[layout]
    tp, cp, dp, pp = sizes
    everyone = ranks(4, told, config=small_config(tmp_path, *overrides))

    def number(t: int, c: int, d: int, p: int) -> int:
        return t + tp * (c + cp * (d + dp * p))

    for rank, found in enumerate(everyone):
        t, c, d, p = found["place"]
        assert found["sizes"] == sizes and number(t, c, d, p) == rank == found["own"]
        assert found["main"] == (rank == 0) and found["last"] == (p == pp - 1)
        assert found["leads"] == (t == c == p == 0)
        assert found["source"] == (t == c == d == 0)
        assert found["over replica"] == number(0, 0, d, 0)
        assert found["from last stage"] == number(t, c, d, pp - 1)
        assert found["sum over dp"] == sum(number(t, c, i, p) for i in range(dp))
        assert found["sum over replicas"] == sum(number(t, j, i, p) for i in range(dp) for j in range(cp))
