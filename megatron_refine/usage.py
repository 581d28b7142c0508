"""What the command lines of all commands have in common. Imports nothing heavy."""

import argparse


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command whose --help shows `doc`, the command's own docstring."""
    kept = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"megatron-refine {command}", description=doc, formatter_class=kept)


def add_config(to: argparse.ArgumentParser) -> None:
    """Add --config, once or several times, and overrides; parse with `parse_intermixed_args`."""
    to.add_argument("--config", required=True, action="append", metavar="FILE", help="a YAML file; later ones win")
    to.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key of the configuration")
