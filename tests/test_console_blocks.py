"""The commands of README and docs run: every `regtool` line of every console block, in order, in a folder that holds the files it names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import typer

from regtool.cli.app import app, main
from tests.conftest import blobs, contained

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# what a command needs that a test machine has not, or that takes minutes: its options are looked at, no more
NOT_HERE = ("--device cuda", "torchrun", "srun", "--scheduler", "cvpr2018_vm2_cc.h5", "vm2.safetensors", "--bids-dir")
LONG = ("parameter_files/", "synthesis.size=[64,64,64]", "until-converged")
# so that a small pair takes little time; the commands are otherwise as they stand
CHEAP = {
    "register": ["--set", "refine.iterations=20", "--set", "grid.max_voxels=4096", "--threads", "1"],
    "cohort": ["--set", "refine.iterations=20", "--set", "grid.max_voxels=4096", "--threads", "1"],
    "train": ["--steps", "1", "--set", "train.validation_pairs=1", "--set", "synthesis.size=[32,32,32]", "--threads", "1"],
    "finetune-oneshot": ["--iterations", "1", "--threads", "1"],
}


def commands(page: Path) -> list[str]:
    """Those of regtool, continued lines joined, without comments."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"(srun |torchrun .*-m )?regtool ", line.strip())]


def words(command: str) -> list[str]:
    """The arguments of regtool: up to a comment, or to what the shell does next."""
    found = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "1"), comments=True)
    found = found[found.index("regtool") + 1 :]
    ends = [k for k, word in enumerate(found) if word in ("&&", "||", "|", ";")]
    return found[: ends[0]] if ends else found


COMMANDS = {page: commands(page) for page in PAGES}
WITH_COMMANDS = [page for page in PAGES if COMMANDS[page]]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_every_option_exists(page: Path) -> None:
    for command in COMMANDS[page]:
        verb, arguments = typer.main.get_command(app), words(command)
        context = verb.make_context("regtool", list(arguments))
        while hasattr(verb, "commands"):
            name, *arguments = arguments
            verb = verb.commands[name]
            context = verb.make_context(name, list(arguments), parent=context)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the pages name, made of one small pair."""
    folder = tmp_path_factory.mktemp("pages")
    volumes = {}
    for name, centre in (("fixed", (11.0, 12.0, 12.0)), ("moving", (12.0, 11.0, 13.0))):
        ball = blobs((24, 24, 24), centre, 7.0)
        ball = np.where(ball > 0.02, ball * (1 + 0.5 * np.sin(np.indices(ball.shape).sum(0) / 2 + centre[0])), 0)  # something to deform
        volumes[name] = sitk.GetImageFromArray((200 * ball).astype(np.int16))
        sitk.WriteImage(volumes[name], str(folder / f"{name}.nii.gz"))
        labels = sitk.GetImageFromArray((ball > 0.5).astype(np.uint8))
        for called in (f"{name}_seg", f"{name[0]}"):
            sitk.WriteImage(labels, str(folder / f"{called}.nii.gz"))
        for called in (name, name[0]):
            (folder / f"{called}.csv").write_text("x,y,z\n12,12,12\n10,14,11\n", encoding="utf-8")
    for called in ("lung", "brain", "labels", "brain_labels"):
        sitk.WriteImage(labels, str(folder / f"{called}.nii.gz"))
    for called, name in (("ct.mha", "fixed"), ("fixed.mha", "fixed"), ("moving.mha", "moving"), ("other_fixed.nii.gz", "fixed")):
        sitk.WriteImage(volumes[name], str(folder / called))
    shutil.copy(folder / "moving.nii.gz", folder / "other_moving.nii.gz")
    shutil.copy(folder / "fixed.csv", folder / "landmarks.csv")
    two = "a,fixed.nii.gz,moving.nii.gz\nb,moving.nii.gz,fixed.nii.gz\n"
    for called in ("pairs.csv", "site_pairs.csv"):
        (folder / called).write_text(f"id,fixed,moving\n{two}", encoding="utf-8")
    (folder / "images.csv").write_text("id,image\na,fixed.nii.gz\nb,moving.nii.gz\nc,other_fixed.nii.gz\n", encoding="utf-8")
    write_series(volumes["moving"], folder / "dicom_folder")
    weights = ROOT / "regtool" / "weights" / "voxelmorph_3d.safetensors"
    (folder / "run").mkdir()
    for called in ("run/model.safetensors", "brain.safetensors"):
        shutil.copy(weights, folder / called)
    before = Path.cwd()
    os.chdir(folder)
    try:
        run(["register", "fixed.nii.gz", "moving.nii.gz", "-o", "result", "--no-qc", *CHEAP["register"]])
        run(["cohort", "pairs.csv", "-o", "results", "--no-qc", *CHEAP["cohort"]])
    finally:
        os.chdir(before)
    for called in ("transform.h5", "displacement.nii.gz"):
        shutil.copy(folder / "result" / called, folder)
    for called in ("old", "new"):
        shutil.copytree(folder / "results", folder / called)
    return folder


def write_series(volume: sitk.Image, folder: Path) -> None:
    folder.mkdir()
    for k in range(volume.GetSize()[2]):
        part = volume[:, :, k]
        for tag, value in {
            "0008|0060": "CT", "0020|000e": "1.2.3", "0020|000d": "1.2", "0020|0013": str(k + 1),
            "0020|0032": f"0\\0\\{k}", "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "1",
        }.items():  # fmt: skip
            part.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{k:02}.dcm"))
        writer.Execute(part)


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended, contained():
        main([*arguments])
    return ended.value.code or 0


def runs_here(command: str) -> bool:
    return not any(word in command for word in (*NOT_HERE, *LONG))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("page", [p for p in WITH_COMMANDS if any(map(runs_here, COMMANDS[p]))], ids=lambda page: page.name)
def test_every_command_runs(page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    shutil.copytree(files, here)
    monkeypatch.chdir(here)
    if page.name == "images.md":  # of channels
        for name in ("fixed.nii.gz", "moving.nii.gz"):
            image = sitk.ReadImage(name)
            sitk.WriteImage(sitk.Compose(image, image), name)
    written = {w[w.index("-o") + 1].rstrip("/") for w in map(words, COMMANDS[page]) if "-o" in w}
    for name in written:  # as a reader has it who starts with his own files
        if (here / name).is_dir() and name != "run":
            shutil.rmtree(here / name)
    for command in filter(runs_here, COMMANDS[page]):
        arguments = words(command)
        target = here / arguments[arguments.index("-o") + 1] if "-o" in arguments else None
        again = ["--overwrite"] if target is not None and target.exists() and "--resume" not in arguments else []
        code = run([*arguments, *again, *CHEAP.get(arguments[0], [])])
        assert code in ((0, 4) if "qc." in command or arguments[0] == "register" else (0,)), command
