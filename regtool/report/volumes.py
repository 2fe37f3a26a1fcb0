"""The images of one registration made small enough to travel inside a page: 8-bit volumes as sheets of slices, coarsened where they are large.

Grey values are JPEG, which every browser decodes (from a file as well as from a server); labels and folds are PNG, which loses nothing.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.sampling import resize_voxels, warp_labels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.report.content import Frame, LandmarkErrors, PageContent
from regtool.report.figures import planes, window

Bytes = NDArray[np.uint8]

STEPS = ((2_000_000, 88), (2_000_000, 70), (1_000_000, 70), (500_000, 60), (200_000, 50))  # voxels of an only volume, JPEG quality
LIMIT = 2_500_000  # characters of all of them together
FRAMES = 6  # time points shown at most
LATTICE = 40, 24_000  # points of the deformed grid: along an axis, in all
OCTAVES = 2.0  # of the Jacobian determinant on either side of 1
BLOCK = 8  # of JPEG: slices that fill whole blocks do not bleed into each other
MOST_LABELS = 255
COUNTED = 65_536  # labels below this are counted without sorting the voxels


def viewer(content: PageContent) -> dict[str, Any]:
    """What the viewer of the page needs, ready for JSON; the volumes are data URLs. x comes first in every list of numbers."""
    frames = chosen(content.frames)
    out: dict[str, Any] = {}
    for voxels, quality in STEPS:
        grid = display_grid(content.fixed.grid, 4 * voxels // (1 + 3 * len(frames)) if frames else voxels)
        out = _volumes(content, frames, grid, quality)
        if sum(len(x) for part in (out, *out["frames"]) for x in part.values() if isinstance(x, str)) <= LIMIT:
            break
    native = content.fixed.grid
    out["size"], out["spacing"], out["native"] = grid.size, grid.spacing, native.size
    out["matrix"], out["origin"] = grid.matrix.tolist(), grid.origin
    hung = planes(content.fixed)
    out["planes"] = [
        {
            "name": p.name, "across": p.across, "down": p.down, "flip": [p.flip_across, p.flip_down], "letters": p.letters,
            "normal": next(iter(p.cut), None), "width": p.width_mm, "height": p.height_mm,
        }
        for p in hung
    ]  # fmt: skip
    middle = {axis: index for p in hung for axis, index in p.cut.items()}
    out["cursor"] = [int((middle.get(axis, 0) + 0.5) * n / m) for axis, (n, m) in enumerate(zip(grid.size, native.size, strict=True))]
    if content.landmarks is not None:
        out["landmarks"] = _vectors(content.landmarks, grid)
    return out


def chosen(frames: tuple[Frame, ...]) -> list[Frame]:
    """At most `FRAMES` of them, spread over all, the first and the last included."""
    places = np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int)
    return [frames[k] for k in places]


def display_grid(grid: Grid, voxels: int = STEPS[0][0], side: int | None = None) -> Grid:
    """The same block of space with at most `voxels` voxels, and `side` along an axis: the finest axes are coarsened first."""
    size = [min(n, side or n) for n in grid.size]
    step = min(grid.spacing)
    while math.prod(size) > voxels:
        step *= 1.02
        size = [max(1, min(n, int(extent / step))) for n, extent in zip(size, grid.extent, strict=True)]
    return grid.resized(size)


def shrunk(data: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(C, *any) onto (C, *shape), at most as large: the mean of evenly spread voxels, none left out, so of all of them for a whole ratio."""
    out = data
    for axis, count in enumerate(shape, 1):
        ratio = out.shape[axis] / count
        taps = math.ceil(ratio)
        total = torch.zeros(())
        for tap in range(taps):
            total = total + out.index_select(axis, _places(count, ratio, (tap + 0.5) / taps))
        out = total / taps if taps > 1 else total
    return out


def sheet(volume: Bytes) -> Bytes:
    """(..., height, width) as one picture of tiles, row by row, each grown to whole JPEG blocks."""
    slices = volume.reshape(-1, *volume.shape[-2:])
    height, width = (-(-n // BLOCK) * BLOCK for n in slices.shape[1:])
    columns = max(1, min(len(slices), round(math.sqrt(len(slices) * height / width))))
    rows = -(-len(slices) // columns)
    tiles = np.zeros((rows * columns, height, width), np.uint8)
    tiles[: len(slices)] = np.pad(slices, ((0, 0), (0, height - slices.shape[1]), (0, width - slices.shape[2])), mode="edge")
    return np.ascontiguousarray(tiles.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width))


def encoded(volume: Bytes, quality: int | None = None) -> str:
    """The sheet of a volume as a data URL: JPEG of that quality, or PNG."""
    buffer = io.BytesIO()
    picture = PIL.Image.fromarray(sheet(volume))
    if quality is None:
        picture.save(buffer, format="png", compress_level=6)
    else:
        picture.save(buffer, format="jpeg", quality=quality)
    return f"data:image/{'png' if quality is None else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _volumes(content: PageContent, frames: list[Frame], grid: Grid, quality: int) -> dict[str, Any]:
    """Every volume on `grid`, by name."""
    moving = [image for frame in frames for image in (frame.before, frame.warped) if image is not None]
    of_fixed = window(content.fixed)
    of_moving = window(*moving) if moving else of_fixed
    out: dict[str, Any] = {"fixed": encoded(_grey(content.fixed, grid, of_fixed), quality), "frames": []}
    for frame in frames:
        part: dict[str, Any] = {"name": frame.name, "before": encoded(_grey(frame.before, grid, of_moving), quality)}
        if frame.warped is not None:
            part["warped"] = encoded(_grey(frame.warped, grid, of_moving), quality)
        if frame.determinant is not None:
            part |= _determinant(frame.determinant, grid, quality)
        if frame.displacement is not None:
            part["field"] = _field(frame.displacement, LATTICE[1] // len(frames))
        out["frames"].append(part)
    if content.labels is not None:
        out |= _labels(content.labels, grid)
    return out


def _grey(image: Image, grid: Grid, limits: tuple[float, float]) -> Bytes:
    """(*shape) in the window as 0 to 255."""
    scaled = (shrunk(image.data[:1], grid.shape)[0] - limits[0]) * (255 / (limits[1] - limits[0]))
    return np.asarray(scaled.nan_to_num().clamp(0, 255).round().to(torch.uint8).cpu().numpy())


def _determinant(determinant: torch.Tensor, grid: Grid, quality: int) -> dict[str, str]:
    """Its logarithm (128: 1), and where it folds: a voxel that folds marks the whole voxel of the page."""
    octaves = shrunk(determinant[None].clamp(min=2.0**-OCTAVES, max=2.0**OCTAVES), grid.shape)[0].log2()
    out = {"jacobian": encoded(np.asarray((128 + octaves * (127 / OCTAVES)).round().to(torch.uint8).cpu().numpy()), quality)}
    folded = ~(determinant > 0)  # NaN folds
    if bool(folded.any()):
        marked = shrunk(folded[None], grid.shape)[0] > 0
        out["folds"] = encoded(np.asarray((marked.to(torch.uint8) * 255).cpu().numpy()))
    return out


def _field(field: DisplacementField, points: int) -> dict[str, Any]:
    """The displacement on a lattice over the fixed block of space, mm along the index axes, 16 bits; a large common shift is left out and named."""
    grid = display_grid(field.grid, points, LATTICE[0])
    u = np.tensordot(field.grid.rotation.T, resize_voxels(field.data[None].cpu(), grid.shape)[0].nan_to_num().numpy(), axes=1)
    shift = np.median(u.reshape(len(u), -1), axis=1)
    if np.linalg.norm(shift) <= 0.1 * min(field.grid.extent):
        shift = np.zeros(len(u))
    u = u - shift.reshape(-1, *[1] * field.grid.ndim)
    scale = float(np.abs(u).max()) / 32767 or 1.0
    numbers = (u / scale).round().astype("<i2")
    text = base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode("ascii")
    return {"size": grid.size, "scale": scale, "shift": float(np.linalg.norm(shift)), "data": text}


def _labels(labels: tuple[Labels, Labels, Labels], grid: Grid) -> dict[str, Any]:
    """Three label maps with the labels numbered from 1, and what each number stands for."""
    maps = [_nearest(one, grid) for one in labels]
    present = np.unique(np.concatenate([_present(data) for data in maps]))
    values = torch.as_tensor(present[present != 0][:MOST_LABELS])
    out: dict[str, Any] = {"names": [str(int(v)) for v in values]}
    for name, data in zip(("labels_fixed", "labels_before", "labels_warped"), maps, strict=True):
        place = torch.searchsorted(values, data).clamp(max=max(len(values) - 1, 0))
        known = values[place] == data if len(values) else torch.zeros_like(data, dtype=torch.bool)
        out[name] = encoded(np.asarray(torch.where(known, place + 1, 0).to(torch.uint8).numpy()))
    return out


def _nearest(labels: Labels, grid: Grid) -> torch.Tensor:
    """(*shape) the labels at the centres of the voxels of `grid`; picked without a resampling where both cover the same block of space."""
    if not labels.grid.resized(grid.size).same_as(grid):
        return warp_labels(replace(labels, data=labels.data[:1]), Transform.identity(grid.ndim), grid, vote=False).data[0]
    places = [_places(n, old / n, 0.5).numpy() for n, old in zip(grid.shape, labels.grid.shape, strict=True)]
    return torch.as_tensor(labels.data[0].numpy()[np.ix_(*places)])


def _present(labels: torch.Tensor) -> NDArray[np.int64]:
    """The labels that occur. Counting takes a tenth of the time of sorting."""
    if int(labels.min()) >= 0 and int(labels.max()) < COUNTED:
        return np.flatnonzero(torch.bincount(labels.flatten()).numpy())
    return np.unique(labels.numpy())


def _places(count: int, ratio: float, part: float) -> torch.Tensor:
    """For each of `count` new voxels the old one at a part of its width."""
    return ((torch.arange(count, dtype=torch.float64) + part) * ratio).long()


def _vectors(landmarks: LandmarkErrors, grid: Grid) -> list[dict[str, Any]]:
    """at: voxels of the page; before, after: mm along the index axes."""

    def numbers(rows: Array) -> list[list[float]]:
        return [[round(float(x), 3) for x in row] for row in np.nan_to_num(rows)]

    at = numbers(grid.to_index(landmarks.points))
    before, after = (numbers(x @ grid.rotation) for x in (landmarks.before, landmarks.after))
    return [{"at": a, "before": b, "after": c} for a, b, c in zip(at, before, after, strict=True)]
