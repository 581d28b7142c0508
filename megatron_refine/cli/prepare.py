"""Prepare the data of a configuration: train the tokenizer, pack the rows, print what they hold.

megatron-refine prepare --config FILE [key.sub=value ...]
"""

import sys

from megatron_refine import usage
from megatron_refine.config import ConfigError, load
from megatron_refine.errors import CheckpointError


def main(arguments: list[str]) -> int:
    """Prepare and print the counts. Returns the exit code: 0, 2 where the configuration or the data are wrong, 4 for a
    damaged checkpoint in checkpoint.load."""
    parser = usage.parser("prepare", __doc__)
    usage.add_config(parser)
    options = parser.parse_intermixed_args(arguments)

    from megatron_refine.models.family import FAMILIES

    try:
        config = load(options.config, options.overrides, FAMILIES)
        from megatron_refine.data.prepare import prepare  # late: a wrong configuration is told at once
        from megatron_refine.phases.tokenizer import with_tokenizer

        prepared = prepare(with_tokenizer(config), say=print)
    except (ConfigError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 4
    print(f"tokenizer  {prepared.tokenizer}")
    for side, counts in prepared.counts.items():
        rows = getattr(prepared, side)
        print(f"{side}  " + "  ".join(f"{name} {count:,}" for name, count in counts.items()))
        print("\n".join(f"       {path}" for path in rows.files))
    return 0
