"""The house rules that a machine can see."""

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ("megatron_refine", "models", "kernels")
FOLDERS = (*PACKAGE, "tools", "launch", "tests")
# Imports go from a line to the lines above it, never sideways.
ORDER = (
    {"errors", "files", "launcher", "markdown", "progress", "usage"},
    {"ranks", "records", "config", "platform"},
    {"exchange", "extras"},
    {"kernels"},
    {"models"},
    {"convert", "estimate", "slurm"},
    {"trainer"},
    {"checkpoint", "step"},
    {"engine"},
    {"data"},
    {"eval", "report"},
    {"phases", "publish"},
    {"run", "bench", "reproduce", "scaling", "study", "warm"},
    {"train"},
    {"cli"},
    {"__main__"},
)
ONLY = {"data": {"config", "errors", "files", "progress", "records"}, "report": {"config", "files", "records"}}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def files(*folders: str) -> list[Path]:
    """Project files; the links megatron_refine/models and megatron_refine/kernels are not followed."""
    found = (Path(at, name) for folder in folders for at, _, names in os.walk(ROOT / folder) for name in names)
    return sorted(path for path in found if path.suffix == ".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def refuse(problems: list[str], rule: str) -> None:
    assert not problems, f"{rule}\n" + "\n".join(problems)


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def module_of(path: Path) -> list[str]:
    """Dotted name, in parts, of a file of the package: models/a.py is megatron_refine.models.a."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts if parts[0] == PACKAGE[0] else [PACKAGE[0], *parts]


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Absolute names of all that the file imports, within functions too."""
    package = module_of(path)[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, Function))


def lines(node: Function | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_file_over_400_lines() -> None:
    long = [f"{where(p)}: {length(p)} lines" for p in files(*FOLDERS) if length(p) > 400]
    refuse(long, "a file has at most 400 lines")


def test_median_file_under_170_lines() -> None:
    lengths = [length(p) for p in files(*FOLDERS) if "tests" not in p.relative_to(ROOT).parts and length(p) > 5]
    assert statistics.median(lengths) < 170, "the median file has under 170 lines"


def test_no_function_over_50_lines() -> None:
    long = [(p, f) for p in files(*FOLDERS) for f in functions(p) if lines(f) > 50]
    refuse([f"{where(p, f)}: {f.name} has {lines(f)}" for p, f in long], "a function has at most 50 lines")


def undocumented(path: Path) -> Iterator[ast.AST]:
    """What lacks a docstring: the module; public functions over 8 lines; public classes but those that list fields;
    their public methods over 8 lines, or over 20 where the class explains itself."""
    module = tree(path)
    if not ast.get_docstring(module) and module.body:
        yield module
    yield from (f for f in silent(module) if isinstance(f, Function) and lines(f) > 8)
    for owner in (node for node in module.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")):
        limit = 20 if ast.get_docstring(owner) else 8
        yield from (f for f in silent(owner) if isinstance(f, Function) and lines(f) > limit)
    for owner in (node for node in silent(module) if isinstance(node, ast.ClassDef) and lines(node) > 8):
        if not any(isinstance(node, ast.AnnAssign) for node in owner.body):
            yield owner


def silent(owner: ast.Module | ast.ClassDef) -> list[Function | ast.ClassDef]:
    """Public definitions right in `owner` that have no docstring."""
    inner = [node for node in owner.body if isinstance(node, Function | ast.ClassDef)]
    return [node for node in inner if not node.name.startswith("_") and not ast.get_docstring(node)]


def test_public_code_has_docstrings() -> None:
    found = [(p, node) for p in files(*PACKAGE) for node in undocumented(p)]
    refuse([f"{where(p, n)}: {getattr(n, 'name', 'the module')}" for p, n in found], "a docstring is missing")


def allowed(part: str) -> set[str]:
    levels = [i for i, names in enumerate(ORDER) if part in names]
    assert levels, f"megatron_refine/{part} has no place in the order of imports: add it to tests/test_house.py"
    return {part} | (ONLY[part] if part in ONLY else set().union(*ORDER[: levels[0]]))


def test_imports_run_one_way() -> None:
    problems = []
    for path in files(*PACKAGE):
        part = module_of(path)[1]
        if part == "__init__":
            continue
        for node, name in imports(path):
            root, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if root in FOLDERS[1:] or (root == PACKAGE[0] and target not in allowed(part) | {"__version__"}):
                problems.append(f"{where(path, node)}: {part} must not import {name}")
    refuse(problems, "imports run one way: " + " <- ".join(", ".join(sorted(names)) for names in ORDER))


def test_family_descriptions_need_no_megatron() -> None:
    light = [p for p in files("models") if p.name in ("config.py", "hf.py", "flops.py")]
    found = [(p, node) for p in light for node, name in imports(p) if name.split(".")[0] == "megatron"]
    refuse([where(p, node) for p, node in found], "config.py, hf.py and flops.py of a family run without Megatron")


def names_cuda(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch"
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith("torch.cuda") or (
            node.module == "torch" and any(alias.name == "cuda" for alias in node.names)
        )
    return isinstance(node, ast.Import) and any(alias.name.startswith("torch.cuda") for alias in node.names)


def test_only_platform_knows_cuda() -> None:
    knowing = [ROOT / "megatron_refine/platform", ROOT / "megatron_refine/warm/driver.py"]
    others = [p for p in files(*FOLDERS) if not any(p.is_relative_to(k) for k in knowing)]
    found = [(p, node) for p in others for node in ast.walk(tree(p)) if names_cuda(node)]
    rule = "torch.cuda belongs in megatron_refine/platform; warm/driver.py pretends to be a GPU"
    refuse([where(p, node) for p, node in found], rule)


def test_no_print() -> None:
    loud = ("train.py", "run/opening.py", "progress.py", "report", "cli")
    exempt = [ROOT / "megatron_refine" / part for part in loud]
    quiet = [p for p in files(*PACKAGE) if not any(p.is_relative_to(e) for e in exempt)]
    calls = [(p, node) for p in quiet for node in ast.walk(tree(p)) if isinstance(node, ast.Call)]
    prints = [where(p, node) for p, node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    refuse(prints, "no print outside cli/, train.py and report/")


TEXT_OPENERS = {"open", "fdopen", "read_text", "write_text", "TextIOWrapper", "NamedTemporaryFile", "TemporaryFile"}


def locale_dependent(node: ast.AST) -> bool:
    """Whether a call reads or writes text in the encoding of the locale."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in ("os", "tarfile"):  # bytes
        return False
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if "encoding" in given:
        return False
    if any(isinstance(given.get(k), ast.Constant) and given[k].value for k in ("text", "universal_newlines")):  # type: ignore[attr-defined]
        return True
    if name not in TEXT_OPENERS:
        return False
    literals = [a.value for a in (*node.args, given.get("mode")) if isinstance(a, ast.Constant)]
    if name in ("read_text", "write_text"):
        return "utf-8" not in literals
    modes = [text for text in literals if isinstance(text, str) and re.fullmatch(r"[rwxab+t]{1,3}", text)]
    if name in ("NamedTemporaryFile", "TemporaryFile"):  # binary by default
        return bool(modes) and "b" not in modes[0]
    arguments = node.args if isinstance(node.func, ast.Attribute) else node.args[1:]
    if not modes and arguments:  # a method of another class, or os.open
        return False
    return not modes or "b" not in modes[0]


def test_text_files_are_utf8_whatever_the_locale() -> None:
    calls = [(p, node) for p in files(*FOLDERS) for node in ast.walk(tree(p)) if locale_dependent(node)]
    refuse([where(p, node) for p, node in calls], 'say encoding="utf-8"')


PICKLED = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "recv_object_list"}


def test_ranks_exchange_no_pickles() -> None:
    names = [(p, n) for p in files(*PACKAGE, "tools") for n in ast.walk(tree(p)) if isinstance(n, ast.Attribute)]
    refuse([where(p, node) for p, node in names if node.attr in PICKLED], "ranks talk by megatron_refine/exchange.py")


@pytest.mark.parametrize("name", ["models", "kernels.delta_rule"])
def test_bare_import_is_refused(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode and (
        "Error: No module named" in done.stderr or "import megatron_refine.models" in done.stderr
    )


@pytest.mark.slow
def test_transformers_is_not_misled_by_our_folder() -> None:
    """It looks for a package `kernels` by importing it, and so does flash-linear-attention through it."""
    code = "from transformers import activations, utils; print(utils.is_kernels_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("name", ["models", "kernels", "configs"])
def test_links_into_the_package(name: str) -> None:
    link = ROOT / "megatron_refine" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}", f"{link.relative_to(ROOT)} must link to ../{name}"


def test_the_drawing_is_that_of_the_imports() -> None:
    """docs/architecture.md; python -m tests.rooms writes it anew."""
    from tests.rooms import PAGE, drawing

    assert drawing() in PAGE.read_text(encoding="utf-8")
