"""The Jacobian determinant of a transform as a picture: three planes through where space changes most, or one in 2-D."""

from __future__ import annotations

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.report.figures import FOOT, GAP, HEAD, INK, LEFT, PAPER, VOLUME, WIDTH, _colourbar, _encoded, _folds, _show, planes

HEIGHT = 1.6  # of a panel at most, in widths


def jacobian_png(determinant: torch.Tensor, corners: torch.Tensor, grid: Grid, mask: torch.Tensor | None = None) -> bytes:
    """PNG, side by side a panel a plane, hung as the pictures of the quality page; volume ratios from 0.5 to 2, folded voxels in pink.

    determinant, corners (`corner_determinant`): (*shape); the cuts go through the middle of the mask, without one through the middle of what changes.
    """
    change = mask.float() if mask is not None else determinant.clamp(min=1e-3).log().abs()
    hung = planes(Image(change[None], grid))
    heights = [WIDTH * min(plane.height_mm / plane.width_mm, HEIGHT) for plane in hung]
    total = (2 * LEFT + len(hung) * (WIDTH + GAP) - GAP, HEAD + max(heights) + FOOT)
    figure = Figure(figsize=total, facecolor=PAPER)
    FigureCanvasAgg(figure)
    for k, (plane, height) in enumerate(zip(hung, heights, strict=True)):
        left, bottom = LEFT + k * (WIDTH + GAP), FOOT + (max(heights) - height) / 2
        panel = figure.add_axes((left / total[0], bottom / total[1], WIDTH / total[0], height / total[1]))
        _show(panel, plane, plane.slice(determinant), VOLUME, LogNorm(0.5, 2, clip=True))
        _folds(panel, plane, plane.slice(corners) <= 0)
        figure.text((left + WIDTH / 2) / total[0], 1 - HEAD / 2 / total[1], plane.name, color=INK, fontsize=13, ha="center", va="center")
    bar = (LEFT / total[0], 0.4 / total[1], 1 - 2 * LEFT / total[0], 0.1 / total[1])
    _colourbar(figure, bar, VOLUME, LogNorm(0.5, 2), "volume ratio (Jacobian determinant); pink: folding", [0.5, 0.7, 1, 1.4, 2])
    return _encoded(figure)
