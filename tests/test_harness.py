"""lm-evaluation-harness on a real model, with tasks of our own, against values worked out by hand; the command line."""

import argparse
import ast
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conversions import write_random
from tests.lanes import short
from tests.runs import MODEL, End, _captured
from tests.zygote import Zygote

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install megatron-refine[eval]")

LIMIT, STOP = 6, "e"
PROMPTS = ["def parse(", "import ", "class Action", "return self", "for name in ", "if not"]
CHOICES = [["argument", "a", "parser.add_argument"], ["None", "self.None", "x"], ["(", "()", "[ ]"], ["is", "not", "."]]
TEXTS = ["def first(self): return 1", "x", "a line\nand one more"]
TASKS = {
    "write": f"""
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["{STOP}", ""], max_gen_toks: {LIMIT}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
    "choose": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "sample": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: true, temperature: 0.7}
""",
    "download": "dataset_path: json\ndataset_kwargs: {data_files: {test: %s/none.json}}",
}
COMMON = "\ntask: %s\ntest_split: test\ncustom_dataset: !function documents.of_%s\n"
READER = """
import json, pathlib, datasets
def documents(name):
    rows = json.loads((pathlib.Path(__file__).parent / f"{name}.json").read_text())
    return {"test": datasets.Dataset.from_list(rows)}
"""


def write_tasks(folder: Path, answers: list[str]) -> None:
    """A folder of tasks: every other answer is what the model writes."""
    folder.mkdir()
    wanted = [answer if i % 2 else "something else" for i, answer in enumerate(answers)]
    rows: dict[str, Any] = {
        "write": [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, wanted, strict=True)],
        "choose": [{"prompt": p, "choices": c, "gold": 0} for p, c in zip(PROMPTS, CHOICES, strict=False)],
        "read": [{"text": text} for text in TEXTS],
        "sample": [{"prompt": p, "answer": ""} for p in PROMPTS],
    }
    reader = READER
    for name, task in TASKS.items():
        if name in rows:
            (folder / f"{name}.json").write_text(json.dumps(rows[name]), encoding="utf-8")
            reader += f"def of_{name}(**_): return documents('{name}')\n"
            task += COMMON % (name, name)
        else:
            task = TASKS["sample"] + f"task: {name}\ntest_split: test\n" + task % folder
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    (folder / "documents.py").write_text(reader, encoding="utf-8")
    (folder / "both.yaml").write_text("group: both\ntask: [write, choose]\n", encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer that knows words of code."""
    from megatron_refine.data.tokenizer import train_tokenizer
    from megatron_refine.models.family import FAMILIES

    folder = tmp_path_factory.mktemp("harness") / "model"
    write_random(folder, FAMILIES["delta_net"].model_validate(MODEL))
    texts = (Path(module.__file__ or "").read_text(encoding="utf-8") for module in (argparse, ast))
    train_tokenizer(texts, MODEL["vocab_size"], folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, ranks: Zygote) -> dict[str, Any]:
    return ranks(1, by_hand, model=model)[0]


@pytest.fixture(scope="module")
def tasks(model: Path, expected: dict[str, Any]) -> Path:
    write_tasks(model.parent / "tasks", expected["answers"])
    return model.parent / "tasks"


def loaded(model: Path, tp: int = 1, bos: bool = False) -> Any:
    """On a rank: the model in fp32."""
    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load
    from megatron_refine.platform import rendezvous
    from megatron_refine.platform.megatron.install import install

    install()
    source = find(model)
    config = load.layout(source, tp=tp, sp=tp > 1, world=rendezvous.world_size())
    return load.load(source, config, load.text(source, "", bos))


def by_hand(model: Path) -> dict[str, Any]:
    """On one rank, a text at a time, without lm_eval: answers, log-likelihoods of choices and of texts."""
    import torch

    from megatron_refine.trainer import forward

    it = loaded(model)

    def ids(text: str) -> list[int]:
        return it.tokenizer.encode([text])[0]

    def logprobs(tokens: list[int]) -> Any:
        rows = forward.main_pass(it.model, torch.tensor([tokens])).rows.local[:, 0]
        return it.model.logits(rows).detach().double().log_softmax(-1)

    def likelihood(context: list[int], whole: list[int]) -> float:
        at = range(len(context) - 1, len(whole) - 1)
        return float(logprobs(whole)[at, whole[len(context) :]].sum())

    def answer(prompt: str) -> str:
        written: list[int] = []
        while len(written) < LIMIT and STOP not in it.tokenizer.decode(written):
            written.append(int(logprobs(ids(prompt) + written)[-1].argmax()))
        return it.tokenizer.decode(written).split(STOP)[0]

    eos = [it.tokenizer.eos_id]
    return {
        "answers": [answer(prompt) for prompt in PROMPTS],
        "choices": [
            [likelihood(ids(prompt.rstrip()), ids(f"{prompt} {choice}")) for choice in choices]
            for prompt, choices in zip(PROMPTS, CHOICES, strict=False)
        ],
        "texts": [likelihood(eos, eos + ids(text)) for text in TEXTS],
        "no context": likelihood(eos, eos + ids("self")),
        "blank": likelihood(ids("return"), ids("return self")),
        "with BOS": likelihood([it.tokenizer.bos_id], [it.tokenizer.bos_id, *ids("self")]),
    }


def evaluated(model: Path, tasks: Path, tp: int, names: list[str]) -> Any:
    """On a rank: results and samples of the harness."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from megatron_refine.eval.harness import HarnessLM

    lm = HarnessLM(loaded(model, tp), batch_size=2)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0)


@pytest.mark.parametrize(("world", "tp"), short([(1, 1), (2, 2), (2, 1)], lambda world, tp: world == 1))
def test_tasks_score_as_by_hand(
    world: int, tp: int, model: Path, tasks: Path, expected: dict[str, Any], ranks: Zygote
) -> None:
    """All three kinds of requests, on one rank, on two of tp with sp, on two replicas; one rank reports."""
    found, *others = ranks(world, evaluated, model=model, tasks=tasks, tp=tp, names=["both", "read"])
    assert others == [None] * (world - 1)
    samples, scores = found["samples"], {name: found["results"][name] for name in ("write", "choose", "read")}
    assert [s["filtered_resps"][0] for s in samples["write"]] == expected["answers"]
    assert scores["write"]["exact_match,none"] == 0.5
    likelihoods = [[float(r[0]) for r in s["filtered_resps"]] for s in samples["choose"]]
    for own, wanted in zip(likelihoods, expected["choices"], strict=True):
        assert own == pytest.approx(wanted, rel=1e-5)

    def accuracy(weight: Callable[[str], float]) -> float:
        rows = [
            [x / weight(c) for x, c in zip(*row, strict=True)] for row in zip(expected["choices"], CHOICES, strict=True)
        ]
        return sum(row.index(max(row)) == 0 for row in rows) / len(rows)

    assert scores["choose"]["acc,none"] == accuracy(lambda choice: 1.0)
    assert scores["choose"]["acc_norm,none"] == accuracy(len)
    total, words = sum(expected["texts"]), sum(len(text.split()) for text in TEXTS)
    assert scores["read"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert scores["read"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert found["config"]["tensor_parallel"] == tp and found["config"]["replicas"] == world // tp


def asked(model: Path) -> dict[str, Any]:
    """On each of two replicas: what the harness's own tasks do not reach."""
    from megatron_refine.config import ConfigError
    from megatron_refine.eval.harness import HarnessLM, question

    it, found = loaded(model), dict[str, Any]()
    lm, with_bos = HarnessLM(it, tokenizer_name="here"), HarnessLM(loaded(model, bos=True))

    def ask(method: Callable[[list[Any]], list[Any]], *arguments: tuple[Any, ...]) -> list[Any]:
        return method([SimpleNamespace(args=each) for each in arguments])

    def refusal(call: Callable[..., Any], *arguments: Any) -> str:
        try:
            return f"nothing refused: {call(*arguments)}"
        except ConfigError as error:
            return str(error)

    found["likelihoods"] = ask(lm.loglikelihood, ("", "self"), ("return ", "self"), ("return", " self"), (" ", "self"))
    found["with BOS"] = ask(with_bos.loglikelihood, ("", "self"))
    found["limits"] = [question("", settings) for settings in (
        {}, {"until": "a", "max_new_tokens": 3}, {"max_tokens": 5, "max_gen_toks": 4, "temperature": 0, "top_p": 0.9},
        {"do_sample": False, "temperature": 1, "num_beams": 1})]  # fmt: skip
    for settings in ({"do_sample": True}, {"temperature": 0.5}, {"num_beams": 2}, {"min_p": 1}, {"max_gen_toks": 0}):
        found[str(settings)] = refusal(question, "", settings)
    found["ranks"] = refusal(ask, lm.generate_until, (f"prompt {it.ranks.rank}", {}))
    found["merged"] = refusal(ask, lm.loglikelihood, ("self", ""))
    it.tokenizer.eos_id = None
    found["nothing"] = refusal(ask, lm.loglikelihood_rolling, ("self",))
    return found | {"name": lm.tokenizer_name, "template": lm.chat_template()}


def test_requests_at_the_edges(model: Path, expected: dict[str, Any], ranks: Zygote) -> None:
    for found in ranks(2, asked, model=model):
        no_context, blank, plain, only_blank = [total for total, _ in found["likelihoods"]]
        assert no_context == pytest.approx(expected["no context"], rel=1e-5)
        assert blank == plain == pytest.approx(expected["blank"], rel=1e-5)
        assert math.isfinite(only_blank) and only_blank != no_context
        assert found["with BOS"][0][0] == pytest.approx(expected["with BOS"], rel=1e-5)
        limits = [(each.max_new_tokens, each.stops) for each in found["limits"]]
        assert limits == [(256, ()), (3, ("a",)), (4, ()), (256, ())]
        assert "do_sample=True, temperature=None), and only greedy" in found["{'do_sample': True}"]
        assert "temperature=0.5), and only greedy" in found["{'temperature': 0.5}"]
        for settings in ("{'num_beams': 2}", "{'min_p': 1}"):
            assert found[settings].startswith(f"generation settings {settings}: only until, max_gen_toks and greedy")
        assert found["{'max_gen_toks': 0}"] == "max_gen_toks=0: an answer has one token or more; raise it"
        assert found["ranks"].startswith("rank 1 has other requests than rank 0; start all ranks with the same")
        assert found["merged"] == (
            "answer '' adds no token to the prompt that ends in 'self', so it cannot be scored; leave this task out "
            "of --tasks"
        )
        assert "no EOS token to begin it with" in found["nothing"]
        assert (found["name"], found["template"]) == ("here", "")


def command(arguments: list[str], missing: bool = False) -> End:
    """On a rank: the command, without lm_eval's own tasks, which take 14 s to list; `missing`: without lm_eval."""
    import functools
    import sys

    from megatron_refine.cli.lm_eval import main

    os.environ["HF_HUB_OFFLINE"] = "1"
    if missing:
        sys.modules |= {"lm_eval": None, "lm_eval.api.model": None}  # type: ignore[dict-item]
    else:
        from lm_eval import tasks

        tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)  # type: ignore
    with _captured() as texts:
        code = main(arguments)
    return End(code, *texts)


def test_command(model: Path, tasks: Path, ranks: Zygote, tmp_path: Path) -> None:
    """On two ranks: a group by pattern, a limit, the table and the file."""
    out = tmp_path / "new" / "results.json"
    line = [str(model), "--tasks", "bo*,read", "--include-path", str(tasks), "--out", str(out), "--limit", "2"]
    first, second = ranks(2, command, arguments=[*line, "--tp", "2", "--sp", "--log-samples"])
    assert first.code == second.code == 0 and second.out == ""
    assert first.out.count("|exact_match") == 1 and first.out.endswith(f"\n{out}\n")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["results"]["write"]["exact_match,none"] == 0.5 and found["config"]["limit"] == 2
    assert [len(rows) for rows in found["samples"].values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--tasks", "write,chose"], 2, "--tasks: chose: no such task or group; `lm_eval ls tasks` lists those of"),
        (["--tasks", ","], 2, "--tasks: names no task; give one or more, with commas between"),
        (["--tasks", "sample"], 2, "the task wants samples (do_sample=True, temperature=0.7), and only greedy"),
        (["--tasks", "download"], 4, "Unable to find '{tasks}/none.json'"),
        (["--metadata", "[1]"], 2, "--metadata [1]: must be a JSON object, {{...}}"),
        (["--metadata", "{{"], 2, "--metadata: no valid JSON: Expecting property name"),
        (["--include-path", "/nowhere"], 2, "--include-path /nowhere: no such folder"),
        (["--out", "{tasks}"], 2, "--out {tasks}: is a folder; name a file"),
        (["--tokenizer", "/nowhere"], 2, "--tokenizer: /nowhere: no such file"),
        (["--tp", "3"], 2, "parallel.tp=3"),
    ],
)  # fmt: skip
def test_command_errors(
    change: list[str], code: int, message: str, model: Path, tasks: Path, ranks: Zygote, tmp_path: Path
) -> None:
    line = [str(model), "--tasks", "write", "--include-path", str(tasks), "--out", str(tmp_path / "o.json")]
    [end] = ranks(1, command, arguments=line + [part.format(tasks=tasks) for part in change])
    *before, last = end.err.splitlines()
    assert (end.code, end.out) == (code, "") and message.format(tasks=tasks) in last, end.err
    # sample: found by its first request, under the harness's own lines; 3: two problems, a line each
    assert not before or change[-1] in ("sample", "3")


def test_missing_model_and_missing_harness(model: Path, ranks: Zygote, tmp_path: Path) -> None:
    rest = ["--tasks", "write", "--out", str(tmp_path / "o.json")]
    [end] = ranks(1, command, arguments=["/nowhere", *rest], missing=True)
    assert end == End(2, "", end.err) and end.err.startswith("/nowhere: no such folder; name a run, a checkpoint or")
    [end] = ranks(1, command, arguments=[str(model), *rest], missing=True)
    assert end.code == 2 and end.err.count("\n") == 1
    assert "lm_eval is not usable" in end.err and "pip install megatron-refine[eval]" in end.err
