"""Scaling experiments: run the points of a sweep and put their throughput, efficiency and times side by side.

    megatron-refine scaling SWEEP.yaml [--dry-run] [--collect] [--slurm --site site.yaml]
    megatron-refine scaling --predict CONFIG [CONFIG ...] --gpus 8,64,256 [key.sub=value ...]

Points run one after the other on this machine, or as SLURM arrays; the same command goes on where it stopped.
docs/scaling.md. Exit codes: 0 done, 1 points failed (they are named), 2 what was asked cannot be, 130 interrupted.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_refine import config as configuration
from megatron_refine import usage
from megatron_refine.config.paths import path_argument


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = usage.parser("scaling", __doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="the sweep; with --predict configurations")
    parser.add_argument("--dry-run", action="store_true", help="list the points and their commands; start nothing")
    parser.add_argument("--collect", action="store_true", help="results of what has run; start nothing")
    parser.add_argument("--slurm", action="store_true", help="submit the points as arrays, one a number of nodes")
    parser.add_argument("--site", type=path_argument, help="with --slurm: a YAML file of launch/site.yaml's keys")
    parser.add_argument("--predict", action="store_true", help="the estimator's table for numbers of GPUs")
    parser.add_argument("--gpus", default="8,64,256,1024", help="with --predict: numbers of GPUs")
    options = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _predict(options) if options.predict else _sweep(options)
    except configuration.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130


def _sweep(options: argparse.Namespace) -> int:
    from megatron_refine.scaling import run
    from megatron_refine.scaling.sweep import points, read_sweep

    if len(options.files) != 1:
        raise configuration.ConfigError(f"{' '.join(options.files)}: name one sweep")
    path = Path(options.files[0])
    sweep = read_sweep(path)
    found, left_out = points(sweep, path)
    for line in left_out:
        print(f"left out: {line}")
    if options.dry_run and not options.slurm:
        for point in found:
            print(f"{point.name}: dp {point.dp}\n  {' '.join(run.command(sweep, point))}")
        return 0
    if options.slurm:
        from megatron_refine.config import read_as
        from megatron_refine.slurm.site import Site

        site = read_as(options.site, Site) if options.site else Site()
        ids = run.submit_jobs(sweep, found, site, options.dry_run)
        print("\n".join(ids) if options.dry_run else f"submitted {', '.join(ids)}; results: the same with --collect")
        return 0
    if not options.collect:
        run.run_here(sweep, found, lambda line: print(line, flush=True))
    return _report(sweep, found)


def _report(sweep: Any, found: Any) -> int:
    from megatron_refine.scaling.results import as_table, collect, write

    results, missing = collect(sweep, found)
    files = write(Path(sweep.out), sweep, results, missing)
    print(as_table(results, missing))
    print(f"written: {', '.join(map(str, files))}")
    return 1 if missing else 0


def _predict(options: argparse.Namespace) -> int:
    from megatron_refine.scaling.predict import table

    try:
        worlds = [int(number) for number in options.gpus.split(",")]
    except ValueError:
        raise configuration.ConfigError(f"--gpus {options.gpus}: write whole numbers with commas") from None
    print(table(*configuration.files_and_overrides(options.files), worlds))
    return 0
