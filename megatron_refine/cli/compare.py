"""Draw the loss and the reward of several runs over one another, and print their held-out metrics.

megatron-refine compare RUN_DIR RUN_DIR [...] --out curves.svg
"""

import sys

from megatron_refine import usage
from megatron_refine.config.paths import path_argument

MOST = 6


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 where a folder is not that of a run or the picture has no place."""
    parser = usage.parser("compare", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN_DIR", help="run.dir of a run; its name is the label"
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE.svg", help="where the picture goes")
    options = parser.parse_args(arguments)

    from megatron_refine.files import write
    from megatron_refine.report import metrics
    from megatron_refine.report.figures import compared
    from megatron_refine.report.screen import comparison
    from megatron_refine.report.summary import milestones, step_times
    from megatron_refine.report.svg import standalone

    folders = {folder.resolve().name: folder for folder in options.runs}
    if not 1 < len(folders) == len(options.runs) <= MOST:
        return _refuse(f"{' '.join(map(str, options.runs))}: 2 to {MOST} folders of different names make a picture")
    try:
        runs = {name: metrics.read(folder / metrics.METRICS) for name, folder in folders.items()}
    except ValueError as error:
        return _refuse(str(error))
    for name, rows in runs.items():
        if not rows:
            return _refuse(f"{folders[name]}: no metrics.jsonl with a step in it: name the run.dir of a run")
    if not options.out.parent.is_dir():
        return _refuse(f"--out {options.out}: {options.out.parent} is not a folder: create it")
    write(options.out, standalone(compared(runs)))
    for name, rows in runs.items():
        print(f"{name}\n{comparison(milestones(rows), step_times(rows))}")
    print(f"picture {options.out}")
    return 0


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2
