"""What the command lines and the screens of all commands have in common. Imports nothing heavy."""

import argparse


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command whose --help shows `doc`, the command's own docstring."""
    kept = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"megatron-refine {command}", description=doc, formatter_class=kept)


def ranks(count: int) -> str:
    """Return the number with its noun, for the screen."""
    return f"{count} rank" + "s" * (count != 1)


def add_config(to: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --config, once or several times, and overrides; parse with `parse_intermixed_args`."""
    add = to.add_argument
    add("--config", required=required, action="append", default=[], metavar="FILE", help="a YAML file; later ones win")
    to.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key of the configuration")
