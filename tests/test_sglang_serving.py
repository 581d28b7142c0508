"""A real SGLang server of each family: what it answers is what the trainer computes."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_refine.engine.client import Client
from megatron_refine.engine.errors import ServerError
from megatron_refine.engine.launch import Process, wait_until
from megatron_refine.engine.server import Server
from megatron_refine.engine.weight_sync import pause
from megatron_refine.launcher import reserve_port
from tests import runs
from tests import sglang_lane as lane
from tests.zygote import Zygote

pytestmark = pytest.mark.sglang
SAMPLING = {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True}


@dataclass
class Served:
    """A running server, and the trainer's word on the same weights."""

    server: Server
    score: Callable[..., list[list[float]]]

    def generate(self, prompts: list[list[int]], **body: Any) -> list[dict[str, Any]]:
        body = {"sampling_params": SAMPLING, "return_logprob": True} | body
        return self.server.client.generate(input_ids=prompts, **body)

    def gap(self, prompts: list[list[int]], answers: list[dict[str, Any]], temperature: float = 1.0) -> float:
        """Largest difference in nats between the answers' log-probabilities and the trainer's."""
        ours = self.score([p + a["output_ids"] for p, a in zip(prompts, answers, strict=True)], temperature)
        return lane.largest_gap(ours, prompts, answers)


@pytest.fixture
def served(sglang_server: tuple[Path, str, Server], ranks: Zygote) -> Served:
    folder, model, server = sglang_server

    def score(sequences: list[list[int]], temperature: float = 1.0) -> list[list[float]]:
        arguments = {"folder": str(folder), "model": model, "weights": str(folder / "hf/weights")}
        return ranks(1, lane.trainer_logprobs, **arguments, sequences=sequences, temperature=temperature)[0]

    return Served(server, score)


def test_prompts_of_mixed_lengths_in_one_batch(served: Served) -> None:
    """Shorter than the convolution, around the kernels' chunk of 64, in parts of 128: prefill and decoding."""
    prompts = [lane.random_prompt(n) for n in (1, 2, 3, 17, 63, 64, 65, 130, 300)]
    assert served.gap(prompts, served.generate(prompts)) < lane.TOLERANCE


def test_scores_of_a_prompt(served: Served) -> None:
    prompt = lane.random_prompt(200, seed=1)
    (answer,) = served.generate([prompt], sampling_params={"max_new_tokens": 0}, logprob_start_len=0)
    theirs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    (ours,) = served.score([prompt])
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < lane.TOLERANCE


@pytest.mark.parametrize("temperature", [2.5, 0.5, 0.0])
def test_logprobs_are_of_the_temperature_of_the_draw(served: Served, temperature: float) -> None:
    """Those of what it writes, greedily at 1; those of the prompt at 1."""
    prompts = [lane.random_prompt(n, seed=2) for n in (5, 90)]
    sampling = SAMPLING | {"temperature": temperature}
    answers = served.generate(prompts, sampling_params=sampling, logprob_start_len=0)
    assert served.gap(prompts, answers, temperature or 1.0) < lane.TOLERANCE
    for prompt, answer in zip(prompts, answers, strict=True):
        theirs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        assert theirs == pytest.approx(served.score([prompt])[0], abs=lane.TOLERANCE)


def test_a_finished_request_is_continued_from_its_state(served: Served) -> None:
    prompts = [lane.random_prompt(n, seed=3) for n in (9, 70, 140)]
    longer = [p + a["output_ids"] + [7, 8] for p, a in zip(prompts, served.generate(prompts), strict=True)]
    answers = served.generate(longer)
    cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
    assert cached == [len(p) + SAMPLING["max_new_tokens"] - 1 for p in prompts]
    assert served.gap(longer, answers) < lane.TOLERANCE


def test_nested_prefixes_of_a_sequence_are_computed_once(served: Served) -> None:
    """Sent ahead without its last token, a prefix serves all n requests; the next one starts from there."""
    tokens, positions = lane.random_prompt(300, seed=4), (40, 41, 100, 290)
    for p in positions:
        (ahead,) = served.generate([tokens[: p - 1]], sampling_params={"max_new_tokens": 0}, extra_key="nested")
        assert ahead["meta_info"]["cached_tokens"] >= max((q - 1 for q in positions if q < p), default=0)
        answers = served.generate([tokens[:p]] * 3, extra_key="nested")
        assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [p - 1] * 3
        assert served.gap([tokens[:p]] * 3, answers) < lane.TOLERANCE


def test_another_key_finds_no_state(served: Served) -> None:
    tokens = lane.random_prompt(100, seed=5)
    served.generate([tokens], extra_key="one")
    (answer,) = served.generate([tokens + [1]], extra_key="other")
    assert answer["meta_info"]["cached_tokens"] == 0


def test_more_requests_than_slots(served: Served) -> None:
    """Slots go from one request to the next; none leaves its state to another."""
    prompts = [lane.random_prompt(20 + 3 * i, seed=6) for i in range(40)]
    assert served.gap(prompts, served.generate(prompts)) < lane.TOLERANCE


def test_requests_that_are_retracted_go_on_where_they_were(served: Served) -> None:
    """A pause takes the states of running requests away; they are computed anew. One of an idle server does nothing."""
    seconds, prompts = 60.0, [lane.random_prompt(40 + 29 * i, seed=7) for i in range(6)]
    pause(served.server, seconds)
    served.server.client.post("/continue_generation", seconds)
    with ThreadPoolExecutor(1) as pool:
        long = SAMPLING | {"max_new_tokens": 150}
        answers = pool.submit(served.generate, prompts, sampling_params=long, timeout=120.0)
        assert wait_until(lambda: running(served.server) == len(prompts), seconds, 0.02)
        try:
            pause(served.server, seconds)  # flushes too, which a server refuses while a request is running
            assert not answers.done()
        finally:
            served.server.client.post("/continue_generation", seconds)
        found = answers.result()
    assert all(len(answer["output_ids"]) == 150 for answer in found)
    assert served.gap(prompts, found) < lane.TOLERANCE


def running(server: Server) -> int:
    """Requests in the server's batch."""
    return int(server.client.get("/v1/loads")["loads"][0]["num_running_reqs"])


def test_a_folder_that_lacks_a_tensor_is_not_served(ranks: Zygote, tmp_path: Path) -> None:
    from megatron_refine.engine.fleet import Fleet

    ranks(1, lane.export, folder=str(tmp_path), model="delta_net", target=str(tmp_path / "hf"))
    file = tmp_path / "hf/weights/model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    fleet = Fleet(lane.lane_config(tmp_path, "delta_net"), tmp_path / "logs")
    try:
        with pytest.raises(ServerError, match="ended while starting: .*missing tensors: model.norm.weight"):
            fleet.start(file.parent)
    finally:
        fleet.stop()


def test_a_run_is_served_and_takes_text(ranks: Zygote, tmp_path: Path) -> None:
    """`serve --model RUN` exports the newest checkpoint with its tokenizer; greedy text is that of `generate`."""
    config = runs.write_config(tmp_path, tmp_path / "cache", train={"steps": 1}, refine={"enabled": False})
    assert ranks(1, runs.command, arguments=["--config", str(config)])[0].code == 0
    run, log = tmp_path / "run", tmp_path / "log"
    asked = {"text": "def main(", "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    with reserve_port("127.0.0.1") as held:
        port = held.getsockname()[1]
        words = ["serve", "--model", str(run), "--port", str(port), f"engine.python={lane.PYTHON}"]
        words += [f"engine.args=[{', '.join(lane.SERVER_ARGS)}]"]
        server = Process([sys.executable, "-m", "megatron_refine", *words], dict(os.environ), log)
        try:
            client = Client(f"http://127.0.0.1:{port}", 60.0)
            assert wait_until(lambda: client.healthy() or server.ended(), 240), server.last_words()
            answer = client.post("/generate", **asked)
        finally:
            server.stop()
    assert (next((run / "engine/node_0").glob("step_0000001-*")) / "README.md").is_file()
    prompt = ["--prompt", "def main(", "--temperature", "0", "--max-new-tokens", "8"]
    line = [sys.executable, "-m", "megatron_refine", "generate", str(run), *prompt]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", check=True)
    assert answer["text"] and answer["text"] in done.stdout
