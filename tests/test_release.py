"""A release says the same version and date everywhere."""

import datetime
import re
from pathlib import Path

import yaml

import megatron_refine

ROOT = Path(__file__).parents[1]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def releases() -> list[tuple[str, str]]:
    """Version and date of every section of the changelog that has both, newest first."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", read("CHANGELOG.md"), re.MULTILINE)


def citation() -> dict[str, object]:
    found = yaml.safe_load(read("CITATION.cff"))
    assert isinstance(found, dict)
    return found


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", megatron_refine.__version__)
    setup = read("setup.py")
    assert "__version__" in setup and not re.search(r"version=['\"]", setup), "setup.py reads it from the package"
    (version,) = re.findall(r'^__version__ = "(.+)"$', read("megatron_refine/__init__.py"), re.MULTILINE)
    assert version == megatron_refine.__version__


def test_version_and_date_agree() -> None:
    version, date = releases()[0]
    assert version == megatron_refine.__version__ == citation()["version"]
    assert citation()["date-released"] == date
    assert datetime.date.fromisoformat(date)


def test_the_changelog_has_sections_in_order() -> None:
    headings = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert [h for h in headings if h != "[Unreleased]"] == [f"[{version}] - {date}" for version, date in releases()]
    assert "[Unreleased]" not in headings[1:]
    order = [tuple(map(int, version.split("."))) for version, _ in releases()]
    dates = [date for _, date in releases()]
    assert order == sorted(order, reverse=True) and dates == sorted(dates, reverse=True)
    for section in re.split(r"^## .*$", read("CHANGELOG.md"), flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
        assert len(kinds) == len(set(kinds)), "a kind of change stands twice in a section"


def test_the_citation_is_complete() -> None:
    found = citation()
    assert found["cff-version"] == "1.2.0" and found["message"] and found["title"] == "megatron_refine"
    assert found["license"] == "Apache-2.0" and "Apache License" in read("LICENSE")
    assert f'license="{found["license"]}"' in read("setup.py")
    (paper,) = found["references"]  # type: ignore[misc]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2602.16704"}]
    assert paper["title"] in read("NOTICE")
