"""The documentation: its links, its map, and the messages that its pages quote."""

import ast
import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from megatron_refine.cli import COMMANDS, run
from megatron_refine.data.corpus import find_corpus
from megatron_refine.data.readers import read_documents

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "tests/golden/README.md"])
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)
PROGRAMS = ("megatron-refine", "megatron_refine", "make")
OTHERS = ("zsh: ", "CUDA out of memory", "nsp 0.000", "…, 1 rank")  # not messages of ours, or made of numbers


def prose(path: Path) -> str:
    """Return the text of a page without what is fenced as code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as the repository's web page makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for file, anchor in LINK.findall(prose(page)):
        target = (page.parent / file).resolve() if file else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(f"{file}#{anchor}")
    assert not broken, f"{page.relative_to(ROOT)}: {', '.join(broken)}: no such file or heading"


def test_the_map_and_the_site_name_every_page() -> None:
    pages = {page.name for page in DOCS.glob("*.md")}
    named = {file for file, _ in LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))}
    assert pages - {"README.md"} <= named, "docs/README.md names every page"
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert all(f": {page}" in yaml.safe_dump(nav) for page in pages), "the nav of mkdocs.yml names every page"


def test_readme_is_short_and_shows_how_training_ends() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150, "README.md has at most 150 lines; the rest belongs in docs/"
    assert re.search(r"<!-- output:train -->\n```text\nstep [^`]*\nreport runs/quickstart/report.html\n```\n", text)


def test_troubleshooting_quotes_messages_as_they_are() -> None:
    others = ("Makefile", "tools/environments.mk", "megatron_refine/slurm/job.sh")
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in others]
    for folder in ("megatron_refine", "models", "kernels", "tools", "launch", "setup.py"):
        at = ROOT / folder
        for path in sorted(at.rglob("*.py")) if at.is_dir() else [at]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    page, found = (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), "\n".join(texts)
    quoted = re.findall(r"^\*\*(.*)\*\*", page, re.MULTILINE)
    entries = [message for line in quoted for message in re.findall(r"`([^`]+)`", line)]
    messages = [message for message in entries if not message.startswith(OTHERS)]
    assert len(messages) > 25
    stale = [m for m in messages if not all(part.strip() in found for part in m.split("…") if len(part.strip()) > 5)]
    assert not stale, "docs/troubleshooting.md quotes what no message says:\n" + "\n".join(stale)


def commands() -> list[tuple[str, list[str]]]:
    """Return each command that a page shows in a block of bash, as (page, words)."""
    found = []
    for page in PAGES:
        for block in FENCE.finditer(page.read_text(encoding="utf-8")):
            shell = block.group() if block.group().lstrip().startswith("```bash") else ""
            for line in shell.replace("\\\n", " ").splitlines()[1:-1]:
                words = shlex.split(line, comments=True)
                start = next((i for i, word in enumerate(words) if word in PROGRAMS), -1)
                if start >= 0 and (start == 0 or words[start - 1] == "-m" or words[0].isupper()):
                    found.append((page.name, words[start:]))
    return found


@cache
def flags(command: str) -> set[str]:
    """Return the options that a command explains."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run(command, ["--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown.getvalue()))


def test_commands_that_pages_show_exist_with_their_options() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wrong, seen = [], set()
    for page, (program, *words) in commands():
        if program == "make":
            wrong += [f"{page}: make {word}" for word in words if re.fullmatch("[a-z-]+", word) and word not in targets]
            continue
        command = words[0] if words else ""
        if command.startswith("-") or command in ("", "COMMAND"):
            continue
        seen.add(command)
        known = flags(command) if command in COMMANDS else set()
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        wrong += [f"{page}: {command} {flag}" for flag in sorted(given - known)]
        wrong += [] if command in COMMANDS else [f"{page}: megatron-refine {command}"]
        for path in words[words.index("--heldout") + 1 :] if "--heldout" in words else []:
            if path.startswith("--") or not (ROOT / path).exists():  # the next option, or a file of the reader's own
                break
            corpus = find_corpus([str(ROOT / path)], "text", "--heldout")
            assert all(text for (_, file) in corpus.files for text in read_documents(file, "text", "--heldout"))
    assert not wrong, "\n".join(wrong)
    assert seen == set(COMMANDS), f"no page shows {set(COMMANDS) - seen}"
