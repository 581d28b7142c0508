"""Which Megatron-Core is installed. Imports nothing of it."""

from importlib.metadata import version

VERSION = version("megatron-core")


def since(*release: int) -> bool:
    """Tell whether the installed release is this one or a later one: since(0, 17)."""
    return tuple(int(part) for part in VERSION.split(".")[: len(release)]) >= release
