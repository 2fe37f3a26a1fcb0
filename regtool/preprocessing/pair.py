"""The one path from a pair of images, and what is known of them, to what networks and similarities see. Training and registration share it.

An image goes through `scaled_image` (inpainted where its mask hides something; intensities), `antialiased` for a grid and `image_on_grid`; masks,
labels and landmarks go through the functions named after them. `pair_view` says what of an aligned pair is compared. Nothing is kept in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regtool.config.schema import Preprocess
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.inversion import invert_points
from regtool.geometry.sampling import warp, warp_labels
from regtool.geometry.transforms import Transform
from regtool.preprocessing.foreground import RelativeBox, box_slices, field_of_view_mask, field_of_view_overlap
from regtool.preprocessing.intensity import normalize_intensity
from regtool.preprocessing.masks import apply_mask, inpaint_outside_mask
from regtool.preprocessing.resolution import antialiased, coarser_resolution, needs_no_resampling


@dataclass(frozen=True, eq=False, kw_only=True)
class PairView:
    """What of a pair is compared.

    compared: the part of the fixed grid; blur_mm: voxels of the moving image along the axes of the fixed one, where they are wider, else 0, and the
    fixed image is seen as blurred as that; () for as it is; field_of_view: a mask of all that the moving image covers, where that leaves out much of
    what the fixed one shows; coverage: how much of it is covered, 0 to 1.
    """

    compared: RelativeBox
    blur_mm: tuple[float, ...] = ()
    field_of_view: Image | None = None
    coverage: float = 1.0

    @classmethod
    def whole(cls, ndim: int) -> PairView:
        """All of both images, as they are."""
        return cls(compared=((0.0, 1.0),) * ndim)

    def slices(self, grid: Grid) -> list[slice]:
        """The voxels of `grid`, which covers the fixed image, that are compared; one slice for each axis of the array."""
        return box_slices(grid, self.compared)

    def cut(self, grid: Grid) -> Grid:
        """The part of `grid` that is compared."""
        return grid.cut(self.slices(grid))


def pair_view(fixed: Image, moving: Grid, transform: Transform, parameters: Preprocess, min_coverage: float) -> PairView:
    """What is compared of images that `transform` aligns. The fixed one is seen as blurred as the moving one: blur is no motion.

    Where the moving image covers less than `min_coverage` of what the fixed one shows, only the block that it covers is compared: a field that mends
    the border of a view tears what is there.
    """
    if needs_no_resampling(moving, transform, fixed.grid):
        return PairView.whole(fixed.grid.ndim)
    blur = coarser_resolution(fixed.grid, moving, transform, parameters.coarser_ratio)
    coverage, box = field_of_view_overlap(fixed, moving, transform, parameters)
    blur = blur if any(blur) else ()
    if 0 < coverage < min_coverage:
        return PairView(compared=box, blur_mm=blur, field_of_view=field_of_view_mask(moving), coverage=coverage)
    return PairView(compared=((0.0, 1.0),) * fixed.grid.ndim, blur_mm=blur, coverage=coverage)


def scaled_image(image: Image, mask: Image | None, parameters: Preprocess) -> Image:
    """On its own grid: inpainted where the mask, on any grid, hides something, and with its intensities scaled."""
    return normalize_intensity(image if mask is None else apply_mask(image, mask, parameters), parameters)


def prepare(image: Image, grid: Grid, parameters: Preprocess, mask: Image | None = None, blur_mm: Sequence[float] = ()) -> Image:
    """Scaled, and smoothed for a grid that is coarser; what `image_on_grid` may then warp again and again. blur_mm: as in `PairView`."""
    return antialiased(scaled_image(image, mask, parameters), grid, blur_mm)


def image_on_grid(prepared: Image, transform: Transform, grid: Grid, field_of_view: Image | None = None) -> torch.Tensor:
    """(1, C, *grid.shape): a prepared image through `transform` onto the grid; beyond `field_of_view`, where one is given, it goes on smoothly."""
    seen = prepared if needs_no_resampling(prepared.grid, transform, grid) else warp(prepared, transform, grid)
    return seen.data[None] if field_of_view is None else inpaint_outside_mask(seen, warp(field_of_view, transform, grid, 0.0)).data[None]


def mask_weights(mask: Image, transform: Transform, grid: Grid) -> torch.Tensor:
    """(1, 1, *grid.shape) in [0, 1]: a mask of ones and zeros through `transform`, linear; 0 beyond it."""
    return warp(mask, transform, grid, 0.0).data[None]


def labels_on_grid(labels: Labels, transform: Transform, grid: Grid) -> torch.Tensor:
    """(1, C, *grid.shape) whole numbers: a label map through `transform`, the heaviest label at each voxel, 0 beyond it."""
    return labels.data[None] if needs_no_resampling(labels.grid, transform, grid) else warp_labels(labels, transform, grid).data[None]


def points_on_grid(points: Array, transform: Transform, grid: Grid) -> torch.Tensor:
    """(P, D) float32 voxel indices of (P, D) points in mm: images are seen through `transform`, so points go through its inverse."""
    return torch.as_tensor(grid.to_index(invert_points(transform, points)[0]), dtype=torch.float32)
