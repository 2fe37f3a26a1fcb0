"""No tuned number hides in the code of the registration: each is a field of the parameter file, with its range and its meaning."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel

from regtool.config.registration import Align, Guard, Metric, Modality, Oneshot, Refine
from regtool.config.section import Section

FOLDER = Path(__file__).resolve().parents[2] / "regtool" / "registration"
# memory.py counts bytes that were measured: they decide nothing but how much fits
FILES = sorted(file for file in FOLDER.glob("*.py") if file.name not in ("__init__.py", "memory.py"))
# counting, halves and quarters in formulas written out, percent, and guards of a division by zero
FREE = {0, 1, 2, 3, 4, 6, 8, 100, 0.5, 1e-9, 1e-12, 1e-6}
# what else stands in the code, and why nobody would set it
DECIDES_NOTHING = {
    ("adaptation.py", 50): "how often whoever watches is told of the similarity",
    ("affine.py", 0.25): "rounding: a block of so much less than another voxel is left as it is",
    ("affine.py", 1.05): "how finely the spacing is sought at which `max_shifts` fit",
    ("modality.py", 1.5): "a bin of the histogram and its two neighbours",
    ("modality.py", 5): "an index: the sixth of six sums",
    ("pipeline.py", 20): "points along each axis by which the overlap of two fields of view is seen",
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_bare_numbers(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    numbers = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, int | float) and not isinstance(n.value, bool)]
    tuned = [f"line {n.lineno}: {n.value}" for n in numbers if n.value not in FREE and (file.name, n.value) not in DECIDES_NOTHING]
    assert not tuned
    constants = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(n in numbers for n in ast.walk(node.value))
        and ast.unparse(node.targets[0]) not in ("MIN_PROBABILITY", "SIMILARITY_REPORTS")
    ]
    assert not constants, "a number of the module"


@pytest.mark.parametrize("section", [Align, Guard, Metric, Modality, Oneshot, Refine])
def test_every_number_is_explained(section: type[Section]) -> None:
    for name, info in section.model_fields.items():
        assert info.description, name
        value = info.default
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert info.metadata, f"{name} has no range"
        assert not isinstance(value, BaseModel), name
