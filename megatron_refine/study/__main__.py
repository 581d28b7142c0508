"""Run a study, and write its page.

    python -m megatron_refine.study configs/study/full.yaml [--jobs 2] [--page docs/learning.md]

The same command goes on where it stopped. Without --page the tables go to `study.md` in the study's folder.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument
from megatron_refine.files import read, speak_utf8, write
from megatron_refine.report import metrics
from megatron_refine.report.metrics import Row
from megatron_refine.report.summary import is_step
from megatron_refine.run.interrupt import quiet
from megatron_refine.study import run
from megatron_refine.study.findings import Ends
from megatron_refine.study.page import page
from megatron_refine.study.plan import Plan, bases, continuations, read_plan

TABLES = "{contrasts}\n\n{arms}\n\n{costs}\n\n{seeds}\n"


def main(arguments: list[str], train: run.Train = run.train) -> int:
    """Return the exit code: 0, 1 where a run failed, 2 with a line for what cannot be."""
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("plan", type=path_argument, help="the file of the study")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--page", type=path_argument, help="page to write, from its template PAGE.in")
    options = parser.parse_args(arguments)
    try:
        plan = read_plan(options.plan)
        run.run_all(plan, options.jobs, lambda line: print(line, flush=True), train)
        target: Path = options.page or Path(plan.out) / "study.md"
        template = read(target.with_name(target.name + ".in")) if options.page else TABLES
        write(target, page(template, plan, ends(plan), steps(plan)))
    except (ConfigError, run.StudyError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(target)
    return 0


def ends(plan: Plan) -> Ends:
    """Return the evaluations of all runs that have finished."""
    found = [(each, run.evaluations(each)) for each in (*bases(plan), *continuations(plan))]
    return [(each, *both) for each, both in found if both]


def steps(plan: Plan) -> dict[str, list[Row]]:
    """Return the training steps of the first model's arms."""
    first, found = next(iter(plan.models)), dict[str, list[Row]]()
    for each in continuations(plan):
        if each.model == first:
            rows = metrics.read(each.folder / metrics.METRICS)
            found.setdefault(each.arm, []).extend(row for row in rows if is_step(row))
    return found


if __name__ == "__main__":
    speak_utf8()
    call: Callable[[], int] = lambda: main(sys.argv[1:])  # noqa: E731
    sys.exit(quiet(call))
