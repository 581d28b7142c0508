"""Links from the site to files of the repository: a hook of mkdocs.yml.

A page links to a file outside docs/ by its relative path, which works on the repository's web page. For the site each
such file becomes a page below repository/, and the links lead there.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS, REPOSITORY = "docs/", "repository/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/])[^)\s#]+")  # the file that a link or an image names
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash", ".sh": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to, and for what these link to."""
    waiting, found = [DOCS + file.src_uri for file in files.documentation_pages()], set[str]()
    while waiting:
        page = waiting.pop()
        text = (ROOT / page).read_text(encoding="utf-8")
        linked = {target for target in (_target(page, link) for link in LINK.findall(text)) if _is_outside(target)}
        waiting += [target for target in linked - found if target.endswith(".md")]
        found |= linked
    for path in sorted(found):
        files.append(File.generated(config, _uri(path), content=_content(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site."""
    here = page.file.src_uri
    source = here.removeprefix(REPOSITORY) if here.startswith(REPOSITORY) else DOCS + here
    if not (ROOT / source).is_file():  # the text of a file that is no Markdown
        return markdown

    def moved(link: re.Match[str]) -> str:
        target = _target(source, link.group())
        exists = (ROOT / target).is_file()  # if not, the generator says so
        return posixpath.relpath(_uri(target), posixpath.dirname(here) or ".") if exists else link.group()

    return LINK.sub(moved, markdown)


def _target(page: str, link: str) -> str:
    """Return the path in the repository that a link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _is_outside(path: str) -> bool:
    return not path.startswith(DOCS) and (ROOT / path).is_file()


def _uri(path: str) -> str:
    """Return the place in the site of a path in the repository."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return REPOSITORY + path + ("" if path.endswith(".md") else ".md")


def _content(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n~~~~{language}\n{text}\n~~~~\n"
