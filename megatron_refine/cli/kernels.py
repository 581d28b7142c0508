"""Compile the Triton kernels of a configuration, or measure them, and pin what they run with.

    megatron-refine kernels warm --config FILE [key.sub=value ...] [--arch sm_90] [--jobs N] [--pinned]
    megatron-refine kernels measure --config FILE [key.sub=value ...] [--json FILE]
    megatron-refine kernels pin FILE [FILE ...]

warm     compile all that the steps launch into TRITON_CACHE_DIR, with or without a GPU: every candidate of every kernel
measure  on a GPU: time the candidates, and print the fastest
pin      write what files of --json say into the tables that runs take their kernels' configurations from

Exit codes: 0, 2 what was asked cannot be. More: docs/gpu.md.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_refine import config as configuration
from megatron_refine import extras, usage
from megatron_refine.config.paths import path_argument
from megatron_refine.files import write_json
from megatron_refine.models.cost import operations
from megatron_refine.models.family import FAMILIES


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("kernels", __doc__)
    add = parser.add_argument
    add("action", choices=["warm", "measure", "pin"])
    usage.add_config(parser, required=False)  # pin takes files in the place of overrides
    add("--arch", default="sm_90", help="warm: the GPU's architecture (default: sm_90)")
    add("--jobs", type=int, default=0, metavar="N", help="warm: processes (default: one a core)")
    add("--passes", default="", help="warm: of main,branch,decode (default: all)")
    add("--pinned", action="store_true", help="warm: of each kernel the candidate that is pinned, not all")
    add("--json", type=path_argument, metavar="FILE", help="warm, measure: write what was found to it")
    add("--tables", type=path_argument, metavar="FOLDER", help="pin: where the tables are (default: the project's)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Do what is asked and print a table. Returns the exit code."""
    options = parse(arguments)
    try:
        print({"warm": _warm, "measure": _measure, "pin": _pin}[options.action](options))
    except configuration.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _load(options: argparse.Namespace) -> configuration.Config:
    if not options.config:
        raise configuration.ConfigError("--config: is missing; name a YAML file")
    return configuration.load(options.config, options.overrides, FAMILIES)


def _none(config: configuration.Config) -> str:
    """What is said of a family without Triton kernels."""
    return (
        f"{config.model.family}: launches no Triton kernels of its own. FlexAttention and torch.compile are "
        "Inductor's, which compiles on a GPU only: keep TORCHINDUCTOR_CACHE_DIR from run to run"
    )


def _warm(options: argparse.Namespace) -> str:
    config = _load(options)
    if "delta_rule" not in operations(config.model):
        return _none(config)
    jobs = options.jobs or len(os.sched_getaffinity(0))
    if jobs < 1:
        raise configuration.ConfigError(f"--jobs={options.jobs}: must be 1 or more")
    extras.check_triton()
    from megatron_refine.platform import hardware
    from megatron_refine.warm import choose, passes, run
    from megatron_refine.warm.driver import CARDS

    kinds = options.passes.split(",") if options.passes else [*passes.KINDS]
    if unknown := [kind for kind in kinds if kind not in passes.KINDS]:
        raise configuration.ConfigError(f"--passes={options.passes}: {unknown[0]} is none of {', '.join(passes.KINDS)}")
    if options.arch not in CARDS:
        raise configuration.ConfigError(f"--arch={options.arch}: unknown; choose one of {', '.join(CARDS)}")
    hardware.keep_compiled()
    start = time.monotonic()
    rows = run.warm(options.config, options.overrides, options.arch, kinds, options.pinned, jobs)
    if options.json:
        write_json(options.json, choose.compiled_file(options.arch, passes.shape(config), rows))
    title = f"{config.model.family}, {passes.shape(config)}, {options.arch}: {os.environ.get('TRITON_CACHE_DIR', '')}"
    return f"{title}\n{run.table(rows, time.monotonic() - start, jobs)}"


def _measure(options: argparse.Namespace) -> str:
    config = _load(options)
    if "delta_rule" not in operations(config.model):
        return _none(config)
    extras.check_triton()
    from megatron_refine.warm import measure

    found = measure.measure(config)
    if options.json:
        write_json(options.json, found)
    return measure.table(found)


def _pin(options: argparse.Namespace) -> str:
    if not options.overrides:
        raise configuration.ConfigError("pin: names no file; give those that `kernels warm --json` or `measure` wrote")
    from megatron_refine.kernels import tuning
    from megatron_refine.warm import choose

    return "\n".join(choose.update(options.tables or tuning.HERE, [Path(word) for word in options.overrides]))
