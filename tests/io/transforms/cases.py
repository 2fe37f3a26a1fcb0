"""Transforms of other tools, and where their points go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from regtool.geometry.grid import Grid
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Affine, Transform
from tests.conftest import to_sitk


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


def lattice_around(grid: Grid) -> Grid:
    """7 to 9 control points an axis."""
    size = tuple(7 + k for k in range(grid.ndim))
    spacing = tuple(e / (n - 3) for e, n in zip(grid.extent, size, strict=True))
    origin = grid.centre - grid.rotation @ (np.array(spacing) * (np.array(size) - 1) / 2)
    return Grid(size, spacing, tuple(origin.tolist()), grid.direction)


def bspline_itk(grid: Grid, order: int, seed: int, amplitude: float = 2.0) -> sitk.BSplineTransform:
    """A lattice that reaches beyond `grid` on all sides."""
    rng = np.random.default_rng(seed)
    lattice = lattice_around(grid)
    return sitk.BSplineTransform([to_sitk(c, lattice) for c in rng.uniform(-amplitude, amplitude, (grid.ndim, *lattice.shape))], order)


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
