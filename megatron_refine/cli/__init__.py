"""The command line: `megatron-refine COMMAND`, or `python -m megatron_refine COMMAND`.

A command is a module of this folder with `main(arguments)`, which returns the exit code. It is imported when it is
called.
"""

import difflib
import gc
import importlib
import sys

from megatron_refine import __version__
from megatron_refine.files import speak_utf8, start_in_utf8
from megatron_refine.run.interrupt import quiet

COMMANDS = {
    "train": "train a model; the same command resumes the run",
    "estimate": "print memory, time and layouts of a run before it starts",
    "submit": "submit a run, a sweep or a chain of jobs to SLURM",
    "prepare": "train the tokenizer and pack the data before the GPUs are yours",
    "evaluate": "score a model on RULER, LongBench and held-out documents",
    "ruler-qa": "make the paper's files of RULER-QA for any tokenizer",
    "lm-eval": "score a model on tasks of lm-evaluation-harness",
    "reproduce": "reproduce a table or a figure of the paper",
    "generate": "continue text with a model",
    "entropy": "draw the entropy of a text under a model, and where rollouts would start",
    "convert": "convert a model to and from Hugging Face's format",
    "serve": "start an SGLang server of a model, or for a run",
    "compare": "draw the curves of several runs over one another",
    "study": "run a study: arms from the same bases, compared",
    "scaling": "run a sweep over ranks and layouts, or predict it",
    "bench": "time steps, rollouts and kernels; count what a GPU launches",
    "kernels": "compile a configuration's Triton kernels with or without a GPU, measure and pin them",
    "parity": "compare a model at a layout with its original implementation",
}
_ELSEWHERE = {"train": "megatron_refine.train"}


def run(command: str, arguments: list[str] | None = None) -> int:
    """Run a command, by default with this process's arguments. Return its exit code; 130 after Ctrl-C."""
    start_in_utf8()
    speak_utf8()
    gc.set_threshold(50_000, 20, 50)  # imports make a million objects; Python's 700 costs a fifth of their time
    given = sys.argv[1:] if arguments is None else arguments

    def call() -> int:
        module = importlib.import_module(
            _ELSEWHERE.get(command) or f"megatron_refine.cli.{command.replace('-', '_')}"
        )  # fmt: skip
        return int(module.main(given))

    return quiet(call)


def main() -> int:
    """Run the command that the first argument names. Return its exit code; 2 for a command that does not exist."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS)) + 2
        print("usage: megatron-refine COMMAND ...\n\n" + "\n".join(f"  {c:{width}}{t}" for c, t in COMMANDS.items()))
        print("\nEach command explains itself: megatron-refine COMMAND --help")
        return 0
    if name == "--version":
        print(f"megatron-refine {__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        print(f"megatron-refine {name}: no such command; {hint}", file=sys.stderr)
        return 2
    return run(name, rest)
