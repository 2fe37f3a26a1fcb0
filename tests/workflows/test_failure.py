"""A failed run leaves a page with what is known, never a file that looks finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regtool.config.toml import merged
from regtool.errors import GeometryError, InputError, RegtoolError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.io.images import write_image
from regtool.workflows import register as module
from regtool.workflows.register import Request, register

QUICK = {"refine": {"iterations": 2, "levels": 1}, "run": {"threads": 1}, "align": {"method": "none"}, "metric": {"name": "ncc"}}
LEFT = {"qc.html", "qc.png", "failed.json"}


@pytest.fixture
def files(tmp_path: Path, ndim: int) -> dict[str, Path]:
    grid = Grid.regular((16, 14, 12)[:ndim])
    image = Image(torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(0)), grid)
    images = {
        "fixed": image,
        "moving": Image(image.data.roll(1, -1), grid),
        "far": Image(image.data, replace(grid, origin=(5000.0,) * ndim)),
        "constant": Image(torch.ones_like(image.data), grid),
    }
    for name, one in images.items():
        write_image(one, tmp_path / f"{name}.nii.gz")
    return {name: tmp_path / f"{name}.nii.gz" for name in images}


def request(files: dict[str, Path], moving: str, *overrides: dict[str, Any], overwrite: bool = False) -> Request:
    return Request(
        fixed=files["fixed"],
        moving=files[moving],
        output=files["fixed"].parent / "out",
        overrides=merged(QUICK, *overrides),
        overwrite=overwrite,
        command="regtool <b>",
    )


def names(files: dict[str, Path]) -> set[str]:
    out = files["fixed"].parent / "out"
    return {p.name for p in out.iterdir()} if out.exists() else set()


@pytest.mark.parametrize(("moving", "error"), [("far", GeometryError), ("constant", InputError)])
def test_failed_run_says_why(files: dict[str, Path], moving: str, error: type[RegtoolError]) -> None:
    with pytest.raises(error) as caught:
        register(request(files, moving))
    assert names(files) == LEFT
    out = files["fixed"].parent / "out"
    report = json.loads((out / "failed.json").read_text())
    assert report["status"] == "failed"
    assert report["error"] == {"type": error.__name__, "what": caught.value.what, "tip": caught.value.tip, "exit_code": 3}
    assert report["moving"]["path"] == str(files[moving].resolve())
    assert "The run failed" in (out / "qc.html").read_text(encoding="utf-8")


def test_images_of_another_dimension(files: dict[str, Path], ndim: int, tmp_path: Path) -> None:
    other = Grid.regular((16, 14, 12)[: 5 - ndim])
    write_image(Image(torch.rand(1, *other.shape), other), tmp_path / "other.nii.gz")
    with pytest.raises(GeometryError):
        register(request({**files, "other": tmp_path / "other.nii.gz"}, "other"))
    assert names(files) == LEFT


def test_next_run_needs_no_overwrite_and_clears_the_page(files: dict[str, Path]) -> None:
    with pytest.raises(GeometryError):
        register(request(files, "far"))
    register(request(files, "moving", {"run": {"qc": False}}))
    assert not names(files) & LEFT
    assert "report.json" in names(files)


def test_finished_result_is_not_touched(files: dict[str, Path]) -> None:
    register(request(files, "moving"))
    page = (files["fixed"].parent / "out" / "qc.html").read_bytes()
    with pytest.raises(GeometryError):
        register(request(files, "far", overwrite=True))
    assert "failed.json" not in names(files)
    assert "report.json" in names(files)
    assert (files["fixed"].parent / "out" / "qc.html").read_bytes() == page


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_interrupted_run_leaves_nothing(files: dict[str, Path], error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "register_pair", interrupted)
    with pytest.raises(type(error)):
        register(request(files, "moving"))
    assert names(files) == set()


def test_nothing_is_left_without_a_page(files: dict[str, Path]) -> None:
    with pytest.raises(GeometryError):
        register(request(files, "far", {"run": {"qc": False}}))
    assert names(files) == set()


def test_error_stays_itself_where_no_page_can_be_written(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regtool.result.folder.write_page", broken)
    with pytest.raises(GeometryError):
        register(request(files, "far"))
    assert names(files) == set()


def test_out_of_memory_and_bugs_are_told_too(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for trouble, kind, code in ((MemoryError(), "OutOfMemory", 5), (ZeroDivisionError("by <zero>"), "ZeroDivisionError", 1)):

        def failing(*_: object, trouble: Exception = trouble) -> None:
            raise trouble

        monkeypatch.setattr(module, "register_pair", failing)
        with pytest.raises(Exception, match=r"memory|zero"):
            register(request(files, "moving"))
        error = json.loads((files["fixed"].parent / "out" / "failed.json").read_text())["error"]
        assert (error["type"], error["exit_code"]) == (kind, code)
