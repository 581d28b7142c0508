"""New weights in real SGLang servers, from trainers at several layouts; what goes wrong is seen, and made good."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_refine.engine.errors import EngineError, ServerError
from tests import sglang_lane as lane
from tests.parity import batch
from tests.zygote import Zygote

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]
LAYOUTS = {
    "tp2": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "cp2 pp2": (4, ["parallel.cp=2", "parallel.pp=2"]),
}
POSITIONS = [[10, 63, 64, 150], [1, 2, 65, 180], [20, 20, 21, 130], [5, 70, 128, 187]]
SMALL_BUCKETS = "engine.bucket_mb=1"  # the model has 2 MiB


@pytest.fixture
def server(sglang_server: Any) -> tuple[str, str]:
    """(URL, family) of a server with some weights of the right shape."""
    _, model, server = sglang_server
    return server.url, model


def config_of(folder: str, model: str, overrides: list[str]) -> Any:
    """At pp > 1 rollouts are refused by the configuration; a sync works at any layout."""
    parallel = {k.removeprefix("parallel."): v for k, _, v in (o.partition("=") for o in overrides) if "parallel" in k}
    rest = [o for o in overrides if not o.startswith("parallel.")]
    config = lane.lane_config(Path(folder), model, *rest)
    found = config.parallel.model_copy(update={k: v == "true" if k == "sp" else int(v) for k, v in parallel.items()})
    return config.model_copy(update={"parallel": found})


def request_of(step: int) -> Any:
    from megatron_refine.records import RolloutRequest

    found = batch(4, 192, vocab=509)
    banned = (0, 200, 508)
    return RolloutRequest(found.tokens, torch.tensor(POSITIONS), found.sample_ids, 2, 5, 0.8, 1, step, None, banned)


def gaps_of_rollouts(engine: Any, model: Any, step: int = 0) -> list[float]:
    return gaps_of(model, engine.rollout(request_of(step)))


@torch.no_grad()
def gaps_of(model: Any, rollouts: Any) -> list[float]:
    """Mean and largest difference between the log-probabilities of rollouts and the trainer's, n = 2."""
    from megatron_refine.trainer.forward import score_pass

    tokens, gaps = request_of(0).tokens, []
    assert not torch.isin(rollouts.tokens, torch.tensor(request_of(0).banned)).any()
    for i in range(4):
        for j, p in enumerate(POSITIONS[i]):
            written = rollouts.tokens[i, j]  # [n, k]
            whole = torch.cat([tokens[i, :p].expand(2, -1), written], 1)
            ours = score_pass(model, whole, torch.full(whole.shape, 0.8)).logprobs[:, p - 1 : p + 4]
            gaps.append((ours - rollouts.logprobs[i, j]).abs())
    everything = torch.stack(gaps)
    return [float(everything.mean()), float(everything.max())]


def sync_often(folder: str, model: str, overrides: list[str], modes: list[str]) -> dict[str, Any]:
    """On a rank: other weights, a sync, rollouts, in each mode in turn, twice."""
    config = config_of(folder, model, overrides)
    gaps = []
    with lane.trainer(config) as (engine, module):
        for version, mode in enumerate(modes):
            lane.move_weights(module, version)
            engine.config = config.model_copy(update={"engine": config.engine.model_copy(update={"sync": mode})})
            engine.sync(version)
            gaps.append(gaps_of_rollouts(engine, module))
        return {"gaps": gaps, "lines": engine.lines, "metrics": engine.metrics()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_arrive_whole_in_both_modes(server: Any, layout: str, ranks: Zygote, tmp_path: Path) -> None:
    """Each sync passes the guard: checksums of all tensors, and the probe."""
    (url, model), (world, overrides) = server, LAYOUTS[layout]
    modes = ["disk", "distributed", "disk", "distributed", "distributed"]
    overrides = lane.attached(url, SMALL_BUCKETS, *overrides)
    found = ranks(world, sync_often, 120, folder=str(tmp_path), model=model, overrides=overrides, modes=modes)[0]
    assert found["metrics"]["engine/recoveries"] == 0, found["lines"]
    assert all(largest < lane.TOLERANCE for _, largest in found["gaps"])
    needed = sum(max(row) - 1 + 2 * len(row) for row in POSITIONS)  # each token once, the last one for each rollout
    computed = found["metrics"]["engine/computed_tokens"]
    assert layout != "tp2" or 0 < computed / len(modes) <= 1.05 * needed, found["metrics"]


@pytest.mark.parametrize("model", ["lact", "qwen3_5"])
def test_servers_of_two_ranks_have_their_parts(model: str, ranks: Zygote, tmp_path: Path) -> None:
    """By the checksum of every tensor on each rank, and the log-probabilities of rollouts."""
    overrides, modes = ["engine.tp=2"], ["disk", "distributed", "disk"]
    found = ranks(1, sync_often, 600, folder=str(tmp_path), model=model, overrides=overrides, modes=modes)[0]
    assert found["metrics"]["engine/recoveries"] == 0, found["lines"]
    assert all(largest < lane.TOLERANCE for _, largest in found["gaps"]), found["gaps"]


def sync_unchanged(folder: str, model: str, overrides: list[str]) -> list[list[float]]:
    config = config_of(folder, model, overrides)
    with lane.trainer(config) as (engine, module):
        gaps = []
        for version in range(11):
            engine.sync(version)
            gaps.append(gaps_of_rollouts(engine, module, version))
        assert engine.recoveries == 0, engine.lines
        return gaps


def test_ten_syncs_of_the_same_weights_leave_the_gap_where_it_was(server: Any, ranks: Zygote, tmp_path: Path) -> None:
    url, model = server
    overrides = lane.attached(url, "parallel.tp=2", SMALL_BUCKETS)
    gaps = ranks(2, sync_unchanged, 120, folder=str(tmp_path), model=model, overrides=overrides)[0]
    means = [mean for mean, _ in gaps]
    # rounding differs with the tokens drawn, by less than an order of magnitude
    assert all(largest < lane.TOLERANCE for _, largest in gaps) and max(means) < 3 * means[0], gaps


def lag_behind(folder: str, model: str, url: str) -> dict[str, Any]:
    """On a rank: weights that change while a server writes, and a sync meanwhile."""
    config = config_of(folder, model, lane.attached(url, "parallel.tp=2", SMALL_BUCKETS))
    with lane.trainer(config) as (engine, module), torch.no_grad():
        engine.sync(0)
        before = [parameter.clone() for parameter in module.parameters()]
        begun = engine.begin(request_of(0))
        lane.move_weights(module, 1)
        engine.sync(1)
        lagging, fresh = engine.finish(begun, 1), gaps_of_rollouts(engine, module)
        other = gaps_of(module, lagging)
        torch._foreach_copy_(list(module.parameters()), before)
        gaps = [gaps_of(module, lagging), fresh]
        return {"gaps": gaps, "other": other, "version": lagging.weight_version} | told(engine)


@pytest.mark.parametrize("sglang_server", ["delta_net"], indirect=True)
def test_rollouts_are_of_the_weights_that_they_began_with(server: Any, ranks: Zygote, tmp_path: Path) -> None:
    url, model = server
    found = ranks(2, lag_behind, 120, folder=str(tmp_path), model=model, url=url)[0]
    assert found["version"] == 0 and found["metrics"]["engine/recoveries"] == 0, found["lines"]
    assert all(largest < lane.TOLERANCE for _, largest in found["gaps"]), found["gaps"]
    assert found["other"][0] > 0.02  # what a mistake about the version would look like


def told(engine: Any) -> dict[str, Any]:
    return {"lines": list(engine.lines), "metrics": engine.metrics()}


def damage_a_sync(folder: str, model: str, overrides: list[str], fault: str) -> dict[str, Any]:
    with lane.trainer(config_of(folder, model, overrides)) as (engine, module):
        return sync_with_fault(engine, module, fault)


def sync_with_fault(engine: Any, module: Any, fault: str) -> dict[str, Any]:
    """On a rank: a good sync, one whose tensors suffer from `fault` on their way, another good one."""
    from megatron_refine.engine import sglang as engine_module

    true_tensors = engine_module.stage_tensors
    engine.sync(0)
    lane.move_weights(module, 1)
    once = iter([True])  # the first pass over the tensors is the broadcast; the checks' is untouched

    def faulty(*arguments: Any) -> Any:
        tensors = true_tensors(*arguments)
        return FAULTS[fault](tensors, engine) if next(once, False) else tensors

    engine_module.stage_tensors = faulty
    try:
        engine.sync(1)
    finally:
        engine_module.stage_tensors = true_tensors
    gaps = [gaps_of_rollouts(engine, module)]
    lane.move_weights(module, 2)
    engine.sync(2)
    gaps.append(gaps_of_rollouts(engine, module))
    return {"gaps": gaps, **told(engine)}


def misnamed(tensors: Any, engine: Any) -> Any:
    for name, tensor in tensors:
        yield name.replace("layers.1.attn.o_proj", "layers.1.attn.o_projection"), tensor


def misshapen(tensors: Any, engine: Any) -> Any:
    for name, tensor in tensors:
        yield name, tensor[:1] if name == "model.norm.weight" else tensor


def missing(tensors: Any, engine: Any) -> Any:
    for name, tensor in tensors:
        if not name.endswith("layers.0.mlp.up_proj.weight"):
            yield name, tensor


def wrong_bits(tensors: Any, engine: Any) -> Any:
    for name, tensor in tensors:
        if name.endswith("layers.1.attn.k_proj.weight"):
            tensor[3, 5] += 1e-6  # far too little for any log-probability
        yield name, tensor


def half_finished(tensors: Any, engine: Any) -> Any:
    """The connection is lost when the first bucket has arrived."""
    for i, pair in enumerate(tensors):
        if i == 20 and engine.groups:
            time.sleep(1.0)
            engine.groups[0].close()
        yield pair


def killed(tensors: Any, engine: Any) -> Any:
    """The server dies between two buckets."""
    for i, pair in enumerate(tensors):
        if i == 20:
            os.killpg(engine.fleet.servers[0].process.pid, signal.SIGKILL)
        yield pair


FAULTS = {
    "misnamed": misnamed, "misshapen": misshapen, "missing": missing, "wrong_bits": wrong_bits,
    "half_finished": half_finished, "killed": killed,
}  # fmt: skip
SAID = {
    "misnamed": "layers.1.attn.o_projection.weight: no tensor of this model",
    "misshapen": "model.norm.weight: shape [1], the model has [128]",
    "missing": "tensors are not the trainer's: model.layers.0.mlp.up_proj.weight",
    "wrong_bits": "1 of ", "half_finished": "is closed", "killed": "",
}  # fmt: skip


# the way of the tensors is that of both families
@pytest.mark.parametrize("sglang_server", ["delta_net"], indirect=True)
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "killed"])
def test_a_damaged_sync_is_seen_and_made_good(server: Any, fault: str, ranks: Zygote, tmp_path: Path) -> None:
    url, model = server
    overrides = lane.attached(url, "parallel.tp=2", SMALL_BUCKETS)
    found = ranks(2, damage_a_sync, 120, folder=str(tmp_path), model=model, overrides=overrides, fault=fault)[0]
    recovered = [line for line in found["lines"] if "loading the weights from disk" in line]
    assert len(recovered) == found["metrics"]["engine/recoveries"] == 1 and SAID[fault] in recovered[0], found["lines"]
    assert all(largest < lane.TOLERANCE for _, largest in found["gaps"])


def update_without_flush(folder: str, model: str, url: str) -> dict[str, float]:
    """On a rank: the gap of a continued request whose state comes from the weights before an update."""
    from megatron_refine.trainer.forward import score_pass

    config = config_of(folder, model, lane.attached(url, "engine.sync=disk"))
    with lane.trainer(config) as (engine, module):
        engine.sync(0)
        client, prompt = engine.fleet.servers[0].client, lane.random_prompt(100, seed=9)
        sampling = {"max_new_tokens": 5, "temperature": 1.0, "ignore_eos": True}
        client.generate(input_ids=[prompt], sampling_params=sampling, extra_key="same")
        lane.move_weights(module, 1)
        target = engine._export(1)
        client.post("/update_weights_from_disk", model_path=str(target), flush_cache=False)
        found = {}
        for case, key in (("stale", "same"), ("other key", "another")):
            longer = prompt + [1, 2, 3]
            (answer,) = client.generate(
                input_ids=[longer], sampling_params=sampling, return_logprob=True, extra_key=key
            )
            with torch.no_grad():
                ours = score_pass(module, torch.tensor([longer + answer["output_ids"]])).logprobs[0, 102:-1]
            found[case] = float((ours - torch.tensor(lane.answered(answer))).abs().mean())
        return found


def test_a_state_of_other_weights_is_far_off_and_another_key_never_finds_it(
    server: Any, ranks: Zygote, tmp_path: Path
) -> None:
    """What flushes and keys prevent, and engine.stop_gap would see."""
    from megatron_refine.errors import MismatchError
    from megatron_refine.step.mismatch import check_gap

    url, model = server
    gaps = ranks(1, update_without_flush, 120, folder=str(tmp_path), model=model, url=url)[0]
    assert gaps["other key"] < lane.TOLERANCE < 0.02 < gaps["stale"]
    with pytest.raises(MismatchError, match=r"engine.stop_gap"):
        check_gap(gaps["stale"], gaps["stale"], 0.02, 1)


def other_weights(folder: str, model: str, url: str) -> list[str]:
    """On a rank: somebody else changes the weights of the server after our sync."""
    config = config_of(folder, model, lane.attached(url, "parallel.tp=2"))
    with lane.trainer(config) as (engine, module):
        engine.sync(0)
        if engine.fleet:
            engine.fleet.servers[0].client.post(
                "/update_weight_version", new_version="somebody-1", abort_all_requests=False
            )
        assert gaps_of_rollouts(engine, module)[1] < lane.TOLERANCE
        return engine.lines


def test_answers_of_weights_that_were_not_announced_are_refused(server: Any, ranks: Zygote, tmp_path: Path) -> None:
    url, model = server
    lines = ranks(2, other_weights, 120, folder=str(tmp_path), model=model, url=url)[0]
    assert any("serves weights 'somebody-1'" in line for line in lines)


def lose_servers(folder: str) -> dict[str, Any]:
    """On a rank: a server of our own, killed in the middle of an update, then hanging while it writes and the trainer
    goes on, then dead."""
    limits = ["engine.request_timeout=10.0", "engine.sync_timeout=20.0", "engine.max_restarts=2"]
    config = config_of(folder, "delta_net", ["parallel.tp=2", SMALL_BUCKETS, *limits])
    with lane.trainer(config) as (engine, module):
        found = {"killed": sync_with_fault(engine, module, "killed")}
        if engine.fleet:
            os.killpg(engine.fleet.servers[0].process.pid, signal.SIGSTOP)
        begun = engine.begin(request_of(0))
        lane.move_weights(module, 3)
        anew = engine.finish(begun, 3)
        found["hung"] = {"gaps": [gaps_of(module, anew)], "version": anew.weight_version, **told(engine)}
        if engine.fleet:
            os.killpg(engine.fleet.servers[0].process.pid, signal.SIGKILL)
        with pytest.raises((EngineError, ServerError)) as stopped:
            gaps_of_rollouts(engine, module)
        return found | {"given up": str(stopped.value)}


def test_servers_that_die_or_hang_are_started_anew_within_the_budget(ranks: Zygote, tmp_path: Path) -> None:
    found = ranks(2, lose_servers, 1500, folder=str(tmp_path))[0]
    for restarts, fault in enumerate(("killed", "hung"), 1):
        metrics = found[fault]["metrics"]
        assert metrics["engine/restarts"] == metrics["engine/recoveries"] == restarts, found[fault]["lines"]
        assert all(largest < lane.TOLERANCE for _, largest in found[fault]["gaps"])
    assert "no answer in time" in str(found["hung"]["lines"]) and found["hung"]["version"] == 3  # written anew
    assert "given up after 2 recoveries (engine.max_restarts)" in found["given up"]
