"""Transforms in files: SimpleITK says where every point must go."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from regtool.errors import GeometryError, InputError, RegtoolError
from regtool.geometry.grid import Grid
from regtool.geometry.sampling import displacement_on, transform_points
from regtool.geometry.transforms import Affine, DisplacementField, PointMap, Transform
from regtool.io.bspline import bspline
from regtool.io.images import write_displacement, write_image
from regtool.io.learn2reg import read_learn2reg, write_learn2reg
from regtool.io.transforms import read_transform, write_ants, write_transform
from regtool.io.transforms.elastix import write as write_transformix
from regtool.io.transforms.itk import from_sitk_transform, to_sitk_transform
from regtool.io.transforms.sampled import total_displacement
from tests.conftest import random_grid, random_image, sitk_field, smooth_field, to_sitk

FIELD_FORMATS = ["nii.gz", "nii", "mha", "mhd", "nrrd"]


@pytest.fixture
def grid(ndim: int, orientation: str) -> Grid:
    return random_grid(ndim, orientation, seed=11)


def points_around(grid: Grid, count: int = 200, seed: int = 0) -> np.ndarray:
    """mm, some of them outside."""
    return grid.to_physical(
        np.random.default_rng(seed).uniform(-2, 1, (count, grid.ndim)) + np.random.default_rng(1).uniform(0, 1, (count, grid.ndim)) * grid.size
    )


def voxel_centres(grid: Grid) -> np.ndarray:
    axes = np.meshgrid(*[np.arange(n) for n in grid.size], indexing="ij")
    return grid.to_physical(np.stack(axes, axis=-1).reshape(-1, grid.ndim).astype(float))


def affine_near(grid: Grid, seed: int) -> Affine:
    rng = np.random.default_rng(seed)
    matrix = np.eye(grid.ndim) + 0.08 * rng.standard_normal((grid.ndim, grid.ndim))
    return Affine(matrix, grid.centre - matrix @ grid.centre + rng.uniform(-3, 3, grid.ndim))


def itk_points(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(p) for p in points.tolist()])


def same(transform: Transform, itk: sitk.Transform, points: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.abs(transform_points(transform, points) - itk_points(itk, points)).max() < tolerance


def linear_transforms(ndim: int) -> list[sitk.Transform]:
    centre = [3.0, -7.0, 11.0][:ndim]
    flat = ndim == 2
    euler = sitk.Euler2DTransform(centre, 0.3, (1, 2)) if flat else sitk.Euler3DTransform(centre, 0.1, 0.2, 0.3, (1, 2, 3))
    similarity = sitk.Similarity2DTransform(1.1, 0.2, (1, 2), centre) if flat else sitk.Similarity3DTransform(1.1, (0, 0, 1), 0.2, (1, 2, 3), centre)
    affine = sitk.AffineTransform(np.eye(ndim).ravel() + 0.07 * np.arange(ndim * ndim), [1.0, 2.0, 3.0][:ndim], centre)
    several = [
        sitk.TranslationTransform(ndim, [4.0, 5.0, 6.0][:ndim]),
        sitk.ScaleTransform(ndim, [1.1, 0.9, 1.2][:ndim]),
        sitk.Transform(ndim, sitk.sitkIdentity),
    ]
    return [euler, similarity, affine, *several, *([] if flat else [sitk.VersorRigid3DTransform((0, 1, 0), 0.4, (1, 2, 3), centre)])]


def bspline_itk(grid: Grid, order: int, seed: int, amplitude: float = 2.0) -> sitk.BSplineTransform:
    """A lattice that reaches beyond `grid` on all sides."""
    rng = np.random.default_rng(seed)
    lattice = lattice_around(grid)
    return sitk.BSplineTransform([to_sitk(c, lattice) for c in rng.uniform(-amplitude, amplitude, (grid.ndim, *lattice.shape))], order)


def lattice_around(grid: Grid) -> Grid:
    """7 to 9 control points an axis."""
    size = tuple(7 + k for k in range(grid.ndim))
    spacing = tuple(e / (n - 3) for e, n in zip(grid.extent, size, strict=True))
    origin = grid.centre - grid.rotation @ (np.array(spacing) * (np.array(size) - 1) / 2)
    return Grid(size, spacing, tuple(origin.tolist()), grid.direction)


def text(values: object) -> str:
    return " ".join(repr(float(v)) for v in np.ravel(values))


def bspline_file(folder: Path, grid: Grid, order: int, seed: int, how: str = "Compose", initial: bool = True) -> Path:
    """`TransformParameters.1.txt` as elastix writes it, after an Euler transform in `TransformParameters.0.txt`."""
    ndim = grid.ndim
    geometry = f"""(FixedImageDimension {ndim})
(MovingImageDimension {ndim})
(FixedInternalImagePixelType "float")
(MovingInternalImagePixelType "float")
(Size {" ".join(map(str, grid.size))})
(Index {" ".join("0" * ndim)})
(Spacing {text(grid.spacing)})
(Origin {text(grid.origin)})
(Direction {text(grid.rotation.T)})
(UseDirectionCosines "true")
(ResampleInterpolator "FinalBSplineInterpolator")
(FinalBSplineInterpolationOrder 1)
(Resampler "DefaultResampler")
(DefaultPixelValue 0)
(ResultImageFormat "nii.gz")
(ResultImagePixelType "float")
"""
    angles = [0.05, -0.03, 0.04][: 1 if ndim == 2 else 3]
    parameters = [*angles, *[1.0, -2.0, 1.5][:ndim]]
    first = folder / "TransformParameters.0.txt"
    first.write_text(
        f'(Transform "EulerTransform")\n(NumberOfParameters {len(parameters)})\n(TransformParameters {text(parameters)})\n'
        f'(InitialTransformParameterFileName "NoInitialTransform")\n(HowToCombineTransforms "Compose")\n(ComputeZYX "false")\n'
        f"(CenterOfRotationPoint {text(grid.centre)})\n{geometry}"
    )
    lattice = lattice_around(grid)
    coefficients = np.array(bspline_itk(grid, order, seed).GetParameters())
    path = folder / "TransformParameters.1.txt"
    path.write_text(
        f'(Transform "BSplineTransform")\n(NumberOfParameters {coefficients.size})\n(TransformParameters {text(coefficients)})\n'
        f'(InitialTransformParameterFileName "{first if initial else "NoInitialTransform"}")\n(HowToCombineTransforms "{how}")\n'
        f"(GridSize {' '.join(map(str, lattice.size))})\n(GridIndex {' '.join('0' * ndim)})\n(GridSpacing {text(lattice.spacing)})\n"
        f"(GridOrigin {text(lattice.origin)})\n(GridDirection {text(lattice.rotation.T)})\n(BSplineTransformSplineOrder {order})\n"
        f'(UseCyclicTransform "false")\n{geometry}'
    )
    return path


# --- reading what ITK and ANTs write ----------


@pytest.mark.parametrize("suffix", ["h5", "hdf5", "tfm", "txt", "mat", "xfm"])
def test_linear_transforms(ndim: int, suffix: str, tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-100, 100, (50, ndim))
    for k, itk in enumerate(linear_transforms(ndim)):
        path = tmp_path / f"{k}.{suffix}"
        try:
            sitk.WriteTransform(itk, str(path))
        except RuntimeError:
            assert suffix == "xfm"  # MINC knows 3-D affines only
            continue
        transform = read_transform(path)
        assert [type(p) for p in transform.parts] == [Affine]
        same(transform, itk, points, 1e-9 if suffix != "xfm" else 1e-4)


@pytest.mark.parametrize("suffix", ["h5", "tfm"])
def test_composites_apply_the_last_first(grid: Grid, suffix: str, tmp_path: Path) -> None:
    itk = sitk.CompositeTransform([linear_transforms(grid.ndim)[2], sitk_field(smooth_field(grid, 4.0, 1)), linear_transforms(grid.ndim)[3]])
    sitk.WriteTransform(itk, str(tmp_path / f"t.{suffix}"))
    transform = read_transform(tmp_path / f"t.{suffix}")
    assert [type(p) for p in transform.parts] == [Affine, DisplacementField, Affine]
    same(transform, itk, points_around(grid))


def test_nested_composites_in_memory(grid: Grid) -> None:
    inner = sitk.CompositeTransform([linear_transforms(grid.ndim)[0], sitk_field(smooth_field(grid, 4.0, 1))])
    itk = sitk.CompositeTransform([linear_transforms(grid.ndim)[2], inner])
    same(from_sitk_transform(itk), itk, points_around(grid))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bsplines(grid: Grid, order: int, tmp_path: Path) -> None:
    itk = sitk.CompositeTransform([linear_transforms(grid.ndim)[0], bspline_itk(grid, order, 5)])
    sitk.WriteTransform(itk, str(tmp_path / "t.h5"))
    transform = read_transform(tmp_path / "t.h5")
    assert [type(p) for p in transform.parts] == [PointMap, Affine]
    same(transform, itk, points_around(grid), 1e-9)


def test_bsplines_far_out_are_the_identity(grid: Grid) -> None:
    itk = bspline_itk(grid, 3, 5)
    points = grid.to_physical(np.random.default_rng(0).uniform(-3, 4, (300, grid.ndim)) * np.array(grid.size))
    same(from_sitk_transform(itk), itk, points, 1e-9)


def test_bspline_lattice_is_checked(grid: Grid) -> None:
    for order, shape in ((4, grid.shape), (0, grid.shape), (3, (*grid.shape[:-1], grid.shape[-1] + 1))):
        with pytest.raises(InputError):
            bspline(np.zeros((grid.ndim, *shape)), grid, order)
    with pytest.raises(InputError, match="NaN"):
        bspline(np.full((grid.ndim, *grid.shape), np.nan), grid, 3)


@pytest.mark.parametrize("suffix", FIELD_FORMATS)
def test_field_images_by_simpleitk(grid: Grid, suffix: str, tmp_path: Path) -> None:
    field = smooth_field(grid, 4.0, 3)
    array = np.ascontiguousarray(np.moveaxis(field.data.numpy(), 0, -1))
    sitk.WriteImage(to_sitk(array, grid, vector=True), str(tmp_path / f"f.{suffix}"))
    same(read_transform(tmp_path / f"f.{suffix}"), sitk_field(field), voxel_centres(grid)[:400], 1e-3)


def test_intent_1006_is_ras_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    field = smooth_field(random_grid(3, "oblique", 1), 4.0, 3)
    write_displacement(field, tmp_path / "f.nii")
    raw = bytearray((tmp_path / "f.nii").read_bytes())
    assert struct.unpack_from("<h", raw, 68)[0] == 1007
    struct.pack_into("<h", raw, 68, 1006)
    (tmp_path / "f.nii").write_bytes(bytes(raw))
    with caplog.at_level(logging.WARNING, logger="regtool"):
        part = read_transform(tmp_path / "f.nii").parts[0]
    assert isinstance(part, DisplacementField)
    sign = torch.tensor([-1.0, -1.0, 1.0]).reshape(3, 1, 1, 1)
    assert float((part.data - sign * field.data).abs().max()) < 1e-5
    assert "1006" in caplog.text


def test_misspelt_names_of_old_itk_are_read(tmp_path: Path) -> None:
    itk = linear_transforms(3)[2]
    sitk.WriteTransform(itk, str(tmp_path / "t.h5"))
    with h5py.File(tmp_path / "t.h5", "a") as file:
        for name in ("TransformParameters", "TransformFixedParameters"):
            file["TransformGroup/0"].move(name, name.replace("Transform", "Tranform", 1))
    same(read_transform(tmp_path / "t.h5"), itk, np.random.default_rng(0).uniform(-50, 50, (20, 3)))


# --- elastix ----------


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("how", ["Compose", "Add"])
def test_elastix_bspline_after_euler(grid: Grid, order: int, how: str, tmp_path: Path) -> None:
    path = bspline_file(tmp_path, grid, order, seed=5, how=how)
    euler = sitk.Euler2DTransform() if grid.ndim == 2 else sitk.Euler3DTransform()
    euler.SetCenter(grid.centre.tolist())
    euler.SetParameters([*[0.05, -0.03, 0.04][: 1 if grid.ndim == 2 else 3], *[1.0, -2.0, 1.5][: grid.ndim]])
    spline, points = bspline_itk(grid, order, 5), points_around(grid)
    got = transform_points(read_transform(path), points)
    want = itk_points(spline, itk_points(euler, points)) if how == "Compose" else itk_points(spline, points) + itk_points(euler, points) - points
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(transform_points(read_transform(tmp_path), points) - want).max() < 1e-4  # the folder: its last file


def test_elastix_files_may_be_moved_together(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 3)
    (tmp_path / "old").mkdir()
    before = transform_points(read_transform(bspline_file(tmp_path / "old", grid, 3, seed=5)), points_around(grid))
    (tmp_path / "old").rename(tmp_path / "new")
    assert np.array_equal(before, transform_points(read_transform(tmp_path / "new"), points_around(grid)))


@pytest.mark.parametrize("kind", ["Translation", "Euler", "Similarity", "Affine"])
def test_elastix_linear(ndim: int, kind: str, tmp_path: Path) -> None:
    euler, similarity, affine, translation = linear_transforms(ndim)[:4]
    itk = {"Translation": translation, "Euler": euler, "Similarity": similarity, "Affine": affine}[kind]
    centre = "" if kind == "Translation" else f"(CenterOfRotationPoint {text(itk.GetFixedParameters()[:ndim])})\n"
    path = tmp_path / "result.txt"
    path.write_text(
        f'// made by hand\n(Transform "{kind}Transform")  // a comment\n(TransformParameters {text(itk.GetParameters())})\n{centre}'
        f'(FixedImageDimension {ndim})\n(MovingImageDimension {ndim})\n(InitialTransformParametersFileName "NoInitialTransform")\n'
    )
    same(read_transform(path), itk, np.random.default_rng(0).uniform(-50, 50, (30, ndim)), 1e-9)


def test_elastix_euler_zyx(tmp_path: Path) -> None:
    itk = sitk.Euler3DTransform((1, 2, 3), 0.3, 0.4, 0.5, (1, 2, 3))
    itk.SetComputeZYX(True)
    path = tmp_path / "TransformParameters.0.txt"
    path.write_text(
        f'(Transform "EulerTransform")\n(TransformParameters {text(itk.GetParameters())})\n(CenterOfRotationPoint 1 2 3)\n(ComputeZYX "true")\n'
        "(FixedImageDimension 3)\n(MovingImageDimension 3)\n"
    )
    same(read_transform(path), itk, np.random.default_rng(0).uniform(-50, 50, (30, 3)), 1e-9)


def test_elastix_binary_parameters_and_itk_file(tmp_path: Path) -> None:
    itk = linear_transforms(3)[2]
    np.array(itk.GetParameters()).tofile(tmp_path / "p.dat")
    path = tmp_path / "TransformParameters.0.txt"
    head = "(FixedImageDimension 3)\n(MovingImageDimension 3)\n"
    path.write_text(
        f'(Transform "AffineTransform")\n{head}(UseBinaryFormatForTransformationParameters "true")\n(TransformParameters "p.dat")\n'
        f"(CenterOfRotationPoint {text(itk.GetFixedParameters())})\n"
    )
    points = np.random.default_rng(0).uniform(-50, 50, (30, 3))
    same(read_transform(path), itk, points, 1e-9)
    sitk.WriteTransform(itk, str(tmp_path / "t.h5"))
    path.write_text(f'(Transform "File")\n(TransformFileName "t.h5")\n{head}')
    same(read_transform(path), itk, points, 1e-9)


def elastix_bad(**changes: str) -> str:
    values = {
        "Transform": '"TranslationTransform"',
        "TransformParameters": "1 2 3",
        "FixedImageDimension": "3",
        "MovingImageDimension": "3",
    } | changes
    return "".join(f"({k} {v})\n" for k, v in values.items() if v)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (elastix_bad(Transform='"AffineDTITransform"'), "AffineDTITransform"),
        (elastix_bad(TransformParameters="1 2"), "has 2 numbers, expected 3"),
        (elastix_bad(TransformParameters="1 2 x"), "no number"),
        (elastix_bad(TransformParameters="1 2 nan"), "NaN"),
        (elastix_bad(TransformParameters=""), "TransformParameters is missing"),
        (elastix_bad(MovingImageDimension="2"), "3-D to 2-D"),
        (elastix_bad(FixedImageDimension="4", MovingImageDimension="4"), "4-D"),
        (elastix_bad(InitialTransformParameterFileName='"nowhere.txt"'), "initial transform not found"),
        (elastix_bad(InitialTransformParameterFileName='"TransformParameters.0.txt"'), "ring"),
        (elastix_bad(Transform='"EulerTransform"'), "CenterOfRotationPoint is missing"),
        (elastix_bad(Transform='"BSplineTransform"', UseCyclicTransform='"true"'), "cyclic"),
        (elastix_bad(Transform='"BSplineTransform"', GridSize="9 9 9", GridSpacing="1 1 1", GridOrigin="0 0 0"), "expected 2187"),
        ("(NoTransform 1)\n", "Transform is missing"),
    ],
)
def test_elastix_errors(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "TransformParameters.0.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_transform(path)


# --- writing ----------


@pytest.mark.parametrize("suffix", ["h5", "hdf5", "tfm", "txt"])
def test_itk_reads_what_we_write(grid: Grid, suffix: str, tmp_path: Path) -> None:
    transform = Transform(
        (affine_near(grid, 1), smooth_field(grid, 3.0, 2), smooth_field(grid.resized([5] * grid.ndim), 3.0, 3), affine_near(grid, 4))
    )
    path = tmp_path / f"t.{suffix}"
    assert write_transform(transform, path) == [path]
    same(transform, sitk.ReadTransform(str(path)), points_around(grid))
    back = read_transform(path)
    assert [type(p) for p in back.parts] == [Affine, DisplacementField, DisplacementField, Affine]
    assert np.abs(transform_points(back, points_around(grid)) - transform_points(transform, points_around(grid))).max() < 1e-9


def test_h5_looks_like_itks(tmp_path: Path) -> None:
    grid = random_grid(3, "oblique", 1)
    field, affine = smooth_field(grid, 3.0, 2), affine_near(grid, 1)
    write_transform(Transform((field, affine)), tmp_path / "ours.h5")
    sitk.WriteTransform(sitk.CompositeTransform([to_sitk_transform(Transform((affine,))), sitk_field(field)]), str(tmp_path / "itk.h5"))

    def layout(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        with h5py.File(path) as file:
            file.visititems(lambda name, item: found.update({name: (item.shape, item.dtype.kind)}) if isinstance(item, h5py.Dataset) else None)
            found["types"] = (tuple(str(file[f"TransformGroup/{k}/TransformType"][0]).replace("float", "double") for k in range(3)), "")  # type: ignore[assignment]
            assert np.allclose(file["TransformGroup/2/TransformFixedParameters"], [*grid.size, *grid.origin, *grid.spacing, *grid.direction])
        return found

    assert layout(tmp_path / "ours.h5") == layout(tmp_path / "itk.h5")
    assert h5py.File(tmp_path / "ours.h5")["TransformGroup/2/TransformParameters"].dtype == np.float32


@pytest.mark.parametrize("size", [(70, 60, 50), (131072, 1), (400, 400)])
def test_h5_chunks(size: tuple[int, ...], tmp_path: Path) -> None:
    """More than one chunk, exactly one, and a part of one."""
    grid = Grid.regular(size[::-1])
    field = DisplacementField(torch.randn(grid.ndim, *grid.shape, generator=torch.Generator().manual_seed(0)), grid)
    write_transform(Transform((field,)), tmp_path / "t.h5")
    part = read_transform(tmp_path / "t.h5").parts[0]
    assert isinstance(part, DisplacementField)
    assert torch.equal(part.data, field.data)
    itk = sitk.DisplacementFieldTransform(sitk.ReadTransform(str(tmp_path / "t.h5"))).GetDisplacementField()
    assert np.array_equal(np.moveaxis(sitk.GetArrayFromImage(itk), -1, 0), field.data.numpy())


@pytest.mark.parametrize("suffix", FIELD_FORMATS)
def test_field_images_hold_the_total_displacement(grid: Grid, suffix: str, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    write_transform(transform, tmp_path / f"t.{suffix}")
    at = voxel_centres(grid)
    assert np.abs(transform_points(read_transform(tmp_path / f"t.{suffix}"), at) - transform_points(transform, at)).max() < 1e-3
    image = sitk.ReadImage(str(tmp_path / f"t.{suffix}"), sitk.sitkVectorFloat64)
    itk, inner = sitk.DisplacementFieldTransform(image), at[::7]
    assert np.abs(itk_points(itk, inner) - transform_points(transform, inner)).max() < 1e-3


def test_affine_alone(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 2)
    first, second = affine_near(grid, 1), affine_near(grid, 2)
    for suffix in ("mat", "h5", "tfm", "txt"):
        write_transform(Transform((first, second)), tmp_path / f"a.{suffix}")
        back = read_transform(tmp_path / f"a.{suffix}")
        assert len(back.parts) == 1
        same(back, to_sitk_transform(Transform((first, second))), points_around(grid), 1e-9)
    with pytest.raises(InputError, match="affine"):
        write_transform(Transform((smooth_field(grid, 1.0, 1),)), tmp_path / "b.mat")
    assert not list(tmp_path.glob("*b.mat*"))


def test_point_maps_are_sampled(grid: Grid, tmp_path: Path) -> None:
    spline = from_sitk_transform(bspline_itk(grid, 3, 5))
    transform = Transform((affine_near(grid, 1), *spline.parts, affine_near(grid, 2)))
    with pytest.raises(InputError, match="no grid") as error:
        write_transform(transform, tmp_path / "t.h5")
    assert error.value.tip is not None
    assert "--like" in error.value.tip
    for suffix in ("h5", "tfm", "mha"):
        write_transform(transform, tmp_path / f"t.{suffix}", grid)
        itk = sitk.ReadImage(str(tmp_path / "t.mha"), sitk.sitkVectorFloat64) if suffix == "mha" else None
        oracle = sitk.DisplacementFieldTransform(itk) if itk is not None else sitk.ReadTransform(str(tmp_path / f"t.{suffix}"))
        at = voxel_centres(grid)[:300]
        assert np.abs(itk_points(oracle, at) - transform_points(transform, at)).max() < 1e-3


def test_a_field_behind_an_affine_needs_a_grid(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 2)
    with pytest.raises(InputError, match="no grid"):
        total_displacement(Transform((affine_near(grid, 1), smooth_field(grid, 1.0, 1))))


def test_ants_pair(grid: Grid, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    warp, affine = write_ants(transform, tmp_path / "out_")
    assert (warp.name, affine.name) == ("out_1Warp.nii.gz", "out_0GenericAffine.mat")
    chained = read_transform(warp).then(read_transform(affine))  # the order of `antsApplyTransforms -t`
    at = voxel_centres(grid)
    assert np.abs(transform_points(chained, at) - transform_points(transform, at)).max() < 1e-3
    assert [p.name for p in write_ants(Transform(transform.parts[:1]), tmp_path / "w")] == ["w1Warp.nii.gz"]
    assert [p.name for p in write_ants(Transform(transform.parts[1:]), tmp_path / "a")] == ["a0GenericAffine.mat"]


def test_transformix_pair(grid: Grid, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    assert write_transform(transform, tmp_path / "TransformParameters.0.txt") == [tmp_path / f"TransformParameters.0.{s}" for s in ("txt", "mha")]
    lines = (tmp_path / "TransformParameters.0.txt").read_text().splitlines()
    assert "(DeformationFieldInterpolationOrder 1)" in lines
    assert f'(DeformationFieldFileName "{tmp_path / "TransformParameters.0.mha"}")' in lines
    at = voxel_centres(grid)
    assert np.abs(transform_points(read_transform(tmp_path / "TransformParameters.0.txt"), at) - transform_points(transform, at)).max() < 1e-3
    assert [p.name for p in write_transformix(transform, tmp_path / "deep" / "any.txt")] == ["any.txt", "any.mha"]


def test_learn2reg(grid: Grid, tmp_path: Path) -> None:
    field = smooth_field(grid, 3.0, 2)
    path = tmp_path / "disp_1_2.nii.gz"
    write_learn2reg(field, path)
    assert float((read_learn2reg(path, grid).data - field.data).abs().max()) < 1e-4
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # components first here, last in nibabel's order
    assert array.shape == (grid.ndim, *grid.shape)
    index = np.array([n // 2 for n in grid.size])
    moved = grid.to_index(transform_points(Transform((field,)), grid.to_physical(index[None].astype(float))))[0]
    assert np.allclose(index + array[(slice(None), *index[::-1])], moved, atol=1e-3)
    with pytest.raises(GeometryError):
        read_learn2reg(path, grid.resized([n + 1 for n in grid.size]))
    with pytest.raises(InputError):
        write_learn2reg(field, tmp_path / "disp.mha")


def test_learn2reg_refuses_other_files(tmp_path: Path) -> None:
    grid = random_grid(3, "aligned", 1)
    write_displacement(smooth_field(grid, 1.0, 1), tmp_path / "mm.nii.gz")
    write_image(random_image(grid, 1), tmp_path / "scalar.nii.gz")
    for name in ("mm", "scalar", "missing"):
        with pytest.raises(InputError):
            read_learn2reg(tmp_path / f"{name}.nii.gz", grid)


# --- bad input: one line and a tip ----------


def bad_files(folder: Path) -> dict[str, Path]:
    grid = random_grid(3, "aligned", 1)
    write_image(random_image(grid, 1), folder / "scalar.nii.gz")
    sitk.WriteImage(sitk.JoinSeries([to_sitk(np.zeros(grid.shape, np.float32), grid)] * 3), str(folder / "learn2reg.nii.gz"))
    write_displacement(smooth_field(grid, 1.0, 1), folder / "good.nii")
    write_displacement(smooth_field(grid, 1.0, 1), folder / "whole.nii.gz")
    raw = bytearray((folder / "good.nii").read_bytes())
    (folder / "cut.nii").write_bytes(bytes(raw[: len(raw) // 2]))
    (folder / "cut.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:-500])
    struct.pack_into("<h", raw, 68, 0)
    (folder / "intent0.nii").write_bytes(bytes(raw))
    write_transform(Transform((smooth_field(grid, 1.0, 1), affine_near(grid, 1))), folder / "good.h5")
    h5 = (folder / "good.h5").read_bytes()
    (folder / "cut.h5").write_bytes(h5[: len(h5) // 2])
    h5py.File(folder / "model.h5", "w").create_group("weights")
    with h5py.File(folder / "short.h5", "w") as file:
        file.create_dataset(
            "TransformGroup/0/TransformType", data=np.array([b"DisplacementFieldTransform_float_3_3"], dtype=object), dtype=h5py.string_dtype("ascii")
        )
        file["TransformGroup/0/TransformFixedParameters"] = [4.0, 4, 4, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1]
        file["TransformGroup/0/TransformParameters"] = np.zeros(10)
    (folder / "matrix.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    (folder / "matrix.mat").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    (folder / "plate.tfm").write_text(
        "#Insight Transform File V1.0\nTransform: ThinPlateSplineKernelTransform_double_3_3\nParameters: 0 0 0\nFixedParameters: 0 0 0\n"
    )
    one = "#Transform {}\nTransform: TranslationTransform_double_3_3\nParameters: 1 2 3\nFixedParameters:\n"
    (folder / "list.tfm").write_text("#Insight Transform File V1.0\n" + one.format(0) + one.format(1))
    (folder / "empty.h5").write_bytes(b"")
    (folder / "word.doc").write_text("hello")
    (folder / "folder").mkdir()
    return {p.name: p for p in folder.iterdir()} | {"missing.h5": folder / "missing.h5"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalar.nii.gz", "scalar"), ("learn2reg.nii.gz", "scalar"), ("intent0.nii", "intent code 0"), ("cut.nii", "truncated"),
        ("cut.nii.gz", "truncated"),
        ("cut.h5", "damaged"), ("model.h5", "without ITK transforms"), ("short.h5", "needs 192 numbers"), ("matrix.txt", "cannot be read"),
        ("matrix.mat", "cannot be read"), ("plate.tfm", "ThinPlateSplineKernelTransform"), ("list.tfm", "holds 2 transforms"),
        ("empty.h5", "empty"), ("word.doc", "not known"), ("folder", "no transform in the folder"), ("missing.h5", "not found"),
    ],
)  # fmt: skip
def test_bad_files(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_transform(bad_files(tmp_path)[name])
    assert error.value.tip
    assert "\n" not in error.value.what
    assert "0x" not in error.value.what


def test_minc_lists_are_refused(tmp_path: Path) -> None:
    """ITK would take the first transform and say nothing."""
    itk = sitk.CompositeTransform([linear_transforms(3)[2], sitk_field(smooth_field(random_grid(3, "aligned", 1), 1.0, 1))])
    sitk.WriteTransform(itk, str(tmp_path / "t.xfm"))
    with pytest.raises(InputError, match="holds 2 transforms"):
        read_transform(tmp_path / "t.xfm")


def test_dimension_is_compared_with_the_images(tmp_path: Path) -> None:
    write_transform(Transform((Affine.identity(2),)), tmp_path / "t.h5")
    assert read_transform(tmp_path / "t.h5", random_grid(2, "aligned", 1)).ndim == 2
    with pytest.raises(GeometryError, match="2-D transform"):
        read_transform(tmp_path / "t.h5", random_grid(3, "aligned", 1))


def test_a_result_folder_stands_for_its_transform(tmp_path: Path) -> None:
    affine = affine_near(random_grid(3, "aligned", 1), 1)
    write_transform(Transform((affine,)), tmp_path / "transform.h5")
    part = read_transform(tmp_path).parts[0]
    assert isinstance(part, Affine)
    assert np.allclose(part.matrix, affine.matrix)


def test_writing_to_nowhere_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegtoolError, match="cannot write"):
        write_transform(Transform((Affine.identity(3),)), tmp_path / "file" / "t.h5")
    with pytest.raises(InputError, match="cannot write"):
        write_transform(Transform((Affine.identity(3),)), tmp_path / "t.doc")


def test_nan_fields_are_refused(tmp_path: Path) -> None:
    grid = random_grid(3, "aligned", 1)
    field = DisplacementField(torch.full((3, *grid.shape), float("nan")), grid)
    for suffix in ("h5", "mha"):
        write_transform(Transform((field,)), tmp_path / f"t.{suffix}")
        with pytest.raises(InputError, match="NaN"):
            read_transform(tmp_path / f"t.{suffix}")


def test_displacement_of_a_read_file_equals_itks(grid: Grid, tmp_path: Path) -> None:
    transform = Transform((smooth_field(grid, 3.0, 2), affine_near(grid, 1)))
    write_transform(transform, tmp_path / "t.h5")
    other = random_grid(grid.ndim, "oblique", 21)
    itk = sitk.TransformToDisplacementField(
        sitk.ReadTransform(str(tmp_path / "t.h5")), sitk.sitkVectorFloat64, other.size, other.origin, other.spacing, other.direction
    )
    got = displacement_on(read_transform(tmp_path / "t.h5"), other).data.numpy()
    assert np.abs(np.moveaxis(sitk.GetArrayFromImage(itk), -1, 0) - got).max() < 1e-4


def test_a_transform_that_simpleitk_has_no_class_for(ndim: int, tmp_path: Path) -> None:
    """It comes as a composite whose only member is that composite again."""
    matrix = np.eye(ndim) + 0.1 * np.arange(ndim * ndim).reshape(ndim, ndim) / ndim
    numbers = " ".join(str(x) for x in [*matrix.ravel(), *range(1, ndim + 1)])
    centre = " ".join(["3"] * ndim)
    file = tmp_path / "odd.txt"
    kind = f"MatrixOffsetTransformBase_double_{ndim}_{ndim}"
    file.write_text(
        f"#Insight Transform File V1.0\n#Transform 0\nTransform: {kind}\nParameters: {numbers}\nFixedParameters: {centre}\n", encoding="utf-8"
    )
    point = np.array([[5.0, -2.0, 7.0][:ndim]])
    expected = (point - 3) @ matrix.T + 3 + np.arange(1, ndim + 1)
    assert np.allclose(transform_points(read_transform(file), point), expected)
