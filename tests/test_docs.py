"""The documents are in step with the code: generated tables, links, names of parameters, paths of files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from regtool.config.choices import similarities
from regtool.config.schema import Parameters

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_table_of_numbers_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("parameter_reference", ROOT / "examples" / "parameter_reference.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    assert script.written(page) == page, "run python examples/parameter_reference.py --write docs/algorithm.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_parameters_that_are_named_exist(page: Path) -> None:
    parameters = Parameters()
    sections = {name: getattr(parameters, name) for name in Parameters.model_fields if isinstance(getattr(parameters, name), BaseModel)}
    for section, key in re.findall(r"`(?:--set )?([a-z_]+)\.([a-z_0-9]+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
        if section in sections and key not in ("md", "py", "toml", "json", "html", "png"):
            assert key in type(sections[section]).model_fields, f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_of_names_are_those_of_the_code(page: Path) -> None:
    names = "|".join(similarities())
    for found in re.findall(rf"`((?:auto\|)?(?:{names})(?:[ |](?:{names})){{3,}})`", page.read_text(encoding="utf-8")):
        assert set(re.split(r"[ |]", found)) - {"auto"} == set(similarities())


@pytest.mark.parametrize("page", [p for p in PAGES if "development" not in p.parts], ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"\b((?:registration|config|similarity|methods|geometry|examples)/[\w/]+\.(?:py|sh))\b", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (ROOT / "regtool" / name).exists(), name
