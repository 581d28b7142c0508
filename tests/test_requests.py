"""What servers are asked and told, and what is made of their answers. Servers here are scripted ones."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_refine.config import Config
from megatron_refine.engine import guard, weight_sync
from megatron_refine.engine.client import Client
from megatron_refine.engine.collect import Begun, Collector
from megatron_refine.engine.errors import ServerError
from megatron_refine.engine.server import Server
from megatron_refine.records import RolloutRequest
from tests.conftest import Answer
from tests.parity import small_config
from tests.zygote import Zygote


def test_two_buckets_in_turn_share_no_memory() -> None:
    """While one travels the next is made; the memory of the one before it is free again."""
    memory = weight_sync.SendMemory()
    first, second = memory.join([torch.full((8,), 1.0)]), memory.join([torch.full((6,), 2.0)])
    assert first.view(torch.float32).tolist() == [1.0] * 8 and second.view(torch.float32).tolist() == [2.0] * 6
    third = memory.join([torch.full((8,), 3.0)])
    assert third.data_ptr() == first.data_ptr() and second.view(torch.float32).tolist() == [2.0] * 6


def test_a_push_ends_when_the_last_bucket_is_loaded() -> None:
    """Not when it is sent: what goes wrong with it belongs to this update."""
    done: list[Any] = []
    group = SimpleNamespace(
        memory=weight_sync.SendMemory(), finish=lambda: done.append("all"),
        broadcast=lambda names, tensors, buffer: done.append(names),
    )  # fmt: skip
    weight_sync.push(group, iter([("a", torch.ones(4)), ("b", torch.ones(4))]), 16)  # type: ignore[arg-type]
    assert done == [["a"], ["b"], "all"]


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


def test_every_rank_of_every_server_has_its_place_in_the_update_group(
    scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We are rank 0, the servers' tp ranks follow one another. The group itself is joined in test_sglang_sync.py."""
    asked: dict[str, Any] = {}
    joined: list[Any] = []

    class Store:
        port = 4711

        def __init__(self, address: str, seconds: float):
            joined.append((address, seconds))

        def join(self, name: str, world: int) -> None:
            joined.append((name, world))

    monkeypatch.setattr(weight_sync.rendezvous, "GroupStore", Store)
    urls = [scripted(lambda path, body, i=i: asked.update({f"{path} {i}": body}) or (200, {})) for i in range(3)]
    servers = [Server(Client(url, 5.0), tp, tmp_path) for url, tp in zip(urls, (2, 1, 4), strict=True)]
    weight_sync.UpdateGroup("name", servers, "host", 3.0)
    assert joined == [("host", 3.0), ("name", 8)]
    for i, offset in enumerate((1, 3, 4)):
        body = asked[f"/init_weights_update_group {i}"]
        assert (body["rank_offset"], body["world_size"], body["group_name"]) == (offset, 8, "name")
        assert (body["master_address"], body["master_port"], body["backend"]) == ("host", 4711, "gloo")


def test_checksums_are_compared_rank_by_rank_and_name_by_name(scripted: Any, tmp_path: Path) -> None:
    ranks = [{"parallelism_info": [{"tp_rank": r}], "checksums": {"a": f"a{r}", "b": f"b{r}"}} for r in (1, 0)]
    server = Server(Client(scripted(lambda path, body: (200, {"ranks": ranks})), 5.0), 2, tmp_path)
    found = guard.server_checksums(server, 5.0)
    assert found == {"a": ["a0", "a1"], "b": ["b0", "b1"]}
    guard.compare_checksums("u", found, dict(found))
    for wrong, name in (({"a": ["a1", "a0"], "b": found["b"]}, "a"), (found | {"c": ["c0", "c1"]}, "c")):
        with pytest.raises(ServerError, match=f"^u: 1 of {len(wrong)} tensors are not the trainer's: {name}$"):
            guard.compare_checksums("u", found, wrong)
    with pytest.raises(ServerError, match="^u: 1 of 1 tensors are not the trainer's: b$"):
        guard.compare_checksums("u", found, {"a": found["a"]})


def test_a_server_answers_every_prompt(scripted: Any) -> None:
    for answers, got in (([{}], "1 answers"), ([{}, {}, {}], "3 answers"), ({}, "dict")):
        url = scripted(lambda path, body, answers=answers: (200, answers))
        with pytest.raises(ServerError, match=f"got {got} for 2 prompts"):
            Client(url, 5.0).generate(input_ids=[[1], [2]])


def generated(label: str, tokens: int = 3) -> dict[str, Any]:
    meta = {"weight_version": label, "prompt_tokens": 1, "cached_tokens": 0, "finish_reason": None}
    return {"output_ids": [5] * tokens, "meta_info": meta | {"output_token_logprobs": [[-1.0, 5, None]] * tokens}}


def request(rollouts: int = 1) -> RolloutRequest:
    tokens, positions = torch.arange(40).view(2, 20), torch.tensor([[9, 4, 9], [2, 1, 17]])
    return RolloutRequest(tokens, positions, torch.tensor([10, 11]), rollouts, 3, 1.0, 1, 0, None)


def test_sequences_are_shared_out_by_their_samples(scripted: Any) -> None:
    """The same server for a sample at every step: its cache has the sequence's states."""
    asked: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}

    def server(number: int) -> Answer:
        def answer(path: str, body: Any) -> tuple[int, Any]:
            asked[number] |= {prompt[0] for prompt in body["input_ids"]}
            return 200, [generated("v") for _ in body["input_ids"]]

        return answer

    Collector(request(), "v", 8).run([Client(scripted(server(number)), 5.0) for number in range(3)])
    assert asked == {10 % 3: {0}, 11 % 3: {20}, 0: set()}


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
    first, second = ([p for p in places for _ in range(rollouts)] for places in ([9, 4, 9], [2, 1, 17]))
    assert asked == {0: [[3], [8], first], 1: [[1], [16], second]}  # all but the last token ahead, once where equal
    tokens, logprobs = collector.tensors()
    assert tokens.shape == logprobs.shape == (2, 3, rollouts, 3)


def test_sequences_of_a_server_go_side_by_side(scripted: Any) -> None:
    """The longer chain ends alone; no more sequences at once than there may be requests."""
    asked: list[list[int]] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        asked.append([len(prompt) for prompt in body["input_ids"]])
        return 200, [generated("v") for _ in body["input_ids"]]

    one = request()
    three = dataclasses.replace(
        one, tokens=torch.arange(60).view(3, 20), sample_ids=torch.tensor([10, 11, 12]),
        positions=torch.tensor([[9, 4, 9], [2, 1, 17], [3, 5, 8]]),
    )  # fmt: skip
    Collector(three, "v", 2).run([Client(scripted(answer), 5.0)])
    assert asked == [[3, 1], [8, 16], [9, 4, 9, 2, 1, 17], [2], [4], [7], [3, 5, 8]]


def test_servers_share_the_requests_that_a_rank_may_make(scripted: Any) -> None:
    """Give each of two servers one of two at once: a sequence after the other."""
    sequences: list[int] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        sequences.append(len({prompt[0] for prompt in body["input_ids"]}))
        return 200, [generated("v") for _ in body["input_ids"]]

    one = request()
    four = dataclasses.replace(
        one, tokens=torch.arange(80).view(4, 20), sample_ids=torch.arange(4), positions=one.positions.repeat(2, 1)
    )
    Collector(four, "v", 2).run([Client(scripted(answer), 5.0) for _ in range(2)])
    assert set(sequences) == {1}


def test_what_a_server_is_asked(scripted: Any) -> None:
    """The whole distribution at the temperature, whatever the served folder's generation_config.json says; states are
    found under the version alone."""
    bodies: list[Any] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        bodies.append(body)
        return 200, [generated("v") for _ in body["input_ids"]]

    asked = dataclasses.replace(request(2), temperature=0.7)
    Collector(asked, "v", 1).run([Client(scripted(answer), 5.0)])
    told = [body.pop("return_logprob") for body in bodies]
    assert all(body.pop("extra_key") == "v" for body in bodies)
    assert told == [body["sampling_params"]["max_new_tokens"] > 0 for body in bodies]
    ahead = [body["input_ids"] for body in bodies if body["sampling_params"] == {"max_new_tokens": 0}]
    drawn = [body["sampling_params"] for body in bodies if body["input_ids"] not in ahead]
    assert [len(body["input_ids"]) for body in bodies if body["input_ids"] not in ahead] == [6, 6]
    whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
    assert drawn == [{"max_new_tokens": 3, "temperature": 0.7, "ignore_eos": True} | whole] * 2
    assert sorted(len(prompts[0]) for prompts in ahead) == [1, 3, 8, 16]


def test_banned_tokens_are_asked_for_and_their_share_is_given_back(scripted: Any) -> None:
    """By a softmax with the biases of the request; 3 takes nearly all of it, 5 nearly nothing."""
    logits, bodies = torch.tensor([0.3, -1.0, 0.5, 9.0, 0.1, -30.0, -95.0], dtype=torch.float64), list[Any]()

    def answer(path: str, body: Any) -> tuple[int, Any]:
        bodies.append(body)
        found = [generated("v") for _ in body["input_ids"]]
        biases = body["sampling_params"].get("logit_bias", {})
        biased = logits + torch.tensor([biases.get(str(i), 0.0) for i in range(7)], dtype=torch.float64)
        logprobs = (biased / 0.7).softmax(-1).float().log()
        shown = [[value if value > -torch.inf else None for value in logprobs.tolist()][i] for i in range(7)]
        for one in found:
            one["output_ids"] = [0, 1, 4]
            one["meta_info"]["output_token_logprobs"] = [[shown[i], i, None] for i in (0, 1, 4)]
            asked = body.get("token_ids_logprob", [])
            one["meta_info"]["output_token_ids_logprobs"] = [[[shown[i], i, None] for i in asked]] * 3
        return 200, found

    for ids in ((3,), (3, 5), (6,)):
        asked = dataclasses.replace(request(2), temperature=0.7, banned=ids)
        collector = Collector(asked, "v", 1)
        collector.run([Client(scripted(answer), 5.0)])
        truth = (logits / 0.7).log_softmax(-1)[[0, 1, 4]].float()
        # the server tells fp32 of up to 100 nats
        torch.testing.assert_close(collector.tensors()[1][0, 0, 0], truth, rtol=0, atol=2e-5)
    biases = [body["sampling_params"].get("logit_bias") for body in bodies]
    assert {"3": -42.0, "5": -42.0} in biases  # at temperature 0.7; none where a prompt is only read
    assert all(("logit_bias" in body["sampling_params"]) == ("token_ids_logprob" in body) for body in bodies)
    with pytest.raises(ServerError, match="drew token 1 in spite of its logit_bias"):
        Collector(dataclasses.replace(request(2), banned=(1, 4)), "v", 1).run([Client(scripted(answer), 5.0)])


def test_rollouts_are_those_of_their_place(scripted: Any) -> None:
    """A server answers with the length of the prefix and the number of the rollout; no log-probability is NaN."""

    def answer(path: str, body: Any) -> tuple[int, Any]:
        found = [generated("v") for _ in body["input_ids"]]
        for n, (one, prompt) in enumerate(zip(found, body["input_ids"], strict=True)):
            number = n % 2
            one["output_ids"] = [prompt[0], len(prompt), number]
            one["meta_info"] |= {"output_token_logprobs": [[-1.0, 5, None], [None, 5, None], [-number - 2.0, 5, None]]}
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
    """On a rank: what `check_probes` says of servers that are right, and of one that is off in some part or not finite;
    a server's log-probabilities are those of the trainer's whole logits, at the temperature of each place."""
    from megatron_refine.trainer import forward
    from tests.parity import build

    model, _ = build(config, torch.float32)
    asked: list[Any] = []

    def logprobs(text: list[int], at: float) -> list[float]:
        own = torch.tensor([text])
        with torch.no_grad():
            rows = forward._rows(model, own, forward.Branches(main_len=len(text)))
            logits = forward.unwrap(model).logits(rows.local[:, 0])
        return (logits[:-1] / at).log_softmax(-1).gather(1, own[0, 1:, None])[:, 0].tolist()

    class Asked:
        url = "http://a:1"

        def generate(self, **body: Any) -> Any:
            asked.append(body)
            found = []
            for number, prompt in enumerate(body["input_ids"]):
                written = [(number + j) % 97 for j in range(6)]
                read = [[None, 0, None]] + [[p, 0, None] for p in logprobs(prompt + written, 1.0)[: len(prompt) - 1]]
                drawn = [[p, 0, None] for p in logprobs(prompt + written, 0.5)[len(prompt) - 1 :]]
                meta = {"input_token_logprobs": read, "output_token_logprobs": drawn, "weight_version": "v"}
                found.append({"output_ids": written, "meta_info": meta})
            return found

    server: Any = Server(Asked(), 1, Path())  # type: ignore[arg-type]
    right = guard.ask_probe(server, config, "v")
    found = {"asked": str([sorted(body.items()) for body in asked])}
    for name, part, wrong in (
        ("right", "prompts", 0.0), ("off", "prompts", 2e-3), ("below", "prompts", 5e-4), ("nan", "prompts", math.nan),
        ("hit", "prefix hits", 2e-3),
    ):  # fmt: skip
        theirs = [("v", *rest[:4], [p + wrong * (rest[0] == part) for p in rest[4]]) for _, *rest in right]
        try:
            guard.check_probes(model, config, [right, theirs])  # type: ignore[list-item]
            found[name] = ""
        except ServerError as error:
            found[name] = str(error)
    return found


def test_a_probe_that_is_off_or_not_finite_is_refused(ranks: Zygote, tmp_path: Path) -> None:
    """Its prompts are scored at temperature 1, what the server wrote at that of the rollouts."""
    config = small_config(tmp_path, "refine.rollout_temperature=0.5")
    found = ranks(1, probes, config=config)[0]
    assert found["right"] == found["below"] == ""
    assert found["off"].startswith("v: the probe's log-probabilities (prompts) are 0.002 nats")
    assert "above 0.001" in found["off"] and found["hit"].startswith("v: the probe's log-probabilities (prefix hits)")
    assert found["nan"].startswith("v: the probe's log-probabilities (prompts) are nan nats")
    for words in ("'extra_key', 'v'", "'temperature': 0.5", "'max_new_tokens': 3", "('logprob_start_len', 0)"):
        assert words in found["asked"], words


def test_what_was_to_be_written_with_other_weights_is_asked_for_anew(scripted: Any) -> None:
    labels: list[str] = []

    def answer(path: str, body: Any) -> Any:
        labels.append(body["extra_key"])
        return b"no JSON"

    begun, clients = Begun(request(), 0), [Client(scripted(answer), 5.0)]
    for label in ("old", "new", "new"):
        begun.ask(clients, label, 8)
        collector = begun.collector
        with pytest.raises(ServerError):
            begun.result()
    assert labels == ["old", "new", "new"] and begun.collector is collector


def test_a_collector_keeps_what_it_has(scripted: Any) -> None:
    seen: list[int] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        seen.append(len(body["input_ids"][0]))
        return (200, [generated("v") for _ in body["input_ids"]]) if len(seen) != 5 else (500, "lost")

    collector, clients = Collector(request(), "v", 1), [Client(scripted(answer), 5.0)]
    with pytest.raises(ServerError, match="500: lost"):
        collector.run(clients)
    collector.run(clients)
    assert seen == [3, 8, 9, 1, 16, 1, 16, 2]  # the first sequence is not asked again


@pytest.mark.parametrize(
    ("bad", "message"),
    [(generated("other"), "serves weights 'other', not 'v'"), (generated("v", tokens=2), "2 of 3 tokens")],
)
def test_answers_of_other_weights_or_cut_short_are_refused(bad: Any, message: str, scripted: Any) -> None:
    client = Client(scripted(lambda path, body: (200, [bad for _ in body["input_ids"]])), 5.0)
    with pytest.raises(ServerError, match=message):
        Collector(request(), "v", 1).run([client])
