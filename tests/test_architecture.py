"""The blueprint of the house: imports only go down, and each dangerous thing lives in one place."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "regtool"
STOREYS = {
    "errors": -1, "config": 0,
    "runtime": 1, "geometry": 1,
    "io": 2, "similarity": 2, "networks": 2, "deformation": 2,
    "preprocessing": 3, "evaluation": 3, "report": 3,
    "methods": 4,
    "registration": 5, "training": 5,
    "cohorts": 6, "result": 6,
    "workflows": 7,
    "cli": 8,
    "api": 9,
    "__init__": 10, "__main__": 10,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {f: ast.parse(f.read_text(encoding="utf-8")) for f in FILES}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imported(tree: ast.AST) -> set[str]:
    """Every module that is imported, but for type checking alone."""
    names: set[str] = set()
    skipped = {id(n) for g in ast.walk(tree) if isinstance(g, ast.If) and "TYPE_CHECKING" in ast.unparse(g.test) for n in ast.walk(g)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def users_of(package: str) -> set[str]:
    return {str(f.relative_to(PACKAGE)) for f, tree in TREES.items() if any(n.split(".")[0] == package for n in imported(tree))}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_only_go_down(file: Path) -> None:
    here = room(file)
    assert here in STOREYS, f"{here} has no storey"
    for name in imported(TREES[file]):
        parts = name.split(".")
        if parts[0] != "regtool" or len(parts) == 1:
            continue
        there = parts[1] if parts[1] in STOREYS else "__init__"
        if here == "__init__" or there == here:
            continue
        assert STOREYS[there] < STOREYS[here], f"{file.relative_to(ROOT)} (storey {STOREYS[here]}) imports {name} (storey {STOREYS[there]})"


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_import_circles() -> None:
    modules = {name_of(file): file for file in FILES}
    imports = {name: {m for m in imported(TREES[file]) if m in modules and m != name} for name, file in modules.items()}
    while imports:  # take away, again and again, what imports nothing that is left
        free = {name for name, needs in imports.items() if not needs & imports.keys()}
        assert free, f"these import each other: {sorted(imports)}"
        imports = {name: needs for name, needs in imports.items() if name not in free}


def test_simpleitk_only_in_io() -> None:
    assert {f.split("/")[0] for f in users_of("SimpleITK")} <= {"io"}


def test_terminal_only_in_cli() -> None:
    assert {f.split("/")[0] for f in users_of("typer") | users_of("rich")} <= {"cli"}
    for file, tree in TREES.items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not calls or room(file) == "cli", f"{file}: print outside cli"


def test_matplotlib_and_jinja_only_in_report() -> None:
    assert {f.split("/")[0] for f in users_of("matplotlib") | users_of("jinja2")} <= {"report"}


def test_one_sampling_convention() -> None:
    for file in FILES:
        if file != PACKAGE / "geometry" / "sampling.py":
            text = file.read_text(encoding="utf-8")
            assert "grid_sample" not in text and "align_corners" not in text, file


def test_nothing_is_unpickled() -> None:
    for file, tree in TREES.items():
        assert not {n.split(".")[0] for n in imported(tree)} & {"pickle", "dill", "joblib", "shelve"}, file
        assert "torch.load(" not in file.read_text(encoding="utf-8") or "weights_only=True" in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("module", ["regtool", "regtool.errors", "regtool.config.schema", "regtool.methods", "regtool.io.formats", "regtool.cli.app"])
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'SimpleITK', 'matplotlib', 'h5py') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_matplotlib_waits_for_a_page() -> None:
    """`register --no-qc` and a pair of images in memory need none: a quarter of a second."""
    code = "import sys, regtool.workflows.register; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_are_documented(file: Path) -> None:
    tree = TREES[file]
    if tree.body and file.name != "__init__.py":
        assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
