"""Shared oracles and phantoms. Every geometric test runs in 2-D and 3-D, axis-aligned, flipped, permuted and oblique."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.transforms import DisplacementField
from regtool.report.schema import RegistrationReport

torch.set_flush_denormal(True)
torch.set_num_threads(1)  # the tests are many and small: they run side by side instead
DATA = Path(os.environ.get("REGTOOL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("data") and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"the real images ({DATA}) are not here"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def set_options(overrides: Mapping[str, Any], section: str = "") -> list[str]:
    """Nested parameters as `--set section.key=value` words."""
    words: list[str] = []
    for key, value in overrides.items():
        words += set_options(value, f"{section}{key}.") if isinstance(value, dict) else ["--set", f"{section}{key}={json.dumps(value)}"]
    return words


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """What the command line changes in its process is undone: the log, the handler of SIGTERM, the number of threads."""
    log = logging.getLogger("regtool")
    before = (log.handlers[:], log.level, log.propagate, signal.getsignal(signal.SIGTERM), torch.get_num_threads())
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])
        signal.signal(signal.SIGTERM, before[3])
        torch.set_num_threads(before[4])


@pytest.fixture(autouse=True)
def _contained() -> Iterator[None]:
    """So that no test depends on those before it."""
    with contained():
        yield


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings without the picture at their end, which takes longer than they do."""
    monkeypatch.setattr("regtool.training.run_folder.curves_png", lambda *_: b"")


def heeds_interrupts() -> None:
    """`preexec_fn` of a process that is sent SIGINT: one whose parents run in the background of a shell would ignore it as they do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(params=[2, 3], ids=["2d", "3d"])
def ndim(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=["aligned", "flipped", "permuted", "oblique"])
def orientation(request: pytest.FixtureRequest) -> str:
    return request.param


def direction(ndim: int, orientation: str, rng: np.random.Generator) -> np.ndarray:
    if orientation == "flipped":
        return np.diag([-1.0, 1.0, -1.0][:ndim])
    if orientation == "permuted":
        return np.roll(np.eye(ndim), 1, axis=0)
    if orientation == "oblique":
        q, r = np.linalg.qr(rng.standard_normal((ndim, ndim)))
        return q * np.sign(np.diag(r))
    return np.eye(ndim)


def random_grid(ndim: int, orientation: str, seed: int, low: int = 9, high: int = 21) -> Grid:
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(low, high, ndim))
    spacing = tuple(rng.uniform(0.6, 3.0, ndim).tolist())
    d = direction(ndim, orientation, rng)
    centre = rng.uniform(-3, 3, ndim) + 100
    origin = centre - d @ (np.array(spacing) * (np.array(size) - 1) / 2)
    return Grid(size, spacing, tuple(origin.tolist()), tuple(d.ravel().tolist()))


def random_image(grid: Grid, seed: int) -> Image:
    rng = np.random.default_rng(seed)
    return Image(torch.as_tensor(rng.standard_normal((1, *grid.shape)), dtype=torch.float32), grid)


def smooth_field(grid: Grid, amplitude_mm: float, seed: int) -> DisplacementField:
    """Analytic, a few sine waves across the grid."""
    rng = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij")[::-1], -1).astype(float)
    points = grid.to_physical(index) - grid.centre
    wave = 2 * np.pi / max(grid.extent)
    u = [amplitude_mm * np.sin(points @ rng.uniform(-wave, wave, grid.ndim) + rng.uniform(0, 6)) for _ in range(grid.ndim)]
    return DisplacementField(torch.as_tensor(np.stack(u), dtype=torch.float32), grid)


def to_sitk(array: np.ndarray, grid: Grid, vector: bool = False) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=vector)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def sitk_field(field: DisplacementField) -> sitk.DisplacementFieldTransform:
    array = np.moveaxis(field.data.numpy(), 0, -1).astype(np.float64)
    return sitk.DisplacementFieldTransform(to_sitk(array, field.grid, vector=True))


def blobs(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    """A soft ball with an off-centre bump, array-axis coordinates."""
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    distance = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)))
    bump = np.exp(-sum((a - c - radius / 2) ** 2 for a, c in zip(axes, centre, strict=True)) / (radius / 2) ** 2)
    return (1 / (1 + np.exp(distance - radius)) + 0.5 * bump).astype(np.float32)


def corners(grid: Grid) -> np.ndarray:
    return np.array(list(itertools.product(*[(0, n - 1) for n in grid.size])))


def registration_report(**more: Any) -> RegistrationReport:
    """The report of a registration, every key that must be there; `more` replaces and adds."""
    image = {"path": "b.nii", "sha256": "fedcba9876543210", "size": [10, 20, 30], "spacing": [1.0, 1.0, 2.5], "orientation": "LPS"}
    facts = {
        "status": "ok", "method": "voxelmorph", "model": {"name": None, "sha256": None}, "fixed": image, "moving": image, "outputs": {},
        "similarity": {"name": "lncc", "reason": "as asked for", "before": 0.1234, "after": 0.5678},
        "jacobian": {"min": -0.25, "max": 3.0, "mean": 1.01, "folding_percent": 0.125, "sd_log": 0.2},
        "displacement_mm": {"mean": 1.25, "max": 4.5}, "stages": [], "seconds": {"read": 0.25, "total": 7.5}, "peak_memory_mb": 812.0,
        "planned_memory_mb": 900.0, "grids": {}, "device": "cpu", "threads": 1, "seed": 0, "versions": {"regtool": "0.1.0"}, "command": "regtool",
        "warnings": [], "qc": [],
    }  # fmt: skip
    return RegistrationReport.model_validate(facts | more)
