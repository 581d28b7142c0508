"""Score a model on RULER, LongBench and held-out documents.

    megatron-refine evaluate MODEL --tasks niah,longbench,heldout --lengths 4096,8192 --data DIR --out DIR
    torchrun --nproc-per-node 2 -m megatron_refine evaluate MODEL ... --tp 2

MODEL is a checkpoint, a run, or a folder in Hugging Face's format. The folder --out gets every answer as it comes, then
scores.json and scores.md; the same command goes on where it stopped. Exit codes: 0 done, 2 what was asked cannot be,
4 weights or checkpoint.
"""

import argparse
import sys

from megatron_refine import usage
from megatron_refine.cli.asking import add_model, found, on_ranks
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument, text_argument

LONGEST = 1 << 30  # tokens of a prompt
GENERATED = 500  # samples of a generated task and length, as RULER's own


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("evaluate", __doc__)
    add = parser.add_argument
    add_model(parser, "prompts")
    groups = "niah, ruler, ruler_qa, longbench, heldout"
    add("--tasks", required=True, type=_names, help=f"names of tasks and groups: {groups}")
    add("--lengths", type=_numbers, default=[4096], help="context lengths of RULER's tasks, in tokens (4096)")
    most = "samples of a generated task and length (500), most rows of a file (all) and documents (500)"
    add("--examples", type=int, default=0, help=most)
    add("--data", type=text_argument, default="", metavar="DIR", help="of ruler_qa, longbench, qa_squad and qa_hotpot")
    add("--essays", type=text_argument, default="", metavar="DIR", help="texts for essay haystacks (a built-in corpus)")
    add("--heldout", type=text_argument, nargs="+", default=[], metavar="FILE", help="text, jsonl or parquet documents")
    add("--text-column", default="text", help="column of jsonl and parquet documents (text)")
    add("--heldout-length", type=int, default=16384, help="tokens of a document that count (16384)")
    add("--out", required=True, type=path_argument, metavar="DIR", help="folder of answers and scores")
    add("--seed", type=int, default=1, help="of generated examples (1)")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


def main(arguments: list[str]) -> int:
    """Evaluate; the first rank prints the tables, or one line for what is wrong. Returns the exit code."""
    options = parse(arguments)

    def answer(first: bool) -> str:
        return f"{run(options)}\n\n{options.out}/scores.md"

    return on_ranks(answer)


def run(options: argparse.Namespace) -> str:
    """Check everything that is asked, then read the weights, on each rank. Returns the tables."""
    from megatron_refine.data.tokenizer import stated
    from megatron_refine.eval import evaluation
    from megatron_refine.eval.results import Results
    from megatron_refine.eval.suite import Request, collect
    from megatron_refine.platform import rendezvous

    _check(options)
    source, config, text, weights = found(options)
    names = [name for name in options.tasks if name != evaluation.HELDOUT]
    if evaluation.HELDOUT in options.tasks and not options.heldout:
        raise ConfigError("--tasks heldout: needs --heldout FILE, the documents")
    lines = [stated(text.path, text.tokenizer)]
    first = rendezvous.global_rank() == 0
    results = Results(
        options.out,
        evaluation.identity(source, text, config.train.precision),
        writes=first,
        say=_say if first else _quiet,
    )
    rows = options.examples or None
    wanted = Request(
        names, options.lengths, rows or GENERATED, rows, options.seed, options.data, options.essays,
        config.model.family, say=_say if first else _quiet,
    )  # fmt: skip
    parts = collect(wanted, text.count, progress=first)
    documents = None
    if evaluation.HELDOUT in options.tasks:
        documents = evaluation.read_documents(
            options.heldout, options.text_column, text, options.heldout_length, rows or GENERATED,
            say=lines.append,
        )  # fmt: skip
    loaded = weights()
    for line in lines if first else ():
        _say(line)
    return evaluation.evaluate(str(options.model), parts, documents, loaded, results, options.batch_size)[1]


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # stdout has the tables


def _quiet(line: str) -> None:
    """Say nothing on the other ranks: the first says the same."""


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number that is too small, and where nothing is asked."""
    least = {"examples": 0, "batch_size": 1, "heldout_length": 2, "tp": 1}
    for name, number in least.items():
        if getattr(options, name) < number:
            key = name.replace("_", "-")
            raise ConfigError(f"--{key}={getattr(options, name)}: must be {number} or more")
    if long := [length for length in options.lengths if length > LONGEST]:
        raise ConfigError(f"--lengths={long[0]}: must be {LONGEST} or less")
    if not options.tasks:
        raise ConfigError("--tasks: names no task; name some, --tasks niah,longbench")
