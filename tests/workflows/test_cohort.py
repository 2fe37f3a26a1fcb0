"""`cohort`: pairs fail alone, runs resume and divide, results are those of `register`, and the page ranks what stands out."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.stats import iqr, median_abs_deviation

from regtool.cohorts import cluster, worker
from regtool.cohorts import pools as pool
from regtool.cohorts.bids import space_of
from regtool.cohorts.folder import PairFolder
from regtool.cohorts.table import row_of
from regtool.cohorts.tasks import Answer, Task
from regtool.cohorts.worker import Worker, attempt
from regtool.config.schema import Parameters, Run
from regtool.config.toml import merged
from regtool.errors import InputError, OutputError, ParameterError, RegtoolError, UsageError
from regtool.methods import build
from regtool.methods.model_file import save_model
from regtool.methods.resolve import Remembered, Resolved, resolve
from regtool.report.cohort import cohort_html, ranking, robust_z
from regtool.workflows import cohort as workflow
from regtool.workflows import register as single
from regtool.workflows.cohort import CohortEvent, Request, cohort
from regtool.workflows.serve import perform
from tests.cli.test_cli import call
from tests.conftest import blobs, set_options

QUICK = {
    "run": {"model": "none", "qc": False, "threads": 1, "device": "cpu"},
    "align": {"method": "none"},
    "metric": {"name": "mse"},
    "refine": {"iterations": 3, "levels": 1},
}
SIZE = (20, 22, 24)
DOOMED = """
import json, os, pathlib, signal, sys
import regtool.workflows.serve as worker
class Deadly:  # as the tasks come in, long before torch is imported
    def __iter__(self):
        for line in sys.__stdin__:
            task = json.loads(line)
            if task["id"] == "once" and not (marker := pathlib.Path(task["cohort"]) / "marker").exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
            if task["id"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            yield line
sys.stdin = Deadly()
real = worker.perform
def perform(task, resolver):
    print("noise that is no answer", flush=True)
    return real(task, resolver)
worker.perform = perform
worker.serve()
"""
LEISURELY = """
import time
import regtool.workflows.serve as worker
real = worker.perform
def perform(task, resolver):
    time.sleep(0.5)
    return real(task, resolver)
worker.perform = perform
worker.serve()
"""


class Here:
    """A worker in this process."""

    def run(self, task: Task, _: float | None = None) -> Answer:
        return perform(task, resolve)


class Inline:
    """A pool in this process: what a cohort decides, without its processes."""

    def __init__(self, tasks: Sequence[Task], own: Sequence[pool.Share], *limits: Any) -> None:
        self.tasks, self.own, self.limits = list(tasks), own, limits

    def next(self, _: float) -> Answer | None:
        task = self.tasks.pop(0)
        return attempt(Here(), replace(task, overrides=merged(task.overrides, self.own[0].overrides)), *self.limits)  # type: ignore[arg-type]

    def running(self) -> Mapping[str, float]:
        return {task.id: 0.0 for task in self.tasks[:1]}

    def close(self) -> None:
        self.tasks.clear()


def phantom(folder: Path, name: str, ndim: int, shift: float, suffix: str = ".nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ball = blobs(SIZE[:ndim], tuple(n / 2 + shift for n in SIZE[:ndim]), 5.0)
    path = folder / f"{name}{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(100 * ball), str(path))
    labels = sitk.GetImageFromArray((ball > 0.5).astype(np.uint8) + (ball > 1.0).astype(np.uint8))
    sitk.WriteImage(labels, str(folder / f"{name}_labels{suffix}"))
    return path


def listed(folder: Path, ndim: int, names: Sequence[str] = ("a", "b", "c")) -> Path:
    """pairs.csv: one fixed image, and a moving one for each name."""
    phantom(folder, "fixed", ndim, 0.0)
    rows = ["id,fixed,moving,fixed_labels,moving_labels"]
    for k, name in enumerate(names):
        phantom(folder, f"m_{k}", ndim, 1.0 + 0.4 * k)
        rows.append(f"{name},fixed.nii.gz,m_{k}.nii.gz,fixed_labels.nii.gz,m_{k}_labels.nii.gz")
    path = folder / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(folder: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in table(folder)]


def voxels(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.nii.gz"))}


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "LocalPool", Inline)


@pytest.fixture
def nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: object) -> None:
        raise AssertionError("a pair would be registered")

    return lambda: monkeypatch.setattr(workflow, "LocalPool", refuse)


def test_each_pair_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real processes: one killed, one that dies once, a broken and an empty file; the others as `register` makes them."""
    source = listed(tmp_path / "in", 3, ("a", "killed", "once", "cut", "empty", "z"))
    cut = tmp_path / "in" / "m_3.nii.gz"
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "in" / "m_4.nii.gz").write_bytes(b"")
    script = tmp_path / "doomed.py"
    script.write_text(DOOMED)
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, str(script)))
    seen: list[CohortEvent] = []
    report = cohort(Request(source=source, output=tmp_path / "out", overrides=QUICK, jobs=2, retry=1), seen.append)
    rows = {row["id"]: row for row in table(tmp_path / "out")}
    assert list(rows) == ["a", "killed", "once", "cut", "empty", "z"]
    assert {name: row["status"] for name, row in rows.items()} == {
        **dict.fromkeys(("a", "once", "z"), "ok"),
        **dict.fromkeys(("killed", "cut", "empty"), "failed"),
    }
    assert "SIGKILL" in rows["killed"]["error"] and "tried 2 times" in rows["killed"]["error"] and rows["killed"]["exit_code"] == "5"
    assert "truncated or damaged" in rows["cut"]["error"] and rows["cut"]["exit_code"] == "3"
    assert "empty file" in rows["empty"]["error"]
    assert report["exit_code"] == 5 and (report["ok"], report["failed"], report["not_run"]) == (3, 3, 0)
    assert {m.finished["id"] for m in seen if m.finished} == set(rows) and seen[-1].done == 6 and seen[-1].failed == 3
    for name, k in (("a", 0), ("z", 5)):
        alone = single.Request(
            fixed=tmp_path / "in" / "fixed.nii.gz", moving=tmp_path / "in" / f"m_{k}.nii.gz", output=tmp_path / "alone" / name, overrides=QUICK
        )
        single.register(alone)
        for file in ("warped.nii.gz", "displacement.nii.gz"):
            assert (tmp_path / "alone" / name / file).read_bytes() == (tmp_path / "out" / name / file).read_bytes()
    assert not list((tmp_path / "out").rglob(".*"))


def task_of(folder: Path, ndim: int = 2, *overrides: dict[str, Any]) -> Task:
    source = listed(folder, ndim, ("a",)).parent
    inputs = {"fixed": str(source / "fixed.nii.gz"), "moving": str(source / "m_0.nii.gz")}
    return Task(
        id="a",
        folder=str(folder / "out" / "a"),
        cohort=str(folder / "out"),
        inputs=inputs,
        overrides=merged(QUICK, *overrides),
        fix_header=False,
        command="",
        names={},
    )


def test_a_worker_that_takes_too_long_or_is_closed(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    slow = Worker(1)
    answer = slow.run(task, timeout=0.3)
    assert answer.status == "failed" and "longer than 0.3 s" in str(answer.error) and answer.exit_code == 1
    threading.Timer(0.3, slow.close).start()
    assert slow.run(task).status == "not_run"
    assert slow.run(task).status == "not_run"
    assert not (tmp_path / "out" / "a" / "report.json").exists()


def test_one_process_registers_all_and_survives_bad_input(tmp_path: Path) -> None:
    """The second pair after the first is what it is alone; the process ends with whoever holds its input."""
    task = task_of(tmp_path)
    other = replace(task, id="b", folder=str(tmp_path / "out" / "b"), inputs={**task.inputs, "moving": task.inputs["fixed"]})
    wrong = replace(task, id="w", folder=str(tmp_path / "out" / "w"), inputs={**task.inputs, "moving": str(tmp_path / "gone.nii")})
    one = Worker(1)
    assert [attempt(one, t, 3, None).status for t in (other, wrong, task)] == ["ok", "failed", "ok"]
    assert one._process is not None
    process, failure = one._process, PairFolder("w", tmp_path / "out" / "w", {}).failure()
    assert failure is not None and failure["error"]["exit_code"] == 3
    assert "gone.nii" in failure["error"]["what"] and "tried" not in failure["error"]["what"]
    together = voxels(tmp_path / "out" / "a")
    shutil.rmtree(tmp_path / "out")
    assert perform(task, resolve).status == "ok"
    assert voxels(tmp_path / "out" / "a") == together
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    one.close()


def test_one_model_serves_all_pairs(tmp_path: Path) -> None:
    parameters = Parameters(method="voxelmorph", engine={"variant": "vm1"})
    engine = build(parameters, 2)
    torch.nn.init.normal_(next(p for name, p in engine.named_parameters() if "head" in name and p.dim() > 1), std=0.05)
    save_model(tmp_path / "m.safetensors", engine, parameters, name="random", training={})
    task = task_of(tmp_path, 2, {"run": {"model": f"{tmp_path}/m.safetensors"}, "refine": {"iterations": 0}, "guard": {"max_folding_percent": 100}})
    other = replace(task, folder=str(tmp_path / "out" / "b"), inputs={"fixed": task.inputs["moving"], "moving": task.inputs["fixed"]})
    asked: list[object] = []

    def counted(*about: Any) -> Resolved:
        asked.append(about)
        return resolve(*about)

    once = Remembered(counted)
    assert [perform(t, once).status for t in (other, task)] == ["ok", "ok"]
    assert len(asked) == 1
    together = voxels(tmp_path / "out" / "a")
    assert perform(task, resolve).status == "ok" and voxels(tmp_path / "out" / "a") == together
    assert perform(replace(task, inputs={**task.inputs, "fixed": str(tmp_path / "gone.nii")}), once).exit_code == 3


def test_crashes_are_named(tmp_path: Path) -> None:
    assert worker._death(-signal.SIGSEGV)[0] == "the process died of SIGSEGV (segmentation fault)"
    assert worker._death(-signal.SIGKILL)[2] == 5
    assert "code 3" in worker._death(3)[0]


def test_resume(tmp_path: Path, inline: None, nothing_to_do: Callable[[], None], ndim: int) -> None:
    source, out = listed(tmp_path, ndim), tmp_path / "out"
    request = Request(source=source, output=out, overrides=QUICK)
    report = cohort(request)
    assert report["status"] == "ok" and report["exit_code"] == 0 and report["skipped"] == 0
    before, images = table(out), voxels(out)
    changed = (out / "a" / "warped.nii.gz").stat().st_mtime_ns
    (out / "b" / "report.json").unlink()  # half-written
    (out / "b" / ".warped.nii.gz.abcdefgh").mkdir()
    (out / ".b.abcdefgh").mkdir()
    os.utime(tmp_path / "m_0.nii.gz")  # another time, the same content
    phantom(tmp_path, "m_2", ndim, 3.0)
    seen: list[CohortEvent] = []
    assert cohort(replace(request, resume=True), seen.append)["skipped"] == 1
    assert [m.finished["id"] for m in seen if m.finished] == ["b", "c"]
    after = table(out)
    assert after[0] == before[0] and after[2]["dice_before"] != before[2]["dice_before"]
    assert {k: v for k, v in voxels(out).items() if k[0] != "c"} == {k: v for k, v in images.items() if k[0] != "c"}
    assert not list(out.rglob(".*")) and (out / "a" / "warped.nii.gz").stat().st_mtime_ns == changed
    nothing_to_do()
    assert cohort(replace(request, resume=True))["skipped"] == 3
    assert table(out) == after


def test_what_is_written_is_what_register_reports(tmp_path: Path, inline: None) -> None:
    source, out = listed(tmp_path, 2), tmp_path / "out"
    cohort(Request(source=source, output=out, overrides=merged(QUICK, {"qc": {"min_dice": 0.999}})))
    for row in table(out):
        report = json.loads((out / row["id"] / "report.json").read_text())
        assert row["status"] == "qc_failed" and row["exit_code"] == "4" and row["error"].startswith("min_dice is 0.")
        assert float(row["dice_after"]) == pytest.approx(report["after"]["dice"]["mean"], rel=1e-5)
        assert float(row["dice_after_2"]) == pytest.approx(report["after"]["dice"]["labels"]["2"], rel=1e-5)
        assert float(row["similarity_before"]) == pytest.approx(report["similarity"]["before"], rel=1e-5)
        assert set(report["inputs"]) == {"fixed", "moving", "fixed_labels", "moving_labels"}
    assert list(table(out)[0])[-4:] == ["dice_before_1", "dice_after_1", "dice_before_2", "dice_after_2"]


def test_shards_share_a_folder(tmp_path: Path, inline: None) -> None:
    source, out = listed(tmp_path, 2, ("a", "b", "c", "d", "e")), tmp_path / "out"
    request = Request(source=source, output=out, overrides=QUICK)
    assert cohort(replace(request, shard=(2, 2)))["pairs"] == 2
    assert [row["status"] for row in table(out)] == ["not_run", "ok", "not_run", "ok", "not_run"]
    with pytest.raises(UsageError, match="--resume goes on|holds this cohort"):
        cohort(replace(request, shard=(2, 2)))
    assert cohort(replace(request, shard=(1, 2)))["pairs"] == 3
    assert {row["status"] for row in table(out)} == {"ok"}
    cohort(replace(request, output=tmp_path / "whole"))
    assert timeless(tmp_path / "whole") == timeless(out)
    assert voxels(tmp_path / "whole") == voxels(out)
    with pytest.raises(UsageError, match="only 5 pairs"):
        cohort(replace(request, shard=(1, 6)))


def test_another_cohort_is_refused(tmp_path: Path, inline: None) -> None:
    source, out = listed(tmp_path, 2, ("a", "b")), tmp_path / "out"
    request = Request(source=source, output=out, overrides=QUICK)
    cohort(request)
    again = replace(request, resume=True)
    with pytest.raises(UsageError, match="holds this cohort already"):
        cohort(request)
    with pytest.raises(ParameterError, match=r"refine\.iterations was 3, is 4"):
        cohort(replace(again, overrides=merged(QUICK, {"refine": {"iterations": 4}})))
    cohort(replace(again, overrides=merged(QUICK, {"run": {"threads": 2, "max_memory_gb": 8}})))  # where and how fast, not what
    text = source.read_text()
    source.write_text(text.replace("m_1.nii.gz", "m_0.nii.gz"))
    with pytest.raises(UsageError, match=r"1 pairs have other files; b: moving was .*m_1.* is .*m_0"):
        cohort(again)
    source.write_text("\n".join(text.splitlines()[:2]) + "\n")
    with pytest.raises(UsageError, match="1 pairs that the list lacks, such as 'b'"):
        cohort(again)
    source.write_text(text + text.splitlines()[1].replace("a,", "new,", 1) + "\n")
    assert cohort(again)["skipped"] == 2  # a list may grow
    assert cohort(replace(request, overwrite=True, overrides=merged(QUICK, {"refine": {"iterations": 4}})))["ok"] == 3
    identity = (out / "cohort.json").read_text()
    (out / "cohort.json").write_text(identity.replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match=r"cohort\.json: expected format 1, got 2; a newer regtool wrote it"):
        cohort(again)
    (out / "cohort.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        cohort(again)
    (out / "cohort.json").unlink()
    with pytest.raises(UsageError, match="not from this cohort"):
        cohort(again)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("id,fixed\na,fixed.nii.gz", InputError, "expected the columns fixed,moving"),
        ("id,fixed,moving\na,fixed.nii.gz,m_0.nii.gz\na,fixed.nii.gz,m_1.nii.gz", InputError, "'a' comes twice: in lines 2 and 3"),
        ("id,fixed,moving\n../x,fixed.nii.gz,m_0.nii.gz", InputError, r"pairs\.csv:2: the id '\.\./x' cannot be the name of a folder"),
        ("id,fixed,moving\nx" * 1 + "x" * 220 + ",fixed.nii.gz,m_0.nii.gz", InputError, "cannot be the name of a folder"),
        ("id,fixed,moving\na,no.nii,m_0.nii.gz\nb,fixed.nii.gz,none.nii", InputError, r"2 of 4 files .* line 2: .*no\.nii, line 3: .*none\.nii"),
        ("id,fixed,moving\nresults.csv,fixed.nii.gz,m_0.nii.gz", UsageError, "as a file of the cohort is"),
    ],
)
def test_wrong_lists_are_refused_before_the_first_pair(
    tmp_path: Path, nothing_to_do: Callable[[], None], rows: str, error: type[Exception], message: str
) -> None:
    nothing_to_do()
    source = listed(tmp_path, 2)
    source.write_text(rows + "\n")
    with pytest.raises(error, match=message):
        cohort(Request(source=source, output=tmp_path / "out", overrides=QUICK))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_the_run(tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = listed(tmp_path, 2, ("a", "b", "c", "d")), tmp_path / "out"
    request, real = Request(source=source, output=out, overrides=QUICK), single.register

    def full(asked: Any, *rest: Any) -> Any:
        if asked.output.name == "c":
            first, second = OSError(28, "No space left on device"), OSError(28, "No space left on device")
            first.__context__, second.__context__ = second, first  # as where closing the file fails once more
            raise OutputError("cannot write warped.nii.gz: No space left on device", tip="the disk is full") from first
        return real(asked, *rest)

    monkeypatch.setattr(single, "register", full)
    with pytest.raises(OutputError, match="No space left on device; stopped after the pair c"):
        cohort(request)
    assert [row["status"] for row in table(out)] == ["ok", "ok", "failed", "not_run"]
    monkeypatch.setattr(single, "register", real)
    assert cohort(replace(request, resume=True))["skipped"] == 2
    assert {row["status"] for row in table(out)} == {"ok"}


def test_fail_fast(tmp_path: Path, inline: None) -> None:
    source = listed(tmp_path, 2)
    (tmp_path / "m_0.nii.gz").write_bytes(b"no image")
    report = cohort(Request(source=source, output=tmp_path / "out", overrides=QUICK, fail_fast=True))
    assert (report["failed"], report["not_run"], report["exit_code"], report["status"]) == (1, 2, 3, "not_run")


def test_signals_and_kill_9_then_resume(tmp_path: Path, inline: None, capfd: pytest.CaptureFixture[str]) -> None:
    """The command, ended in the middle by SIGTERM, then killed while resuming, and resumed again, against an uninterrupted run."""
    source = listed(tmp_path, 2, [f"p{k}" for k in range(6)])
    command = ["cohort", str(source), "-o", str(tmp_path / "out"), *set_options(QUICK)]
    (tmp_path / "leisurely.py").write_text(LEISURELY)
    code = (
        "import sys; from regtool.cohorts import worker as w; w.COMMAND = sys.executable, sys.argv.pop(1); from regtool.cli.app import main; main()"
    )

    def start(*more: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", code, str(tmp_path / "leisurely.py"), *command, *more]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    terminated = start()
    assert terminated.stderr is not None
    assert terminated.stderr.readline().startswith("[1/6] p0: ok")
    terminated.terminate()
    _, errors = terminated.communicate(timeout=60)
    assert terminated.returncode == 143 and "nothing half-written is left" in errors
    states = [row["status"] for row in table(tmp_path / "out")]
    assert states[0] == "ok" and states[-1] == "not_run" and not list((tmp_path / "out").rglob(".*"))
    killed = start("--resume")
    assert killed.stderr is not None
    killed.stderr.readline()
    killed.kill()
    killed.communicate(timeout=60)  # its pipes close with the last process that holds them
    resumed = call(capfd, *command, "--resume", "--json")
    report = json.loads(resumed.out)
    assert resumed.code == 0 and report["ok"] == 6 and 2 <= report["skipped"] < 6
    cohort(Request(source=source, output=tmp_path / "whole", overrides=QUICK))
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")
    assert voxels(tmp_path / "out") == voxels(tmp_path / "whole")


def test_threads_memory_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.torch.cuda, "device_count", lambda: 2)
    shared = pool.shares(3, Run(threads=8, max_memory_gb=6))
    assert [(s.threads, s.max_memory_gb, s.device) for s in shared] == [(2, 2.0, "cuda:0"), (2, 2.0, "cuda:1"), (2, 2.0, "cuda:0")]
    assert [s.device for s in pool.shares(2, Run(device="cuda:1"))] == ["cuda:1", "cuda:1"]
    assert pool.shares(64, Run(threads=2))[0].threads == 1


def dataset(folder: Path, names: Sequence[str]) -> Path:
    for k, name in enumerate(names):
        made = phantom(folder / Path(name).parent, Path(name).name, 3, 1.0 + k)
        (made.parent / f"{Path(name).name}_labels.nii.gz").unlink()
    return folder


def test_bids(tmp_path: Path, inline: None, nothing_to_do: Callable[[], None]) -> None:
    raw = dataset(tmp_path / "raw", ["sub-01/anat/sub-01_T1w", "sub-02/ses-b/anat/sub-02_ses-b_run-1_T1w", "sub-02/ses-b/anat/sub-02_ses-b_T2w"])
    template = phantom(tmp_path, "tpl-MNI152NLin6Asym_res-02_T1w", 3, 0.0)
    out = tmp_path / "derived"
    request = Request(source=None, output=out, bids_dir=raw, template=template, bids=True, overrides=merged(QUICK, {"run": {"inverse": True}}))
    assert cohort(request)["ok"] == 2
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    stem = "sub-02/ses-b/anat/sub-02_ses-b_run-1"
    names = [f"{stem}_space-MNI152NLin6Asym_T1w.nii.gz", f"{stem}_from-T1w_to-MNI152NLin6Asym_mode-image_xfm.h5"]
    names += [f"{stem}_from-{a}_to-{b}_mode-image_desc-displacement_xfm.nii.gz" for a, b in (("T1w", "MNI152NLin6Asym"), ("MNI152NLin6Asym", "T1w"))]
    assert {*names, *(re.sub(r"\.(nii\.gz|h5)$", ".json", name) for name in names)} <= files
    assert {"dataset_description.json", ".bidsignore", "logs/sub-01_T1w/report.json", "results.csv", "cohort.html"} <= files
    assert json.loads((out / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    moving = sitk.ReadImage(str(raw / "sub-02/ses-b/anat/sub-02_ses-b_run-1_T1w.nii.gz"))
    low = float(sitk.GetArrayFromImage(moving).min())
    again = sitk.Resample(moving, sitk.ReadImage(str(template)), sitk.ReadTransform(str(out / names[1])), sitk.sitkLinear, low)
    assert np.abs(sitk.GetArrayFromImage(again) - sitk.GetArrayFromImage(sitk.ReadImage(str(out / names[0])))).max() < 0.1
    report = json.loads((out / "logs/sub-02_ses-b_run-1_T1w/report.json").read_text())
    assert (out / "logs/sub-02_ses-b_run-1_T1w" / report["outputs"]["warped"]).resolve() == (out / names[0]).resolve()
    nothing_to_do()
    assert cohort(replace(request, resume=True))["skipped"] == 2
    with pytest.raises(InputError, match=r"no sub-\*/\[ses-\*/\]anat/\*_FLAIR"):
        cohort(replace(request, ending="FLAIR", output=tmp_path / "other"))
    with pytest.raises(UsageError, match="among the raw data"):
        cohort(replace(request, output=raw))
    assert space_of(Path("my template-1.nii.gz")) == "mytemplate1"


def test_bids_names_that_collide(tmp_path: Path) -> None:
    source = listed(tmp_path, 2, ("a-1", "a1"))
    with pytest.raises(UsageError, match="a-1 and a1 would both become sub-a1"):
        cohort(Request(source=source, output=tmp_path / "out", overrides=QUICK, bids=True))


def row(name: str, dice: float, **more: Any) -> dict[str, Any]:
    return {"id": name, "status": "ok", "dice_before": 0.5, "dice_after": dice, "seconds": 1.0, "folding_percent": 0.0, "similarity": "lncc", **more}


def test_robust_z_and_ranking() -> None:
    values = np.array([1.0, 2.0, 4.0, 7.0, 50.0])
    assert robust_z(values) == pytest.approx((values - np.median(values)) / median_abs_deviation(values, scale="normal"), rel=1e-4)
    assert not robust_z(np.array([1.0, 1.0, 1.0, 9.0])).any()
    rows = [row(f"p{k}", 0.8 + 0.01 * k) for k in range(9)] + [row("flipped", 0.1), row("best", 0.99)]
    (first, score, why), *rest = ranking(rows)
    assert first["id"] == "flipped" and why == "Dice 0.1"
    assert score == pytest.approx(0.6745 * (0.84 - 0.1) / median_abs_deviation([r["dice_after"] for r in rows]), rel=1e-6)
    assert all(score < 3.5 for _, score, _ in rest)  # far better than the others is no outlier
    few = [row("a", 0.5, similarity_after=0.9), row("b", 0.5, similarity_after=0.8), row("c", 0.5, similarity="mi", similarity_after=0.1)]
    assert all(score == pytest.approx(0, abs=0.7) for _, score, _ in ranking(few))  # another kind of similarity is no outlier


def test_page_is_escaped_and_stands_alone() -> None:
    evil = '<img src=x onerror="alert(1)">'
    rows = [row(f"p{k}", 0.1 * k, **{f"dice_{w}_{label}": 0.1 * k for w in ("before", "after") for label in (3, 12)}) for k in range(9)]
    rows += [{"id": evil, "status": "failed", "error": f"cannot read {evil}.nii"}, {"id": "late", "status": "not_run"}]
    page = cohort_html(evil, rows, {"p1": "p1/qc.html", evil: f"{evil}/qc.html"}, f"regtool cohort {evil}")
    assert "<img" not in page and "&lt;img src=x" in page and "<script" not in page and 'href="p1/qc.html"' in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|url\(|@import""", page)
    assert "label 12" in page and 'href="%3Cimg%20src%3Dx' in page
    box = re.search(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="10"/>', page)
    assert box is not None
    width = (790 - 110) * iqr([0.1 * k for k in range(9)])
    found = [float(w) for w in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="10"/>', page)]
    assert found[-1] == pytest.approx(width, abs=0.02)
    assert cohort_html("nothing yet", [{"id": "a", "status": "not_run"}], {}, "")


def test_rows_of_any_state(tmp_path: Path) -> None:
    pair = PairFolder("a", tmp_path / "a", {"fixed": Path("f.nii"), "moving": Path("m.nii")})
    assert row_of(pair)["status"] == "not_run"
    pair.fail("two\nlines", None, 1, 2.0)
    assert row_of(pair)["error"] == "two\nlines" and row_of(pair)["exit_code"] == 1
    (tmp_path / "a" / "report.json").write_text('{"status": "ok"')  # cut short
    assert row_of(pair)["status"] == "failed"
    (tmp_path / "a" / "report.json").write_text('{"status": "ok", "inputs": {}, "outputs": {}}')
    with pytest.raises(InputError, match="expected format 1, got none; an older regtool wrote it"):
        row_of(pair)


def test_no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    source = listed(tmp_path, 2)
    with pytest.raises(RegtoolError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        cohort(Request(source=source, output=tmp_path / "out", overrides=QUICK, scheduler="tcp://127.0.0.1:9"))
    assert {row["status"] for row in table(tmp_path / "out")} == {"not_run"}
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match="not installed"):
        cohort(Request(source=source, output=tmp_path / "out", overrides=QUICK, scheduler="tcp://127.0.0.1:9"))


@pytest.mark.slow
def test_cluster_that_loses_a_worker(tmp_path: Path, inline: None) -> None:
    """A scheduler and two workers in processes of their own, one of them killed in the middle: all pairs, none twice, the same voxels."""
    pytest.importorskip("distributed")
    source = listed(tmp_path, 3, [f"p{k}" for k in range(12)])
    file, running = tmp_path / "scheduler.json", []

    def start(*command: str) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([sys.executable, "-m", "dask", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return running[-1]

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        first, _ = (start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path)) for _ in range(2))
        seen: list[str] = []

        def watch(moment: CohortEvent) -> None:
            if moment.finished is not None:
                seen.append(moment.finished["id"])
                if len(seen) == 4:
                    first.kill()

        report = cohort(Request(source=source, output=tmp_path / "there", overrides=QUICK, scheduler=address), watch)
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()
    assert report["ok"] == 12 and sorted(seen) == sorted({*seen}) and len(seen) == 12
    cohort(Request(source=source, output=tmp_path / "here", overrides=QUICK))
    assert timeless(tmp_path / "here") == timeless(tmp_path / "there")
    assert voxels(tmp_path / "here") == voxels(tmp_path / "there")
