"""A pair in files or in memory: both images, and what is known of them besides, checked against each other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from regtool.errors import GeometryError, InputError, UsageError
from regtool.geometry.images import Annotations, Image, Labels, Landmarks
from regtool.geometry.sampling import resample
from regtool.io.images import Source, read_image, read_labels
from regtool.io.points import read_points

log = logging.getLogger("regtool")


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """Where a pair comes from, paths or what is in memory already. fix_header: repair directions and spacings that cannot be."""

    fixed: Source | Image
    moving: Source | Image
    fixed_mask: Source | None = None
    moving_mask: Source | None = None
    fixed_labels: Source | None = None
    moving_labels: Source | None = None
    fixed_landmarks: Path | Landmarks | None = None
    moving_landmarks: Path | Landmarks | None = None
    fix_header: bool = False


def read_pair(files: PairFiles) -> tuple[Image, Image, Annotations]:
    """Both images, and masks, labels and landmarks where they are given. UsageError, InputError and GeometryError for what does not fit."""
    fixed, moving = _read_images(files)
    annotations = Annotations(
        fixed_mask=_mask(files.fixed_mask, "fixed", fixed, files.fix_header),
        moving_mask=_mask(files.moving_mask, "moving", moving, files.fix_header),
        labels=_labels(files, fixed, moving),
        landmarks=_landmarks(files, fixed, moving),
    )
    return fixed, moving, annotations


def _read_images(files: PairFiles) -> tuple[Image, Image]:
    sources = ("fixed image", files.fixed), ("moving image", files.moving)
    fixed, moving = (x if isinstance(x, Image) else read_image(x, files.fix_header, name) for name, x in sources)
    if fixed.time is not None:
        log.warning("the fixed image is a time series; its mean over time is used")
        fixed = Image(fixed.data.mean(dim=0, keepdim=True), fixed.grid)
    return fixed, moving


def named(source: object) -> str:
    """What an error or a report calls an input: its path, or `in memory`."""
    return str(source) if isinstance(source, Path) else "in memory"


def _mask(source: Source | None, name: str, image: Image, fix_header: bool) -> Image | None:
    """1 where the file is above zero. InputError for an empty mask, one of another dimension, or one that lies elsewhere than its image."""
    if source is None:
        return None
    read, path = read_image(source, fix_header, f"{name} mask"), named(source)
    mask = Image((read.data.mean(dim=0, keepdim=True) > 0).float(), read.grid)
    if mask.grid.ndim != image.grid.ndim:
        raise InputError(f"the {name} mask {path} is {mask.grid.ndim}-D, its image {image.grid.ndim}-D", tip=f"check --{name}-mask")
    if not bool(mask.data.any()):
        raise InputError(f"the {name} mask {path} is empty: no voxel is above zero", tip="leave it out to use the whole image")
    if not mask.grid.same_as(image.grid, tolerance=0.1):
        if not bool(resample(mask, image.grid, 0.0).data.any()):
            raise InputError(f"the {name} mask {path} marks nothing in its image: they lie apart in space", tip="`regtool doctor` shows geometries")
        log.warning("the %s mask lies on another grid than its image (size %s, %s); it is resampled", name, mask.grid.size, image.grid.size)
    return mask


def _labels(files: PairFiles, fixed: Image, moving: Image) -> tuple[Labels, Labels] | None:
    """UsageError where labels are given for one image only, InputError where they do not lie on their image."""
    if not _both(files.fixed_labels, files.moving_labels, "labels"):
        return None
    assert files.fixed_labels is not None and files.moving_labels is not None
    found = read_labels(files.fixed_labels, files.fix_header), read_labels(files.moving_labels, files.fix_header)
    paths = named(files.fixed_labels), named(files.moving_labels)
    for name, path, labels, image in zip(("fixed", "moving"), paths, found, (fixed, moving), strict=True):
        if labels.grid.ndim != image.grid.ndim:
            raise InputError(f"the {name} labels are {labels.grid.ndim}-D, their image is {image.grid.ndim}-D", tip=f"check --{name}-labels {path}")
        if not labels.grid.overlap_percent(image.grid):
            raise InputError(f"the {name} labels {path} lie apart from their image in space", tip="`regtool doctor` shows geometries")
        if not labels.grid.same_as(image.grid, tolerance=0.1):
            log.warning("the %s labels lie on another grid than their image (size %s against %s)", name, labels.grid.size, image.grid.size)
    return found


def _landmarks(files: PairFiles, fixed: Image, moving: Image) -> tuple[Landmarks, Landmarks] | None:
    if not _both(files.fixed_landmarks, files.moving_landmarks, "landmarks"):
        return None
    assert files.fixed_landmarks is not None and files.moving_landmarks is not None
    found = _points(files.fixed_landmarks, fixed.grid.ndim), _points(files.moving_landmarks, moving.grid.ndim)
    if len(found[0].points) != len(found[1].points):
        raise InputError(
            f"{len(found[0].points)} fixed landmarks but {len(found[1].points)} moving ones", tip="both files need the same points in the same order"
        )
    for name, landmarks, image in (("fixed", found[0], fixed), ("moving", found[1], moving)):
        beyond = int((~image.grid.contains(landmarks.points)).sum())
        if beyond == len(landmarks.points):
            raise InputError(
                f"all {beyond} {name} landmarks lie outside their image",
                tip="points are mm, LPS: those of RAS files have x and y negated, voxel indices are no millimetres",
            )
        if beyond:
            log.warning("%d of %d %s landmarks lie outside their image; are they in mm LPS?", beyond, len(landmarks.points), name)
    return found


def _points(source: Path | Landmarks, ndim: int) -> Landmarks:
    if isinstance(source, Path):
        return read_points(source, ndim=ndim)
    if source.points.shape[1] != ndim:
        raise GeometryError(f"landmarks of {source.points.shape[1]} coordinates do not lie in an image of {ndim} dimensions")
    return source


def _both(fixed: object, moving: object, what: str) -> bool:
    if (fixed is None) != (moving is None):
        raise UsageError(f"{what} are given for one image only", tip=f"--fixed-{what} and --moving-{what} go together")
    return fixed is not None
