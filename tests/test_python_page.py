"""The examples of docs/python.md run, in order; and the functions have the options of the command line."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import SimpleITK as sitk
import typer

import regtool
from regtool.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
OF_THE_TERMINAL = {"as_json", "quiet", "verbose", "fixed_option", "moving_option", "help"}
CALLED = {"parameter_file": "parameters", "overrides": "settings"}


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, phase in (("fixed", "diastole"), ("moving", "systole")):
        for ending in ("", "_labels"):
            image = sitk.ReadImage(str(DATA / f"heart_sc_n_07_{phase}{ending}.png"))
            small = sitk.Shrink(image, [4, 4])
            sitk.WriteImage(small, str(tmp_path / f"{name}{ending}.nii.gz"))
    (tmp_path / "pairs.csv").write_text("id,fixed,moving\na,fixed.nii.gz,moving.nii.gz\nb,moving.nii.gz,fixed.nii.gz\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert (tmp_path / "warped.nii.gz").exists()
    assert (tmp_path / "adapted" / "model.safetensors").exists()
    assert (tmp_path / "study" / "a" / "report.json").exists()


def options_of(*verb: str) -> set[str]:
    command = typer.main.get_command(app)
    for name in verb:
        command = command.commands[name]  # type: ignore[attr-defined]
    return {CALLED.get(p.name, p.name) for p in command.params} - OF_THE_TERMINAL  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("verb", "functions", "differently"),
    [
        (("register",), ["register"], {}),
        (("finetune-oneshot",), ["finetune_oneshot", "finetune_list"], {}),
        (("train",), ["train"], {}),
        (("cohort",), ["cohort"], {"ending": "suffix"}),
        (("warp",), ["warp", "warp_points"], {"inputs": "moving", "start": "origin"}),
        (("evaluate",), ["evaluate", "evaluate_list"], {}),
        (("jacobian",), ["jacobian"], {}),
        (("transform", "invert"), ["transform.invert"], {}),
        (("transform", "compose"), ["transform.compose"], {"transform": "transforms"}),
        (("transform", "convert"), ["transform.convert"], {"source": "transform"}),
        (("transform", "info"), ["transform.info"], {}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_every_option_of_the_verb(verb: tuple[str, ...], functions: list[str], differently: dict[str, str]) -> None:
    taken: set[str] = set()
    for name in functions:
        function = getattr(regtool.transform, name.partition(".")[2]) if "." in name else getattr(regtool, name)
        taken |= inspect.signature(function).parameters.keys()
    assert {differently.get(option, option) for option in options_of(*verb)} <= taken


def test_all_is_complete_and_there() -> None:
    for name in regtool.__all__:
        assert getattr(regtool, name) is not None
        assert name in dir(regtool)
    with pytest.raises(AttributeError, match="no attribute 'registre'"):
        regtool.registre  # noqa: B018


def test_the_package_is_typed_and_has_a_version() -> None:
    assert (Path(regtool.__file__).parent / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", regtool.__version__)
