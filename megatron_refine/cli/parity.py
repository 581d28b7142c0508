"""Hold a model in Hugging Face's format, at a layout, to what its original implementation computed.

    megatron-refine parity DIR [--tp N] [--sp] [--pp N] [--cp N]

DIR holds config.json, safetensors and expected.safetensors, as the folders of tests/golden do. Starts a rank a process
on this machine, on CPU in fp32. Exit codes: 0 equal, 1 not, 2 a model or a layout that cannot be, 4 files.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_refine import extras, launcher, usage
from megatron_refine.config import Config, ConfigError, Data, Eval, Parallel, Refine, Train, cross_check
from megatron_refine.config.paths import path_argument
from megatron_refine.convert.fields import CONFIG, model_of, read_config
from megatron_refine.files import read_json, write_json

if TYPE_CHECKING:
    from megatron_refine.trainer.parity import Errors

EXIT_DIFFERENT, EXIT_CONFIG, EXIT_FILES = 1, 2, 4


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with 2 where it is wrong."""
    parser = usage.parser("parity", __doc__)
    parser.add_argument(
        "folder", type=path_argument, metavar="DIR", help="config.json, safetensors, expected.safetensors"
    )
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what} parallel size")
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Check the layout, start its ranks, print the errors of each case. Returns the exit code."""
    options = parse(arguments)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        extras.check_transformer_engine()
        config = layout(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    found = on_ranks(options.folder, config)
    if isinstance(found, str):
        print(found, file=sys.stderr)
        return EXIT_FILES
    for case, errors in found.items():
        print(f"{case}: {describe(errors)}")
    return 0 if all(errors.passed for errors in found.values()) else EXIT_DIFFERENT


def layout(options: argparse.Namespace) -> Config:
    """The model of the folder at the layout asked for. Raises ConfigError where it cannot be."""
    for name in ("tp", "pp", "cp"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be 1 or more")
    return cross_check(
        Config(
            model=model_of(read_config(options.folder), str(options.folder / CONFIG)),
            data=Data(seq_length=1 << 20),
            parallel=Parallel(tp=options.tp, sp=options.sp, pp=options.pp, cp=options.cp),
            train=Train(precision="fp32", global_batch_size=1),
            refine=Refine(enabled=False),
            eval=Eval(sequences=0),
        )
    )


def on_ranks(folder: Path, config: Config) -> "dict[str, Errors] | str":
    """`compare` on a process a rank, or what is wrong with the files; any other failure of a rank ends them all."""
    import torch.multiprocessing as mp

    from megatron_refine.trainer.parity import Errors

    world = config.parallel.model_size
    with tempfile.TemporaryDirectory() as results, launcher.reserve_port("127.0.0.1") as held:
        output, port = Path(results) / "errors", held.getsockname()[1]
        mp.start_processes(_rank, (world, port, folder, config, output), nprocs=world, start_method="spawn")
        found = read_json(output)
    return found if isinstance(found, str) else {case: Errors(**errors) for case, errors in found.items()}


def _rank(rank: int, world: int, port: int, folder: Path, config: Config, output: Path) -> None:
    """One rank's part; the first writes the errors."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch.distributed as dist

    from megatron_refine.platform.megatron.install import install

    install()
    from megatron_refine.convert.errors import ConversionError
    from megatron_refine.trainer.parity import compare

    found: Any
    try:
        found = compare(folder, config)
    except (ConfigError, ConversionError) as error:  # the same on all ranks: they read the same files
        found = str(error)
    if rank == 0:
        write_json(output, found if isinstance(found, str) else {case: vars(errors) for case, errors in found.items()})
    if dist.is_initialized():
        dist.destroy_process_group()


def describe(e: "Errors") -> str:
    """A line of one case."""
    return (
        f"{'ok' if e.passed else 'DIFFERENT'}  max |dlogit| {e.logits:.1e} (limit {e.logit_limit:.1e})  "
        f"|dloss| {e.loss:.1e}  gradients {e.gradient:.1e} (limit {e.gradient_limit:.1e}), worst {e.worst}"
    )
