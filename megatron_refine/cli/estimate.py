"""What a run needs and how long it takes, without a GPU and without starting anything.

    megatron-refine estimate CONFIG [CONFIG ...] [--gpus N] [--hardware FILE] [key.sub=value ...]

Prints parameters, memory of a rank, FLOPs, seconds of a step, collectives, and the layouts of N GPUs that fit, ranked.
Every formula: docs/estimator.md. Exit codes: 0, 2 what was asked cannot be.
"""

import sys

from megatron_refine import config as configuration
from megatron_refine import usage
from megatron_refine.config.paths import path_argument
from megatron_refine.estimate.hardware import read_hardware
from megatron_refine.estimate.plan import plan
from megatron_refine.models.family import FAMILIES


def main(arguments: list[str]) -> int:
    """Print the plan."""
    parser = usage.parser("estimate", __doc__)
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="YAML files, later ones win; then key.sub=value")
    parser.add_argument("--gpus", type=int, help="number of ranks (default: those of one copy of the model)")
    parser.add_argument(
        "--hardware", type=path_argument, help="a YAML file of the keys in docs/estimator.md (default: H100)"
    )
    options = parser.parse_intermixed_args(arguments)
    files, overrides = configuration.files_and_overrides(options.config)
    try:
        config = configuration.load(files, overrides, FAMILIES)
        world = options.gpus if options.gpus is not None else config.parallel.model_size
        print(plan(config, world, read_hardware(options.hardware)))
        return 0
    except configuration.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
