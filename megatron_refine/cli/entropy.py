"""Draw the entropy of each token of a text under a model, and where rollouts would start; nothing is trained.

    megatron-refine entropy MODEL --text book.txt --out entropy.svg

MODEL is a run, a checkpoint or a folder in Hugging Face's format. Beside the picture a .jsonl file gets a row a token:
index, text, entropy of predicting it (nats), the smoothed entropy, the probability that a rollout starts with it.
Exit codes: 0 done, 2 what was asked cannot be, 4 weights or checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_refine import usage
from megatron_refine.cli.asking import add_model, found, on_ranks, text_of
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument
from megatron_refine.config.training import COLDEST

if TYPE_CHECKING:
    from megatron_refine.eval.entropy import Profile

_SHOWN, _BEFORE = 10, 12  # tokens of the highest entropy, and tokens before each


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("entropy", __doc__)
    add_model(parser)
    add = parser.add_argument
    add("--text", required=True, type=path_argument, metavar="FILE", help="the text, UTF-8")
    add("--out", required=True, type=path_argument, metavar="FILE.svg", help="the picture; the rows go beside it")
    add("--length", type=int, default=16384, metavar="N", help="most tokens of the text (16384)")
    add("--chunks", type=int, default=8, metavar="C", help="as refine.num_chunks (8)")
    add("--rollout-len", type=int, default=5, metavar="K", help="as refine.rollout_len (5)")
    add("--margin", type=int, default=20, metavar="N", help="as refine.margin (20)")
    add("--temperature", type=float, default=1.0, help="as refine.temperature (1.0)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure, draw and print; the first rank writes. Return the exit code."""
    options = parse(arguments)
    return on_ranks(lambda first: run(options, first))


def run(options: argparse.Namespace, first: bool) -> str:
    """Check everything that is asked, then read the weights, on each rank. Returns the summary."""
    from megatron_refine.eval import entropy
    from megatron_refine.files import write
    from megatron_refine.report import figures
    from megatron_refine.report.svg import standalone

    _check(options)
    written = text_of("--text", options.text, Path.read_bytes)
    *_, text, weights = found(options)
    ids = text.encode(written)
    tokens = ids[: options.length]
    if len(tokens) < 2:
        raise ConfigError(f"--text {options.text}: has {len(tokens)} tokens; two or more have an entropy")
    rule = entropy.Rule(options.chunks, options.rollout_len, options.margin, options.temperature)
    profile = entropy.profile(weights().model, tokens, rule)
    if not first:
        return ""
    if len(ids) > len(tokens):
        print(f"{options.text}: the first {len(tokens):,} of {len(ids):,} tokens, --length", file=sys.stderr)
    pieces = entropy.pieces(text.tokenizer, tokens)
    write(options.out.with_suffix(".jsonl"), _lines(pieces, profile))
    drawn = figures.text_entropy(profile.entropy, profile.smoothed, profile.chance, profile.borders)
    write(options.out, standalone(drawn))
    return _summary(pieces, profile) + f"\n{options.out}, {options.out.with_suffix('.jsonl')}"


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for a number out of its range, and for a picture of another kind or without a place."""
    least = {"length": 2, "chunks": 1, "rollout_len": 1, "margin": 1, "tp": 1}
    for name, number in least.items():
        if getattr(options, name) < number:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: must be {number} or more")
    if not COLDEST <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature={options.temperature}: must be 1e-6 or more")
    if options.out.suffix != ".svg":
        raise ConfigError(f"--out {options.out}: is no .svg; name one")
    if options.text.resolve() in (options.out.resolve(), options.out.with_suffix(".jsonl").resolve()):
        raise ConfigError(f"--out {options.out}: it, or the .jsonl beside it, is the text itself; name another picture")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: {options.out.parent} is not a folder; create it")


def _lines(pieces: list[str], profile: "Profile") -> str:
    """A JSON object a token; the first has no entropy."""
    columns = (profile.entropy.tolist(), profile.smoothed.tolist(), profile.chance.tolist())
    rows = [
        {"index": i, "text": text, "entropy": e if i else None, "smoothed": s if i else None, "probability": p}
        for i, (text, e, s, p) in enumerate(zip(pieces, *columns, strict=True))
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _summary(pieces: list[str], profile: "Profile") -> str:
    """The mean, and the tokens of the highest entropy with what stands before them."""
    values = profile.entropy[1:]
    lines = [f"{len(pieces):,} tokens, mean entropy {values.mean():.4f} nats"]
    if not profile.borders:
        lines.append("too short for rollouts with these chunks and margins: no position can be selected")
    lines.append("  token   nats  smoothed  probability  text")
    for i in sorted(range(1, len(pieces)), key=lambda i: -profile.entropy[i])[:_SHOWN]:
        before = "".join(pieces[max(i - _BEFORE, 0) : i])
        shown = json.dumps(before, ensure_ascii=False)[1:-1] + " [" + json.dumps(pieces[i], ensure_ascii=False)[1:-1]
        numbers = f"{profile.entropy[i]:7.3f}{profile.smoothed[i]:10.3f}{profile.chance[i]:13.6f}"
        lines.append(f"{i:7}{numbers}  {shown}]")
    return "\n".join(lines)
