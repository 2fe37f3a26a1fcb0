"""Reading an image between its voxels. The only place with normalised [-1, 1] coordinates.

Agreement with ITK needs three things together: clamping to the border, an explicit inside mask `-0.5 <= v < n - 0.5` (half-open), and an
explicit value outside it. `padding_mode="zeros"` alone is wrong by up to 0.2 of the intensity range at the rim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from regtool.errors import GeometryError
from regtool.geometry.grid import Array, Grid
from regtool.geometry.images import Image, Labels
from regtool.geometry.transforms import Affine, DisplacementField, Part, PointMap, Transform
from regtool.geometry.vectors import vector

SLAB_POINTS = 250_000  # points handled at once: keeps the float64 coordinates in 6 MB, near the caches
FEW = {2: 40_000, 3: 6_000}  # points, by dimension, from which several threads are worth calling
PIECES = 256  # that points are shared out in at most
SUMS = 2  # where the gradient of the image is wanted, of which each piece makes one of its own

_BACKWARD = {2: torch.ops.aten.grid_sampler_2d_backward, 3: torch.ops.aten.grid_sampler_3d_backward}
_BILINEAR, _BORDER = 0, 1  # torch's numbers for these


def linear(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The image between its voxels, the border continued outwards; differentiable (once) in both.

    torch's own kernel for the CPU takes one thread an image, however large it is; here the points of an image are shared out among the threads.
    Values, and gradients of the points, are torch's to the last bit, whatever the number of threads; the gradient of the image comes as two sums.

    image: (N, C, *shape); points: (N, *out, D), x first, -1 and 1 at the centres of the outermost voxels. Returns (N, C, *out).
    """
    count = points[0].numel() // points.shape[-1]
    if image.device.type != "cpu" or torch.get_num_threads() <= len(image) or count < FEW[points.shape[-1]] or _pieces(count, PIECES) == 1:
        return _read(image, points)
    return _Linear.apply(image, points)  # type: ignore[no-untyped-call]


def sample(data: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Linear interpolation, clamped to the border.

    data: (C, *shape); index: (P, D) continuous voxel indices, x first, of data's dtype. Returns (C, P).
    """
    ndim = index.shape[-1]
    points = _normalised(index, data.shape[1:]).reshape(1, *[1] * (ndim - 1), -1, ndim)
    return linear(data[None], points).reshape(data.shape[0], -1)


def inside(index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(..., D) voxel indices to (...) bool: in the image as ITK defines it."""
    axes = zip(index.unbind(-1), reversed(shape), strict=True)
    return functools.reduce(torch.logical_and, ((x >= -0.5) & (x < n - 0.5) for x, n in axes))


def warp_voxels(image: torch.Tensor, displacement: torch.Tensor, outside: float | None = None) -> torch.Tensor:
    """`warped(x) = image(x + u(x))` inside a network, differentiable in both.

    image: (N, C, *shape); displacement: (N, D, *shape) in voxels of the same grid, component 0 is x (the last axis).
    outside: the value beyond the image; None continues the border outwards.
    """
    shape = image.shape[2:]
    moved = displacement.movedim(1, -1)
    points = torch.addcmul(_normalised(voxel_grid(shape, displacement), shape), moved, _voxel(shape, displacement))
    values = linear(image, points)
    if outside is None:
        return values
    here = inside(voxel_grid(shape, displacement) + moved, shape)
    return torch.where(here.unsqueeze(1), values, torch.full((), outside, dtype=values.dtype, device=values.device))


def linearised(image: torch.Tensor, displacement: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`warp_voxels(image, v)` as a function of v near `displacement`, to first order: the warped image and its slope times the step from there (Lucas
    and Kanade 1981). Differentiable in v; each call takes a tenth of the time of a warp and its gradient.

    image: (N, C, *shape); displacement, v: (N, D, *shape) as there.
    """
    with torch.enable_grad():
        here = displacement.detach().requires_grad_()
        channels = warp_voxels(image, here).split(1, dim=1)
        slopes = [torch.autograd.grad(channel.sum(), here, retain_graph=True)[0] for channel in channels]
    values, here = [channel.detach() for channel in channels], here.detach()

    def near(v: torch.Tensor) -> torch.Tensor:
        step = v - here
        moved = [value + (slope * step).sum(dim=1, keepdim=True) for value, slope in zip(values, slopes, strict=True)]
        return moved[0] if len(moved) == 1 else torch.cat(moved, dim=1)

    return near


def voxel_grid(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """(*shape, D) voxel indices of every voxel, x first, with the dtype and device of `like`."""
    axes = [torch.arange(n, dtype=like.dtype, device=like.device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)


def resize_voxels(data: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(N, C, *shape) images onto another number of voxels over the same block of space (edge to edge), linear. Values are not rescaled."""
    if tuple(data.shape[2:]) == tuple(shape):
        return data
    return F.interpolate(data, tuple(shape), mode=("bilinear", "trilinear")[data.dim() - 4], align_corners=False)


def pad_end(data: torch.Tensor, shape: Sequence[int], value: float | None = None) -> torch.Tensor:
    """(N, C, *smaller) to (N, C, *shape) at the far ends, by `value`; None repeats the border."""
    missing = [n - m for n, m in zip(shape, data.shape[2:], strict=True)]
    if not any(missing):
        return data
    return F.pad(data, [end for n in reversed(missing) for end in (0, n)], mode="replicate" if value is None else "constant", value=value)


def crop_end(data: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(N, C, *larger) to (N, C, *shape), the near ends kept."""
    for axis, n in enumerate(shape, start=2):
        data = data.narrow(axis, 0, n)
    return data


def resample(image: Image, grid: Grid, outside: float | None = None, device: torch.device | None = None) -> Image:
    """`image` on another grid, through physical space, linear (as `sitk.Resample` with the identity). outside: default the image's minimum."""
    if image.grid.same_as(grid, tolerance=1e-6):
        return Image(image.data, grid, image.time, image.colour)
    return warp(image, Transform.identity(grid.ndim), grid, outside, device)


def mask_on_grid(mask: Image, grid: Grid) -> torch.Tensor:
    """(*grid.shape) bool: where the mask, on any grid, is above one half."""
    return resample(mask, grid, 0.0).data[0] > 0.5


def warp(image: Image, transform: Transform, grid: Grid, outside: float | None = None, device: torch.device | None = None) -> Image:
    """`warped(x) = image(T(x))` on `grid`, linear, in float64 slabs: agrees with `sitk.Resample` to rounding, rim included.

    outside: the value beyond the image, default its minimum, of channels each its own. device: that computes, default the image's; the result lies
    where the image does. Raises GeometryError where dimensions disagree.
    """
    _same_dimension(image.grid, transform, grid)
    device = device or image.data.device
    data = image.data.to(device=device, dtype=_float(device))
    several = outside is None and image.time is None and len(data) > 1
    value = data.flatten(1).amin(dim=1, keepdim=True) if several else data.amin() if outside is None else outside
    out = torch.empty(image.data.shape[0], grid.voxels, device=image.data.device)
    for part, index in moving_indices(image.grid, transform, grid, device):
        values = sample(data, index)
        out[:, part] = torch.where(inside(index, image.grid.shape), values, value).float().to(out.device)
    return Image(out.reshape(-1, *grid.shape), grid, image.time, image.colour)


def warp_labels(labels: Labels, transform: Transform, grid: Grid, vote: bool = True, outside: int = 0, device: torch.device | None = None) -> Labels:
    """Labels through a transform; values and dtype stay as they are, whatever their size.

    vote: every label's indicator is interpolated linearly and the heaviest wins (no label can appear that was not there; smoother than the
    nearest voxel; of equal weights the one at the lower index wins). False: nearest neighbour, halves upwards, as ITK. device: as of `warp`.
    """
    _same_dimension(labels.grid, transform, grid)
    device = device or labels.data.device
    data = labels.data.to(device).reshape(labels.data.shape[0], -1)
    out = torch.empty(labels.data.shape[0], grid.voxels, dtype=torch.int64, device=labels.data.device)
    for part, index in moving_indices(labels.grid, transform, grid, device):
        values = _vote(data, index, labels.grid.shape) if vote else data[:, _flat(torch.floor(index + 0.5).long(), labels.grid.shape)]
        out[:, part] = torch.where(inside(index, labels.grid.shape), values, outside).to(out.device)
    return Labels(out.reshape(-1, *grid.shape), grid, labels.dtype, labels.time)


def moving_indices(moving: Grid, transform: Transform, grid: Grid, device: torch.device | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slab by slab over `grid`: (which voxels, (P, D) indices in `moving` that the transform sends them to), in float64 where the device can."""
    to_index = Affine(moving.inverse_matrix, -moving.inverse_matrix @ np.array(moving.origin))
    for part, points in grid_points(grid, transform, device):
        yield part, apply_affine(to_index, points)


def displacement_on(transform: Transform, grid: Grid, device: torch.device | None = None) -> DisplacementField:
    """`u(x) = T(x) - x` at every voxel of `grid`, mm; it lies where the first field of the transform does, on the CPU where there is none.

    device: that computes, default where the result lies.
    """
    parts = transform.parts
    if len(parts) == 1 and isinstance(parts[0], DisplacementField) and parts[0].grid.same_as(grid, tolerance=1e-6):
        return DisplacementField(parts[0].data, grid)
    lies = next((part.data.device for part in parts if isinstance(part, DisplacementField)), torch.device("cpu"))
    device = device or lies
    out = torch.empty(grid.ndim, grid.voxels, device=lies)
    here = grid_points(grid, Transform.identity(grid.ndim), device)
    for (part, points), (_, origin) in zip(grid_points(grid, transform, device), here, strict=True):
        out[:, part] = (points - origin).T.float().to(lies)
    return DisplacementField(out.reshape(-1, *grid.shape), grid)


def transform_points(transform: Transform, points: Array) -> Array:
    """(P, D) mm in fixed space to (P, D) mm in moving space, float64."""
    x = torch.as_tensor(np.asarray(points, dtype=np.float64).reshape(-1, transform.ndim))
    for part in transform.parts:
        x = _apply(part, x)
    return np.asarray(x.numpy(), dtype=np.float64)


def grid_points(grid: Grid, transform: Transform, device: torch.device | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slab by slab (whole rows of the first array axis): (which voxels, (P, D) mm where the transform sends their centres).

    device: that computes, default the CPU.
    """
    device = device or torch.device("cpu")
    dtype = _float(device)
    plane = grid.voxels // grid.shape[0]
    rows = max(1, SLAB_POINTS // plane)
    to_mm = Affine(grid.matrix, np.array(grid.origin))
    first, rest = transform.parts[0], transform.parts[1:]
    own = None
    if isinstance(first, Affine):
        to_mm = first.after(to_mm)  # one matrix product, and no rounding between the two
    elif isinstance(first, DisplacementField) and first.grid.same_as(grid, tolerance=1e-6):
        own = first.data.reshape(grid.ndim, -1).to(device)  # the field is known at these very points: nothing to interpolate
    else:
        rest = transform.parts
    rest = Transform(rest).to(device, dtype).parts if rest else ()  # once, not for every slab
    like = torch.empty(0, dtype=dtype, device=device)
    for start in range(0, grid.shape[0], rows):
        stop = min(start + rows, grid.shape[0])
        index = voxel_grid((stop - start, *grid.shape[1:]), like).reshape(-1, grid.ndim)
        index[:, -1] += start
        x = apply_affine(to_mm, index)
        where = slice(start * plane, stop * plane)
        if own is not None:
            x = x + own[:, where].T.to(x)
        for part in rest:
            x = _apply(part, x)
        yield where, x


def _apply(part: Part, x: torch.Tensor) -> torch.Tensor:
    """(P, D) mm through one part."""
    if isinstance(part, Affine):
        return apply_affine(part, x)
    if isinstance(part, PointMap):
        return torch.as_tensor(part.map(x.double().cpu().numpy())).to(x)
    grid = part.grid
    index = apply_affine(Affine(grid.inverse_matrix, -grid.inverse_matrix @ np.array(grid.origin)), x)
    u = sample(part.data.to(x), index).T
    return x + torch.where(inside(index, grid.shape)[:, None], u, torch.zeros((), dtype=u.dtype, device=u.device))


def apply_affine(affine: Affine, x: torch.Tensor) -> torch.Tensor:
    """(P, D) points through an affine. Column by column: a product with a matrix this small takes three times as long."""
    out = torch.empty_like(x)
    for row, start, column in zip(affine.matrix.tolist(), affine.translation.tolist(), out.unbind(-1), strict=True):
        column.fill_(start)
        for factor, source in zip(row, x.unbind(-1), strict=True):
            if factor:
                column.add_(source, alpha=factor)
    return out


def _read(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(image, points, mode="bilinear", padding_mode="border", align_corners=True)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(image, points)
        pairs = zip(image.split(1), points, strict=True)
        values = [_read(*_shared(x, at, PIECES)) for x, at in pairs]
        return torch.stack([value.transpose(0, 1) for value in values]).reshape(*image.shape[:2], *points.shape[1:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (image, points), wanted = ctx.saved_tensors, ctx.needs_input_grad
        of_image: list[torch.Tensor] = []
        of_points: list[torch.Tensor] = []
        for x, at, up in zip(image.split(1), points, upstream, strict=True):
            copies, parts = _shared(x, at, SUMS if wanted[0] else PIECES)
            ups = up.reshape(len(up), *parts.shape[:-1]).transpose(0, 1)
            found = _BACKWARD[points.shape[-1]](ups, copies, parts, _BILINEAR, _BORDER, True, wanted)
            of_image += [found[0].sum(dim=0)] if wanted[0] else []
            of_points += [found[1].reshape(at.shape)] if wanted[1] else []
        return (torch.stack(of_image) if of_image else None), (torch.stack(of_points) if of_points else None)


def _shared(image: torch.Tensor, points: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, C, *shape) and (*out, D) as a batch of pieces: the same image k times, without a copy, and (k, 1, ..., P / k, D) points."""
    ndim = points.shape[-1]
    k = _pieces(points.numel() // ndim, most)
    return image.expand(k, *image.shape[1:]), points.reshape(k, *[1] * (ndim - 1), -1, ndim)


def _pieces(count: int, most: int) -> int:
    """The largest number up to `most` that divides the points; 1 for a prime number of them."""
    return next(k for k in range(most, 0, -1) if count % k == 0)


def _normalised(index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Voxel indices to [-1, 1] with voxel centres at the ends; an axis of one voxel has only its centre."""
    return index * _voxel(shape, index) - 1


def _voxel(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """(D,) what a voxel is in normalised coordinates, x first."""
    return vector([2 / max(n - 1, 1) for n in reversed(shape)], like)


def _flat(index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(P, D) whole indices, clamped into the image, to (P,) positions in the flattened array."""
    flat = torch.zeros(index.shape[0], dtype=torch.int64, device=index.device)
    for component, n in zip(reversed(range(index.shape[1])), shape, strict=True):
        flat = flat * n + index[:, component].clamp(0, n - 1)
    return flat


def _vote(data: torch.Tensor, index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """(C, voxels) labels at (P, D) indices: of the surrounding voxels, the label with the largest summed linear weight."""
    low = torch.floor(index)
    first = low.long()
    corners = [vector(c, first) for c in itertools.product((0, 1), repeat=index.shape[1])]
    labels = [data[:, _flat(first + corner, shape)] for corner in corners]
    best_label = labels[0].clone()
    differ = torch.stack([(other != labels[0]).any(dim=0) for other in labels[1:]]).any(dim=0)  # elsewhere there is nothing to vote on
    upper = (index - low)[differ].float()
    weights = [torch.where(corner == 1, upper, 1 - upper).prod(dim=1) for corner in corners]
    candidates = [label[:, differ] for label in labels]
    winner, best = candidates[0], torch.full(candidates[0].shape, -1.0, device=index.device)
    for label in candidates:
        score = torch.stack([w * (other == label) for other, w in zip(candidates, weights, strict=True)]).sum(dim=0)
        better = score > best + 1e-6
        best, winner = torch.where(better, score, best), torch.where(better, label, winner)
    best_label[:, differ] = winner
    return best_label


def _same_dimension(moving: Grid, transform: Transform, grid: Grid) -> None:
    found = {"moving image": moving.ndim, "transform": transform.ndim, "fixed grid": grid.ndim}
    if len(set(found.values())) > 1:
        raise GeometryError("dimensions disagree: " + ", ".join(f"{name} {n}-D" for name, n in found.items()))


def _float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
