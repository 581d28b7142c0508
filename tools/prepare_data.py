"""Prepare the data of a configuration: train the tokenizer, pack the rows, print what they hold.

python tools/prepare_data.py --config FILE [key.sub=value ...]
"""

import argparse
import sys

from megatron_refine.config import ConfigError, load
from megatron_refine.files import speak_utf8
from megatron_refine.interrupt import quiet


def main(arguments: list[str]) -> int:
    """Prepare and print the counts. Returns the exit code: 0, or 2 where the configuration or the data are wrong."""
    speak_utf8()
    parser = argparse.ArgumentParser(description="Pack the data of a configuration; a second run finds it done.")
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help="a YAML file; later ones win")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace the file's")
    options = parser.parse_args(arguments)

    from megatron_refine.models.family import FAMILIES

    try:
        config = load(options.config, options.overrides, FAMILIES)
        from megatron_refine.data.prepare import prepare  # late: a wrong configuration is told at once

        prepared = prepare(config, say=print)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"tokenizer  {prepared.tokenizer}")
    for side, counts in prepared.counts.items():
        rows = getattr(prepared, side)
        print(f"{side}  " + "  ".join(f"{name} {count:,}" for name, count in counts.items()))
        print("\n".join(f"       {path}" for path in rows.files))
    return 0


if __name__ == "__main__":
    sys.exit(quiet(lambda: main(sys.argv[1:])))
