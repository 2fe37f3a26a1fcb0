"""The quality page: pictures hung the right way round, numbers in, nothing executable out."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import re
import time

import numpy as np
import PIL.Image
import pytest
import torch

from regtool.errors import GeometryError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.jacobian import jacobian_determinant
from regtool.geometry.transforms import DisplacementField
from regtool.report.content import Frame, LandmarkErrors, PageContent
from regtool.report.figures import anatomy, planes, window
from regtool.report.page import number, qc_html, qc_png
from regtool.report.schema import FailureReport, RegistrationReport
from regtool.report.volumes import FRAMES, display_grid, sheet, shrunk
from tests.conftest import random_grid, random_image, registration_report, smooth_field

Reported = RegistrationReport | FailureReport
REPORT = registration_report(
    status="qc_failed",
    model={"name": "brain", "sha256": "0123456789abcdef"},
    fixed={"path": "<script>alert(1)</script>.nii", "size": [10, 20, 30], "spacing": [1.0, 1.0, 2.5], "orientation": "LPS"},
    stages=[
        {"name": "align", "kept": True, "seconds": 0.5, "similarity": 0.2, "reason": ""},
        {"name": "network", "kept": False, "seconds": 1.5, "similarity": 0.1, "reason": ""},
    ],
    before={"dice": {"mean": 0.5, "labels": {"1": 0.5}}, "tre_mm": {"mean": 9.0, "median": 9.0, "p95": 9.0, "each": [9.0]}, "ncc": 0.25},
    after={"dice": {"mean": 0.75, "labels": {"1": 0.75}}, "tre_mm": {"mean": 1.5, "median": 1.5, "p95": 1.5, "each": [1.5]}, "ncc": 0.875},
    losses=[3.0, 2.0, 1.0, None, 0.5],
    command="regtool register 'a b.nii' c.nii",
    warnings=["a <b>strange</b> header"],
    qc=[
        {"name": "max_folding_percent", "value": 0.125, "limit": 0.1, "passed": False},
        {"name": "min_similarity_gain", "value": 0.44, "limit": 0.1, "passed": True},
    ],
)


def frame(grid: Grid, seed: int = 2, name: str = "0") -> Frame:
    field = smooth_field(grid, 1.0, seed=1)
    return Frame(
        name=name, before=random_image(grid, seed), warped=random_image(grid, seed + 1), displacement=field, determinant=jacobian_determinant(field)
    )


def content(
    grid: Grid, title: str = "moving to fixed", report: Reported | None = None, frames: tuple[Frame, ...] | None = None, **more: object
) -> PageContent:
    frames = (frame(grid),) if frames is None else frames
    return PageContent(**({"title": title, "fixed": random_image(grid, 1), "frames": frames, "report": report or registration_report()} | more))


def carried(page: str) -> dict:
    """What the page gives its viewer."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def tiles(url: str, size: list[int]) -> np.ndarray:
    """The volume (z, y, x) of a sheet of tiles, as the viewer reads it."""
    x, y, z = (*size, 1)[:3]
    picture = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(url.split("base64,")[1]))))
    width, height = -(-x // 8) * 8, -(-y // 8) * 8
    columns = picture.shape[1] // width
    return np.stack([picture[k // columns * height :, k % columns * width :][:y, :x] for k in range(z)])


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:  # noqa: ARG002
        self.seen.append(tag)
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_picture(ndim: int, orientation: str) -> None:
    png = qc_png(content(random_grid(ndim, orientation, seed=2)))
    assert png.startswith(b"\x89PNG")


def test_page_says_everything_and_escapes_it() -> None:
    grid = Grid.regular((12, 10, 8))
    errors = LandmarkErrors(np.array([[1.0, 2.0, 3.0]]), np.array([[9.0, 0.0, 0.0]]), np.array([[0.0, 1.5, 0.0]]))
    page = qc_html(content(grid, title="<img src=x onerror=alert(1)></script>", report=REPORT, landmarks=errors))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("script") == 2  # the data and the viewer
    assert "img" not in tags.seen
    numbers = [
        "0.1234",
        "0.5678",
        "0.125 %",
        "at most 0.1 %",
        "at least 0.1",
        "7.5 s",
        "812 MB",
        "0123456789ab",
        "10 × 20 × 30",
        "0.75",
        "1.5 mm",
        "0.875",
        "4.5 mm",
    ]
    words = [
        "Quality control failed",
        "folding: 0.125 %, should be at most 0.1 %",
        "rolled back",
        "kept",
        "global correlation",
        "<polyline",
        'data-landmark="0"',
    ]
    escaped = ["a &lt;b&gt;strange&lt;/b&gt; header", "&lt;script&gt;alert(1)&lt;/script&gt;.nii", "&#39;a b.nii&#39;"]
    for text in numbers + words + escaped:
        assert text in page, text
    assert "http:" not in page
    assert "https:" not in page


def test_only_our_own_script_may_run_and_nothing_is_fetched() -> None:
    page = qc_html(content(Grid.regular((12, 10))))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    assert policy and script
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert policy.group(1) == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_page_without_thresholds() -> None:
    page = qc_html(content(Grid.regular((12, 10))))
    assert "no thresholds were set" in page
    assert page == qc_html(content(Grid.regular((12, 10))))


@pytest.mark.parametrize("known", ["both images", "the fixed image"])
def test_page_of_a_failed_run(ndim: int, known: str) -> None:
    grid = Grid.regular((12, 10, 8)[:ndim])
    error = {"what": "no <overlap>", "tip": "look at it", "exit_code": 3}
    report = FailureReport.model_validate({"status": "failed", "error": error, "seconds": {"total": 1.0}})
    made = content(grid, report=report, frames=(Frame(name="0", before=random_image(grid, 2)),) if known == "both images" else ())
    page = qc_html(made)
    for text in ("The run failed", "no &lt;overlap&gt;", "tip: look at it"):
        assert text in page
    assert [sorted(f) for f in carried(page)["frames"]] == ([["before", "name"]] if known == "both images" else [])
    assert qc_png(made).startswith(b"\x89PNG")


def test_viewer_gets_the_images_as_they_are(ndim: int, orientation: str) -> None:
    """Grey values within what JPEG loses, labels exactly, folds where they are, vectors in voxels of the picture."""
    grid = random_grid(ndim, orientation, seed=4)
    ramp = torch.linspace(0, 255, grid.size[0]).expand(1, *grid.shape).contiguous()
    image = Image(ramp, grid)
    determinant = torch.ones(grid.shape)
    fold = tuple(n // 2 for n in grid.shape)
    determinant[fold] = -0.5
    field = DisplacementField(
        torch.as_tensor(grid.rotation[:, 0], dtype=torch.float32).reshape(-1, *[1] * ndim).expand(ndim, *grid.shape) * 0.5, grid
    )
    labels = Labels(torch.randint(0, 3, (1, *grid.shape)) * 1000, grid)
    points = grid.to_physical(np.array([[1.0, 2.0, 3.0][:ndim]]))
    errors = LandmarkErrors(points, grid.rotation[:, 1][None] * 4, grid.rotation[:, 0][None] * 2)
    made = content(
        grid,
        frames=(Frame(name="0", before=image, warped=image, displacement=field, determinant=determinant),),
        labels=(labels, labels, labels),
        landmarks=errors,
        fixed=image,
    )
    data = carried(qc_html(made))
    shape = grid.shape if ndim == 3 else (1, *grid.shape)
    low, high = window(image)
    expected = ((ramp[0].numpy() - low) / (high - low) * 255).clip(0, 255).reshape(shape)
    assert np.abs(tiles(data["fixed"], data["size"]).astype(float) - expected).max() < 6
    assert data["names"] == ["1000", "2000"]
    assert np.array_equal(tiles(data["labels_warped"], data["size"]).astype(int) * 1000, labels.data[0].numpy().reshape(shape))
    found = np.argwhere(tiles(data["frames"][0]["folds"], data["size"]))
    assert found.tolist() == [[*[0] * (3 - ndim), *fold]]
    lattice = data["frames"][0]["field"]
    u = np.frombuffer(base64.b64decode(lattice["data"]), "<i2").reshape(ndim, -1) * lattice["scale"]
    assert np.allclose(u[0], 0.5, atol=1e-4)
    assert np.allclose(u[1:], 0, atol=1e-4)
    vector = data["landmarks"][0]
    assert np.allclose(vector["at"], [1, 2, 3][:ndim], atol=1e-3)
    assert np.allclose(vector["before"][:2], [0, 4], atol=1e-3)
    assert np.allclose(vector["after"][:2], [2, 0], atol=1e-3)


def test_a_shift_of_all_points_is_left_out_of_the_grid() -> None:
    grid = Grid.regular((10, 12))
    field = DisplacementField(torch.tensor([30.0, 40.0]).reshape(2, 1, 1).expand(2, *grid.shape), grid)
    lattice = carried(
        qc_html(
            content(
                grid,
                frames=(
                    Frame(
                        name="0", before=random_image(grid, 2), warped=random_image(grid, 3), displacement=field, determinant=torch.ones(grid.shape)
                    ),
                ),
            )
        )
    )["frames"][0]["field"]
    assert lattice["shift"] == pytest.approx(50)
    assert not any(base64.b64decode(lattice["data"]))


def test_few_time_points_of_many_are_shown() -> None:
    grid = Grid.regular((9, 10, 8))
    data = carried(qc_html(content(grid, frames=tuple(frame(grid, t, str(t)) for t in range(25)))))
    assert len(data["frames"]) == FRAMES
    assert [data["frames"][k]["name"] for k in (0, -1)] == ["0", "24"]


def test_coarsening_is_a_mean_of_areas() -> None:
    data = torch.as_tensor(np.random.default_rng(0).random((1, 8, 9, 10)), dtype=torch.float32)
    expected = data.numpy()[0].reshape(4, 2, 3, 3, 5, 2).mean(axis=(1, 3, 5))
    assert np.allclose(shrunk(data, (4, 3, 5))[0].numpy(), expected, atol=1e-6)
    spot = torch.zeros(1, 11, 13)
    for at in np.ndindex(11, 13):
        spot.zero_()[(0, *at)] = 1
        assert float(shrunk(spot, (7, 5)).sum()) > 0  # a fold is never lost


def test_display_grid_covers_the_same_block() -> None:
    grid = Grid((512, 512, 60), (0.5, 0.5, 3.0), (1.0, 2.0, 3.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    small = display_grid(grid, 1_000_000)
    assert small.voxels <= 1_000_000
    assert small.size[2] == 60  # the coarse axis stays as it is
    assert np.allclose(small.extent, grid.extent)
    assert np.allclose(small.corners, grid.corners)


def test_tiles_fill_whole_blocks() -> None:
    volume = np.arange(5 * 9 * 11, dtype=np.uint8).reshape(5, 9, 11)
    picture = sheet(volume)
    assert picture.shape[0] % 16 == 0 and picture.shape[1] % 16 == 0
    assert np.array_equal(picture[:9, :11], volume[0])


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


def test_numbers() -> None:
    assert [number(x) for x in (0.123456, 12, 123456.7, None, float("nan"), "a")] == ["0.1235", "12", "123457", "none", "nan", "a"]


def test_parts_on_other_grids_are_refused() -> None:
    grid = Grid.regular((12, 10))
    with pytest.raises(GeometryError, match="warped of shape"):
        content(grid, frames=(Frame(name="0", before=random_image(grid, 0), warped=random_image(Grid.regular((12, 11)), 0)),))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_large_pair_is_small_and_quick(kind: str) -> None:
    grid = Grid.regular((256, 256, 256))
    random = (
        torch.randn(1, *grid.shape)
        if kind == "noise"
        else torch.nn.functional.interpolate(torch.randn(1, 1, 32, 32, 32), grid.shape, mode="trilinear")[0]
    )
    image = Image(random, grid)
    labels = Labels((random > 0).long() + (random > 1), grid)
    field = DisplacementField(random.expand(3, *grid.shape).contiguous(), grid)
    made = PageContent(
        title="large",
        fixed=image,
        frames=(Frame(name="0", before=image, warped=image, displacement=field, determinant=1 + random[0]),),
        report=registration_report(),
        labels=(labels, labels, labels),
    )
    start = time.process_time()
    page = qc_html(made)
    qc_png(made)
    assert time.process_time() - start < 6  # 3 s on two cores
    assert len(page) < 3_000_000
