"""Convert a model between Hugging Face's format and a checkpoint of this trainer.

megatron-refine convert hf-to-megatron --hf DIR --megatron DIR [--verify] [--dtype bf16]
megatron-refine convert megatron-to-hf --megatron DIR --hf DIR [--verify] [--dtype bf16] [--max-shard-size 5GB]
"""

import argparse
import contextlib
import os
import sys

from megatron_refine import extras, usage
from megatron_refine.config import ConfigError
from megatron_refine.config.paths import path_argument
from megatron_refine.errors import CheckpointError, disk_failed
from megatron_refine.files import TornError

EXIT_CONFIG, EXIT_CHECKPOINT = 2, 4
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("convert", __doc__)
    parser.add_argument("direction", choices=["hf-to-megatron", "megatron-to-hf"])
    parser.add_argument(
        "--hf", required=True, type=path_argument, metavar="DIR", help="config.json and safetensors files"
    )
    parser.add_argument("--megatron", required=True, type=path_argument, metavar="DIR", help="a run or a checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="cast every tensor (default: each as it is)")
    parser.add_argument("--max-shard-size", default="", metavar="SIZE", help="of a safetensors file written (5GB)")
    parser.add_argument("--verify", action="store_true", help="read the result again, compare tensors and logits")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Convert and say what came out. Returns the exit code: 0, 2 (configuration), 4 (weights, checkpoint, disk)."""
    options = parse(arguments)
    try:
        extras.check_transformer_engine()
        _check(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    # on the CPU everywhere: it is a matter of bytes, and the comparison wants fp32 to be fp32
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    from megatron_refine.platform.megatron.install import install

    install()
    from megatron_refine.convert.errors import ConversionError

    try:
        run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except (ConversionError, CheckpointError, TornError, OSError) as error:
        print(disk_failed(error) if isinstance(error, OSError) else error, file=sys.stderr)
        return EXIT_CHECKPOINT
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError, before anything heavy is imported, for a source without a model and a target in the way."""
    from megatron_refine.checkpoint.source import find, refuse_existing

    to_hf = options.direction == "megatron-to-hf"
    refuse_existing(options.hf if to_hf else options.megatron)
    with contextlib.suppress(CheckpointError):  # told by its own exit code
        find(options.megatron if to_hf else options.hf)


def run(options: argparse.Namespace) -> None:
    """The conversion; then the model's section to paste in a configuration, and the result of the comparison."""
    import torch

    from megatron_refine.checkpoint.conversion import MODEL, hf_to_megatron
    from megatron_refine.checkpoint.manifest import ORIGIN
    from megatron_refine.checkpoint.source import find_checkpoint
    from megatron_refine.convert.hf_writer import size_in_bytes
    from megatron_refine.data.tokenizer import FILES
    from megatron_refine.publish import export

    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else None
    to_hf = options.direction == "megatron-to-hf"
    if to_hf:
        size = size_in_bytes(options.max_shard_size) if options.max_shard_size else None
        source = find_checkpoint(options.megatron, "--megatron")
        options.megatron = source.folder
        export(source, options.hf, dtype, size)
        print(f"wrote {options.hf}, from {source.folder}")
    else:
        hf_to_megatron(options.hf, options.megatron, dtype)
        names = (options.megatron / ORIGIN / name for name in FILES)
        with_tokenizer = next((f" data.tokenizer={path}" for path in names if path.exists()), "")
        print(f"wrote {options.megatron}: start training from it with checkpoint.load={options.megatron}"
              f"{with_tokenizer} and")  # fmt: skip
        print((options.megatron / MODEL).read_text(encoding="utf-8"), end="")
    if options.verify:
        from megatron_refine.checkpoint.verify import verify

        verdict = verify(options.hf, options.megatron, to_hf)
        print(
            f"verified: {verdict.tensors} tensors equal, logits within {verdict.difference:.2g} of {verdict.scale:.3g}"
        )
