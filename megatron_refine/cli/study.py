"""Run a study: arms that go on from the same bases, compared as its file says beforehand.

    megatron-refine study configs/study/full.yaml [--jobs 2] [--page docs/learning.md]

The same command goes on where it stopped. Without --page the tables go to `study.md` in the study's folder.
Exit codes: 0 done, 1 a run failed, 2 what was asked cannot be.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_refine import usage
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument
from megatron_refine.files import TornError, read, write
from megatron_refine.study.plan import read_plan

if TYPE_CHECKING:
    from megatron_refine.study.run import Train

TABLES = "{contrasts}\n\n{arms}\n\n{costs}\n\n{seeds}\n"


def main(arguments: list[str], train: "Train | None" = None) -> int:
    """Run and tell. train: how a run is made, where not in a process of its own. Returns the exit code."""
    parser = usage.parser("study", __doc__)
    parser.add_argument("plan", type=path_argument, metavar="FILE", help="the file of the study")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--page", type=path_argument, metavar="FILE", help="page to write, from its template FILE.in")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs}: must be 1 or more")
    try:
        plan = read_plan(options.plan)
        target: Path = options.page or Path(plan.out) / "study.md"
        template = read(target.with_name(target.name + ".in")) if options.page else TABLES
    except (ConfigError, TornError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    from megatron_refine.study import page, run

    try:
        run.run_all(plan, options.jobs, lambda line: print(line, flush=True), train or run.train)
    except run.StudyError as error:
        print(error, file=sys.stderr)
        return 1
    write(target, page.page(template, plan))
    print(target)
    return 0
