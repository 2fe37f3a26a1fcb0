"""The quality figure of one registration: fixed, moving, warped, differences, deformed grid and Jacobian on mid-anatomy slices.

Only slices are touched, so a large volume costs no more than a small one. Display follows radiology: the patient's right on the left of the
picture, front and head up. Where the header says nothing about the patient (2-D, or an axis-aligned image with origin 0, which is what tools
write that know no better) no anatomical letter is shown, for a wrong R is worse than none; x runs to the right, y down, z up.
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.geometry.transforms import DisplacementField
from regtool.report.content import PageContent

Slice = NDArray[np.float32]

PNG_BYTES = 2_100_000
WIDTH, LEFT, GAP, HEAD, FOOT = 2.75, 0.3, 0.06, 0.5, 0.62  # inches
SAMPLES = 48  # voxels an axis looked at for intensity windows and for the place of the anatomy
LINES = 24  # of the deformed grid along the longer side
INK, PAPER = "#e8e8e8", "#101214"
FOLD, LINE = "#ff2bd6", "#5ee0a0"
DIFFERENCE = LinearSegmentedColormap.from_list("difference", ["#9be7ff", "#2b8cff", "#0a0a0a", "#ff8a1f", "#ffe9a8"])
VOLUME = LinearSegmentedColormap.from_list("volume", ["#7fd0ff", "#1f5fbf", "#17191c", "#c46a12", "#ffd27a"])
COLUMNS = ("fixed", "moving, before", "difference before", "warped, after", "difference after", "deformed grid on fixed", "Jacobian determinant")


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One slice and how it is hung: index axes across and down, which of them run backwards, where the others are cut, edge letters."""

    name: str
    across: int
    down: int
    flip_across: bool
    flip_down: bool
    cut: dict[int, int]
    letters: tuple[str, str, str, str]  # left, right, top, bottom
    width_mm: float
    height_mm: float

    def slice(self, data: torch.Tensor) -> Slice:
        """(*shape) to (down, across)."""
        ndim = data.dim()
        for axis in sorted(self.cut):  # x is the last array axis, so cutting a low one keeps the array positions of the higher ones
            data = data.select(ndim - 1 - axis, self.cut[axis])
        rows_first = data if self.across < self.down else data.T
        flips = [d for d, flip in ((0, self.flip_down), (1, self.flip_across)) if flip]
        return np.asarray(torch.flip(rows_first.cpu().float(), flips).numpy(), dtype=np.float32)


def qc_png(content: PageContent) -> bytes:
    """The first frame as PNG: one row a plane (axial, coronal, sagittal; a 2-D image has one), seven columns; fewer where the run failed."""
    first = content.frames[0] if content.frames else None
    names = COLUMNS if first and first.warped else COLUMNS[: 3 if first else 1]
    hung = planes(content.fixed)
    heights = [WIDTH * min(max(p.height_mm / p.width_mm, 0.35), 1.6) for p in hung]
    total = (LEFT + len(names) * (WIDTH + GAP), HEAD + sum(heights) + GAP * (len(hung) - 1) + FOOT)

    def place(column: int, bottom: float, columns: int, height: float) -> tuple[float, float, float, float]:
        """Inches to the fractions of the figure that matplotlib wants: left, bottom, width, height."""
        width = columns * (WIDTH + GAP) - GAP
        return (LEFT + column * (WIDTH + GAP)) / total[0], bottom / total[1], width / total[0], height / total[1]

    figure = Figure(figsize=total, facecolor=PAPER)
    FigureCanvasAgg(figure)
    moving = [image for image in (first.before, first.warped) if image] if first else []
    windows = window(content.fixed), window(*moving or [content.fixed])
    top = total[1] - HEAD
    for plane, height in zip(hung, heights, strict=True):
        top -= height
        panels = [figure.add_axes(place(k, top, 1, height)) for k in range(len(names))]
        figure.text(LEFT / 2 / total[0], (top + height / 2) / total[1], plane.name, color=INK, fontsize=13, rotation=90, ha="center", va="center")
        _row(panels, plane, content, *windows)
        top -= GAP
    for k, name in enumerate(names):
        left, y, width, _ = place(k, total[1] - HEAD / 2, 1, 0)
        figure.text(left + width / 2, y, name, color=INK, fontsize=13, ha="center", va="center")
    percent, ratio = Normalize(-100, 100), LogNorm(0.5, 2)
    if len(names) > 1:
        _colourbar(figure, place(2, 0.4, 1, 0.1), DIFFERENCE, percent, "fixed minus moving, % of the grey window", [-100, -50, 0, 50, 100])
    if len(names) == len(COLUMNS):
        _colourbar(figure, place(6, 0.4, 1, 0.1), VOLUME, ratio, "volume ratio; pink: folding", [0.5, 0.7, 1, 1.4, 2])
    return _encoded(figure)


def planes(fixed: Image) -> list[Plane]:
    """Every pair of axes once (x-y alone in 2-D; axial, coronal and sagittal in 3-D), cut through the middle of the anatomy."""
    grid = fixed.grid
    world = _world_axes(grid)
    middle = anatomy(fixed)
    out = []
    for a, b in itertools.combinations(range(grid.ndim), 2):  # world axes: across, down
        across, down = world.index(a), world.index(b)
        normals = [k for k in range(grid.ndim) if k not in (across, down)]
        known = normals and not grid.has_default_geometry
        head_up = b not in (0, 1)  # LPS grows to the head but the picture grows downwards
        out.append(
            Plane(
                name=("axial", "coronal", "sagittal")[a + b - 1] if known else f"{'xyz'[a]}-{'xyz'[b]}", across=across, down=down,
                flip_across=bool(grid.rotation[a, across] < 0),
                flip_down=bool(grid.rotation[b, down] < 0) != head_up,
                cut={k: middle[k] for k in normals}, letters=_letters(a, b) if known else _axis_names(a, b),
                width_mm=grid.extent[across], height_mm=grid.extent[down],
            )
        )  # fmt: skip
    return out


def anatomy(image: Image) -> tuple[int, ...]:
    """The voxel index x, y[, z] in the middle of what is brighter than average (by the weighted median along each axis)."""
    steps = [max(1, n // SAMPLES) for n in image.grid.shape]
    sparse = _sparse(image.data[0], steps).float()
    bright = (sparse - sparse.mean()).clamp(min=0)
    out = []
    for axis in range(image.grid.ndim):
        profile = bright.sum(dim=[d for d in range(bright.dim()) if d != axis]).cumsum(0)
        place = int(torch.searchsorted(profile, profile[-1] / 2)) if float(profile[-1]) > 0 else len(profile) // 2
        out.append(min(place * steps[axis] + steps[axis] // 2, image.grid.shape[axis] - 1))
    return tuple(out[::-1])


def window(*images: Image) -> tuple[float, float]:
    """One grey window for all: 0.5th to 99.5th percentile of a sparse sample, never empty."""
    parts = [_sparse(one.data[0], [max(1, n // SAMPLES) for n in one.grid.shape]).float().cpu().numpy().ravel() for one in images]
    sparse = np.nan_to_num(np.concatenate(parts))
    low, high = np.percentile(sparse, (0.5, 99.5))
    if high <= low:
        low, high = float(sparse.min()), float(sparse.max())
    return float(low), float(high) if high > low else float(low) + 1.0


def _encoded(figure: Figure) -> bytes:
    """PNG; drawn smaller where noise would make the file large (the page carries it as text, a third longer)."""
    out = io.BytesIO()
    for dpi in (100, 80, 60):
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=dpi, facecolor=PAPER, pil_kwargs={"compress_level": 4})
        if out.tell() < PNG_BYTES:
            break
    return out.getvalue()


def _row(panels: list[Axes], plane: Plane, content: PageContent, window_fixed: tuple[float, float], window_moving: tuple[float, float]) -> None:
    """One plane, column by column."""
    fixed = plane.slice(content.fixed.data[0])
    greys = _scaled(fixed, window_fixed)
    _show(panels[0], plane, fixed, "gray", Normalize(*window_fixed))
    if not content.frames:
        return
    first = content.frames[0]
    for left, image in ((1, first.before), (3, first.warped)):
        if image is not None:
            data = plane.slice(image.data[0])
            _show(panels[left], plane, data, "gray", Normalize(*window_moving))
            _show(panels[left + 1], plane, greys - _scaled(data, window_moving), DIFFERENCE, Normalize(-1, 1))
    if first.displacement is not None and first.determinant is not None:
        _show(panels[5], plane, fixed, "gray", Normalize(*window_fixed), dim=0.75)
        _grid_lines(panels[5], plane, first.displacement)
        determinant = plane.slice(first.determinant)
        _show(panels[6], plane, determinant, VOLUME, LogNorm(0.5, 2, clip=True))
        _folds(panels[6], plane, determinant <= 0)


def _show(panel: Axes, plane: Plane, data: Slice, colours: str | Colormap, norm: Normalize, dim: float = 1.0) -> None:
    """One picture in millimetres with its edge letters."""
    determinant = isinstance(norm, LogNorm)
    smooth = "nearest" if determinant else "antialiased"
    shown = data.clip(1e-3) if determinant else data
    panel.imshow(shown, cmap=colours, norm=norm, extent=(0, plane.width_mm, plane.height_mm, 0), interpolation=smooth, alpha=dim, aspect="equal")
    panel.set(facecolor="black", xlim=(0, plane.width_mm), ylim=(plane.height_mm, 0), xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    for (x, y, ha, va), letter in zip(places, plane.letters, strict=True):
        _write(panel, x, y, letter, "#ffd75e", ha, va)


def _write(panel: Axes, x: float, y: float, text: str, colour: str, ha: str = "left", va: str = "top") -> None:
    """Text at a fraction of the panel, outlined so that it reads on any anatomy."""
    outline = [patheffects.withStroke(linewidth=2, foreground="black")]
    panel.text(x, y, text, transform=panel.transAxes, color=colour, fontsize=10, ha=ha, va=va, path_effects=outline)


def _grid_lines(panel: Axes, plane: Plane, field: DisplacementField) -> None:
    """Lines of the voxel lattice at x + u(x). A common shift is taken out of the drawing, and named: it would push the lines off the picture."""
    grid = field.grid
    u = np.stack([plane.slice(component) for component in field.data])
    points = []
    shift = []
    for axis, flip, along in ((plane.across, plane.flip_across, 1), (plane.down, plane.flip_down, 0)):
        step = np.tensordot(grid.inverse_matrix[axis], u, axes=1) * (grid.spacing[axis] * (-1 if flip else 1))
        shift.append(float(np.median(step)))
        rest = (np.arange(u.shape[1 + along]) + 0.5) * grid.spacing[axis]
        points.append((rest if along else rest[:, None]) + step)
    far = math.hypot(*shift) > 0.1 * min(plane.width_mm, plane.height_mm)
    lattice = np.stack([p - s if far else p for p, s in zip(points, shift, strict=True)], axis=-1)
    every_mm = max(plane.width_mm, plane.height_mm) / LINES
    rows = _every(lattice.shape[0], every_mm / grid.spacing[plane.down])
    columns = _every(lattice.shape[1], every_mm / grid.spacing[plane.across])
    lines = [*lattice[rows], *lattice[:, columns].swapaxes(0, 1)]
    panel.add_collection(LineCollection(lines, colors=LINE, linewidths=0.6, alpha=0.9), autolim=False)
    if far:
        _write(panel, 0.02, 0.98, f"shift {math.hypot(*shift):.0f} mm not drawn", LINE)


def _folds(panel: Axes, plane: Plane, folded: NDArray[np.bool_]) -> None:
    """Folded voxels in a colour nothing else has, each large enough to be seen."""
    if not folded.any():
        return
    rows, columns = np.nonzero(folded)
    x, y = (columns + 0.5) * plane.width_mm / folded.shape[1], (rows + 0.5) * plane.height_mm / folded.shape[0]
    panel.plot(x, y, linestyle="none", marker="s", markersize=2.5, markeredgewidth=0, color=FOLD)
    _write(panel, 0.02, 0.98, f"{len(rows)} folded", FOLD)


def _colourbar(figure: Figure, box: tuple[float, float, float, float], colours: Colormap, norm: Normalize, label: str, ticks: list[float]) -> None:
    """A horizontal scale under its columns."""
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=figure.add_axes(box), orientation="horizontal", ticks=ticks, format="%g")
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=INK, labelsize=9, length=2, pad=2)
    bar.outline.set_visible(False)
    bar.set_label(label, color=INK, fontsize=9, labelpad=1)


def _scaled(data: Slice, limits: tuple[float, float]) -> Slice:
    """Grey window to [0, 1]."""
    return ((data - limits[0]) / (limits[1] - limits[0])).clip(0, 1)


def _sparse(data: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """Every so-manieth voxel, a view."""
    return data[tuple(slice(step // 2, None, step) for step in steps)]


def _every(count: int, step: float) -> NDArray[np.int64]:
    """Indices about `step` apart, both ends included."""
    return np.unique(np.linspace(0, count - 1, max(2, round(count / max(step, 1.0)) + 1)).round().astype(np.int64))


def _world_axes(grid: Grid) -> list[int]:
    """For each index axis the world axis it follows, each once: the assignment with the largest cosines."""
    r = np.abs(grid.rotation)
    return list(max(itertools.permutations(range(grid.ndim)), key=lambda order: sum(float(r[w, k]) for k, w in enumerate(order))))


def _letters(across: int, down: int) -> tuple[str, str, str, str]:
    """Left, right, top and bottom of a picture in the radiological display convention."""
    ends = ("RL", "AP", "SI")
    return ends[across][0], ends[across][1], ends[down][0], ends[down][1]


def _axis_names(across: int, down: int) -> tuple[str, str, str, str]:
    """The same for an image that tells nothing about the patient: where each coordinate grows."""
    return "", f"+{'xyz'[across]}", "+z" if down == len("xy") else "", "+y" if down == 1 else ""
