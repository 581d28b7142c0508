"""The drawing in docs/architecture.md, made of the real imports: python -m tests.rooms writes it anew."""

import re
from pathlib import Path

from tests.test_house import ORDER, PACKAGE, ROOT, files, imports, module_of

PAGE = ROOT / "docs/architecture.md"
BLOCK = re.compile(r"```mermaid\n.*?```", re.DOTALL)
LEFT_OUT = {"files", "launcher", "progress", "ranks", "usage", "records", "errors", "exchange", "extras", "__main__"}


def room(parts: list[str]) -> str:
    """The part of the package that a module is in."""
    return parts[1] if len(parts) > 1 else ""


def edges() -> set[tuple[str, str]]:
    """Which room imports which, without small files that nearly all import, and without what follows from the rest."""
    rooms = {name for floor in ORDER for name in floor} - LEFT_OUT
    found = set()
    for path in files(*PACKAGE):
        own = room(module_of(path))
        for _, name in imports(path):
            other = room(name.split(".")) if name.startswith(f"{PACKAGE[0]}.") else ""
            if own in rooms and other in rooms and own != other:
                found.add((own, other))
    below = {name: {b for a, b in found if a == name} for name in rooms}

    def reached(start: str) -> set[str]:
        return set().union(*({x} | reached(x) for x in below[start]))

    return {(a, b) for a, b in found if not any(b in reached(c) for c in below[a] - {b})}


def drawing() -> str:
    """The block, floor by floor."""
    place = {name: i for i, floor in enumerate(ORDER) for name in floor}
    lines = sorted(edges(), key=lambda edge: (-place[edge[0]], edge))
    return "\n".join(["```mermaid", "flowchart TD", *(f"    {a} --> {b}" for a, b in lines), "```"])


def main() -> None:
    """Write the drawing into the page."""
    page = PAGE.read_text(encoding="utf-8")
    Path(PAGE).write_text(BLOCK.sub(drawing(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
