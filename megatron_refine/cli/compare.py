"""Draw the loss, the reward and the accuracy of several runs over one another, and print their held-out metrics.

megatron-refine compare RUN_DIR RUN_DIR [...] --out curves.svg
megatron-refine compare NTP=a/seed1 NTP=a/seed2 REFINE=b/seed1 REFINE=b/seed2 --out curves.svg

Runs of one label are one curve: their mean, with a band from the lowest to the highest.
"""

import sys
from pathlib import Path

from megatron_refine import usage
from megatron_refine.config.paths import path_argument


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 where a folder is not that of a run or the picture has no place."""
    parser = usage.parser("compare", __doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN_DIR", help="run.dir of a run, which is the label where there is none"
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE.svg", help="where the picture goes")
    options = parser.parse_args(arguments)

    from megatron_refine.files import write
    from megatron_refine.report import metrics
    from megatron_refine.report.figures import compared
    from megatron_refine.report.screen import comparison, spread
    from megatron_refine.report.summary import milestones, step_times
    from megatron_refine.report.svg import standalone

    labelled = [_labelled(word) for word in options.runs]
    if len({folder.resolve() for _, folder in labelled}) < max(2, len(labelled)):
        return _refuse(f"{' '.join(options.runs)}: two folders or more, each named once, make a picture")
    if len({(label, folder.resolve().name) for label, folder in labelled}) < len(labelled):
        return _refuse(f"{' '.join(options.runs)}: folders of one name need labels; write LABEL=RUN_DIR")
    runs: dict[str, list[list[metrics.Row]]] = {}
    for label, folder in labelled:
        try:
            rows = metrics.read(folder / metrics.METRICS)
        except ValueError as error:
            return _refuse(str(error))
        if not rows:
            return _refuse(f"{folder}: no metrics.jsonl with a step in it: name the run.dir of a run")
        runs.setdefault(label, []).append(rows)
    if not options.out.parent.is_dir():
        return _refuse(f"--out {options.out}: {options.out.parent} is not a folder: create it")
    write(options.out, standalone(compared(runs)))
    for label, group in runs.items():
        for rows in group:
            print(f"{label}\n{comparison(milestones(rows), step_times(rows))}")
        if len(group) > 1:
            print(f"{label}, {len(group)} runs\n{spread(group)}")
    print(f"picture {options.out}")
    return 0


def _labelled(word: str) -> tuple[str, Path]:
    """A folder with its label. An existing folder that has = in its name is a folder."""
    label, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        label, path = "", word
    folder = path_argument(path)
    return label or folder.resolve().name, folder


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2
