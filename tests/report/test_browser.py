"""The quality page in a real browser: it loads without a complaint, and every control changes what is shown as it should.

Needs playwright, and a Chromium of its own (`playwright install chromium`) or of the system; skipped without.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.transforms import DisplacementField
from regtool.report.content import Frame, LandmarkErrors, PageContent
from regtool.report.page import qc_html
from regtool.report.schema import FailureReport
from tests.conftest import registration_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SHAPE = (12, 20, 16)
COLOUR = """([k, x, y]) => {
  const shown = document.querySelectorAll('canvas')[k], copy = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
  const context = copy.getContext('2d', { willReadFrequently: true });
  context.drawImage(shown, -Math.floor(x * shown.width), -Math.floor(y * shown.height));
  return [...context.getImageData(0, 0, 1, 1).data];
}"""
PICTURE = "k => document.querySelectorAll('canvas')[k].toDataURL()"
SETTLED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        system = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
        for where in (None, system):
            try:
                chromium = driver.chromium.launch(executable_path=where, args=["--no-sandbox"])
            except playwright.Error:
                continue
            yield chromium
            chromium.close()
            return
        pytest.skip("no Chromium here")


class Shown:
    """A page that is open, and what it complained of."""

    def __init__(self, browser: Any, folder: Path, content: PageContent, scheme: str = "light") -> None:
        file = folder / "qc.html"
        file.write_text(qc_html(content), encoding="utf-8")
        self.page = browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900}).new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda r: self.complaints.append(r.url) if r.url != file.as_uri() and not r.url.startswith("data:") else None)
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def colour(self, plane: int, x: float, y: float) -> list[int]:
        self.page.evaluate(SETTLED)
        return self.page.evaluate(COLOUR, [plane, x, y])[:3]

    def picture(self, plane: int = 0) -> str:
        self.page.evaluate(SETTLED)
        return self.page.evaluate(PICTURE, plane)

    def choose(self, words: str) -> None:
        self.page.locator("fieldset label", has_text=words).first.click()

    def slide(self, where: str, to: float) -> None:
        self.page.locator(where).first.evaluate("(e, to) => { e.value = to; e.dispatchEvent(new Event('input')) }", to)


def grey(level: float, grid: Grid, step: float = 0.0) -> Image:
    """`level`, and `step` more with every slice; two voxels at the rim stretch the grey window to 0 ... 255."""
    data = torch.full((1, *grid.shape), level) + step * torch.arange(grid.shape[0], dtype=torch.float32).reshape(-1, *[1] * (grid.ndim - 1))
    data[0, :1] = 0.0
    data[0, -1:] = 255.0
    return Image(data, grid)


def content(grid: Grid, **more: Any) -> PageContent:
    """Fixed image: 10 times the slice; moving image: 160 before, 60 after; one voxel folds in the middle; a box of labels."""
    middle = tuple(n // 2 for n in grid.shape)
    determinant = torch.ones(grid.shape)
    determinant[middle] = -1.0
    field = torch.zeros(grid.ndim, *grid.shape)
    field[0] = 2 * torch.sin(torch.arange(grid.shape[-1]) / 3)
    inside = tuple(slice(n // 4, 3 * n // 4) for n in grid.shape)
    labels = torch.zeros(1, *grid.shape, dtype=torch.int64)
    labels[(0, *inside)] = 7
    point = grid.to_physical(torch.tensor(middle[::-1]).double().numpy())[None]
    error = 0 * point
    error[0, 0] = 5.0
    frames = (Frame(name="0", before=grey(160, grid), warped=grey(60, grid), displacement=DisplacementField(field, grid), determinant=determinant),)
    parts = {
        "title": "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
        "fixed": grey(0, grid, 10.0),
        "frames": frames,
        "report": registration_report(losses=[2.0, 1.0, 0.5], warnings=["<img src=x onerror=alert(3)>"]),
        "labels": (Labels(labels, grid), Labels(labels.roll(2, -1), grid), Labels(labels, grid)),
        "landmarks": LandmarkErrors(point, error, error / 5),
    }
    return PageContent(**(parts | more))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[1:]], ids=["3d", "2d"])
def test_page_loads_without_a_complaint(browser: Any, tmp_path: Path, shape: tuple[int, ...], scheme: str) -> None:
    shown = Shown(browser, tmp_path, content(Grid.regular(shape)), scheme)
    assert shown.page.locator("canvas").count() == len(shape) * (len(shape) - 1) // 2
    paper = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.split("(")[1].split(",")[0]) > 128) == (scheme == "light")
    for words in ("Checkerboard", "Difference", "Fixed", "Moving", "before", "after", "Grid", "Jacobian", "Contours"):
        shown.choose(words)
    shown.picture()
    assert shown.complaints == []


def test_swipe_and_views_show_the_right_image(browser: Any, tmp_path: Path) -> None:
    shown = Shown(browser, tmp_path, content(Grid.regular(SHAPE), labels=None, landmarks=None))
    fixed, before, after = 30, 160, 60
    shown.slide(".plane input", 3)
    for part, expected in ((0.8, fixed), (0.2, after)):
        shown.slide("#swipe", part)
        assert shown.colour(0, 0.5, 0.3) == pytest.approx([expected] * 3, abs=6)
    shown.choose("before")
    assert shown.colour(0, 0.5, 0.3) == pytest.approx([before] * 3, abs=6)
    shown.page.keyboard.down("f")
    assert shown.colour(0, 0.5, 0.3) == pytest.approx([fixed] * 3, abs=6)
    shown.page.keyboard.up("f")
    assert shown.colour(0, 0.5, 0.3) == pytest.approx([before] * 3, abs=6)
    shown.choose("Checkerboard")
    side = max(SHAPE[1:]) / 8
    found = [round(shown.colour(0, (k + 0.5) * side / SHAPE[2], 2.5 * side / SHAPE[1])[0], -1) for k in range(6)]
    assert found == [fixed, before] * 3
    shown.choose("Difference")
    red, _, blue = shown.colour(0, 0.5, 0.3)
    assert blue > red + 50  # the moving image is brighter
    shown.choose("Fixed")
    assert shown.colour(0, 0.5, 0.3) == pytest.approx([fixed] * 3, abs=6)
    assert shown.complaints == []


def test_slices_scroll_by_wheel_keys_and_slider(browser: Any, tmp_path: Path) -> None:
    shown = Shown(browser, tmp_path, content(Grid.regular(SHAPE), labels=None, landmarks=None))
    shown.choose("Fixed")
    shown.slide(".plane input", 4)
    canvas = shown.page.locator("canvas").first
    assert shown.colour(0, 0.5, 0.3)[0] == pytest.approx(40, abs=6)
    canvas.hover()
    shown.page.mouse.wheel(0, 80)
    assert shown.colour(0, 0.5, 0.3)[0] == pytest.approx(60, abs=6)
    canvas.focus()
    shown.page.keyboard.press("ArrowUp")
    assert shown.colour(0, 0.5, 0.3)[0] == pytest.approx(70, abs=6)
    assert shown.page.locator(".plane output").first.text_content() == "slice 8 of 12"
    other = shown.page.locator("canvas").nth(1)  # a click in the next plane moves this one; z grows upwards
    box = other.bounding_box()
    other.click(position={"x": box["width"] / 2, "y": box["height"] * (1 - 2.5 / 12)})
    shown.picture()
    assert shown.page.locator(".plane output").first.text_content() == "slice 3 of 12"
    assert shown.complaints == []


def test_overlays_are_drawn_where_they_belong(browser: Any, tmp_path: Path) -> None:
    grid = Grid.regular(SHAPE)
    shown = Shown(browser, tmp_path, content(grid))
    shown.choose("Fixed")
    for k, count in enumerate(SHAPE):
        shown.slide(f".plane:nth-child({k + 1}) input", count // 2)
    for words in ("Contours", "Landmarks"):
        shown.choose(words)
    plain = shown.picture()
    middle = ((SHAPE[2] // 2 + 0.5) / SHAPE[2], (SHAPE[1] // 2 + 0.5) / SHAPE[1])
    pictures = {plain}
    for words in ("Grid", "Jacobian", "Contours", "Landmarks", "Cross hair"):
        shown.choose(words)
        pictures.add(shown.picture())
        if words == "Jacobian":
            red, green, blue = shown.colour(0, *middle)
            assert red > 200 and blue > 150 and green < 120  # the fold
        shown.choose(words)
    assert len(pictures) == 6
    assert shown.picture() == plain
    assert shown.complaints == []


def test_time_points_and_failed_runs(browser: Any, tmp_path: Path) -> None:
    grid = Grid.regular(SHAPE)
    frames = tuple(Frame(name=f"{t}", before=grey(160, grid), warped=grey(level, grid)) for t, level in enumerate((60, 120, 200)))
    shown = Shown(browser, tmp_path, content(grid, frames=frames, labels=None, landmarks=None))
    shown.choose("Moving")
    shown.slide(".plane input", 4)
    for t, level in ((2, 200), (1, 120), (0, 60)):
        shown.page.locator("#time").select_option(str(t))
        shown.page.wait_for_timeout(200)
        assert shown.colour(0, 0.5, 0.3)[0] == pytest.approx(level, abs=6)
    assert shown.complaints == []
    error = {"what": "no <b>overlap</b>", "tip": None, "exit_code": 3}
    report = FailureReport.model_validate({"status": "failed", "error": error, "seconds": {"total": 1.0}})
    for some in ((Frame(name="0", before=grey(160, grid)),), ()):
        shown = Shown(browser, tmp_path, content(grid, frames=some, labels=None, landmarks=None, report=report))
        assert "no <b>overlap</b>" in shown.page.locator("header").text_content()
        assert shown.page.locator("fieldset input[value=after]").is_disabled()
        assert shown.complaints == []
