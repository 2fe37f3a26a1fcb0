"""A library is a guest: every call leaves the process as it found it, and two threads may call at once."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import regtool
from regtool.errors import RegtoolError
from regtool.io.images import read_image
from regtool.runtime import computing, seeded

QUICK = {"run.qc": False, "run.model": "none", "align.method": "none", "refine.iterations": 3, "run.threads": 1}


def blob(x: float) -> sitk.Image:
    return sitk.GaussianSource(sitk.sitkFloat32, [40, 40], [6, 9], [x, 20], 200.0)


def state() -> dict[str, Any]:
    """All that a call could leave behind."""
    log = logging.getLogger("regtool")
    return {
        "torch's random state": torch.random.get_rng_state().tolist(),
        "numpy's random state": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "Python's random state": random.getstate(),
        "threads": torch.get_num_threads(),
        "ITK's threads": sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(),
        "ITK's warnings": sitk.ProcessObject.GetGlobalWarningDisplay(),
        "denormals": (bool(np.float32(1e-40) * np.float32(1) > 0), bool(torch.tensor([1e-40]).mul(1).item() > 0)),
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "log": (log.level, list(log.handlers), list(log.filters), log.propagate),
        "warnings": list(warnings.filters),
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)},
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "stderr": os.fstat(2)[:3],
        "open files": sorted(p.name for p in Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else None,
    }


def changed(call: Callable[[], object]) -> list[str]:
    """The names of what is not as before the call."""
    call()  # the first one loads what stays loaded
    before = state()
    call()
    after = state()
    return [name for name in before if before[name] != after[name]]


def test_a_registration_leaves_nothing_behind() -> None:
    torch.manual_seed(123)
    assert changed(lambda: regtool.register(blob(20), blob(22), settings=QUICK)) == []


def test_the_first_call_too_keeps_the_random_state() -> None:
    """It builds networks, which begin with random weights."""
    code = "\n".join(
        (
            "import torch, regtool, SimpleITK as sitk",
            "a = sitk.GaussianSource(sitk.sitkFloat32, [40, 40], [6, 9], [20, 20], 200.0)",
            "state = torch.manual_seed(123).get_state()",
            "regtool.register(a, a + 1, align='none', refine=2, threads=1)",
            "print(bool((torch.random.get_rng_state() == state).all()))",
        )
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_learning_on_the_pair_leaves_nothing_behind() -> None:
    settings = {"run.qc": False, "run.model": "none", "oneshot.iterations": 2, "refine.iterations": 0, "engine.variant": "vm1", "run.threads": 1}
    assert changed(lambda: regtool.register(blob(20), blob(22), method="voxelmorph", settings=settings)) == []


def test_a_failure_leaves_nothing_behind() -> None:
    def fails() -> None:
        with pytest.raises(RegtoolError):
            regtool.register(blob(20), blob(22), settings={**QUICK, "run.seed": -1})

    assert changed(fails) == []


@pytest.mark.parametrize("verb", ["warp", "warp_points", "evaluate", "jacobian", "transform", "train", "finetune_oneshot", "cohort"])
def test_every_verb_leaves_nothing_behind(verb: str, tmp_path: Path) -> None:
    for name, x in (("a", 20), ("b", 22)):
        sitk.WriteImage(blob(x), str(tmp_path / f"{name}.nii.gz"))
    a, b, pairs = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", tmp_path / "pairs.csv"
    pairs.write_text("id,fixed,moving\np,a.nii.gz,b.nii.gz\nq,b.nii.gz,a.nii.gz\n", encoding="utf-8")
    shift = sitk.TranslationTransform(2, (1.0, 2.0))
    small: dict[str, Any] = {"method": "voxelmorph", "threads": 1, "overwrite": True, "settings": {"engine.variant": "vm1", "train.batch_size": 1}}
    calls: dict[str, Callable[[], object]] = {
        "warp": lambda: regtool.warp(b, shift, a, threads=1),
        "warp_points": lambda: regtool.warp_points([[20.0, 20.0]], shift, origin="moving"),
        "evaluate": lambda: regtool.evaluate(a, b, shift),
        "jacobian": lambda: regtool.jacobian(shift, like=a),
        "transform": lambda: regtool.transform.invert(shift),
        "train": lambda: regtool.train(pairs, output=tmp_path / "run", steps=2, **small),
        "finetune_oneshot": lambda: regtool.finetune_oneshot(a, b, output=tmp_path / "one", iterations=2, model="none", qc=False, **small),
        "cohort": lambda: regtool.cohort(pairs, output=tmp_path / "study", overwrite=True, align="none", refine=2, model="none", qc=False),
    }
    assert changed(calls[verb]) == []


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    sitk.WriteImage(blob(20), str(tmp_path / "a.nii.gz"))
    assert changed(lambda: read_image(tmp_path / "a.nii.gz")) == []


def test_reading_in_threads_keeps_stderr(tmp_path: Path) -> None:
    for k in range(4):
        sitk.WriteImage(blob(20), str(tmp_path / f"{k}.nii.gz"))
    before = os.fstat(2)[:3]
    threads = [threading.Thread(target=lambda k=k: [read_image(tmp_path / f"{k % 4}.nii.gz") for _ in range(20)]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.fstat(2)[:3] == before


def test_two_threads_register_at_once() -> None:
    """Both get what one alone gets."""
    settings = {"run.qc": False, "run.model": "none", "align.method": "none", "refine.iterations": 10, "run.threads": 1}
    alone = {x: sitk.GetArrayFromImage(regtool.register(blob(20), blob(x), settings=settings).displacement) for x in (22.0, 17.0)}
    found: dict[float, np.ndarray] = {}

    def work(x: float) -> None:
        found[x] = sitk.GetArrayFromImage(regtool.register(blob(20), blob(x), settings=settings).displacement)

    threads = [threading.Thread(target=work, args=(x,)) for x in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, expected in alone.items():
        np.testing.assert_array_equal(found[x], expected)


def test_two_threads_share_a_model() -> None:
    """Read once, and both get what one alone gets, with its own warnings."""
    given: dict[str, Any] = {"method": "voxelmorph", "align": "none", "refine": "none", "threads": 1}
    images = {x: blob(x) for x in (22.0, 17.0)}
    images[17.0][0, 0] = float("nan")
    alone = {x: regtool.register(blob(20), image, **given) for x, image in images.items()}
    found: dict[float, regtool.Registration] = {}

    def work(x: float) -> None:
        for _ in range(3):
            found[x] = regtool.register(blob(20), images[x], **given)

    threads = [threading.Thread(target=work, args=(x,)) for x in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, expected in alone.items():
        np.testing.assert_array_equal(found[x].displacement.to_numpy(), expected.displacement.to_numpy())
        assert found[x].report.warnings == expected.report.warnings
    assert any("NaN" in warning for warning in found[17.0].report.warnings)
    assert not any("NaN" in warning for warning in found[22.0].report.warnings)


def test_seeded_numbers_are_torchs_own() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(7)
    following = torch.rand(3)
    torch.manual_seed(7)
    with seeded(5):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3), following)


def test_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    inside: list[int] = []

    def fails() -> None:
        with computing(before + 1):
            inside.append(torch.get_num_threads())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before
