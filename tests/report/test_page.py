"""The quality page: pictures hung the right way round, numbers in, nothing executable out."""

from __future__ import annotations

import html.parser
import time

import numpy as np
import pytest
import torch

from regtool.errors import GeometryError
from regtool.geometry.fields import jacobian_determinant
from regtool.geometry.grid import Grid
from regtool.geometry.image import DisplacementField, Image
from regtool.report.figures import anatomy, planes, window
from regtool.report.page import PageContent, displacement_length, number, qc_html, qc_png
from tests.conftest import random_grid, random_image, smooth_field

REPORT = {
    "status": "qc_failed",
    "method": "voxelmorph",
    "model": {"name": "brain", "sha256": "0123456789abcdef"},
    "fixed": {"path": "<script>alert(1)</script>.nii", "size": [10, 20, 30], "spacing": [1.0, 1.0, 2.5]},
    "moving": {"path": "b.nii", "size": [10, 20, 30], "spacing": [1.0, 1.0, 2.5]},
    "similarity": {"name": "lncc", "before": 0.1234, "after": 0.5678},
    "jacobian": {"min": -0.25, "max": 3.0, "mean": 1.01, "folding_percent": 0.125, "sd_log": 0.2},
    "stages": [
        {"name": "align", "kept": True, "seconds": 0.5, "similarity": 0.2},
        {"name": "network", "kept": False, "seconds": 1.5, "similarity": 0.1},
    ],
    "seconds": {"read": 0.25, "total": 7.5},
    "peak_memory_mb": 812.0,
    "device": "cpu",
    "seed": 0,
    "versions": {"regtool": "0.1.0"},
    "command": ["regtool", "register", "a b.nii", "c.nii"],
    "warnings": ["a <b>strange</b> header"],
}


def content(grid: Grid, title: str = "moving to fixed", report: dict | None = None, **changes: object) -> PageContent:
    field = smooth_field(grid, 1.0, seed=1)
    parts = {"fixed": random_image(grid, 1), "moving_before": random_image(grid, 2), "warped": random_image(grid, 3), "displacement": field}
    thresholds = [("max_folding_percent", 0.125, 0.1, False), ("min_similarity_gain", 0.44, 0.1, True)]
    return PageContent(
        **({"title": title, **parts, "determinant": jacobian_determinant(field), "report": report or {}, "thresholds": thresholds} | changes)
    )


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:  # noqa: ARG002
        self.seen.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_picture(ndim: int, orientation: str) -> None:
    png = qc_png(content(random_grid(ndim, orientation, seed=2)))
    assert png.startswith(b"\x89PNG")


def test_page_says_everything_and_escapes_it() -> None:
    page = qc_html(content(Grid.regular((12, 10, 8)), title="<img src=x onerror=alert(1)>", report=REPORT), b"png")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("script") == 0
    assert tags.seen.count("img") == 1
    numbers = ["0.1234 → 0.5678", "0.125 %", "rolled back, similarity 0.1", "kept, similarity 0.2", "7.5 s", "812 MB", "0123456789ab", "10 × 20 × 30"]
    words = ["quality control failed", "FAIL", "pass", "prefers-color-scheme"]
    escaped = ["a &lt;b&gt;strange&lt;/b&gt; header", "&lt;script&gt;alert(1)&lt;/script&gt;.nii", "&#39;a b.nii&#39;"]
    for text in numbers + words + escaped:
        assert text in page, text
    assert "http" not in page.split("base64,")[0]


def test_page_of_an_empty_report() -> None:
    assert "displacement, mean" in qc_html(content(Grid.regular((12, 10))), b"png")


@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_pictures_are_hung_as_radiologists_do(flip: tuple[int, int, int]) -> None:
    """One bright voxel to the patient's left, front and head must appear right and up, whatever the axes of the file."""
    size = np.array([8, 10, 12])
    order = [1, 2, 0]  # index axis k runs along world axis order[k]
    direction = np.zeros((3, 3))
    for k, world in enumerate(order):
        direction[world, k] = flip[k]
    grid = Grid(tuple(size.tolist()), (1.0, 2.0, 3.0), (5.0, 5.0, 5.0), tuple(direction.ravel().tolist()))
    target = {0: 1, 1: -1, 2: 1}  # world axis: left, front, head in LPS
    index = [size[k] - 1 if target[w] * flip[k] > 0 else 0 for k, w in enumerate(order)]
    data = torch.zeros(1, *grid.shape)
    data[(0, *index[::-1])] = 1
    found = {}
    for plane in planes(Image(data, grid)):
        cut = data[0]
        for axis in plane.cut:
            cut = cut.amax(dim=2 - axis, keepdim=True).expand_as(cut)
        rows, columns = np.nonzero(plane.slice(cut))
        picture = plane.slice(cut)
        found[plane.name] = (
            "right" if columns[0] > picture.shape[1] / 2 else "left",
            "down" if rows[0] > picture.shape[0] / 2 else "up",
            plane.letters,
        )
    assert found == {
        "axial": ("right", "up", ("R", "L", "A", "P")),
        "coronal": ("right", "up", ("R", "L", "S", "I")),
        "sagittal": ("left", "up", ("A", "P", "S", "I")),
    }


def test_no_side_is_claimed_where_the_header_is_silent() -> None:
    assert {letter for p in planes(random_image(Grid.regular((8, 9, 10)), 0)) for letter in p.letters} == {"", "+x", "+y", "+z"}
    assert [p.letters for p in planes(random_image(Grid.regular((8, 9)), 0))] == [("", "+x", "", "+y")]


def test_slices_go_through_the_anatomy() -> None:
    grid = Grid.regular((40, 60, 50))
    data = torch.full((1, *grid.shape), -1000.0)
    data[0, 8:13, 40:45, 30:35] = 100
    assert anatomy(Image(data, grid)) == (32, 42, 10)
    assert len(anatomy(Image(torch.zeros(1, *grid.shape), grid))) == 3


def test_grey_window_is_never_empty() -> None:
    assert window(Image(torch.full((1, 4, 4), 7.0), Grid.regular((4, 4)))) == (7.0, 8.0)


def test_displacement_length_and_numbers() -> None:
    grid = Grid.regular((2, 2))
    field = DisplacementField(torch.tensor([[[3.0, 0], [0, 0]], [[4.0, 0], [0, 1]]]), grid)
    assert displacement_length(field) == (pytest.approx(1.5), pytest.approx(5.0))
    assert [number(x) for x in (0.123456, 12, 123456.7, None, float("nan"), "a")] == ["0.1235", "12", "123457", "none", "nan", "a"]


def test_parts_on_other_grids_are_refused() -> None:
    with pytest.raises(GeometryError, match="warped of shape"):
        content(Grid.regular((12, 10)), warped=random_image(Grid.regular((12, 11)), 0))


@pytest.mark.slow
def test_large_pair_is_small_and_quick() -> None:
    grid = Grid.regular((256, 256, 256))
    image = Image(torch.randn(1, *grid.shape), grid)
    made = PageContent("noise", image, image, image, DisplacementField(torch.randn(3, *grid.shape), grid), torch.rand(grid.shape), {}, [])
    start = time.perf_counter()
    page = qc_html(made, qc_png(made))
    assert time.perf_counter() - start < 3
    assert len(page) < 3_000_000
