"""Continue text with a model.

    megatron-refine generate MODEL --prompt "Once upon a time"
    megatron-refine generate MODEL --file prompts.txt > continuations.jsonl
    megatron-refine generate MODEL

MODEL is a run, a checkpoint or a folder in Hugging Face's format. A prompt's continuation is shown as it comes. A file
has a prompt on each line; they are continued in batches, and each gives a line of JSON, in the order of the file.
Without either every line that is typed is continued; an empty one, or Ctrl-D, ends.

Exit codes: 0 done, 2 what was asked cannot be, 4 weights or checkpoint.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_refine import launcher, usage
from megatron_refine.cli.asking import add_model, found, on_ranks, text_of
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import is_utf8, path_argument
from megatron_refine.config.training import COLDEST

if TYPE_CHECKING:
    from megatron_refine.eval.answers import Answerer, Question


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("generate", __doc__)
    add_model(parser, "prompts of a file")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--file", type=path_argument, help="a text file with a prompt on each line; - for standard input")
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="most tokens to write (128)")
    add("--temperature", type=float, default=0.8, help="logits are divided by it; 0: the most probable token (0.8)")
    add("--top-p", type=float, default=0.95, help="draw from the fewest tokens of this probability; 1: from all (0.95)")
    add("--seed", type=int, default=1, help="of the draws: the same seed gives the same text (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Continue what is asked; the first rank prints. Return the exit code."""
    options = parse(arguments)
    return on_ranks(lambda first: run(options, first))


def run(options: argparse.Namespace, first: bool) -> str:
    """Check, load and continue, on each rank. Returns "": text is printed as it comes."""
    _check(options)
    prompts = _read(options.file) if options.file else [options.prompt] if options.prompt is not None else None
    if prompts is None and launcher.read().world > 1:
        raise ConfigError("a conversation runs on one rank; name --prompt or --file")
    *_, weights = found(options)
    from megatron_refine.eval.answers import Answerer, Question
    from megatron_refine.trainer.generate import Sampling

    loaded, sampling = weights(), Sampling(options.temperature, options.top_p, options.seed)
    shown = _Shown() if first and not options.file else None
    answerer = Answerer(
        loaded.model, loaded.tokenizer, loaded.ranks, batch_size=options.batch_size, bos=loaded.bos, sampling=sampling,
        watch=shown,
    )  # fmt: skip

    def question(prompt: str) -> Question:
        return Question(prompt, options.max_new_tokens, tuple(options.stop))

    if prompts is None:
        _converse(answerer, question, shown)
        return ""
    start = time.perf_counter()
    texts = _continued(answerer, [question(prompt) for prompt in prompts])
    if first:
        for prompt, text in zip(prompts, texts, strict=True) if options.file else ():
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        if shown:
            shown.end(texts[0])
        _tell_speed(answerer, texts, time.perf_counter() - start)
    return ""


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a number out of its range, and for a text that is none."""
    temperature = options.temperature
    for name, number, right, range_ in (
        ("max-new-tokens", options.max_new_tokens, options.max_new_tokens >= 1, "1 or more"),
        ("batch-size", options.batch_size, options.batch_size >= 1, "1 or more"),
        ("temperature", temperature, temperature == 0 or COLDEST <= temperature < float("inf"), "0, or 1e-6 or more"),
        ("seed", options.seed, abs(options.seed) < 2**63, "a number of 64 bits"),
        ("top-p", options.top_p, 0 < options.top_p <= 1, "above 0, at most 1"),
    ):
        if not right:
            raise ConfigError(f"--{name}={number}: must be {range_}")
    if options.prompt is not None and not is_utf8(options.prompt):
        raise ConfigError("--prompt: is not UTF-8 text; write it into a file and name it with --file")
    if str(options.file) == "-" and (ranks := launcher.read().world) > 1:
        raise ConfigError(f"--file -: {ranks} ranks cannot share standard input; name a file")
    if "" in options.stop:
        raise ConfigError("--stop: is empty; name a text, or leave it out")


def _read(path: Path) -> list[str]:
    """Return the lines of a file that are not blank. Raises ConfigError."""
    text = text_of("--file", path, lambda path: sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"--file {path}: holds no prompt; write one on each line")
    return lines


def _continued(answerer: "Answerer", questions: "list[Question]") -> list[str]:
    texts: dict[int, str] = {}
    for answers in answerer(questions, answerer.encode(questions)):
        texts |= answers
    return [texts[i] for i in range(len(questions))]


class _Shown:
    """The text so far on the screen. What may still change, as half a character does, is held back."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, text: str) -> None:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if text.startswith(self.text):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def end(self, text: str) -> None:
        """The text is whole: show its rest and a line end, and begin anew."""
        print(text[len(self.text) :] if text.startswith(self.text) else "")
        self.text = ""


def _converse(answerer: "Answerer", question: Callable[[str], "Question"], shown: "_Shown | None") -> None:
    """Continue line after line until there is none."""
    while True:
        print("> ", end="", flush=True)
        prompt = sys.stdin.readline().rstrip("\n")
        if not prompt:
            return
        start = time.perf_counter()
        texts = _continued(answerer, [question(prompt)])
        if shown:
            shown.end(texts[0])
        _tell_speed(answerer, texts, time.perf_counter() - start)


def _tell_speed(answerer: "Answerer", texts: list[str], seconds: float) -> None:
    count = sum(len(ids) for ids in answerer.tokenizer.encode(texts))
    print(f"{count} tokens, {count / seconds:.1f} tokens/s", file=sys.stderr)
