"""The SGLang engine without SGLang: states, deadlines, checksums, buckets, launching. Servers here are scripted ones,
for faults that a real one cannot be made to show; real ones are in test_sglang_*.py."""

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_refine.config import Config, ConfigError
from megatron_refine.engine import guard, weight_sync
from megatron_refine.engine.checksum import checksum
from megatron_refine.engine.client import Client
from megatron_refine.engine.collect import Collector
from megatron_refine.engine.errors import EngineError, ServerError
from megatron_refine.engine.fleet import Fleet
from megatron_refine.engine.launch import command, environment, reserve_port
from megatron_refine.engine.server import MOVES, Server, State
from megatron_refine.records import RolloutRequest
from tests import sglang_lane as lane
from tests.parity import small_config
from tests.zygote import Zygote

Answer = Callable[[str, Any], tuple[int, Any]]


@pytest.fixture
def scripted() -> Iterator[Callable[[Answer], str]]:
    """`scripted(answer)`: the URL of a server that answers a path and a body as the function says (bytes: no JSON)."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, content = answer(self.path, json.loads(body or b"null"))
                self.send_response(status)
                raw = isinstance(content, bytes)
                self.send_header("content-type", "application/octet-stream" if raw else "application/json")
                self.end_headers()
                self.wfile.write(content if raw else json.dumps(content).encode())

            do_GET = do_OPTIONS = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()


def test_only_a_sync_makes_a_server_healthy() -> None:
    """From DEAD there is no way to HEALTHY that misses STALE, which a sync alone leaves."""
    assert MOVES[State.DEAD] == {State.DEAD, State.STARTING} and State.HEALTHY not in MOVES[State.STARTING]
    server = Server(Client("http://127.0.0.1:1", 1.0), 1, Path())
    with pytest.raises(AssertionError, match="dead -> healthy"):
        server.move(State.HEALTHY)


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
        with pytest.raises(ServerError, match="answers with application/octet-stream where JSON is due"):
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


def lane_config(folder: Path, *overrides: str) -> Any:
    """The lane's configuration, where SGLang need not be installed."""
    python = folder / "python"
    python.touch(0o700)
    return small_config(folder, "engine.kind=sglang", f"engine.python={python}", *overrides)


def test_a_server_inherits_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    found = environment(lane_config(tmp_path, "engine.env={A: b}").engine)
    assert found["A"] == "b" and found["PATH"] == os.environ["PATH"]
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
        ("engine.python=/nowhere/python", "engine.python=/nowhere/python: no such interpreter"),
        ('engine.python=""', "needs engine.python, .* or engine.urls"),
        ("engine.urls=[127.0.0.1:30000]", "engine.urls: 127.0.0.1:30000: write http://host:port"),
        ("engine.tp=3", "engine.tp=3: must divide the 4 heads"),
        ("engine.api_key_env=NOT_SET_ANYWHERE", "engine.api_key_env=NOT_SET_ANYWHERE: is not set"),
    ],
)
def test_a_wrong_engine_section_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        lane_config(tmp_path, override)


@pytest.mark.parametrize(("model", "kind"), [("lact", "native"), ("delta_net", "sglang")])
def test_what_cannot_be_recorded_is_refused(model: str, kind: str, tmp_path: Path) -> None:
    server = [f"engine.kind={kind}", "engine.urls=[http://127.0.0.1:1]"]
    with pytest.raises(ConfigError, match="engine.cuda_graphs=true: is for engine.kind=native with DeltaNet or"):
        small_config(tmp_path, *server, "engine.cuda_graphs=true", model=model)


def test_lact_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.family=lact is not served; choose one of delta_net, gated_delta_net"):
        small_config(tmp_path, "engine.kind=sglang", "engine.urls=[http://127.0.0.1:1]", model="lact")


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
    parts = [guard.server_part("model.embeddings.weight", rows, rank, 2) for rank in range(2)]
    assert (
        [len(part) for part in parts] == [255, 255] and torch.cat(parts)[:509].equal(rows) and not parts[1][254].any()
    )
    parts = [guard.server_part("model.layers.0.attn.o_proj.weight", square, rank, 2) for rank in range(2)]
    assert torch.cat(parts, 1).equal(square)
    whole = guard.server_part("model.layers.0.attn.o_norm.weight", rows[0], 1, 2)
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


def test_two_buckets_in_turn_share_no_memory() -> None:
    """While one travels the next is made; the memory of the one before it is free again."""
    memory = weight_sync.SendMemory()
    first, second = memory.join([torch.full((8,), 1.0)]), memory.join([torch.full((6,), 2.0)])
    assert first.view(torch.float32).tolist() == [1.0] * 8 and second.view(torch.float32).tolist() == [2.0] * 6
    third = memory.join([torch.full((8,), 3.0)])
    assert third.data_ptr() == first.data_ptr() and second.view(torch.float32).tolist() == [2.0] * 6


def test_what_a_server_is_told_of_new_weights_and_in_which_order(scripted: Any, tmp_path: Path) -> None:
    """A state of the old weights outlives no sync: retracted and flushed before, flushed after the announcement."""
    told: list[tuple[str, Any]] = []
    url = scripted(lambda path, body: told.append((path, body)) or (200, {}))
    server = Server(Client(url, 5.0), 1, tmp_path)
    weight_sync.pause(server, 5.0)
    weight_sync.begin(server, 5.0)
    weight_sync.end(server, 5.0)
    weight_sync.load_folder(server, tmp_path, 5.0)
    weight_sync.resume(server, "v", 5.0)
    assert told == [
        ("/pause_generation", {"mode": "retract"}), ("/flush_cache", {}),
        ("/begin_weight_update", {}), ("/end_weight_update", {}),
        ("/update_weights_from_disk", {"model_path": str(tmp_path), "load_format": "auto", "flush_cache": True}),
        ("/update_weight_version", {"new_version": "v", "abort_all_requests": False}), ("/flush_cache", {}),
        ("/continue_generation", {}),
    ]  # fmt: skip


def test_an_update_that_was_left_open_is_closed_first(scripted: Any, tmp_path: Path) -> None:
    told: list[str] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        told.append(path)
        return (400, "open") if told == ["/begin_weight_update"] else (200, {})

    server = Server(Client(scripted(answer), 5.0), 1, tmp_path)
    weight_sync.begin(server, 5.0)
    assert told == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]
    server.has_sessions = False  # an older server
    weight_sync.begin(server, 5.0)
    weight_sync.end(server, 5.0)
    assert len(told) == 3


def generated(label: str, tokens: int = 3) -> dict[str, Any]:
    meta = {"weight_version": label, "prompt_tokens": 1, "cached_tokens": 0, "finish_reason": None}
    return {"output_ids": [5] * tokens, "meta_info": meta | {"output_token_logprobs": [[-1.0, 5, None]] * tokens}}


def request(rollouts: int = 1) -> RolloutRequest:
    tokens, positions = torch.arange(40).view(2, 20), torch.tensor([[9, 4, 9], [2, 1, 17]])
    return RolloutRequest(tokens, positions, torch.tensor([10, 11]), rollouts, 3, 1.0, 1, 0, None)


@pytest.mark.parametrize("rollouts", [1, 2])
def test_prefixes_of_a_sequence_go_out_in_order_to_one_server(rollouts: int, scripted: Any) -> None:
    asked: dict[int, list[list[int]]] = {0: [], 1: []}

    def server(number: int) -> Answer:
        def answer(path: str, body: Any) -> tuple[int, Any]:
            asked[number].append([len(prompt) for prompt in body["input_ids"]])
            assert all(prompt[0] == 20 * number for prompt in body["input_ids"])
            return 200, [generated("v") for _ in body["input_ids"]]

        return answer

    clients = [Client(scripted(server(number)), 5.0) for number in range(2)]
    collector = Collector(request(rollouts), "v", 8)
    collector.run(clients)
    if rollouts == 1:
        assert asked == {0: [[4], [9], [9]], 1: [[1], [2], [17]]}
    else:  # all but the last token ahead, once for equal positions
        assert asked == {0: [[3], [4, 4], [8], [9, 9], [9, 9]], 1: [[1, 1], [1], [2, 2], [16], [17, 17]]}
    tokens, logprobs = collector.tensors()
    assert tokens.shape == logprobs.shape == (2, 3, rollouts, 3)


def test_what_a_server_is_asked(scripted: Any) -> None:
    """The whole distribution at the temperature, whatever the served folder's generation_config.json says; states are
    found under the version alone."""
    bodies: list[Any] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        bodies.append(body)
        return 200, [generated("v") for _ in body["input_ids"]]

    asked = dataclasses.replace(request(2), temperature=0.7)
    Collector(asked, "v", 1).run([Client(scripted(answer), 5.0)])
    assert all(body.pop("extra_key") == "v" and body.pop("return_logprob") is True for body in bodies)
    ahead = [body["input_ids"] for body in bodies if body["sampling_params"] == {"max_new_tokens": 0}]
    drawn = [body["sampling_params"] for body in bodies if body["input_ids"] not in ahead]
    whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
    assert drawn == [{"max_new_tokens": 3, "temperature": 0.7, "ignore_eos": True} | whole] * 6
    assert sorted(len(prompts[0]) for prompts in ahead) == [1, 3, 8, 16]


def test_rollouts_are_those_of_their_place(scripted: Any) -> None:
    """A server answers with the length of the prefix and the number of the rollout; a log-probability of None is NaN."""

    def answer(path: str, body: Any) -> tuple[int, Any]:
        found = [generated("v") for _ in body["input_ids"]]
        for n, (one, prompt) in enumerate(zip(found, body["input_ids"], strict=True)):
            one["output_ids"] = [prompt[0], len(prompt), n]
            one["meta_info"] |= {"output_token_logprobs": [[-1.0, 5, None], [None, 5, None], [-n - 2.0, 5, None]]}
            one["meta_info"] |= {"prompt_tokens": len(prompt), "cached_tokens": len(prompt) - 1}
        return 200, found

    collector = Collector(request(2), "v", 8)
    collector.run([Client(scripted(answer), 5.0)])
    tokens, logprobs = collector.tensors()
    starts = torch.tensor([[9, 4, 9], [2, 1, 17]])
    for n in range(2):
        assert tokens[:, :, n, 0].tolist() == [[0] * 3, [20] * 3]  # the first token of the sequence
        assert tokens[:, :, n, 1].equal(starts) and (tokens[:, :, n, 2] == n).all()
        assert (logprobs[:, :, n, 0] == -1).all() and (logprobs[:, :, n, 2] == -n - 2).all()
    assert logprobs[..., 1].isnan().all()
    prompts = 2 * (9 + 4 + 9 + 2 + 1 + 17) + 3 + 8 + 1 + 16
    assert (collector.prompt_tokens, collector.cached_tokens) == (prompts, prompts - 12 - 4)


def probes(config: Config) -> dict[str, str]:
    """On a rank: what `check_probes` says of servers that are right, off in the mean, and not finite; and on whose
    side a probe is scored at which temperature."""
    from megatron_refine.trainer import forward
    from tests.parity import build

    model, _ = build(config, torch.float32)
    asked: list[Any] = []

    class Asked:
        url = "http://a:1"

        def generate(self, **body: Any) -> Any:
            asked.append(body)
            meta = {"input_token_logprobs": [[None, 0, None]] * 70, "output_token_logprobs": [[-1.0, 0, None]] * 6}
            return [{"output_ids": list(range(6)), "meta_info": meta | {"weight_version": "v"}}]

    server: Any = Server(Asked(), 1, Path())  # type: ignore[arg-type]
    tokens, _ = guard.ask_probe(server, config, "v")
    own, found = torch.tensor([tokens]), {"asked": str(sorted(asked[0].items()))}
    with torch.no_grad():
        rows = forward._rows(model, own, forward.Branches(main_len=76)).local[:-1, 0]
        logits = forward.unwrap(model).logits(rows)
        logits[69:] /= config.refine.rollout_temperature
        right = logits.log_softmax(-1).gather(1, own[0, 1:, None])[:, 0]
        for name, wrong in (("right", 0.0), ("off", 2e-3), ("below", 5e-4), ("nan", float("nan"))):
            theirs = (right + wrong).tolist()
            try:
                guard.check_probes(model, config, [("u", tokens, right.tolist()), ("v", tokens, theirs)])
                found[name] = ""
            except ServerError as error:
                found[name] = str(error)
    return found


def test_a_probe_that_is_off_or_not_finite_is_refused(ranks: Zygote, tmp_path: Path) -> None:
    """Its prompt is scored at temperature 1, what the server wrote at that of the rollouts."""
    config = small_config(tmp_path, "refine.rollout_temperature=0.5")
    found = ranks(1, probes, config=config)[0]
    assert found["right"] == found["below"] == ""
    assert found["off"].startswith("v: the probe's log-probabilities are 0.002 nats") and "above 0.001" in found["off"]
    assert found["nan"].startswith("v: the probe's log-probabilities are nan nats")
    for words in ("'extra_key', 'v'", "'temperature': 0.5", "'max_new_tokens': 6", "('logprob_start_len', 0)"):
        assert words in found["asked"], words


def test_a_collector_keeps_what_it_has(scripted: Any) -> None:
    seen: list[int] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        seen.append(len(body["input_ids"][0]))
        return (200, [generated("v")]) if len(seen) != 3 else (500, "lost")

    collector, clients = Collector(request(), "v", 1), [Client(scripted(answer), 5.0)]
    with pytest.raises(ServerError, match="500: lost"):
        collector.run(clients)
    collector.run(clients)
    assert seen == [4, 9, 9, 1, 2, 17, 9]


@pytest.mark.parametrize(
    ("bad", "message"),
    [(generated("other"), "serves weights 'other', not 'v'"), (generated("v", tokens=2), "2 of 3 tokens")],
)
def test_answers_of_other_weights_or_cut_short_are_refused(bad: Any, message: str, scripted: Any) -> None:
    client = Client(scripted(lambda path, body: (200, [bad])), 5.0)
    with pytest.raises(ServerError, match=message):
        Collector(request(), "v", 1).run([client])


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
    assert fleet.servers[0].state is State.DEAD
