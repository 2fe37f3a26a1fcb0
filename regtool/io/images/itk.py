"""Images between files, SimpleITK and regtool: what the formats share that ITK reads."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid, nearest_rotation, shear_degrees
from regtool.io.formats import image_suffixes, suffix_of
from regtool.io.images.record import FileFacts
from regtool.io.itk import itk_reason, permissive, quiet

log = logging.getLogger("regtool")

DAMAGED = "the file is damaged or not what its name says; copy or export it again"


def to_sitk(array: np.ndarray, grid: Grid, vector: bool = False) -> sitk.Image:
    """(*shape) or, for vectors, (*shape, C) as a SimpleITK image with the grid's geometry."""
    image = sitk.GetImageFromArray(array, isVector=vector)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def joined(array: np.ndarray, grid: Grid, time: tuple[float, float] | None = None) -> sitk.Image:
    """(C, *shape) as one SimpleITK image: 4-D where there is a time axis, (spacing, origin); a vector image where there are several channels."""
    if time is not None:
        return sitk.JoinSeries([to_sitk(np.ascontiguousarray(frame), grid) for frame in array], time[1], time[0])
    if array.shape[0] > 1:
        return to_sitk(np.ascontiguousarray(np.moveaxis(array, 0, -1)), grid, vector=True)
    return to_sitk(np.ascontiguousarray(array[0]), grid)


def unpacked(source: sitk.Image, path: Path, fix_header: bool) -> tuple[np.ndarray, Grid, tuple[float, float] | None, int | None]:
    """((C, *shape) array, or (1, *shape, components) where there are several; grid; time axis; number of components). path: for messages."""
    time: tuple[float, float] | None = None
    frames = [source]
    if source.GetDimension() > Grid.MAX_DIMENSION:
        if source.GetDimension() > Grid.MAX_DIMENSION + 1:
            raise InputError(f"{path} has {source.GetDimension()} axes", tip="regtool takes 2-D, 3-D and 4-D images")
        size = list(source.GetSize())
        if size[-1] > 1:
            time = (source.GetSpacing()[-1] or 1.0, source.GetOrigin()[-1])
        frames = [
            sitk.Extract(source, [*size[:-1], 0], [0] * len(size[:-1]) + [t], sitk.ExtractImageFilter.DIRECTIONCOLLAPSETOSUBMATRIX)
            for t in range(size[-1])
        ]
    grid = grid_of(frames[0], path, fix_header)
    several = source.GetNumberOfComponentsPerPixel()
    arrays = [sitk.GetArrayViewFromImage(f) for f in frames]
    if 1 in grid.size and sum(n > 1 for n in grid.size) == grid.ndim - 1 > 1:
        grid, axis = _flattened(grid)
        arrays = [np.squeeze(a, axis=axis) for a in arrays]
    array = np.stack(arrays) if len(arrays) > 1 else np.array(arrays[0])[None]
    return array, grid, time, several if several > 1 else None


def grid_of(image: sitk.Image, path: Path, fix_header: bool = False) -> Grid:
    """The geometry of a SimpleITK image; errors name the file."""
    spacing, direction = image.GetSpacing(), image.GetDirection()
    try:
        if fix_header:
            angle = shear_degrees(direction)
            if angle > 1e-3:
                log.warning("%s: directions are off a rotation by %.3g degrees; replaced by the nearest one", path, angle)
                direction = nearest_rotation(direction)
        return Grid(image.GetSize(), spacing, image.GetOrigin(), direction)
    except GeometryError as error:
        raise GeometryError(f"{path}: {error.what}", tip=error.tip) from error


def read_with_itk(path: Path, _fix_header: bool = False, tip: str | None = None) -> sitk.Image:
    """As SimpleITK reads the file. Raises as `refusal`."""
    try:
        with quiet():
            return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise refusal(path, error, tip) from error


def refusal(path: Path, error: RuntimeError, tip: str | None = None) -> InputError | GeometryError:
    """ITK's error as ours. tip: what may be wrong with the file, default that it is damaged or of no known format."""
    if "spacing" in str(error).lower():
        return GeometryError(f"{path}: voxel spacing is zero", tip="correct the spacing in the header; without it nothing is in mm")
    if tip is None:
        known = suffix_of(path) in image_suffixes()
        tip = DAMAGED if known else f"regtool reads {' '.join(image_suffixes())} and DICOM folders"
    return InputError(f"{path} cannot be read as an image: {itk_reason(error)}", tip=tip)


def check_spacing(path: Path, found: tuple[float, ...], fix_header: bool, repairable: bool = True) -> None:
    """GeometryError for spacings that ITK would silently replace (zero in NIfTI) or read as a flipped axis (negative)."""
    if all(s > 0 for s in found):
        return
    if not fix_header:
        raise GeometryError(
            f"{path}: voxel spacing must be above zero, the header has {', '.join(f'{s:g}' for s in found)}",
            tip="correct the header"
            + (", or accept ITK's reading with --fix-header: zero is 1 mm, a negative one flips its axis" if repairable else ""),
        )
    log.warning("%s: spacing %s is not above zero; zero is taken as 1 mm, a negative one flips its axis", path, found)


def write_with_itk(array: np.ndarray, grid: Grid, time: tuple[float, float] | None, path: Path) -> None:
    """By ITK's own writer of the suffix, compressed. OSError where it fails, or where the file does not hold what was written."""
    image = joined(array, grid, time)
    try:
        with quiet():
            sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)
            written = sitk.ReadImage(str(path))  # ITK does not notice when the last bytes do not fit on the disk
    except RuntimeError as error:
        raise OSError(0, itk_reason(error)) from error
    if not np.array_equal(sitk.GetArrayViewFromImage(written), sitk.GetArrayViewFromImage(image), equal_nan=array.dtype.kind == "f"):
        raise OSError(errno.ENOSPC, "not all of it could be written")


def itk_facts(path: Path) -> FileFacts:
    """What ITK finds in the header. InputError where it finds none."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with permissive():  # sheared axes do not matter here
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as an image: {itk_reason(error)}") from error
    return FileFacts(sitk.GetPixelIDValueAsString(reader.GetPixelID()), reader.GetNumberOfComponents(), reader.GetSize())


def _flattened(grid: Grid) -> tuple[Grid, int]:
    """A one-slice volume as a 2-D grid, and the array axis that goes. In-plane coordinates are the two world axes that the slice spans."""
    drop = grid.size.index(1)
    keep = [a for a in range(grid.ndim) if a != drop]
    world = [w for w in range(grid.ndim) if w != int(np.argmax(np.abs(grid.rotation[:, drop])))]
    block = grid.rotation[np.ix_(world, keep)]
    origin = np.array(grid.origin)[world]
    if shear_degrees(block.ravel().tolist()) > 0.1:  # an oblique slice: its own axes become x and y
        block, origin = np.eye(len(keep)), np.array(grid.origin) @ grid.rotation[:, keep]
    size, spacing = tuple(grid.size[a] for a in keep), tuple(grid.spacing[a] for a in keep)
    return Grid(size, spacing, tuple(origin.tolist()), nearest_rotation(block.ravel().tolist())), grid.ndim - 1 - drop
