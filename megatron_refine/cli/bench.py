"""Benchmarks. All kinds are taken in turn in one process, so that a machine whose speed drifts slows all of them alike.

    torchrun --nproc-per-node 2 -m megatron_refine bench step --config FILE [--official] [key.sub=value ...]

step     seconds and saved bytes of an NTP-only step, a fused and a two-pass REFINE step, and their ratios; with
         --official the official scheme too, with --hf an NTP step of flash-linear-attention's model (one rank each)
length   seconds of an NTP-only and a fused step over the length of the sequences; --plot draws them
rollout  rollouts from forked states, and from prefixes that are prefilled first, padded or not
profile  the ten hottest operators (on a GPU: kernels) of an NTP-only and a fused step
kernels  the mixer's operation in chunks, and a token after the other
overlap  steps of several replicas with their communication between the passes, beside them, and without any
sync     weights to an SGLang server, and plain broadcasts of as many bytes to a process that only receives them
data     text to rows, rows to batches
facts    what this machine gives: TFLOP/s of a product, TB/s of a copy, microseconds of a launch; versions

launches counts instead, without a GPU, what the steps of a GPU launch and move: megatron-refine bench launches --help
"""

import argparse
import os
import sys
from functools import partial

from megatron_refine import config as configuration
from megatron_refine import extras, launcher, usage
from megatron_refine.bench import baseline
from megatron_refine.config.paths import path_argument
from megatron_refine.models.family import FAMILIES
from megatron_refine.run import preflight

BENCHMARKS = ("step", "length", "profile", "rollout", "kernels", "overlap", "sync", "data", "facts", "launches")


def main(arguments: list[str]) -> int:
    """Run a benchmark; the first rank prints. Returns the exit code: 0; 1 where a ratio is not that of --check; 2 where
    configuration or data are wrong."""
    if arguments[:1] == ["launches"]:
        return launches(arguments[1:])
    parser = usage.parser("bench", __doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    usage.add_config(parser)
    parser.add_argument("--rounds", type=int, default=12, help="measurements of each kind (default: 12)")
    parser.add_argument("--official", action="store_true", help="step: the official scheme too")
    parser.add_argument("--hf", action="store_true", help="step: flash-linear-attention's model too; needs a GPU")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536", help="length: tokens of a sequence")
    parser.add_argument("--plot", type=path_argument, metavar="FILE", help="length: an .svg or .png of it")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="step: write the ratios to it")
    parser.add_argument("--check", type=path_argument, metavar="FILE", help="step: compare with these; 1 where outside")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = configuration.load(options.config, options.overrides, FAMILIES)
        world = launcher.check().world
        extras.check_transformer_engine()
        record = baseline.Record(baseline.spelled(arguments), config, world, options.json, options.check)
        table = run(options, config, world == 1, record)
    except (configuration.ConfigError, launcher.LaunchError) as error:
        if launcher.speaks() or isinstance(error, launcher.LaunchError):
            print(error, file=sys.stderr)
        return 2
    if table:
        print(table)
    for line in record.outside:
        print(line, file=sys.stderr)
    return 1 if record.outside else 0


def run(options: argparse.Namespace, config: configuration.Config, alone: bool, record: baseline.Record) -> str:
    """The table of the benchmark; "" but on the first rank. alone: whether there is no other rank."""
    if options.benchmark == "launches":
        raise configuration.ConfigError("launches: is the first word: megatron-refine bench launches --config FILE ...")
    if options.rounds < 1:
        raise configuration.ConfigError(f"--rounds={options.rounds}: must be 1 or more")
    if options.benchmark != "step" and (options.json or options.check):
        raise configuration.ConfigError("--json, --check: are for step")
    if options.hf and not alone:
        raise configuration.ConfigError("--hf: runs on one rank only; start it without torchrun")
    if options.official and not (alone and config.fused):
        raise configuration.ConfigError("--official: runs on one rank, with one optimizer step a batch; set update.*")
    if options.benchmark == "sync":
        if config.engine.kind != "sglang":
            raise configuration.ConfigError("sync: measures SGLang servers; add --config configs/engines/"
                                            "quickstart_sglang.yaml, or set engine.kind and engine.python")  # fmt: skip
        preflight.engine(config)
    try:
        lengths = [int(text) for text in options.lengths.split(",")]
    except ValueError:
        raise configuration.ConfigError(f"--lengths={options.lengths}: not whole numbers with commas between") from None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_refine.platform.megatron.install import install

    install()
    import torch.distributed as dist

    from megatron_refine.bench import data, facts, kernels, length, overlap, profile, rollout, step, sync

    runs = {
        "step": partial(step.run, official=options.official, hf=options.hf, record=record),
        "length": partial(length.run, lengths=lengths, plot=options.plot),
        "profile": profile.run, "rollout": rollout.run, "kernels": kernels.run, "sync": sync.run, "data": data.run,
        "overlap": overlap.run, "facts": facts.run,
    }  # fmt: skip
    try:
        return runs[options.benchmark](config, options.rounds)  # type: ignore[operator]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


LAUNCHES = """Count what the steps of a GPU launch and move, on a machine without one.

Nothing is computed, and nothing is measured: NTP, fused and two-pass steps of one micro-batch run at full size, forward
and backward, on tensors without values. Prints launches, matrix products by dtype, bytes of everything else, and the
time that peaks of 600 TFLOP/s (bf16), 3 TB/s and 10 us a launch allow; by stage, and the ten largest operators. The
optimizer's part, once a batch, stands apart. How each kernel is counted: docs/benchmarks.md
"""


def launches(arguments: list[str]) -> int:
    """Count the steps of a configuration. Returns the exit code: 0; 2 where the configuration is wrong."""
    parser = usage.parser("bench launches", LAUNCHES)
    usage.add_config(parser)
    parser.add_argument("--json", action="store_true", help="print launches, bytes, roofline_seconds and mfu as JSON")
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        config = configuration.load(options.config, options.overrides, FAMILIES)
        if launcher.check().world > 1:
            raise configuration.ConfigError("launches: counts one rank; start it without a launcher")
        from megatron_refine.bench.launches import roofline, steps

        counted = steps.count(config, other=not options.json)
    except (configuration.ConfigError, launcher.LaunchError) as error:
        print(error, file=sys.stderr)
        return 2
    print(roofline.as_json(config, counted) if options.json else roofline.tables(config, counted))
    return 0
