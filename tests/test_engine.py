"""The SGLang engine without SGLang: states, deadlines, checksums, buckets, launching. Servers here are scripted ones,
for faults that a real one cannot be made to show; real ones are in test_sglang_*.py."""

import hashlib
import itertools
import os
import pickle
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_refine.config import ConfigError
from megatron_refine.convert.fields import fresh_config
from megatron_refine.engine import guard, weight_sync
from megatron_refine.engine.checksum import checksum
from megatron_refine.engine.client import Client
from megatron_refine.engine.errors import EngineError, ServerError
from megatron_refine.engine.fleet import Fleet
from megatron_refine.engine.launch import command, environment, first_gpus, positions
from megatron_refine.engine.server import MOVES, Condition, Server
from megatron_refine.launcher import reserve_port
from megatron_refine.models.family import Serving, Slot
from megatron_refine.platform import hardware
from megatron_refine.run import preflight
from tests import sglang_lane as lane
from tests.conftest import Answer
from tests.parity import small_config
from tests.zygote import Zygote


def test_only_a_sync_makes_a_server_healthy() -> None:
    """From DEAD there is no way to HEALTHY that misses STALE, which a sync alone leaves."""
    assert (
        MOVES[Condition.DEAD] == {Condition.DEAD, Condition.STARTING}
        and Condition.HEALTHY not in MOVES[Condition.STARTING]
    )
    server = Server(Client("http://127.0.0.1:1", 1.0), 1, Path())
    with pytest.raises(AssertionError, match="dead -> healthy"):
        server.move(Condition.HEALTHY)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda path, body: (503, {"error": {"message": "starting\nup"}}), "503: starting up"),
        (lambda path, body: (200, {"success": False, "message": "no such tensor"}), "no such tensor"),
        (lambda path, body: (400, "bad request"), "400: bad request"),
        (lambda path, body: time.sleep(3) or (200, {}), "no answer in time"),
    ],
    ids=["503", "no success", "400", "hangs"],
)
def test_a_call_that_fails_is_one_line(answer: Answer, message: str, scripted: Any) -> None:
    url = scripted(answer)
    with pytest.raises(ServerError, match=f"^{url}/flush_cache: {message}$"):
        Client(url, 0.5).post("/flush_cache")


def test_an_answer_that_is_not_json_is_an_error_and_never_unpickled(scripted: Any, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "pwned",)

    client = Client(scripted(lambda path, body: (200, pickle.dumps([Touch()]))), 5.0)
    calls: list[Callable[[], Any]] = [
        lambda: client.get("/server_info"), lambda: client.post("/weights_checker", action="checksum"),
        lambda: client.generate(input_ids=[[1]]), lambda: client.post("/update_weights_from_distributed"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ServerError, match="answered with application/octet-stream, not with JSON"):
            call()
    assert not (tmp_path / "pwned").exists()


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ServerError, match="^http://127.0.0.1:9/generate: .*refused"):
        Client("http://127.0.0.1:9", 1.0).generate(input_ids=[[1]])


def test_the_api_key_is_sent(scripted: Any) -> None:
    seen: list[str] = []

    client = Client(scripted(lambda path, body: (200, {})), 1.0, "secret")
    client._http.event_hooks["request"] = [lambda request: seen.append(request.headers["authorization"])]
    client.get("/model_info")
    assert seen == ["Bearer secret"]


def test_no_proxy_stands_between_us_and_a_server(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    assert Client(scripted(lambda path, body: (200, {"a": 1})), 5.0).get("/model_info") == {"a": 1}


def test_the_api_key_is_not_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    python = tmp_path / "python"
    python.touch(0o700)
    config = lane_config(tmp_path, "engine.api_key_env=MY_KEY", f"engine.python={python}")
    words = command(config, tmp_path, 30000, tmp_path)
    assert "secret" not in str(words)
    file = Path(words[words.index("--config") + 1])
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == {"api-key": "secret"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert words[words.index("--host") + 1] == "127.0.0.1"


def test_the_command_line_of_a_server(tmp_path: Path) -> None:
    config = lane_config(tmp_path, "engine.tp=2", "run.seed=11", "engine.args=[--more, this]")
    words = command(config, tmp_path / "weights", 30007, tmp_path)
    options = dict(itertools.pairwise(words))
    expected = {"--model-path": f"{tmp_path}/weights", "--port": "30007", "--tp": "2", "--random-seed": "11",
                "--dtype": "float32", "-m": "sglang.launch_server", "--more": "this"}  # fmt: skip
    assert expected.items() <= options.items() and words[-2:] == ["--more", "this"]
    low = command(lane_config(tmp_path, "train.precision=bf16"), tmp_path, 30007, tmp_path)
    assert dict(itertools.pairwise(low))["--dtype"] == "bfloat16"


SERVING = Serving("", lambda model, tp: Slot([], ()))
GPUS: list[tuple[list[str], int, int, list[int | None]]] = [  # overrides, GPUs, ranks here, each server's first GPU
    (["engine.sync=disk"], 1, 1, [0]),
    ([], 2, 1, [1]),
    (["engine.servers=2", "engine.tp=2"], 8, 4, [4, 6]),
    (["engine.servers=4"], 8, 4, [4, 5, 6, 7]),
    (["engine.servers=3", "engine.tp=2", "engine.sync=disk"], 4, 4, [0, 2, 0]),
    (["engine.servers=2", "engine.args=[--base-gpu-id, 5]"], 8, 8, [None, None]),
    (["engine.env={CUDA_VISIBLE_DEVICES: 7}"], 8, 8, [None]),
    ([], 0, 2, [None]),
]


@pytest.mark.parametrize(("overrides", "gpus", "ranks", "first"), GPUS)
def test_servers_have_gpus_of_their_own(
    overrides: list[str],
    gpus: int,
    ranks: int,
    first: list[int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = lane_config(tmp_path, *overrides)
    assert first_gpus(config, gpus, ranks) == first
    monkeypatch.setattr(hardware, "has_gpu", lambda: gpus > 0)
    for gpu in first:
        words = command(config, tmp_path, 30007, tmp_path, gpu=gpu)
        assert ("--disable-prefill-cuda-graph" in words) == (gpus > 0) != ("torch_native" in words)
        placed = dict(itertools.pairwise(words)).get("--base-gpu-id")
        assert placed == ("5" if "5" in config.engine.args else None if gpu is None else str(gpu))
    monkeypatch.setattr(hardware, "gpus", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    fleet = Fleet(config, tmp_path)
    assert [server.gpu for server in fleet.servers] == first
    fleet.stop()


def test_servers_have_ports_in_a_row_and_their_first_start_is_no_restart(tmp_path: Path) -> None:
    fleet = Fleet(lane_config(tmp_path, "engine.servers=3", "engine.port=30100", "engine.sync=disk"), tmp_path)
    assert [server.url for server in fleet.servers] == [f"http://127.0.0.1:{30100 + i}" for i in range(3)]
    assert fleet.restarts == 0
    for server, starts in zip(fleet.servers, (3, 1, 2), strict=True):
        server.starts = starts
    assert fleet.restarts == 3
    fleet.stop()


def test_too_few_gpus_are_one_line(tmp_path: Path) -> None:
    for ranks, servers in ((1, 1), (8, 2)):
        config = lane_config(tmp_path, f"engine.servers={servers}")
        with pytest.raises(ConfigError, match="NCCL refuses two processes on one GPU; set engine.sync=disk"):
            first_gpus(config, ranks, ranks)
    with pytest.raises(ConfigError, match="engine.tp=2: this machine has 1 GPUs"):
        first_gpus(lane_config(tmp_path, "engine.tp=2", "engine.sync=disk"), 1, 1)
    with pytest.raises(ConfigError, match="--attention-backend triton: it needs layers of softmax attention"):
        preflight.engine(lane_config(tmp_path, "engine.args=[--attention-backend=triton]"))
    with pytest.raises(ConfigError, match="--enable-memory-saver: a server that gives its memory back has no weights"):
        preflight.engine(lane_config(tmp_path, "engine.args=[--enable-memory-saver]"))


def test_a_server_has_room_for_what_a_run_asks(tmp_path: Path) -> None:
    """Without layers of keys and values SGLang's default is one sequence."""
    config = lane_config(tmp_path, "data.seq_length=5000", "engine.max_requests=3")
    words = dict(itertools.pairwise(command(config, tmp_path, 30007, tmp_path)))
    assert int(words["--max-total-tokens"]) >= 3 * (5000 + config.refine.rollout_len)
    assert fresh_config(config.model, "float32", positions(config))["max_position_embeddings"] > 5000
    assert fresh_config(config.model, "float32", 10)["max_position_embeddings"] == 2048


def lane_config(folder: Path, *overrides: str) -> Any:
    """The lane's configuration, where SGLang need not be installed."""
    python = folder / "python"
    python.touch(0o700)
    return small_config(folder, "engine.kind=sglang", f"engine.python={python}", *overrides)


def test_a_server_inherits_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SGLANG_RETURN_ORIGINAL_LOGPROB"):
        monkeypatch.setenv(name, "1")
    found = environment(lane_config(tmp_path, "engine.env={A: b}").engine)
    assert found["A"] == "b" and found["PATH"] == os.environ["PATH"]
    assert found["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0"  # log-probabilities at the temperature of the draw
    assert not found.keys() & {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"}


def test_the_ranks_of_a_server_share_out_our_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, engine = "SGLANG_CPU_OMP_THREADS_BIND", lane_config(tmp_path, "engine.tp=4").engine
    for cores, shares in (({1, 2, 3, 5, 8}, "1,8|2|3|5"), ({0, 1}, "0|1|0|1")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert environment(engine)[variable] == shares
    monkeypatch.setenv(variable, "7|8|9|10")  # the user knows better
    assert environment(engine)[variable] == "7|8|9|10"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('engine.python=""', "needs engine.python, .* or engine.urls"),
        ("engine.urls=[127.0.0.1:30000]", "engine.urls: 127.0.0.1:30000: write http://host:port"),
        ("engine.tp=3", "engine.tp=3: must divide the 4 heads"),
        ("engine.api_key_env=NOT_SET_ANYWHERE", "engine.api_key_env=NOT_SET_ANYWHERE: is not set"),
    ],
)
def test_a_wrong_engine_section_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        lane_config(tmp_path, override)


@pytest.mark.parametrize("override", ["engine.kind=sglang", "parallel.pp=2"])
def test_what_cannot_be_recorded_is_refused(override: str, tmp_path: Path) -> None:
    server = [override, "engine.urls=[http://127.0.0.1:1]"]
    with pytest.raises(ConfigError, match="engine.cuda_graphs=true: is for engine.kind=native at parallel.pp=1"):
        small_config(tmp_path, *server, "engine.cuda_graphs=true")


def test_a_family_without_a_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SGLang does not serve model.family=olmo_hybrid; set engine.kind=native"):
        small_config(tmp_path, "engine.kind=sglang", "engine.urls=[http://127.0.0.1:1]", model="olmo_hybrid")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_on_a_cpu_is_sha256(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5).to(dtype).T  # not contiguous
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert checksum(tensor, "cpu") == hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize(("words", "dtype"), [(1, torch.float32), (8192, torch.float32), (20001, torch.bfloat16)])
def test_checksum_on_a_gpu_is_the_kernels_formula(words: int, dtype: torch.dtype) -> None:
    """Word by word, in plain integers."""
    mask, seed = 0xFFFFFFFF, 0x243F6A88
    seeds, factors, turns = (seed, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & mask), (0x27D4EB2D, 0x165667B1), (15, 13)

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B & mask
        x = (x ^ x >> 13) * 0xC2B2AE35 & mask
        return x ^ x >> 16

    tensor = torch.randn(words, generator=torch.Generator().manual_seed(1)).to(dtype)
    content = tensor.view(torch.uint8).numpy().tobytes()
    content += b"\0" * (-len(content) % 4)
    values = [int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4)]
    total = 0
    for first in range(0, len(values), 8192):
        halves = []
        for s, f, r in zip(seeds, factors, turns, strict=True):
            added = sum(
                mix(v ^ ((i * f + s) & mask) ^ ((i << r | i >> 32 - r) & mask))
                for i, v in enumerate(values[first : first + 8192], first)
            )
            halves.append(mix(added & mask ^ len(values) * 4 & mask))
        total = total + (halves[0] << 32 | halves[1]) & (1 << 64) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = (total ^ total >> shift) * factor & (1 << 64) - 1
    assert checksum(tensor, "cuda") == f"{total ^ total >> 31:016x}"


def test_parts_of_a_server_with_tp_make_up_the_tensor() -> None:
    rows, square = torch.randn(509, 8), torch.randn(6, 8)
    parts = [guard.server_part(SERVING, None, "model.embeddings.weight", rows, rank, 2) for rank in range(2)]
    assert (
        [len(part) for part in parts] == [255, 255] and torch.cat(parts)[:509].equal(rows) and not parts[1][254].any()
    )
    parts = [
        guard.server_part(SERVING, None, "model.layers.0.attn.o_proj.weight", square, rank, 2) for rank in range(2)
    ]
    assert torch.cat(parts, 1).equal(square)
    whole = guard.server_part(SERVING, None, "model.layers.0.attn.o_norm.weight", rows[0], 1, 2)
    assert whole.equal(rows[0])


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_buckets_hold_every_byte_in_order(size: int) -> None:
    """Also where dtypes of other widths follow one another: a server reads each at a multiple of its width."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.bfloat16, torch.float64])
    tensors = [(f"t{i}", torch.randn(i % 5 + 1, 3).to(next(dtypes))) for i in range(20)]
    names, content = [], b""
    for found, held, buffer in weight_sync.buckets(iter(tensors), size, weight_sync.SendMemory()):
        offset = 0
        for tensor in held:
            assert offset % tensor.itemsize == 0
            offset += tensor.nbytes
        assert offset == buffer.nbytes and (len(held) == 1 or buffer.nbytes <= size)
        names += found
        content += buffer.numpy().tobytes()
    assert names == [name for name, _ in tensors]
    assert content == b"".join(t.view(torch.uint8).numpy().tobytes() for _, t in tensors)


def fail_on_one(folder: str) -> str:
    from megatron_refine.engine.control import Control

    control, rank = Control(20.0), int(os.environ["RANK"])
    assert control.attempt(lambda: rank) == [0, 1, 2]
    with pytest.raises(ServerError) as error:
        control.attempt(lambda: 1 // (rank - 1))  # the middle one fails
    assert control.attempt(lambda: rank) == [0, 1, 2]
    return str(error.value)


def test_a_failure_on_one_rank_reaches_all(ranks: Zygote, tmp_path: Path) -> None:
    assert ranks(3, fail_on_one, folder=str(tmp_path)) == ["rank 1: integer division or modulo by zero"] * 3


def start_in_vain(config: Any) -> str:
    with lane.trainer(config) as (engine, _), pytest.raises(EngineError) as error:
        engine.sync(0)
    return str(error.value)


def test_a_server_that_answers_503_ends_the_run_in_time(scripted: Any, ranks: Zygote, tmp_path: Path) -> None:
    url = scripted(lambda path, body: (503, {}))
    config = small_config(
        tmp_path, "engine.kind=sglang", f"engine.urls=[{url}]", "engine.start_timeout=0.5", "engine.max_restarts=1",
        "engine.request_timeout=5.0",
    )  # fmt: skip
    (message,) = set(ranks(2, start_in_vain, config=config))
    assert f"{url}: not healthy after 0.5 s; given up after 1 recoveries" in message


def test_a_reserved_port_is_left_for_the_server() -> None:
    """It binds its port long after that was chosen: meanwhile no other program may be given it."""
    with reserve_port("127.0.0.1") as held:
        address = held.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every asyncio server
            server.bind(address)
            server.listen()
            with socket.create_connection(address, timeout=5):
                pass


@pytest.mark.parametrize("said, shown", [
    (["ImportError: no sglang here"], "ImportError: no sglang here"),
    (["ERROR:    address already in use", "ReadTimeoutError: it follows"], "ERROR:    address already in use"),
])  # fmt: skip
def test_a_launched_program_that_ends_is_reported_with_its_error(said: list[str], shown: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said) + "exit 1\n", encoding="utf-8")
    python.chmod(0o700)
    fleet = Fleet(small_config(tmp_path, "engine.kind=sglang", f"engine.python={python}"), tmp_path / "logs")
    with pytest.raises(ServerError, match=rf"ended while starting: {shown} \(.*sglang_0.1.log\)"):
        fleet.start(tmp_path)
    assert fleet.servers[0].condition is Condition.DEAD and fleet.restarts == 0
    with pytest.raises(ServerError, match="ended while starting"):
        fleet.start(tmp_path)
    assert fleet.restarts == 1


def test_each_run_has_its_own_folder_in_sync_dir() -> None:
    """A user's folder `weights` stands there untouched, and so does that of another run."""
    from megatron_refine.engine.sglang import _own_folder

    first, other = (_own_folder("/data/me", Path("runs", name), "ab12") for name in ("a", "b"))
    assert first != other and first.parent == Path("/data/me") and first.name.startswith("megatron_refine-")
    assert first == _own_folder("/data/me", Path("runs/a").absolute(), "ab12")
    assert first != _own_folder("/data/me", Path("runs/a"), "cd34")  # of another attempt
