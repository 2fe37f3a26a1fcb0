"""The groups of options that verbs share, and what becomes of the values that they are given."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import SimpleITK as sitk
import typer

from regtool.cli.app import app
from regtool.cli.grouped import Sets, given_parameters, grouped
from regtool.config.choices import Alignment, ImageFormat, similarities
from tests.cli.test_cli import call
from tests.conftest import blobs

STRANGE = "Ä 'b' \"c\" \\d\\n 𝒳😀 = [e].f"  # quotes, backslashes, spaces, characters beyond the first 65536, what TOML and JSON have a use for
QUICK = ("--threads", "1", "--no-qc", "--refine", "none", "--align", "none", "-q")


@dataclass(frozen=True)
class Shared:
    needed: Annotated[str, typer.Option("--needed", help="Must be.")]
    some: Annotated[int, typer.Option("--some", help="How many."), Sets("oneshot.iterations", lambda n: n or None)] = 3
    more: Annotated[bool | None, typer.Option("--more/--less"), Sets("run.inverse")] = None


def test_a_group_is_its_options(capfd: pytest.CaptureFixture[str]) -> None:
    small, seen = typer.Typer(), []

    @grouped
    def verb(path: Annotated[Path, typer.Argument()], shared: Shared, own: Annotated[str, typer.Option()] = "x") -> None:
        seen.append((path, shared, own))

    small.command()(verb)
    small(["--needed", "a", "b.nii", "--less", "--own", "y"], standalone_mode=False)
    small(["--some", "0", "b.nii", "--needed", "a"], standalone_mode=False)
    assert seen == [(Path("b.nii"), Shared("a", 3, False), "y"), (Path("b.nii"), Shared("a", 0, None), "x")]
    assert list(given_parameters(seen[0][1])) == [("--some 3", "oneshot.iterations", 3), ("--more False", "run.inverse", False)]
    assert list(given_parameters(seen[1][1])) == []
    with pytest.raises(typer.TyperException, match="needed"):
        small(["b.nii"], standalone_mode=False)


def test_what_verbs_share_is_declared_once() -> None:
    """The same option says the same wherever it is."""
    command = typer.main.get_command(app)
    texts: dict[str, dict[str, set[str]]] = {}
    for verb in ("register", "cohort", "finetune-oneshot", "train"):
        for option in command.commands[verb].params:  # type: ignore[attr-defined]
            texts.setdefault(max(option.opts, key=len), {}).setdefault(str(getattr(option, "help", "")), set()).add(verb)
    shared = ("--method", "--model", "--align", "--initial-transform", "--similarity", "--refine", "--symmetric", "--inverse", "--format", "--device")
    for name in (
        *shared,
        "--qc",
        "--threads",
        "--max-memory",
        "--seed",
        "--set",
        "--parameters",
        "--fix-header",
        "--fixed-mask",
        "--json",
        "--quiet",
    ):
        assert len(texts[name]) == 1, name
        assert len(next(iter(texts[name].values()))) > 1, name


def test_help_names_every_choice(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = call(capfd, "register", "--help").out
    for names in (Alignment.__args__, ImageFormat.__args__, ("auto", *similarities())):  # type: ignore[attr-defined]
        assert "|".join(names) in shown


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("--align", "Center"), "align.method", "center"),
        (("--similarity", "MSE"), "metric.name", "mse"),
        (("--similarity", "MSE"), "training_similarity.name", "mse"),
        (("--format", "MHA"), "run.format", "mha"),
        (("--device", "CPU"), "run.device", "cpu"),
        (("--refine", "NONE"), "refine.iterations", 0),
        (("--refine", "7", "--symmetric"), "run.inverse", True),
        (("--set", "refine.iterations=5", "--refine", "7"), "refine.iterations", 7),
        (("--set", "measure.name=mse"), "metric.name", "mse"),
    ],
)
def test_options_become_parameters(words: tuple[str, ...], key: str, value: object, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pair(tmp_path)
    options = ("--threads", "1", "--no-qc", "--set", "refine.max_voxels=100", "--model", "none", "--set", "refine.iterations=1")
    answer = call(capfd, "register", tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz", "-o", tmp_path / "out", *options, *words)
    assert answer.code == 0, answer.err
    section, name = key.split(".")
    assert tomllib.loads((tmp_path / "out" / "parameters.toml").read_text(encoding="utf-8"))[section][name] == value


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--set", "engine.variatn=vm1", "-m", "voxelmorph"), "parameters: engine.variatn: unknown parameter; did you mean 'variant'?"),
        (("--set", "run.sede=1", "--seed", "2"), "--set run.sede=1: run.sede: unknown parameter; did you mean 'seed'?"),
    ],
    ids=["engine", "set"],
)
def test_what_is_wrong_is_said_in_the_words_that_gave_it(
    words: tuple[str, ...], error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair(tmp_path)
    answer = call(capfd, "register", tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz", "-o", tmp_path / "out", *words)
    assert answer.code == 2
    assert answer.lines("error")[0].startswith(f"error: {error}"), answer.err


def pair(folder: Path) -> None:
    """fixed.nii.gz, and moving.nii.gz three millimetres along x."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, x in (("fixed", 12.0), ("moving", 15.0)):
        sitk.WriteImage(sitk.GetImageFromArray(blobs((24, 24), (12.0, x), 4.0).astype(np.float32)), str(folder / f"{name}.nii.gz"))


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A folder of a name that is hard to quote: a pair, the transform between its images, a model, a list."""
    folder = tmp_path / STRANGE
    pair(folder)
    shift = sitk.TranslationTransform(2, (3.0, 0.0))
    sitk.WriteTransform(shift, str(folder / f"{STRANGE}.tfm"))
    shutil.copy(Path(str(files("regtool"))) / "weights" / "cycle_2d.safetensors", folder / f"{STRANGE}.safetensors")
    (folder / "pairs.csv").write_text("id,fixed,moving\na,fixed.nii.gz,moving.nii.gz\n")
    return folder


def test_paths_survive_register_and_its_parameter_file(strange: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = (strange / "fixed.nii.gz", strange / "moving.nii.gz")
    out, model, initial = strange / "out", strange / f"{STRANGE}.safetensors", strange / f"{STRANGE}.tfm"
    first = call(capfd, "register", *images, "-o", out, *QUICK, "--model", model, "--initial-transform", initial)
    assert first.code == 0, first.err
    written = tomllib.loads((out / "parameters.toml").read_text(encoding="utf-8"))["run"]
    assert (written["model"], written["initial_transform"]) == (str(model), str(initial))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["fixed"]["path"] == str(images[0])
    again = call(capfd, "register", *images, "-o", strange / "again", "-p", out / "parameters.toml", "-q")
    assert again.code == 0, again.err
    one, two = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "displacement.nii.gz"))) for folder in (out, strange / "again"))
    assert np.array_equal(one, two)
    assert abs(one[12, 12, 0] - 3.0) < 1.5  # the transform was there


def test_paths_survive_set(strange: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = (strange / "fixed.nii.gz", strange / "moving.nii.gz")
    initial = strange / f"{STRANGE}.tfm"
    done = call(capfd, "register", *images, "-o", strange / "out", *QUICK, "--model", "none", "--set", f"run.initial_transform={initial}", "--json")
    assert done.code == 0, done.err
    assert tomllib.loads((strange / "out" / "parameters.toml").read_text(encoding="utf-8"))["run"]["initial_transform"] == str(initial)


def test_paths_survive_the_tasks_of_a_cohort(strange: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(strange)  # the process that registers works elsewhere: relative paths must arrive too
    model, initial = f"{STRANGE}.safetensors", f"{STRANGE}.tfm"
    done = call(capfd, "cohort", "pairs.csv", "-o", "out", *QUICK, "--model", model, "--initial-transform", initial, "--json")
    assert done.code == 0, done.err + done.out
    written = tomllib.loads((strange / "out" / "a" / "parameters.toml").read_text(encoding="utf-8"))["run"]
    assert (written["model"], written["initial_transform"]) == (str(strange / model), str(strange / initial))
