"""What the commands that ask a model have in common: its options, its ranks, and how they end."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_refine import extras, launcher
from megatron_refine.config import Config, ConfigError
from megatron_refine.config.paths import path_argument, text_argument
from megatron_refine.files import TornError

if TYPE_CHECKING:
    from megatron_refine.checkpoint.source import Source
    from megatron_refine.eval.load import Loaded, Text

EXIT_CONFIG, EXIT_CHECKPOINT, EXIT_LOST = 2, 4, 8


def add_model(parser: argparse.ArgumentParser, batch: str = "") -> None:
    """Add the model, its tokenizer and its layout; batch: what --batch-size counts, "": there is no such option."""
    add = parser.add_argument
    add("model", type=path_argument, metavar="MODEL", help="a run, a checkpoint or a model in Hugging Face's format")
    add("--tokenizer", type=text_argument, default="", metavar="FILE", help="default: the one that came with the model")
    add("--bos", action=argparse.BooleanOptionalAction, help="begin with BOS (default: as the run trained, else not)")
    add("--tp", type=int, default=1, help="tensor parallel size; start as many ranks, or a multiple, with torchrun")
    add("--sp", action="store_true", help="sequence parallelism")
    add("--precision", choices=["fp32", "bf16"], default="", help="default: bf16 on a GPU, fp32 without")
    if batch:
        add("--batch-size", type=int, default=8, help=f"{batch} at once, a replica (8)")


def on_ranks(run: Callable[[bool], str]) -> int:
    """Call `run(whether this is the first rank)` on every rank, print what the first returns. Return the exit code: 0,
    2 where what is asked cannot be, 4 for weights, a checkpoint or another file, 8 where the ranks did not meet; one
    line says why."""
    try:
        rank = launcher.check().rank
        extras.check_transformer_engine()
    except (ConfigError, launcher.LaunchError) as error:
        if launcher.speaks() or isinstance(error, launcher.LaunchError):
            print(error, file=sys.stderr)
        return EXIT_CONFIG
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_refine.platform.megatron.install import install

    install()
    import torch.distributed as dist

    from megatron_refine.convert.errors import ConversionError
    from megatron_refine.errors import CheckpointError, LostError, refused_file

    first = rank == 0
    try:
        text = run(first)
    except (ConfigError, ConversionError, CheckpointError, TornError, OSError) as error:
        # a file or a network may fail one rank alone
        if first or isinstance(error, OSError) or getattr(error, "alone", False):
            line = str(error)
            if isinstance(error, OSError):
                line = refused_file(error) or " ".join(line.split())
            print(line if first else f"rank {rank}: {line}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_CHECKPOINT
    except LostError as error:
        print(error, file=sys.stderr)
        return EXIT_LOST
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if first and text:
        print(text)
    return 0


def found(options: argparse.Namespace) -> "tuple[Source, Config, Text, Callable[[], Loaded]]":
    """Return the model, its layout, its tokenizer, and what loads its weights. Raises ConfigError, CheckpointError."""
    from megatron_refine.checkpoint.source import find
    from megatron_refine.eval import load
    from megatron_refine.platform import rendezvous

    source = find(options.model)
    config = load.layout(
        source, tp=options.tp, sp=options.sp, world=rendezvous.world_size(), precision=options.precision
    )  # fmt: skip
    text = load.text(source, options.tokenizer, options.bos)
    return source, config, text, lambda: load.load(source, config, text)


def text_of(option: str, path: Path, read: Callable[[Path], bytes]) -> str:
    """Return a text of the user's, without a byte order mark. Raises ConfigError naming the option."""
    try:
        return read(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{option} {path}: cannot be read: {cause}") from None
