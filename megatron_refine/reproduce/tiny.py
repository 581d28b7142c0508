"""A reproduction in minutes on two cores: tiny models and data made on the spot, through the same commands."""

import argparse
import ast
import random
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_refine.data.tokenizer import train_tokenizer
from megatron_refine.files import write, write_rows
from megatron_refine.reproduce.items import LONGBENCH
from megatron_refine.reproduce.setting import Setting

LENGTH, NEEDLES, VOCABULARY = 128, 1024, 512
SIZE = (
    "model.num_layers=1", f"data.seq_length={LENGTH}", "data.split_documents=true", "train.steps=2",
    "train.global_batch_size=4", "update.mini_batch_size=2", "train.precision=fp32", "train.recompute=none",
    "optimizer.lr=1e-3", "eval.every=0", "eval.sequences=2", "checkpoint.every=0", "ttt.reset=per_batch",
    "task.max_new_tokens=4",
)  # fmt: skip
SHORT = {"piqa acc": "tiny_choice acc", "wikitext word_perplexity": "tiny_text word_perplexity"}
_TASK = """task: {name}
test_split: test
custom_dataset: !function documents.{name}
output_type: {output}
doc_to_text: "{prompt}"
doc_to_target: "{target}"
{more}metric_list: [{{metric: {metric}}}]
"""
_DOCUMENTS = """import datasets

WORDS = ["parser", "argument", "option", "default"]


def tiny_choice(**_):
    rows = [{"prompt": f"add the {word}, then the", "choices": [word, "moon"], "gold": 0} for word in WORDS]
    return {"test": datasets.Dataset.from_list(rows)}


def tiny_text(**_):
    rows = [{"text": f"The {word} of a command is read from the line."} for word in WORDS]
    return {"test": datasets.Dataset.from_list(rows)}
"""


def tiny(setting: Setting) -> Setting:
    """Make the data, all of it the same each time, and return the setting of tiny runs."""
    folder = setting.out / "data"
    tokenizer = folder / "tokenizer.json"
    source = str(argparse.__file__)
    if not tokenizer.exists():
        _questions(folder)
        _harness(folder / "tasks")
        train_tokenizer([Path(source).read_text(encoding="utf-8")], VOCABULARY, tokenizer)  # last: all is there
    text = str(textwrap.__file__)
    return replace(
        setting, ranks=1, start={}, tokenizer=str(tokenizer), train_data=(source, str(ast.__file__)), booksum=(text,),
        ruler_qa=str(folder / "ruler_qa"), longbench=str(folder / "longbench"), essays=text, text=text,
        tasks=str(folder / "tasks"), size=SIZE, niah={4096: NEEDLES}, qa={4096: LENGTH}, short=SHORT, seeds=2,
        examples=2,
    )  # fmt: skip


def _questions(folder: Path) -> None:
    draw = random.Random(1)
    for task in ("ruler_squadqa", "ruler_hotpotqa"):
        for split, count in (("8_train", 8), ("2_test", 2)):
            rows = [_question(draw, 3) for _ in range(count)]
            write_rows(folder / f"ruler_qa/{task}_{LENGTH}_{split}.jsonl", rows)
    for task in LONGBENCH:
        rows = [_question(draw, 2) | {"max_gen_tokens": 4} for _ in range(2)]
        write_rows(folder / f"longbench/{task}_{LENGTH}.jsonl", rows)


def _question(draw: random.Random, documents: int) -> dict[str, Any]:
    """A number of one of several names."""
    names = draw.sample(("parser", "option", "action", "default", "choice"), documents)
    numbers = [str(draw.randrange(100, 1000)) for _ in names]
    text = " ".join(f"The {name} has {number}." for name, number in zip(names, numbers, strict=True))
    return {"prompt": f"{text} Question: what has the {names[0]}? Answer:", "answers": [numbers[0]]}


def _harness(folder: Path) -> None:
    """Two tasks for lm-evaluation-harness."""
    choice = dict(output="multiple_choice", prompt="{{prompt}}", target="{{gold}}", metric="acc",
                  more='doc_to_choice: "{{choices}}"\n')  # fmt: skip
    words = dict(output="loglikelihood_rolling", prompt="", target="{{text}}", metric="word_perplexity", more="")
    for name, task in (("tiny_choice", choice), ("tiny_text", words)):
        write(folder / f"{name}.yaml", _TASK.format(name=name, **task))
    write(folder / "documents.py", _DOCUMENTS)
