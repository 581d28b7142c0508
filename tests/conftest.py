"""Fixtures of all tests."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
# a shell's background job ignores it, and so would all that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

from megatron_refine.platform.megatron.install import install  # noqa: E402

install()
from tests import interpreter, sglang_lane, slurm_cluster  # noqa: E402
from tests.zygote import Zygote  # noqa: E402

if TYPE_CHECKING:
    from megatron_refine.engine.server import Server

Answer = Callable[[str, Any], tuple[int, Any]]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Zygote]:
    """`ranks(world_size, fn, timeout=DEADLINE, **kwargs)`: results of a module-level function, by rank."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session", params=sglang_lane.MODELS)
def sglang_server(
    request: pytest.FixtureRequest, ranks: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str, "Server"]]:
    """(folder, family, server), at first with the weights of folder/hf/weights. Syncs change them, so tests of what it
    answers come before those."""
    from megatron_refine.engine.fleet import Fleet

    folder, model = tmp_path_factory.mktemp(request.param), request.param
    ranks(1, sglang_lane.export, folder=str(folder), model=model, target=str(folder / "hf"))
    fleet = Fleet(sglang_lane.lane_config(folder, model), folder / "logs")
    try:
        fleet.start(folder / "hf/weights")
        yield folder, model, fleet.servers[0]
    finally:
        fleet.stop()


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("sglang") and not sglang_lane.INSTALLED:
            item.add_marker(pytest.mark.skip(reason=sglang_lane.MISSING))
        if item.get_closest_marker("kernels") and not interpreter.available():
            item.add_marker(pytest.mark.skip(reason=interpreter.MISSING))
        if item.get_closest_marker("slurm") and not slurm_cluster.available():
            item.add_marker(pytest.mark.skip(reason=slurm_cluster.MISSING))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    from megatron_refine.platform import hardware

    if not hardware.has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))
