"""What is asked of the parameters travels as values: a path is never written into a text to be read again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regtool.config.resolve import check_overrides, load
from regtool.config.toml import merged, nested, parse_override
from regtool.errors import ParameterError

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
tables: Any = st.dictionaries(st.sampled_from("abc"), st.integers() | words)
nested_tables: Any = st.dictionaries(st.sampled_from("abc"), tables | st.integers())


@given(nested_tables, nested_tables)
def test_the_later_table_wins_key_by_key(low: dict[str, Any], high: dict[str, Any]) -> None:
    found = merged(low, high)
    for key in {*low, *high}:
        if isinstance(low.get(key), dict) and isinstance(high.get(key), dict):
            assert found[key] == {**low[key], **high[key]}
        else:
            assert found[key] == high.get(key, low.get(key))


def test_merging_leaves_the_tables_alone() -> None:
    low: dict[str, Any] = {"run": {"seed": 1}}
    merged(low, {"run": {"seed": 2}})["run"]["threads"] = 3
    merged(low)["run"]["threads"] = 3
    assert low == {"run": {"seed": 1}}


@given(words)
def test_any_text_arrives_as_it_was_given(text: str) -> None:
    assert load(None, {"run": {"model": text, "initial_transform": text}}).run.model == text


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("oneshot.iterations=9", "oneshot.iterations", 9),
        (" oneshot.iterations = 9 ", "oneshot.iterations", 9),
        ("run.inverse=true", "run.inverse", True),
        ("grid.size=[8, 9]", "grid.size", [8, 9]),
        ('run.model="a=b.safetensors"', "run.model", "a=b.safetensors"),
        (r"run.model=C:\new\a b.safetensors", "run.model", r"C:\new\a b.safetensors"),
        ('run.model=Ä/𝒳/😀 "it\'s".safetensors', "run.model", 'Ä/𝒳/😀 "it\'s".safetensors'),
        ("run.model=", "run.model", ""),
    ],
)
def test_the_text_of_set(text: str, key: str, value: object) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize(("old", "new"), [("measure", "metric"), ("similarity", "training_similarity"), ("regularity", "regularization")])
def test_old_names_are_read_with_a_line_that_tells_the_new_one(old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, value = ("diffusion", 0.25) if old == "regularity" else ("name", "mse")
    text = f'"{value}"' if isinstance(value, str) else str(value)
    file = tmp_path / "old.toml"
    file.write_text(f"[run]\nseed = 3\n\n[{old}]\n{key} = {text}\n")
    with caplog.at_level(logging.WARNING, "regtool"):
        in_file = load(file)
        by_set = load(None, nested(*parse_override(f"{old}.{key}={text}")))
        by_table = load(None, {old: {key: value}})
    for parameters in (in_file, by_set, by_table):
        assert getattr(getattr(parameters, new), key) == value
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}:4: {old} is now called {new}",
        f"--set {old}.{key}={text}: {old}.{key} is now called {new}.{key}",
        f"{old} is now called {new}",
    ]


def test_an_unknown_key_beside_an_old_name_has_its_own_line(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    file.write_text('[measure]\nname = "mse"\nwindwo = 7\n')
    with pytest.raises(ParameterError, match=r"old\.toml:3: metric\.windwo: unknown parameter; did you mean 'window'\?"):
        load(file)


def test_what_is_wrong_is_said_in_the_words_that_gave_it(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[grid]\nspacing_mm = 2\n\n[oneshot]\niterations = 5\n")
    said = {"oneshot.iterations": "--iterations many", "run.max_memory_gb": "--max-memory 8"}
    with pytest.raises(ParameterError, match=r"^--iterations many: oneshot\.iterations: .*integer.*got 'many'"):
        check_overrides({"oneshot": {"iterations": "many"}, "run": {"max_memory_gb": 8.0}}, said)
    check_overrides({"grid": {"size": [8, 8]}}, {"grid.size": "--set grid.size=[8,8]"})  # right by itself
    with pytest.raises(ParameterError, match=r"^parameters: grid: size goes without spacing_mm"):
        load(file, {"grid": {"size": [8, 8]}})  # and wrong beside the file
    with pytest.raises(ParameterError, match=r"^parameters: oneshot\.iterations: "):
        load(file, {"oneshot": {"iterations": "many"}})  # the file's own line is not to blame


@pytest.mark.parametrize(
    ("section", "key", "given", "meant"),
    [
        ("align", "method", "Affine", "affine"),
        ("metric", "name", "LNCC", "lncc"),
        ("run", "format", "NRRD", "nrrd"),
        ("run", "device", "CUDA:1", "cuda:1"),
        ("refine", "finest", "NGF", "ngf"),
        ("train", "schedule", "Cosine", "cosine"),
    ],
)
def test_names_in_upper_or_lower_case(section: str, key: str, given: str, meant: str) -> None:
    assert getattr(getattr(load(None, {section: {key: given}}), section), key) == meant


def test_a_method_in_upper_or_lower_case() -> None:
    assert load(None, {"method": "VoxelMorph"}).method == "voxelmorph"


def test_a_wrong_name_answers_with_the_nearest() -> None:
    with pytest.raises(ParameterError, match=r"align\.method: .*'moments'.*, got 'momnets'; did you mean 'moments'\?"):
        load(None, {"align": {"method": "momnets"}})
