"""What a network learns from, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from regtool.geometry.sampling import warp_voxels

if TYPE_CHECKING:
    from regtool.preprocessing.batch import Batch

ACROSS = 2  # pairs side by side
INCHES = 1.25  # of one tile
COLUMNS = ("fixed", "moving", "warped by the known u", "labels of fixed", "|u|, bright: its largest")


def pairs_png(pairs: Sequence[Batch], title: str) -> bytes:
    """Each pair, N = 1, all of one shape, with labels and a known displacement: fixed, moving and warped image, labels, how far it moves.

    Of 3-D pairs the slices through the middle. One picture of all: an axis for every tile would take seconds.
    """
    tiles = [_tiles(pair) for pair in pairs]
    high, wide = tiles[0][0].shape[:2]
    rows = -(-len(pairs) // ACROSS)
    sheet = np.ones((rows * (high + 2), ACROSS * len(COLUMNS) * (wide + 2), 3), dtype=np.float32)
    for k, row in enumerate(tiles):
        for column, tile in enumerate(row):
            y, x = k // ACROSS * (high + 2), (k % ACROSS * len(COLUMNS) + column) * (wide + 2)
            sheet[y : y + high, x : x + wide] = tile
    figure = Figure(figsize=(INCHES * ACROSS * len(COLUMNS), INCHES * rows * high / wide + 0.5))
    FigureCanvasAgg(figure)
    top = 1 - 0.5 / figure.get_figheight()
    axis = figure.add_axes((0, 0, 1, top))
    axis.imshow(sheet, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for column, name in enumerate(COLUMNS * ACROSS):
        figure.text((column + 0.5) / (len(COLUMNS) * ACROSS), top + 0.004, name, ha="center", va="bottom", fontsize=6)
    figure.suptitle(title, fontsize=8, y=0.99)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _tiles(pair: Batch) -> list[NDArray[np.float32]]:
    """(rows, columns, 3) each."""
    assert pair.displacement is not None and pair.fixed_labels is not None
    images = [_middle(x) for x in (pair.fixed, pair.moving, warp_voxels(pair.moving, pair.displacement, 0.0))]
    largest = max(float(image.max()) for image in images)
    length = _middle(pair.displacement.norm(dim=1, keepdim=True))
    return [
        *(np.repeat((image / largest)[..., None], 3, axis=2) for image in images),
        colormaps["tab20"](_middle(pair.fixed_labels) % 20)[..., :3],
        colormaps["magma"](length / max(float(length.max()), 1e-6))[..., :3],
    ]


def _middle(data: torch.Tensor) -> NDArray[np.float32]:
    """(rows, columns) of (1, 1, *shape)."""
    data = data[0, 0].cpu()
    for _ in data.shape[2:]:
        data = data[len(data) // 2]
    return data.numpy()
