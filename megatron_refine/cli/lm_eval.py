"""Run tasks of lm-evaluation-harness on a model.

    megatron-refine lm-eval MODEL --tasks lambada_openai,arc_easy --out results.json
    torchrun --nproc-per-node 2 -m megatron_refine lm-eval MODEL --tasks niah_single_1 --tp 2 --out results.json \
        --metadata '{"max_seq_lengths": [4096, 8192]}'

MODEL is a checkpoint, a run, or a folder in Hugging Face's format. Prints the harness's table; --out gets its results.
Exit codes: 0 done, 2 what was asked cannot be, 4 weights, checkpoint, or files of a task.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from megatron_refine import launcher, usage
from megatron_refine.cli.asking import add_model, found, on_ranks
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument, text_argument

HUB_SECONDS = 5.0  # until a hub that does not answer is done without


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("lm-eval", __doc__)
    add = parser.add_argument
    add_model(parser, "requests")
    add("--tasks", required=True, help="names of tasks and groups, with commas between; * stands for any characters")
    add("--out", required=True, type=path_argument, metavar="FILE", help="the results, as JSON")
    add("--limit", type=float, help="most examples of a task; below 1: their share")
    add("--num-fewshot", type=int, help="examples in the prompt (default: the task's)")
    add("--gen-kwargs", default="", metavar="K=V,...", help="generation settings in place of the task's")
    add("--metadata", default="{}", metavar="JSON", help="what a task takes, RULER for one: max_seq_lengths, tokenizer")
    add("--include-path", type=text_argument, action="append", default=[], metavar="DIR", help="folder of more tasks")
    add("--log-samples", action="store_true", help="every prompt and answer goes into the results")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the tasks; the first rank prints the table, or one line for what is wrong. Returns the exit code."""
    options = parse(arguments)

    def answer(first: bool) -> str:
        if not first:
            logging.disable(logging.WARNING)  # the first rank says the same
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(None):  # tasks print as they like
            return f"{run(options)}\n{options.out}"

    if not launcher.speaks():
        os.environ["TQDM_DISABLE"] = "1"  # the harness's own bars, before tqdm is imported
    return on_ranks(answer)


def run(options: argparse.Namespace) -> str:
    """Check what is asked, then read the weights, on each rank. Returns the first rank's table."""
    from megatron_refine.files import write

    _, _, text, weights = found(options)
    if options.out.is_dir():
        raise ConfigError(f"--out {options.out}: is a folder; name a file")
    _reach_hub()
    from megatron_refine.eval.harness import HarnessLM  # tells where lm_eval is missing

    manager, names = find_tasks(options, text.path)
    model = HarnessLM(weights(), batch_size=options.batch_size, tokenizer_name=str(text.path))
    results = evaluate(options, model, manager, names)
    if not model.ranks.is_main:
        return ""
    from lm_eval.utils import handle_non_serializable, make_table

    write(options.out, json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False))
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


def _reach_hub() -> None:
    """Do without Hugging Face's hub where it does not answer: its libraries would ask again and again, for minutes."""
    import httpx

    if os.environ.get("HF_HUB_OFFLINE"):
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        httpx.head(hub, timeout=HUB_SECONDS)
    except httpx.HTTPError as error:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        if launcher.speaks():
            print(f"{hub}: does not answer ({error}); only tasks whose data are here already can run", file=sys.stderr)


def find_tasks(options: argparse.Namespace, tokenizer: Path) -> tuple[Any, list[str]]:
    """The harness's tasks and the names that are asked for. Raises ConfigError for a name of none."""
    from lm_eval.tasks import TaskManager

    try:
        metadata = json.loads(options.metadata)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--metadata: no valid JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise ConfigError(f"--metadata {options.metadata}: must be a JSON object, {{...}}")
    for folder in options.include_path:
        if not Path(folder).is_dir():
            raise ConfigError(f"--include-path {folder}: no such folder")
    folder = str(tokenizer if tokenizer.is_dir() else tokenizer.parent)  # RULER's tasks measure prompts with it
    manager = TaskManager(include_path=options.include_path, metadata={"tokenizer": folder} | metadata)
    found: list[str] = []
    for name in filter(None, options.tasks.split(",")):
        matches = [name] if name in manager.all_tasks else manager.match_tasks([name])
        if not matches:
            raise ConfigError(f"--tasks: {name}: no such task or group; `lm_eval ls tasks` lists those of lm_eval")
        found += [match for match in matches if match not in found]
    if not found:
        raise ConfigError("--tasks: names no task; give one or more, with commas between")
    return manager, found


def evaluate(options: argparse.Namespace, model: Any, manager: Any, names: list[str]) -> Any:
    """The harness's results. Raises ConfigError where a task lacks a package."""
    from lm_eval import simple_evaluate

    limit = options.limit
    try:
        return simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            limit=int(limit) if limit and limit >= 1 else limit,
            gen_kwargs=options.gen_kwargs or None,
            log_samples=options.log_samples,
            bootstrap_iters=100_000 if model.ranks.is_main else 0,  # of standard errors, which only one rank reports
        )
    except ImportError as error:
        raise ConfigError(f"--tasks {options.tasks}: {error}; install it") from None
