"""Reproduce tables and figures of the REFINE paper (arXiv 2602.16704), and ablations beside them.

    megatron-refine reproduce tab3 tab5 --start delta_net_1.3b=FOLDER lact_760m=FOLDER --train-data docs.parquet \\
        --booksum books.parquet --longbench DIR [--run | --collect] [key.sub=value ...]
    megatron-refine reproduce all --scale tiny

ITEM is tab3 tab4 tab5 tab6 tab7 tabe1 fig4 fig5 fige2 fige3, or of this project compute rollouts group lambda tau; all
takes them all. Prints the commands; --run runs those that are not done, one after the other, and --collect writes
ITEM.md, the paper's numbers beside ours, of what is there. docs/reproduction.md. Exit codes: 0 done, 2 what was asked
cannot be, 130 interrupted; else that of the command that failed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_refine import usage
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument, text_argument
from megatron_refine.files import TornError

if TYPE_CHECKING:
    from megatron_refine.reproduce.setting import Setting


def main(arguments: list[str], call: Callable[[Sequence[str], int], int] | None = None) -> int:
    """Print, run or collect. `call` runs a command on ranks, by default in processes of its own. Returns the exit
    code."""
    options = parse(arguments)
    try:
        return _reproduce(options, call)
    except (ConfigError, TornError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("reproduce", __doc__)
    add = parser.add_argument
    add("items", nargs="+", metavar="ITEM", help="tables and figures; key.sub=value sets a key of every training")
    add("--model", nargs="+", default=[], help="delta_net_1.3b, lact_760m (default: both)")
    add("--scale", choices=["full", "tiny"], default="full", help="tiny: in minutes on two cores, and at once")
    add("--out", type=path_argument, default=Path("runs/reproduce"), help="folder of runs and pages (runs/reproduce)")
    add("--ranks", type=int, default=8, help="ranks of this machine, or of a node (8)")
    add("--start", nargs="+", default=[], metavar="MODEL=FOLDER", help="released weights, a run or a checkpoint")
    add("--tokenizer", type=text_argument, default="", metavar="FILE", help="default: the one that came with --start")
    add("--train-data", type=text_argument, nargs="+", default=[], metavar="FILE", help="long documents to train on")
    add("--booksum", type=text_argument, nargs="+", default=[], metavar="FILE", help="held-out documents")
    add("--ruler-qa", type=text_argument, default="", metavar="DIR", help="the paper's RULER QA files, by length")
    add("--longbench", type=text_argument, default="", metavar="DIR", help="the twelve files of LongBench")
    add("--essays", type=text_argument, default="", metavar="DIR", help="texts that hide needles (a built-in corpus)")
    add("--text", type=text_argument, default="", metavar="FILE", help="of fige2")
    add("--site", type=text_argument, default="", metavar="FILE", help="SLURM: a YAML file of launch/site.yaml's keys")
    add("--nodes", type=int, default=0, help="SLURM: most nodes of a training, which `submit` gets")
    add("--run", action="store_true", help="run, or submit, what is not done yet")
    add("--collect", action="store_true", help="write the pages of what is there; start nothing")
    return parser.parse_intermixed_args(arguments)


def _reproduce(options: argparse.Namespace, call: Callable[[Sequence[str], int], int] | None) -> int:
    from megatron_refine.reproduce import running
    from megatron_refine.reproduce.page import collect
    from megatron_refine.reproduce.setting import check
    from megatron_refine.reproduce.tiny import tiny

    items, models, setting = asked(options)
    if setting.tiny:
        setting = tiny(setting)
    call, code = call or running.spawn, 0
    if not options.collect:
        check(setting, items, models)
        jobs = running.listed(setting, items, models)
        running.check_made(setting.out, jobs)
        if setting.nodes and options.run:
            return running.submit_all(setting, jobs, call, _say)
        if not (options.run or setting.tiny):
            print(running.printed(setting, jobs))
            return 0
        code = running.run_here(setting.out, jobs, call, _say)
    for item in items:
        _say(f"written: {collect(setting, item, models)}")
    return code


def asked(options: argparse.Namespace) -> "tuple[list[str], list[str], Setting]":
    """Items, models and setting. Raises ConfigError."""
    from megatron_refine.config import read_as
    from megatron_refine.reproduce.items import ITEMS, MODELS
    from megatron_refine.reproduce.setting import Setting, starts
    from megatron_refine.slurm.site import Site

    overrides = [word for word in options.items if "=" in word]
    names = [word for word in options.items if "=" not in word]
    items = list(ITEMS) if names == ["all"] else names
    for option, asked, known in (("ITEM", items, [*ITEMS]), ("--model", options.model, [*MODELS])):
        for name in asked:
            if name not in known:
                raise ConfigError(f"{option} {name}: unknown; choose of {', '.join(known)}")
    if not items:
        raise ConfigError("ITEM: names no table or figure; name some, or all")
    for name, least in (("ranks", 1), ("nodes", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name}={getattr(options, name)}: must be {least} or more")
    site = read_as(Path(options.site), Site) if options.site else Site()
    return items, options.model or list(MODELS), Setting(
        out=options.out / options.scale, scale=options.scale, ranks=options.ranks, start=starts(options.start),
        tokenizer=options.tokenizer, train_data=tuple(options.train_data), booksum=tuple(options.booksum),
        ruler_qa=options.ruler_qa, longbench=options.longbench, essays=options.essays, text=options.text,
        overrides=tuple(overrides), nodes=options.nodes, site=options.site,
        node_ranks=site.ranks_per_node,
    )  # fmt: skip


def _say(line: str) -> None:
    print(line, flush=True)
