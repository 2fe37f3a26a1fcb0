"""From a list of pairs to batches: images are read when they are asked for, and kept as long as they fit into a given memory."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from regtool.config.schema import Parameters
from regtool.errors import InputError
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.sampling import pad_end
from regtool.geometry.transforms import Affine, Transform
from regtool.io.images import read_image, read_labels
from regtool.io.pairs import Entry, Pair
from regtool.io.points import read_points
from regtool.preprocessing.batch import Batch, Points
from regtool.preprocessing.intensity import one_channel
from regtool.preprocessing.pair import PairView, image_on_grid, labels_on_grid, mask_weights, pair_view, points_on_grid, scaled_image
from regtool.preprocessing.resolution import antialiased, needs_no_resampling, network_grid

T = TypeVar("T", Image, Labels, torch.Tensor)
Align = Callable[[Image, Image, Image | None, Image | None], Affine]  # (fixed, moving, their masks) -> fixed to moving in mm
SAME_GRID = 0.1  # voxels by which a label map may lie beside its image without being resampled
SAME_PLACE = 1.0  # voxels by which one of the same size may: beyond, its header is another one's
VOLUME = 1 << 16  # labels of one volume of a 4-D label map
OVERLAP_PERCENT = 50.0  # of the smaller one's block of space that an image and its label map must share


class Dataset:
    """Pairs as the network sees them, in training as in registration: on the grid of the fixed image, the moving image through an alignment.

    Safe to be used by a few threads.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        parameters: Parameters,
        cache_bytes: int,
        align: Align | None = None,
        *,
        images_only: bool = False,
        fix_header: bool = False,
    ) -> None:
        """cache_bytes: of images and labels to be kept; align: None leaves the images as their headers say; images_only: labels and landmarks are not
        read; fix_header: as in read_image.
        """
        self.pairs, self.parameters, self.align = pairs, parameters, align
        self.images_only, self.fix_header = images_only, fix_header
        self._cache = _Cache(cache_bytes)
        self._grids: dict[Path, Grid] = {}
        self._aligned: dict[int, tuple[Affine, PairView]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def ndim(self) -> int:
        """2 or 3, of the first image."""
        return self._grid(self.pairs[0].fixed).ndim

    def sample(self, index: int) -> Batch:
        """One pair, N = 1, on the CPU; not to be changed in place. Labels and landmarks where both images have them.

        A 4-D label map holds structures that may overlap. Raises InputError, naming the file, for what cannot be read, a time series, another
        dimension than that of the first image, labels or a mask that lie elsewhere than their image, and for unequal numbers of landmarks.
        """
        pair = self.pairs[index]
        entries = (pair.fixed, pair.moving)
        for entry in entries:
            if self._grid(entry).ndim != self.ndim:
                raise InputError(f"{entry.image} is {self._grid(entry).ndim}-D, but {self.pairs[0].fixed.image} {self.ndim}-D", tip="list them apart")
        affine, view = self._alignment(index, pair)
        grid = view.cut(network_grid(self._grid(pair.fixed), self.parameters.grid))
        sides = list(zip(entries, (Affine.identity(grid.ndim), affine), strict=True))
        images = [self._network_image(*sides[0], grid, view.blur_mm), self._network_image(*sides[1], grid, view=view.field_of_view)]
        masks = [self._network_mask(*sides[0], grid), self._network_mask(*sides[1], grid, view.field_of_view)]
        labels: list[torch.Tensor | None] = [None, None]
        points: list[Points] = [(None,), (None,)]
        if not self.images_only and all(entry.labels for entry in entries):
            labels = [self._network_labels(entry, affine, grid).long() for entry, affine in sides]
        if not self.images_only and all(entry.landmarks for entry in entries):
            points = [(self._network_points(entry, affine, grid),) for entry, affine in sides]
            counts = [len(p[0]) for p in points if p[0] is not None]
            if counts[0] != counts[1]:
                raise InputError(
                    f"{pair.fixed.landmarks} holds {counts[0]} landmarks, {pair.moving.landmarks} {counts[1]}",
                    tip="both files need the same points in the same order",
                )
        return Batch(
            images[0],
            images[1],
            fixed_mask=masks[0],
            moving_mask=masks[1],
            fixed_labels=labels[0],
            moving_labels=labels[1],
            fixed_points=points[0],
            moving_points=points[1],
        )

    def _alignment(self, index: int, pair: Pair) -> tuple[Affine, PairView]:
        """(fixed to moving in mm, what of the pair is then compared), from the images as they are read."""
        if index not in self._aligned:
            affine, fixed, moving = Affine.identity(self.ndim), self._grid(pair.fixed), self._grid(pair.moving)
            if self.align is not None:
                images = self._grey(pair.fixed), self._grey(pair.moving)
                affine = self.align(*images, self._mask(pair.fixed), self._mask(pair.moving))
            transform, view = Transform((affine,)), PairView.whole(self.ndim)
            if not needs_no_resampling(moving, transform, fixed):
                view = pair_view(self._grey(pair.fixed), moving, transform, self.parameters.preprocess, self.parameters.align.min_coverage)
            self._aligned[index] = affine, view
        return self._aligned[index]

    def _grid(self, entry: Entry) -> Grid:
        if entry.image not in self._grids:
            (self._scaled if self.align is None and entry.mask is None else self._grey)(entry)
        return self._grids[entry.image]

    def _read(self, entry: Entry) -> Image:
        """One channel, as read."""
        image = read_image(entry.image, self.fix_header)
        if image.time is not None:
            raise InputError(f"{entry.image} is a time series of {len(image.data)} images", tip="save single time points and list them")
        self._grids[entry.image] = image.grid
        return one_channel(image, self.parameters.preprocess)

    def _grey(self, entry: Entry) -> Image:
        """The same, kept: what pairs are aligned by."""
        return self._cache.get(("grey", entry.image), lambda: self._read(entry))

    def _scaled(self, entry: Entry) -> Image:
        """On its own grid."""

        def make() -> Image:
            image = self._cache.kept(("grey", entry.image)) or self._read(entry)
            return scaled_image(image, self._mask(entry), self.parameters.preprocess)

        return self._cache.get(("image", entry.image, entry.mask), make)

    def _mask(self, entry: Entry) -> Image | None:
        """Ones where the file is above zero, else zeros."""
        path = entry.mask
        if path is None:
            return None

        def read() -> Image:
            mask = read_image(path, self.fix_header)
            return Image((mask.data.mean(dim=0, keepdim=True) > 0).float(), _placed(path, mask.grid, self._grids[entry.image], entry.image))

        return self._cache.get(("mask", path, entry.image), read)

    def _network_image(self, entry: Entry, affine: Affine, grid: Grid, blur_mm: tuple[float, ...] = (), view: Image | None = None) -> torch.Tensor:
        """(1, 1, *grid.shape)."""
        transform = Transform((affine,))

        def make() -> torch.Tensor:
            return image_on_grid(antialiased(self._scaled(entry), grid, blur_mm), transform, grid, view)

        if not blur_mm and view is None and needs_no_resampling(self._grid(entry), transform, grid):
            return make()  # is the scaled image itself, which is kept already
        return self._cache.get(("image", entry.image, entry.mask, grid, blur_mm, view is not None, *_numbers(affine)), make)

    def _network_mask(self, entry: Entry, affine: Affine, grid: Grid, view: Image | None = None) -> torch.Tensor | None:
        """(1, 1, *grid.shape) in [0, 1]; where there is no mask, the `view` if there is one."""
        if entry.mask is None and view is None:
            return None

        def make() -> torch.Tensor:
            mask = self._mask(entry) or view
            assert mask is not None
            return mask_weights(mask, Transform((affine,)), grid)

        return self._cache.get(("mask", entry.mask, entry.image, grid, *_numbers(affine)), make)

    def _network_labels(self, entry: Entry, affine: Affine, grid: Grid) -> torch.Tensor:
        """(1, 1, *grid.shape) in the smallest type that holds them."""
        path, transform = entry.labels, Transform((affine,))
        assert path is not None

        def read() -> Labels:
            labels = read_labels(path, self.fix_header)
            return Labels(_small(_one_map(labels.data)), _placed(path, labels.grid, self._grid(entry), entry.image))

        def make() -> torch.Tensor:
            return _small(labels_on_grid(self._cache.get(("labels", path, entry.image), read), transform, grid))

        return self._cache.get(("labels", path, entry.image, grid, *_numbers(affine)), make)

    def _network_points(self, entry: Entry, affine: Affine, grid: Grid) -> torch.Tensor:
        """(P, D) voxel indices."""
        path = entry.landmarks
        assert path is not None

        def read() -> torch.Tensor:
            return torch.from_numpy(read_points(path, grid=self._grid(entry), ndim=grid.ndim).points)

        return points_on_grid(self._cache.get(("points", path, entry.image), read).numpy(), Transform((affine,)), grid)


class Order:
    """An endless stream of 0..n-1, every epoch a permutation of its own. What is drawn when depends on the seed alone: resuming needs no state."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def index(self, draw: int) -> int:
        """The `draw`-th of the stream, from 0."""
        epoch, place = divmod(draw, self.n)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n))
        return int(self._epoch[1][place])


def collate(batches: Sequence[Batch]) -> Batch:
    """All pairs in one batch. Where sizes differ they are padded at the far ends, and masks keep the padding from counting.

    Images continue their border there, labels are 0. A pair without a mask counts everywhere; one without labels gets maps of zeros (which
    `soft_dice` counts as perfect), so that others may have some.
    """
    shape = tuple(max(sizes) for sizes in zip(*(b.fixed.shape[2:] for b in batches), strict=True))
    padded = any(tuple(b.fixed.shape[2:]) != shape for b in batches)

    def masks(of: Callable[[Batch], torch.Tensor | None]) -> torch.Tensor | None:
        if not padded and all(of(b) is None for b in batches):
            return None
        found = ((of(b), b.fixed) for b in batches)
        return torch.cat([pad_end(image.new_ones(len(image), 1, *image.shape[2:]) if mask is None else mask, shape, 0) for mask, image in found])

    def labels(of: Callable[[Batch], torch.Tensor | None]) -> torch.Tensor | None:
        if all(of(b) is None for b in batches):
            return None
        found = ((of(b), b.fixed) for b in batches)
        zeros = (image.new_zeros(len(image), 1, *image.shape[2:], dtype=torch.int64) if own is None else own for own, image in found)
        return torch.cat([pad_end(own, shape, 0) for own in zeros])

    def points(of: Callable[[Batch], Points]) -> Points:
        return tuple(p for b in batches for p in of(b) or (None,) * len(b.fixed))

    def known() -> torch.Tensor | None:
        if all(b.displacement is None for b in batches):
            return None
        nowhere = torch.full((), math.nan, device=batches[0].fixed.device)
        each = (nowhere.expand(len(b.fixed), len(shape), *b.fixed.shape[2:]) if b.displacement is None else b.displacement for b in batches)
        return torch.cat([pad_end(u, shape, math.nan) for u in each])

    return Batch(
        torch.cat([pad_end(b.fixed, shape) for b in batches]),
        torch.cat([pad_end(b.moving, shape) for b in batches]),
        fixed_mask=masks(lambda b: b.fixed_mask),
        moving_mask=masks(lambda b: b.moving_mask),
        fixed_labels=labels(lambda b: b.fixed_labels),
        moving_labels=labels(lambda b: b.moving_labels),
        fixed_points=points(lambda b: b.fixed_points),
        moving_points=points(lambda b: b.moving_points),
        displacement=known(),
    )


class _Cache:
    """What was made, by key; beyond `limit` bytes what was not used for longest goes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made where it is not kept (by two threads at once perhaps twice)."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        made = make()
        size = made.data.nbytes
        with self._lock:
            if key not in self._kept and size <= self.limit:
                self._kept[key] = (made, size)
                self.size += size
                while self.size > self.limit:
                    self.size -= self._kept.popitem(last=False)[1][1]
        return made

    def kept(self, key: Hashable) -> Any:
        """The value of `key`, None where it is not kept."""
        with self._lock:
            return self._kept[key][0] if key in self._kept else None


def _numbers(affine: Affine) -> tuple[bytes, bytes]:
    return affine.matrix.tobytes(), affine.translation.tobytes()


def _one_map(labels: torch.Tensor) -> torch.Tensor:
    """(1, *shape) of (K, *shape), the structures of a 4-D map, which may overlap: later ones lie on top, and label v of the k-th is v + k VOLUME."""
    out = labels[:1]
    for k, volume in enumerate(labels[1:], start=1):
        out = torch.where(volume != 0, volume + k * VOLUME, out)
    return out


def _placed(path: Path, grid: Grid, image: Grid, image_path: Path) -> Grid:
    """The grid of a label map or mask, its image's own where the two agree. InputError where they cannot belong together."""
    if grid.ndim != image.ndim:
        raise InputError(f"{path} is {grid.ndim}-D, its image {image_path} {image.ndim}-D")
    if grid.same_as(image, SAME_GRID):
        return image
    if grid.size == image.size:
        elsewhere = not grid.same_as(image, SAME_PLACE)
    else:
        elsewhere = max(grid.overlap_percent(image), image.overlap_percent(grid)) < OVERLAP_PERCENT
    if elsewhere:
        raise InputError(
            f"{path} does not lie on its image {image_path}: origin {grid.origin}, not {image.origin}, spacing {grid.spacing}, not {image.spacing}",
            tip="write it with the image's spacing, origin and direction",
        )
    return grid


def _small(labels: torch.Tensor) -> torch.Tensor:
    """Label maps are kept in memory, and int64 takes twice what the image does."""
    low, high = (int(v) for v in labels.aminmax())
    kind = next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
    return labels.to(kind)
