"""`regtool train`: what a lab leaves running overnight must survive, resume to the same weights, and say what went wrong."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool import methods as engines
from regtool.cli.app import main
from regtool.config.schema import Parameters
from regtool.config.toml import merged
from regtool.errors import DivergedError, InputError, OutOfMemory, OutputError, ParameterError, UsageError
from regtool.io import checkpoints
from regtool.io.checkpoints import read_checkpoint
from regtool.io.models import read_tensors
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model
from regtool.registration.memory import LIMIT_SHARE, training_bytes
from regtool.training.run import ProgressEvent
from regtool.training.run_folder import STATE
from regtool.workflows.train import Request, train
from tests.cli.test_cli import call
from tests.conftest import blobs, heeds_interrupts, set_options

QUICK = {
    "train": {"validate_every": 4, "checkpoint_every": 4, "log_every": 2, "learning_rate": 0.001},
    "run": {"threads": 1},
    "align": {"method": "none"},
}


def write_images(folder: Path, ndim: int, count: int = 4, size: int = 24) -> None:
    """A ball that moves from image to image, with its label and its centre as a landmark."""
    shape = tuple(size + 4 * axis for axis in range(ndim))
    rng = np.random.default_rng(0)
    with (folder / "images.csv").open("w", encoding="utf-8") as file:
        file.write("id,image,labels,landmarks\n")
        for i in range(count):
            centre = tuple((np.array(shape) / 2 + rng.uniform(-2, 2, ndim)).tolist())
            for kind, array in (("image", blobs(shape, centre, size / 5)), ("labels", (blobs(shape, centre, size / 5) > 0.5).astype(np.uint8))):
                sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / f"{kind}{i}.mha"))
            point = ",".join(f"{x:.3f}" for x in reversed(centre))
            (folder / f"points{i}.csv").write_text(f"{'x,y,z'[: 2 * ndim - 1]}\n{point}\n", encoding="utf-8")
            file.write(f"i{i},image{i}.mha,labels{i}.mha,points{i}.csv\n")
    with (folder / "pairs.csv").open("w", encoding="utf-8") as file:
        file.write("id,fixed,moving,fixed_labels,moving_labels\n")
        for i in range(count):
            j = (i + 1) % count
            file.write(f"p{i},image{i}.mha,image{j}.mha,labels{i}.mha,labels{j}.mha\n")


@pytest.fixture
def data(tmp_path: Path, no_curves: None) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_images(folder, 2)
    return folder


def request(data: Path, output: Path, *overrides: dict[str, Any], method: str = "voxelmorph", **more: Any) -> Request:
    return Request(data=data / "pairs.csv", output=output, overrides=merged({"method": method}, QUICK, *overrides), **more)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / STATE)[0]


def history(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "history.csv").read_text(encoding="utf-8").splitlines()))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("source", ["images.csv", "pairs.csv", "."])
def test_trains_from_lists_and_folders_and_the_model_registers(ndim: int, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_images(data, ndim, size=16 if ndim == 3 else 24)
    if source == ".":
        for file in [*data.glob("labels*"), *data.glob("*.csv")]:
            file.unlink()
    options = set_options(merged(QUICK, {"engine": {"variant": "vm1"}, "train": {"validation_share": 0.5}}))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(data / source), "-m", "voxelmorph", "-o", str(run), "--steps", "8", "--json", *options])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 8
    assert report["best_step"] in (4, 8)
    assert ("dice" in report["after"]) == (source != ".")
    assert ("tre_voxels" in report["after"]) == (source == "images.csv")
    rows = history(run)
    assert [int(r["step"]) for r in rows] == [2, 4, 6, 8]
    assert [bool(r["validation.similarity"]) for r in rows] == [False, True, False, True]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    quick = ["--refine", "none", "--align", "none", "--no-qc"]
    images = [str(data / f"image{i}.mha") for i in range(2)]
    with pytest.raises(SystemExit) as ended:
        main(["register", *images, "--model", str(run / "model.safetensors"), "-o", str(tmp_path / "out"), *quick])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:  # what is written repeats the training
        main(["parameters", "check", str(run / "parameters.toml")])
    assert ended.value.code == 0


DEMANDING = {
    "train": {"accumulate": 2, "ema": 0.9, "clip_norm": 1.0, "batch_size": 2, "warmup_steps": 3, "weight_decay": 0.01},
    "augment": {"flip": 0.5, "noise": 0.1, "elastic_voxels": 2, "rotation_degrees": 10},
}


@pytest.mark.parametrize("method", engines.names())
def test_resumed_weights_are_those_of_an_uninterrupted_run(method: str, data: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout and batch statistics where the method has them, at a step that is no multiple of anything."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small = {"engine": {"channels": [4, 4, 8]}} if method == "deformgan" else {}
    train(request(data, whole, DEMANDING, small, {"train": {"steps": 7}}, method=method))
    train(request(data, parts, DEMANDING, small, {"train": {"steps": 3}}, method=method))
    train(request(data, parts, DEMANDING, small, {"train": {"steps": 7}}, method=method, resume=True))
    assert same(weights(whole), weights(parts))
    assert [r["step"] for r in history(parts)] == ["2.0", "3.0", "4", "6", "7"]


def test_resuming_where_nothing_is_starts_from_the_beginning(data: Path, tmp_path: Path) -> None:
    report = train(request(data, tmp_path / "run", {"train": {"steps": 2}}, resume=True))
    assert report["steps"] == 2
    assert any("no state yet" in w for w in report["warnings"])


def test_a_finished_run_resumes_to_itself(data: Path, tmp_path: Path) -> None:
    first = train(request(data, tmp_path / "run", {"train": {"steps": 4}}))
    before = weights(tmp_path / "run")
    again = train(request(data, tmp_path / "run", {"train": {"steps": 4}}, resume=True))
    assert same(before, weights(tmp_path / "run"))
    assert again["best_step"] == first["best_step"]


def command(data: Path, run: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "regtool",
        "train",
        str(data / "pairs.csv"),
        "-m",
        "voxelmorph",
        "-o",
        str(run),
        "--device",
        "cpu",
        *set_options(QUICK),
        *more,
    ]


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 90, newer_than: int = 0) -> None:
    end = time.monotonic() + seconds
    while not file.exists() or file.stat().st_mtime_ns < newer_than:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_at_any_moment_the_last_checkpoint_loads(data: Path, tmp_path: Path) -> None:
    """kill -9 while checkpoints are written without pause, in the first run and in one that went on."""
    run, steps = tmp_path / "run", 0
    more = ("--steps", "100000", "--set", "train.checkpoint_every=1", "--set", "train.validate_every=3")
    for resume in ((), ("--resume",)):
        process = subprocess.Popen(command(data, run, *more, *resume), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        wait_for(run / STATE, process, newer_than=time.time_ns())
        time.sleep(0.3 + 0.37 * len(resume))
        process.kill()
        process.communicate()
        tensors, record = read_checkpoint(run / STATE)
        assert record["step"] > steps
        steps = record["step"]
        assert any(name.startswith("optimiser/") for name in tensors)
        load_model(run / "model.safetensors", 2)
    report = train(request(data, run, {"train": {"steps": steps + 2, "validate_every": 3}}, resume=True))
    assert report["steps"] == steps + 2


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_writes_a_checkpoint_and_ends(name: str, code: int, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--steps", "100000", "--set", "train.checkpoint_every=100000", "--set", "train.validate_every=100000")
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen(command(data, run, *more), preexec_fn=heeds_interrupts, **pipes)
    wait_for(run / "parameters.toml", process)
    time.sleep(1.0)
    if name == "SIGTERM":
        process.send_signal(signal.SIGUSR1)  # a checkpoint, and on it goes
        wait_for(run / STATE, process)
        (run / STATE).unlink()
        assert process.poll() is None
    process.send_signal(getattr(signal, name))
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code, err
    assert "--resume" in err
    assert read_checkpoint(run / STATE)[1]["step"] > 0
    assert (run / "curves.png").exists()
    load_model(run / "model.safetensors", 2)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_with_twice_the_accumulation(data: Path, tmp_path: Path) -> None:
    """And both hold the same weights at the end."""
    script, two = tmp_path / "ranks.py", tmp_path / "two"
    script.write_text(
        "import sys, torch\n"
        "from regtool.cli.app import main\n"
        "from regtool.training.trainer import Trainer\n"
        "plain = Trainer.update\n"
        "def update(self, step):\n"
        "    found = plain(self, step)\n"
        "    torch.save(self.engine.state_dict(), f'{sys.argv[1]}/rank{self.ranks.rank}.pt')\n"
        "    return found\n"
        "Trainer.update = update\n"
        "main(sys.argv[2:])\n",
        encoding="utf-8",
    )
    more = {"train": {"steps": 4, "batch_size": 2}, "augment": {"flip": 0.5}, "run": {"device": "cpu"}}
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(20000 + os.getpid() % 40000)]
    asked = command(data, two, *set_options(more))[3:]
    done = subprocess.run([*launched, str(script), str(tmp_path), *asked], check=False, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / "rank0.pt"), torch.load(tmp_path / "rank1.pt"))
    train(request(data, tmp_path / "one", more, {"train": {"accumulate": 2}}))
    a, b = weights(tmp_path / "one"), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) < 1e-5, name


def test_a_loss_that_is_no_number_stops_with_step_pair_and_term(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Engine.registration_losses
    calls = []

    def broken(self: Engine, batch: Any, displacement: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.extend([1] if self.training else [])  # and not the looks at how it stands
        terms = plain(self, batch, displacement)
        return terms if len(calls) < 6 else {**terms, "diffusion": terms["diffusion"] * float("nan")}

    monkeypatch.setattr(Engine, "registration_losses", broken)
    with pytest.raises(DivergedError, match=r"step 6: diffusion is nan on p\d"):
        train(request(data, tmp_path / "run", {"train": {"steps": 20}}))
    tensors, record = read_checkpoint(tmp_path / "run" / STATE)
    assert record["step"] == 4
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    load_model(tmp_path / "run" / "model.safetensors", 2)


def test_a_gradient_that_is_no_number_never_reaches_the_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: plain(gradients) * float("inf"))
    with pytest.raises(DivergedError, match="step 1: the gradient of registration is inf"):
        train(request(data, tmp_path / "run", {"train": {"steps": 20}}))


def test_a_full_disk_stops_the_training_and_leaves_the_old_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    plain, calls = Path.write_bytes, []

    def full(self: Path, content: bytes) -> int:
        if self.name == STATE:
            calls.append(1)
            if len(calls) == 2:
                plain(self, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left") as error:
        train(request(data, run, {"train": {"steps": 20}}))
    assert "disk is full" in str(error.value.tip)
    assert read_checkpoint(run / STATE)[1]["step"] == 4
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_a_resume_with_changed_parameters_names_them(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(request(data, run, {"train": {"steps": 2}}))
    with pytest.raises(ParameterError, match=r"train.learning_rate was 0.001, is 0.01") as error:
        train(request(data, run, {"train": {"learning_rate": 0.01}}, resume=True))
    assert "other" not in str(error.value).partition(":")[2]
    with pytest.raises(ParameterError, match=r"engine.variant was 'vm2', is 'vm1'; run.seed was 0, is 3"):
        train(request(data, run, {"engine": {"variant": "vm1"}, "run": {"seed": 3}}, resume=True))
    lines = (data / "pairs.csv").read_text(encoding="utf-8").splitlines()
    (data / "pairs.csv").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"other pairs: 4 \(\w+\), now 3"):
        train(request(data, run, resume=True))


@pytest.mark.parametrize("damage", ["cut", "foreign", "text", "other"])
def test_an_unreadable_state_is_said(damage: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(request(data, run, {"train": {"steps": 2}}))
    state = run / STATE
    content = state.read_bytes()
    if damage == "other":
        tensors, record = read_checkpoint(state)
        tensors.pop(next(name for name in tensors if name.startswith("engine/")))
        checkpoints.write_checkpoint(state, tensors, record)
    else:
        state.write_bytes({"cut": content[:-100], "foreign": (run / "model.safetensors").read_bytes(), "text": b"hello"}[damage])
    with pytest.raises(InputError, match="state"):
        train(request(data, run, {"train": {"steps": 4}}, resume=True))


def test_a_run_is_not_overwritten_unasked(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(request(data, run, {"train": {"steps": 2}}))
    with pytest.raises(UsageError, match="holds a training already"):
        train(request(data, run))
    with pytest.raises(UsageError, match="exclude each other"):
        train(request(data, run, resume=True, overwrite=True))
    before = (run / STATE).read_bytes()
    with pytest.raises(InputError):  # a list that cannot be read costs nothing
        train(Request(data=data / "nothing.csv", output=run, overrides={"method": "voxelmorph"}, overwrite=True))
    assert (run / STATE).read_bytes() == before
    assert train(request(data, run, {"train": {"steps": 3}}, overwrite=True))["steps"] == 3


def test_a_loss_without_a_term_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(request(data, run, {"train": {"steps": 2}}))
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ParameterError, match="nothing to learn from") as error:
        train(request(data, run, {"training_similarity": {"weight": 0}, "regularization": {"diffusion": 0}, "train": {"steps": 2}}, overwrite=True))
    assert "training_similarity.weight" in str(error.value.tip)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert train(
        request(
            data,
            run,
            {"training_similarity": {"weight": 0}, "regularization": {"diffusion": 0}, "supervision": {"dice": 1}, "train": {"steps": 2}},
            overwrite=True,
        )
    )


def test_bad_lists(data: Path, tmp_path: Path) -> None:
    def tried(text: str) -> str:
        path = data / "bad.csv"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as error:
            train(Request(data=path, output=tmp_path / "run", overrides=merged({"method": "voxelmorph"}, QUICK, {"supervision": {"dice": 1}})))
        return error.value.what

    assert "no pairs" in tried("fixed,moving\n")
    assert "1 image" in tried("image\nimage0.mha\n")
    assert "gone.mha" in (missing := tried("fixed,moving\ngone.mha,image1.mha\nimage1.mha,lost.mha\n"))
    assert "lost.mha" in missing
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4), np.uint8)), str(data / "tiny.mha"))
    label = sitk.GetImageFromArray(np.ones((24, 28), np.uint8))
    label.SetOrigin((500.0, 500.0))
    sitk.WriteImage(label, str(data / "away.mha"))
    assert "away.mha" in tried("fixed,moving,fixed_labels,moving_labels\nimage0.mha,image1.mha,away.mha,labels1.mha\n")
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_training_too_large_says_which_grid_fits(data: Path, tmp_path: Path) -> None:
    least, most = (training_bytes(Parameters(method="voxelmorph"), shape) / LIMIT_SHARE / 2**30 for shape in ((1, 1), (24, 28)))
    limit = (least + 2 * most) / 3
    with pytest.raises(OutOfMemory, match=r"28x24 voxels needs [\d.]+ GB, 0.\d+ GB may be used; the largest grid that fits is \d+x\d+") as error:
        train(request(data, tmp_path / "run", {"run": {"max_memory_gb": limit}, "train": {"steps": 1}}))
    assert "grid.max_voxels" in str(error.value.tip)


def test_tiny_images_train(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_images(data, 2, size=5)
    assert train(request(data, tmp_path / "run", {"train": {"steps": 2}}))["steps"] == 2


def test_supervision_is_a_term_of_its_own(data: Path, tmp_path: Path) -> None:
    seen: list[ProgressEvent] = []
    overrides = merged({"method": "voxelmorph"}, QUICK, {"train": {"steps": 2}, "supervision": {"dice": 0.5, "landmarks": 0.1}})
    train(Request(data=data / "images.csv", output=tmp_path / "run", overrides=overrides), seen.append)
    assert {"lncc", "diffusion", "dice", "landmarks"} == set(seen[-1].terms)
    assert 0 <= seen[-1].terms["dice"] <= 0.5


def test_time_ends_a_training(data: Path, tmp_path: Path) -> None:
    report = train(request(data, tmp_path / "run", {"train": {"max_minutes": 0.0001, "steps": 1000}}))
    assert report["steps"] < 1000
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_an_atlas_is_the_fixed_image_of_every_pair(data: Path, tmp_path: Path) -> None:
    overrides = merged({"method": "voxelmorph"}, QUICK, {"train": {"steps": 2}})
    report = train(Request(data=data / "images.csv", output=tmp_path / "run", overrides=overrides, atlas=data / "image0.mha"))
    assert report["pairs"] == 3


def test_validation_list(data: Path, tmp_path: Path) -> None:
    report = train(request(data, tmp_path / "run", {"train": {"steps": 2}}, validation=data / "images.csv"))
    assert (report["pairs"], report["validation_pairs"]) == (4, 12)


def test_event_files_for_tensorboard(data: Path, tmp_path: Path) -> None:
    train(request(data, tmp_path / "run", {"train": {"steps": 2, "tensorboard": True}}))
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))


def test_the_learning_rate_rises_and_falls(data: Path, tmp_path: Path) -> None:
    train(request(data, tmp_path / "run", {"train": {"steps": 6, "warmup_steps": 2, "schedule": "cosine", "log_every": 1}}))
    rates = [float(r["learning_rate"]) for r in history(tmp_path / "run")]
    assert rates[0] == pytest.approx(0.5e-3)
    assert rates[2] == pytest.approx(1e-3 * (0.01 + 0.99 * (1 + np.cos(np.pi / 3)) / 2))
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_the_running_mean_is_what_is_kept(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(request(data, run, {"train": {"steps": 4, "ema": 0.5, "validation_share": 0}}))
    state, kept = weights(run), read_tensors(run / "model.safetensors")
    assert all(torch.equal(kept[name], state[f"mean/{name}"]) for name in kept)
    assert any(not torch.equal(kept[name], state[f"engine/{name}"]) for name in kept)


def test_training_runs_in_a_thread_too(data: Path, tmp_path: Path) -> None:
    """Where signals cannot be handled."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(train(request(data, tmp_path / "run", {"train": {"steps": 2}}))["steps"]))
    thread.start()
    thread.join()
    assert found == [2]


def test_bf16_needs_a_gpu(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bf16 needs a CUDA device"):
        train(request(data, tmp_path / "run", {"train": {"precision": "bf16"}, "run": {"device": "cpu"}}))


@pytest.mark.gpu
def test_trains_on_cuda_in_bf16(data: Path, tmp_path: Path) -> None:
    report = train(request(data, tmp_path / "run", {"train": {"precision": "bf16", "steps": 8}, "run": {"device": "cuda"}}))
    assert report["device"] == "cuda"


def test_the_view_on_a_terminal_shows_where_the_training_stands(data: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    more = ("--steps", "8", "--validation", str(data / "pairs.csv"))
    process = subprocess.Popen(command(data, tmp_path / "run", *more), stderr=theirs, stdout=subprocess.PIPE, text=True, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    out = process.communicate()[0]
    assert process.returncode == 0
    assert "model" in out
    text = shown.decode()
    for word in ("8 of 8", "lncc", "diffusion", "validation", "Dice", "folding", "pairs/s", "left", "MB"):
        assert word in text, word


def test_lines_where_nobody_looks(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = call(capfd, *command(data, tmp_path / "run", "--steps", "8")[3:])
    assert answer.code == 0
    assert "step 8 of 8: lncc" in answer.err
    assert "\x1b" not in answer.err
    quiet = call(capfd, *command(data, tmp_path / "q", "--steps", "2", "-q")[3:])
    assert (quiet.code, quiet.err) == (0, "")
