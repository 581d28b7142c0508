"""Decoding as a CUDA graph: what is given in and taken out here, the graph itself on a GPU."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.kernels.places import Places
from megatron_refine.platform import hardware
from tests import parity
from tests.runs import write_config
from tests.zygote import Zygote

ROOT = Path(__file__).parents[1]


def replayed(run: Any) -> Any:
    """Stands in for `hardware.record`: runs anew at each replay, into the tensors of the first time."""
    found = [tensor.clone() for tensor in run()]

    def replay() -> None:
        for mine, fresh in zip(found, run(), strict=True):
            mine.copy_(fresh)

    return replay, tuple(found)


def decoded(config: Config) -> Any:
    """On a rank: rollouts of four micro-batches, plain and recorded, and the number of recordings."""
    from megatron_refine.engine import decode
    from megatron_refine.trainer import forward

    model, _ = parity.build(config, torch.float64)
    hardware.record = replayed
    graphs, results = decode.DecodeGraphs(model), []
    for seed, chunks, temperature in ((0, 4, 0.7), (1, 4, 0.7), (2, 3, 0.7), (1, 4, 1.5)):
        b, generator = parity.batch(2, seed=seed), torch.Generator().manual_seed(seed)
        positions = 24 + 16 * torch.randint(0, 9, (2, chunks), generator=generator)  # no chunk of LaCT's ends
        sequences = torch.arange(2).repeat_interleave(chunks)
        with torch.no_grad():
            main = forward.main_pass(model, b.tokens)
            hidden = main.rows.take(positions.flatten() - 1, sequences)
            states = main.states(Places.read(sequences, positions.flatten()))
        given = hidden, torch.rand(5, 2 * chunks, generator=generator, dtype=torch.float64), temperature
        fixed = decode.fixed(states, 4)
        assert fixed is not None
        results.append((decode.decode(model, states, *given), graphs(fixed, *given)))
    return results, len(graphs._recorded)


@pytest.mark.parametrize("model", ["delta_net", "gated_delta_net", "lact", "lact muon"])
def test_recorded_decoding_gives_the_same_rollouts(model: str, ranks: Zygote, tmp_path: Path) -> None:
    """Later requests of a shape and temperature replay the first one's recording; earlier results stay as they were."""
    results, recordings = ranks(1, decoded, config=parity.small_config(tmp_path, model=model))[0]
    assert recordings == 3
    for plain, recorded in results:
        assert all(a.equal(b) for a, b in zip(plain, recorded, strict=True))
    assert not results[0][1][0].equal(results[1][1][0])
    assert not results[1][1][0].equal(results[3][1][0])  # the same draws at another temperature


def ends_of_chunks(config: Config) -> list[bool]:
    """On a rank: whether five tokens can be fed in a recording, from places before the end of a chunk of 16."""
    from megatron_refine.engine import decode
    from megatron_refine.trainer import forward

    model, _ = parity.build(config, torch.float64)
    found = []
    for place in (11, 12, 15, 16):
        places = Places.read(torch.tensor([0, 0]), torch.tensor([5, place]))
        states = forward.main_pass(model, parity.batch(1).tokens).states(places)
        found.append(decode.fixed(states, 5) is not None)
    return found


def test_the_end_of_a_chunk_is_not_recorded(ranks: Zygote, tmp_path: Path) -> None:
    """The weights change there, at another token for every place."""
    config = parity.small_config(tmp_path, model="lact")
    assert ranks(1, ends_of_chunks, config=config)[0] == [True, False, False, True]


def unrecorded(config: Config) -> Any:
    """On a rank where nothing can be recorded: rollouts without graphs, and by choice; what is said; with graphs asked
    for, the error."""
    from megatron_refine.engine.native import NativeEngine
    from megatron_refine.records import Fork, RolloutRequest
    from megatron_refine.trainer import forward

    def fails(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    hardware.record = fails
    model, _ = parity.build(config, torch.float64)
    b, positions = parity.batch(2), torch.tensor([[20, 90], [33, 150]])
    places = Places.of_each(positions)

    @torch.no_grad()
    def rollout(**options: Any) -> Any:
        main = forward.main_pass(model, b.tokens)
        fork = Fork(main.states(places), main.rows.take(places.tokens - 1, places.sequences))
        request = RolloutRequest(b.tokens, positions, b.sample_ids, 2, 5, 0.7, 1, 0, fork)
        engine = NativeEngine(model, **options)
        first, second = engine.rollout(request).tokens, engine.rollout(request).tokens  # it is tried, and said, once
        assert first.equal(second)
        return first

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain, chosen = rollout(), rollout(cuda_graphs=True)
    try:
        error = str(rollout(cuda_graphs=True, required=True))
    except RuntimeError as raised:
        error = str(raised)
    return plain, chosen, [str(w.message) for w in said if "cuda_graphs" in str(w.message)], error


def test_what_cannot_be_recorded_is_decoded_step_by_step(ranks: Zygote, tmp_path: Path) -> None:
    plain, chosen, said, error = ranks(1, unrecorded, config=parity.small_config(tmp_path))[0]
    assert plain.equal(chosen) and error.startswith("operation not permitted")
    assert said == ["engine.cuda_graphs=auto: decoding cannot be recorded, and goes on step by step: operation not "
                    "permitted when stream is capturing"]  # fmt: skip


@pytest.mark.gpu
def test_a_run_with_cuda_graphs_is_the_run_without(tmp_path: Path) -> None:
    """The same draws from the same weights: rewards of the first REFINE steps agree to bf16's rounding."""
    rewards = []
    for graphs in ("false", "true"):
        folder = tmp_path / graphs
        folder.mkdir()
        path = write_config(folder, tmp_path / "data", train={"precision": "bf16", "steps": 3})
        arguments = ["--config", str(path), f"engine.cuda_graphs={graphs}", "parallel.tp=1", "parallel.sp=false"]
        environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        done = subprocess.run([sys.executable, "-m", "megatron_refine.train", *arguments], cwd=ROOT, env=environment,
                              capture_output=True, encoding="utf-8")  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rewards.append([row["rollout/reward_mean"] for row in map(json.loads, lines) if "rollout/reward_mean" in row])
    assert rewards[0] and rewards[1] == pytest.approx(rewards[0], rel=0.05)
