"""Pieces of one self-contained HTML page. Every text from outside passes through `html.escape`."""

import re
from collections.abc import Iterable, Sequence
from html import escape

COLOURS = """
:root { color-scheme: light dark;
  --paper: #fcfcfb; --card: #ffffff; --ink: #22262b; --soft: #667079; --grid: #e3e5e8; --match: #dcefe0;
  --blue: #2f6cb3; --orange: #cf7220; --green: #3f8f5c; --purple: #7b5fb0; --red: #bf4646; --gray: #8b949e; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15181c; --card: #1c2025; --ink: #dfe3e8; --soft: #98a2ad; --grid: #343a42; --match: #244a33;
  --blue: #74a9e6; --orange: #eba45f; --green: #7fc495; --purple: #b39ae0; --red: #e58a8a; --gray: #77818c; } }
"""
_CSS = """
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -0.01em; }
h2 { margin: 2.75rem 0 0.75rem; font-size: 1.12rem; font-weight: 650; }
p { margin: 0.5rem 0; } .note { color: var(--soft); font-size: 0.9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: 0.75rem; margin: 1.5rem 0; }
.tile { padding: 0.7rem 0.9rem; }
.tile, pre { border: 1px solid var(--grid); border-radius: 8px; background: var(--card); }
.tile dt { color: var(--soft); font-size: 0.8rem; } .tile dd { margin: 0; font-size: 1.3rem; font-weight: 600; }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; text-align: left; }
th, td { padding: 0.4rem 0.75rem 0.4rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th.number, td.number { text-align: right; white-space: nowrap; }
code, pre { font: 0.82rem/1.5 ui-monospace, monospace; } td code { white-space: pre-wrap; overflow-wrap: anywhere; }
.space { color: var(--gray); } mark { background: var(--match); color: inherit; border-radius: 2px; }
pre { overflow-x: auto; padding: 0.9rem; }
summary { cursor: pointer; }
svg.tall { display: none; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 0.9rem 3rem; } svg.wide { display: none; } svg.tall { display: block; }
  table { font-size: 0.7rem; } th, td { padding-right: 0.35rem; white-space: normal; overflow-wrap: break-word; }
  td code { font-size: 0.65rem; min-width: 4.5rem; display: inline-block; }
}
"""
_SPACES = {" ": "·", "\n": "↵\n", "\t": "→\t", "\r": "␍"}


def document(title: str, body: Iterable[str]) -> str:
    """Return a whole page; `title` is plain text, `body` HTML."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f'<html lang="en"><head>{meta}<title>{escape(title)}</title><style>{COLOURS}{_CSS}</style></head>'
    return "\n".join(["<!doctype html>", head, "<body>", *body, "</body></html>", ""])


def section(title: str, body: str, note: str = "") -> str:
    """Return a heading, its content, and a sentence on how to read it."""
    name = re.sub(r"\W+", "-", title.lower())
    note = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{name}"><h2>{title}</h2>{body}{note}</section>'


def figure(svg: str) -> str:
    """A drawing of `svg.draw` as a figure."""
    return f"<figure>{svg}</figure>"


def text(sentence: str) -> str:
    """Return a sentence of plain text as a paragraph."""
    return f"<p>{escape(sentence)}</p>"


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Return headline numbers; name and value are plain text."""
    cells = (f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in facts)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Return a table of HTML cells under plain headings; the columns `numbers` are set flush right."""
    flush = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        attribute = [' class="number"' if column in flush else "" for column in range(len(cells))]
        return "".join(f"<{tag}{a}>{cell}</{tag}>" for a, cell in zip(attribute, cells, strict=True))

    head = line([escape(heading) for heading in headings], "th")
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def visible(text: str, matched: int = 0) -> str:
    """Return text as code with its white space in view and its first `matched` characters highlighted."""
    marked = f"<mark>{_spell(text[:matched])}</mark>" if matched else ""
    return f"<code>{marked}{_spell(text[matched:])}</code>"


def _spell(text: str) -> str:
    spelled = (f'<span class="space">{_SPACES[char]}</span>' if char in _SPACES else escape(char) for char in text)
    return "".join(spelled)
