"""Images, label maps and displacement fields on disk, in every format SimpleITK reads, a DICOM folder, and FreeSurfer's .mgz."""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError, InputError
from regtool.geometry.grid import Grid, nearest_rotation, shear_degrees
from regtool.geometry.images import LUMA, Image, Labels
from regtool.geometry.transforms import DisplacementField
from regtool.io import nifti
from regtool.io.dicom import read_series
from regtool.io.files import atomic, require_file
from regtool.io.intact import lost_numbers, safe_for_itk
from regtool.io.mgh import read_mgh

log = logging.getLogger("regtool")

SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".hdr", ".img", ".tif", ".tiff", ".png", ".jpg", ".gipl", ".mgz", ".dcm")
WRITABLE = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")  # the formats that keep geometry and any pixel type
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")  # whose fourth channel is no intensity but how much one sees through


def silence_itk() -> None:
    """ITK's own warnings no longer go to stderr, for the whole process: what matters is said by our log. Of a program's start, not of a library's."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def read_image(path: Path, fix_header: bool = False) -> Image:
    """An intensity image: float32, several components as channels, grey RGB(A) as one, one slice made 2-D, the fourth axis a time axis,
    NaN replaced by the minimum.

    path: a file, or a folder with a DICOM series. fix_header: repair directions that are no rotation, and spacings at or below zero.
    Raises InputError for what cannot be read, GeometryError for a header that cannot be used; each names the file.
    """
    source, fixed = _open(path, fix_header)
    array, grid, time, components = _unpacked(source, path, fix_header, fixed)
    if np.iscomplexobj(array):
        raise InputError(f"{path} holds complex numbers", tip="save its magnitude first")
    data, colour = (array.astype(np.float32), False) if components is None else _channels(array, components, path)
    finite = np.isfinite(data)
    if not finite.all():
        if not finite.any():
            raise InputError(f"{path} holds no finite number (all NaN)", tip="check how the image was made")
        log.warning("%s: %d voxels are NaN or infinite; they are taken as the image's minimum", path, int((~finite).sum()))
        data = np.where(finite, data, data[finite].min())
    return Image(torch.from_numpy(np.ascontiguousarray(data)), grid, time, colour)


def read_labels(path: Path, fix_header: bool = False) -> Labels:
    """A label map: whole numbers of any pixel type, none of them changed. Raises as read_image, and InputError for fractions."""
    source, fixed = _open(path, fix_header)
    array, grid, time, components = _unpacked(source, path, fix_header, fixed)
    if components is not None:
        array = array[..., 0] if (array == array[..., :1])[..., :3].all() else _no_labels(path, "it has several components (colours)")
    if np.iscomplexobj(array) or not np.array_equal(array, np.round(array.real)):
        _no_labels(path, "its values are not whole numbers")
    return Labels(torch.from_numpy(array.astype(np.int64)), grid, array.dtype.name, time)


def read_grid(path: Path, fix_header: bool = False) -> Grid:
    """The grid of an image or field. Raises as read_image."""
    source, fixed = _open(path, fix_header)
    return _unpacked(source, path, fix_header, fixed)[1]


def read_displacement(path: Path) -> DisplacementField:
    """A displacement field in mm LPS, as ITK, ANTs and regtool write it: a vector image with as many components as dimensions."""
    source, _ = _open(path, fix_header=False)
    ndim, components = source.GetDimension(), source.GetNumberOfComponentsPerPixel()
    if components != ndim:
        kind = "a scalar image" if components == 1 else f"an image of {components} components"
        raise InputError(
            f"{path} is no displacement field: it is {kind} of {ndim} dimensions, expected {ndim}-D vectors of mm",
            tip="a NIfTI field needs intent code 1007; `regtool transform convert --from learn2reg` reads voxel fields",
        )
    array = np.moveaxis(sitk.GetArrayViewFromImage(source), -1, 0).astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: the displacement field holds NaN or infinite vectors")
    return DisplacementField(torch.from_numpy(np.ascontiguousarray(array)), _grid(source, path, False))


def write_image(image: Image, path: Path) -> None:
    """float32, atomically; format from the suffix. 4-D where the image has a time axis, a vector image where it has channels."""
    _write(image.data.numpy(), image.grid, image.time, path)


def write_labels(labels: Labels, path: Path) -> None:
    """With the pixel type the map was read with, atomically."""
    _write(labels.data.numpy().astype(labels.dtype), labels.grid, labels.time, path)


def write_displacement(field: DisplacementField, path: Path) -> None:
    """float32 vectors in mm LPS (NIfTI: intent code 1007), atomically."""
    _write(field.data.numpy(), field.grid, None, path, vector=True)


def suffix_of(path: Path) -> str:
    """`.nii.gz` for `a.b.nii.gz`; else the last suffix, lower-case."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def check_writable(path: Path) -> None:
    """InputError where images cannot be written in the format of `path`."""
    if suffix_of(path) not in WRITABLE:
        raise InputError(f"cannot write images as {suffix_of(path) or 'a file without suffix'}: {path}", tip=f"use one of {' '.join(WRITABLE)}")


def to_sitk(array: np.ndarray, grid: Grid, vector: bool = False) -> sitk.Image:
    """(*shape) or, for vectors, (*shape, C) as a SimpleITK image with the grid's geometry."""
    image = sitk.GetImageFromArray(array, isVector=vector)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def from_sitk(image: sitk.Image, name: str = "image") -> Image:
    """A SimpleITK image in memory as an Image, by the rules of read_image."""
    array, grid, time, components = _unpacked(image, Path(name), False, False)
    data, colour = (array.astype(np.float32), False) if components is None else _channels(array, components, Path(name))
    return Image(torch.from_numpy(np.ascontiguousarray(data)), grid, time, colour)


def image_to_sitk(image: Image) -> sitk.Image:
    """In memory: scalar, vector where there are channels, 4-D where there is a time axis."""
    return _to_sitk(image.data.numpy(), image.grid, image.time, vector=False)


def displacement_to_sitk(field: DisplacementField) -> sitk.Image:
    """In memory: a float32 vector image, mm LPS."""
    return _to_sitk(field.data.numpy(), field.grid, None, vector=True)


def field_transform(displacement: sitk.Image) -> sitk.Transform:
    """The SimpleITK transform of a displacement image; the image itself stays."""
    return sitk.DisplacementFieldTransform(sitk.Cast(displacement, sitk.sitkVectorFloat64))


def _write(array: np.ndarray, grid: Grid, time: tuple[float, float] | None, path: Path, vector: bool = False) -> None:
    """(C, *shape) to a file."""
    check_writable(path)
    with atomic(path) as temporary:
        if suffix_of(path) in (".nii", ".nii.gz"):
            nifti.write(array, grid, time, temporary, vector or (time is None and array.shape[0] > 1))
            return
        image = _to_sitk(array, grid, time, vector)
        try:
            with nifti.quiet():
                sitk.WriteImage(image, str(temporary), useCompression=True, compressionLevel=1)
                written = sitk.ReadImage(str(temporary))  # ITK does not notice when the last bytes do not fit on the disk
        except RuntimeError as error:
            raise OSError(0, nifti.itk_reason(error)) from error
        if not np.array_equal(sitk.GetArrayViewFromImage(written), sitk.GetArrayViewFromImage(image), equal_nan=array.dtype.kind == "f"):
            raise OSError(errno.ENOSPC, "not all of it could be written")


def _to_sitk(array: np.ndarray, grid: Grid, time: tuple[float, float] | None, vector: bool) -> sitk.Image:
    """(C, *shape) as one SimpleITK image."""
    if time is not None:
        return sitk.JoinSeries([to_sitk(np.ascontiguousarray(frame), grid) for frame in array], time[1], time[0])
    if vector or array.shape[0] > 1:
        return to_sitk(np.ascontiguousarray(np.moveaxis(array, 0, -1)), grid, vector=True)
    return to_sitk(np.ascontiguousarray(array[0]), grid)


def _open(path: Path, fix_header: bool) -> tuple[sitk.Image, bool]:
    """The file as SimpleITK reads it, and whether the reader had to repair its directions already."""
    if path.is_dir():
        return read_series(path), False
    require_file(path, "image")
    if suffix_of(path) in (".mgz", ".mgh"):
        return read_mgh(path), False
    _check_spacing(path, fix_header)
    try:
        return _read(path), False
    except RuntimeError as error:
        if "orthonormal" in str(error):
            angle = shear_degrees(nifti.directions(path))
            if fix_header:
                log.warning("%s: directions are off a rotation by %.3g degrees; replaced by the nearest one", path, angle)
                with nifti.permissive():
                    return _read(path), True
            raise GeometryError(
                f"{path}: direction cosines are not orthonormal (off by {angle:.3g} degrees)",
                tip="--fix-header replaces them by the nearest rotation",
            ) from error
        if "spacing" in str(error).lower():
            raise GeometryError(f"{path}: voxel spacing is zero", tip="correct the spacing in the header; without it nothing is in mm") from error
        raise InputError(f"{path} cannot be read as an image: {nifti.itk_reason(error)}", tip=_tip(path)) from error


def _read(path: Path) -> sitk.Image:
    """SimpleITK's reading, with the NaN of NIfTI files put back that ITK takes for zeros. RuntimeError as SimpleITK."""
    with safe_for_itk(path) as file, nifti.quiet():
        image = sitk.ReadImage(str(file))
    lost = lost_numbers(path) if suffix_of(path) in (".nii", ".nii.gz") else None
    if lost is None:
        return image
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise InputError(f"{path} holds NaN or infinite vectors", tip="check how it was made")
    array = sitk.GetArrayFromImage(image)
    array.ravel()[lost[: array.size]] = np.nan
    whole = sitk.GetImageFromArray(array, isVector=False)
    whole.CopyInformation(image)
    return whole


def _check_spacing(path: Path, fix_header: bool) -> None:
    """GeometryError for spacings that ITK would silently replace (zero in NIfTI) or read as a flipped axis (negative)."""
    if suffix_of(path) in (".nii", ".nii.gz"):
        found = nifti.spacings(path)
    elif suffix_of(path) in (".mha", ".mhd"):
        with path.open("rb") as f:
            line = re.search(rb"^Element(?:Spacing|Size)\s*=\s*(.+)$", f.read(4096).split(b"ElementDataFile")[0], re.MULTILINE)
        try:
            found = tuple(float(x) for x in line.group(1).split()) if line else ()
        except ValueError:
            return  # ITK's reader explains what it does not understand
    else:
        return
    if all(s > 0 for s in found):
        return
    if not fix_header:
        repairable = suffix_of(path) in (".nii", ".nii.gz") or 0 not in found  # ITK refuses a zero in MetaImage
        raise GeometryError(
            f"{path}: voxel spacing must be above zero, the header has {', '.join(f'{s:g}' for s in found)}",
            tip="correct the header"
            + (", or accept ITK's reading with --fix-header: zero is 1 mm, a negative one flips its axis" if repairable else ""),
        )
    log.warning("%s: spacing %s is not above zero; zero is taken as 1 mm, a negative one flips its axis", path, found)


def _tip(path: Path) -> str:
    """What may be wrong with a file that no reader takes."""
    if suffix_of(path) not in SUFFIXES:
        return f"regtool reads {' '.join(SUFFIXES)} and DICOM folders"
    if suffix_of(path) == ".hdr" and not path.with_suffix(".img").exists():
        return f"its voxels, {path.with_suffix('.img').name}, are not beside it"
    if nifti.is_nifti2(path):
        return "this is NIfTI-2; convert it to NIfTI-1, for example with `mri_convert` or nibabel"
    return "the file is damaged or not what its name says; copy or export it again"


def _unpacked(source: sitk.Image, path: Path, fix_header: bool, fixed: bool) -> tuple[np.ndarray, Grid, tuple[float, float] | None, int | None]:
    """((C, *shape) array, or (1, *shape, components) where there are several; grid; time axis; number of components)."""
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
    grid = _grid(frames[0], path, fix_header and not fixed)
    several = source.GetNumberOfComponentsPerPixel()
    arrays = [sitk.GetArrayViewFromImage(f) for f in frames]
    if 1 in grid.size and sum(n > 1 for n in grid.size) == grid.ndim - 1 > 1:
        grid, axis = _flattened(grid)
        arrays = [np.squeeze(a, axis=axis) for a in arrays]
    array = np.stack(arrays) if len(arrays) > 1 else np.array(arrays[0])[None]
    return array, grid, time, several if several > 1 else None


def _grid(image: sitk.Image, path: Path, fix_header: bool) -> Grid:
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


def _channels(array: np.ndarray, components: int, path: Path) -> tuple[np.ndarray, bool]:
    """((C, *shape) float32, whether that is red, green, blue) of (1, *shape, components). Colours that are all grey become one channel."""
    if len(array) > 1:
        raise InputError(f"{path} has both a time axis and {components} components", tip="save one component")
    if components == len(LUMA) + 1 and (suffix_of(path) in PICTURES or array.dtype == np.uint8):
        array = array[..., : len(LUMA)]
    data = array[0].astype(np.float32)
    if data.shape[-1] != len(LUMA) or array.dtype.kind != "u":
        return np.moveaxis(data, -1, 0), False
    if (data == data[..., :1]).all():
        log.warning("%s is a colour image without colours; its luminance is used", path)
        return np.asarray(data @ np.array(LUMA, dtype=np.float32), dtype=np.float32)[None], False
    return np.moveaxis(data, -1, 0), True


def _no_labels(path: Path, why: str) -> np.ndarray:
    raise InputError(f"{path} is no label map: {why}", tip="label maps hold whole numbers; use --interpolation linear for intensities")
