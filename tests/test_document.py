"""docs/configuration.md is what the schema says of its keys, and the schema says something of each."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field

from megatron_refine.config import Config, ModelConfig, Train, load
from megatron_refine.config.document import HERE, PAGE, TEMPLATE, explain, main, render
from megatron_refine.config.paths import FilePaths, ProgramText
from megatron_refine.config.schema import with_model
from megatron_refine.models.family import FAMILIES
from tests.test_config import TREE


def schemas() -> Iterator[tuple[str, Any]]:
    yield from ((name, field.annotation) for name, field in Config.model_fields.items())
    yield from (("model", family) for family in FAMILIES.values())


def rows() -> dict[str, list[str]]:
    """The page's tables: type, default and meaning of each key."""
    found = re.findall(r"^\| `(\w+\.\w+)` \| (.*) \| (.*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {key: cells for key, *cells in found}


def test_the_page_is_up_to_date() -> None:
    page = render(TEMPLATE.read_text(encoding="utf-8"), FAMILIES)
    assert PAGE.read_text(encoding="utf-8") == page, "run make configuration"


def test_the_page_has_every_key_and_no_other() -> None:
    assert rows().keys() == {f"{name}.{key}" for name, schema in schemas() for key in schema.model_fields}


def test_no_key_and_no_section_lacks_its_description() -> None:
    silent = [name for name, schema in schemas() if not schema.__doc__]
    said = {f"{name}.{key}": field.description for name, s in schemas() for key, field in s.model_fields.items()}
    silent += [key for key, text in said.items() if not re.fullmatch(r"\S.*\.", text or "")]
    assert not silent, "a description is one or more sentences"


def test_defaults_are_as_one_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump({"model": TREE["model"]})
    path.write_text(text, encoding="utf-8")
    config, shown = load(path, [], FAMILIES), rows()
    for name, section in Config.model_fields.items():
        if name != "model":
            keys: Any = section.annotation.model_fields
            text += f"{name}:\n" + "".join(f"  {key}: {shown[f'{name}.{key}'][1].strip('`')}\n" for key in keys)
    path.write_text(text, encoding="utf-8")
    assert load(path, [], FAMILIES) == config


class Shape(ModelConfig):
    """Of docs/phases.md."""

    width: int = Field(4, ge=3, le=9, description="Width a|b: docs/data.md.")
    files: FilePaths = Field(description="Files.")
    program: ProgramText = Field("", description="Program.")
    kind: Literal["a", "b"] = Field("a", description="Kind.")
    kinds: list[Literal["a", "b"]] = Field(["a", "b"], description="Kinds.")
    named: dict[str, str] = Field(default_factory=dict, description="Named.")
    on: bool = Field(False, description="On.")
    small: float = Field(2.5e-7, gt=0, lt=1, description="Small.")
    large: float = Field(1e6, description="Large.")


def test_rows() -> None:
    page = render(f"before\n{HERE}\nafter\n", {"shape": Shape})
    assert "### shape\n\nOf [phases.md](phases.md).\n\n| key | type | default | meaning |\n|---|---|---|---|\n" in page
    assert [line for line in page.splitlines() if re.match(r"\| `model\.(?!family)", line)][-9:] == [
        r"| `model.width` | int >= 3, <= 9 | `4` | Width a\|b: [data.md](data.md). |",
        "| `model.files` | list of path | required | Files. |",
        '| `model.program` | path | `""` | Program. |',
        "| `model.kind` | `a`, `b` | `a` | Kind. |",
        "| `model.kinds` | list of `a`, `b` | `[a, b]` | Kinds. |",
        "| `model.named` | map of str | `{}` | Named. |",
        "| `model.on` | bool | `false` | On. |",
        "| `model.small` | float > 0, < 1 | `2.5e-7` | Small. |",
        "| `model.large` | float | `1e6` | Large. |",
    ]
    assert "\nbefore\n## model\n" in page and page.endswith(" |\nafter\n")


def test_check_fails_until_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr("megatron_refine.config.document.PAGE", page)
    with pytest.raises(SystemExit, match=r"configuration\.md: is out of date; run make configuration"):
        main(["--check"])
    main([])
    main(["--check"])
    monkeypatch.setattr(Train.model_fields["steps"], "description", "Something else.")
    with pytest.raises(SystemExit, match="out of date"):
        main(["--check"])
    main([])
    assert "| `train.steps` | int >= 1 | `100` | Something else. |\n" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "schema", "says"),
    [
        ("optimizer.eps", Config, "optimizer.eps: float > 0, default 1e-8. Adam's epsilon."),
        ("engine.sync", Config, "engine.sync: distributed, disk, default distributed. How weights reach the servers."),
        ("task.paths", Config, "task.paths: list of path, default []. Jsonl, json or parquet files"),
        ("model.num_heads", with_model(FAMILIES["delta_net"]), "model.num_heads: int >= 1, required. Heads of the"),
    ],
)
def test_explain(key: str, schema: type[BaseModel], says: str) -> None:
    line = explain(key, schema)
    assert line.startswith(says) and "\n" not in line and "`" not in line


@pytest.mark.parametrize("key", ["train.stepz", "nothing", "train.steps.x", "model.num_heads"])
def test_an_unknown_key_has_no_explanation(key: str) -> None:
    with pytest.raises(KeyError):
        explain(key)
