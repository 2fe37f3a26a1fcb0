"""Refining the displacement itself: Adam on the field of one pair, coarse to fine, from a network's answer or from zero. No weights are touched.

What Adam moves is a raw field; what warps is that field smoothed by small boxes, which keeps the steps of single voxels together as the control
points of a B-spline do (the continuous half of ConvexAdam, Siebert et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from regtool.data.preprocess import antialiased
from regtool.geometry.grid import Grid
from regtool.geometry.image import Image
from regtool.geometry.sampling import resample, resize_voxels, warp_voxels
from regtool.losses import REGULARITIES, SIMILARITIES
from regtool.parameters import Measure, Refine

SMALLEST = 12  # voxels along the shortest axis of the coarsest level, where the image has as many
FLAT = 1e-4  # a level ends where this much is not gained in a tenth of its iterations
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Refined:
    """displacement: (1, D, *shape) voxels of the grid that came in; losses: one an iteration, over all levels."""

    displacement: torch.Tensor
    losses: tuple[float, ...]


def refine(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    start: torch.Tensor | None,
    parameters: Refine,
    measure: Measure,
    progress: Progress | None = None,
) -> Refined:
    """Lowers `-similarity + weight * roughness` of the displacement.

    fixed, moving: (1, 1, *shape) on one grid, scaled to about [0, 1]; start: (1, D, *shape) voxels, or None for no motion. From a start only
    the two finest levels are visited, with half the steps: what is coarse has been found.
    """
    levels = _levels(tuple(fixed.shape[2:]), parameters.levels if start is None else min(2, parameters.levels))
    iterations = parameters.iterations if start is None else -(-parameters.iterations // 2)
    displacement = start
    losses: list[float] = []
    total = iterations * len(levels)
    for shape in levels:
        f, m = _at(fixed, shape), _at(moving, shape)
        raw = _at_scale(displacement, shape, f).requires_grad_()
        optimiser = torch.optim.Adam([raw], lr=parameters.step_voxels, betas=(0.9, 0.99))
        patience = max(3, iterations // 10)
        for step in range(iterations):
            optimiser.zero_grad(set_to_none=True)
            u = _smoothed(raw, parameters.smoothings)
            alike = SIMILARITIES[measure.name](f, warp_voxels(m, u), measure)
            rough = REGULARITIES["diffusion"](u)
            loss = -alike + parameters.diffusion * rough
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress("refining", len(losses), total, losses[-1])
            if step >= 2 * patience and losses[-1 - patience] - losses[-1] < FLAT:
                break
        displacement = _smoothed(raw.detach(), parameters.smoothings)
    assert displacement is not None
    return Refined(_at_scale(displacement, tuple(fixed.shape[2:]), fixed), tuple(losses))


def _levels(shape: tuple[int, ...], levels: int) -> list[tuple[int, ...]]:
    """Coarse to fine, each half of the next; an axis stops shrinking at SMALLEST, and so does the list where no axis shrinks any more."""
    out = [shape]
    while len(out) < levels:
        coarser = tuple(n if n < 2 * SMALLEST else -(-n // 2) for n in out[0])
        if coarser == out[0]:
            break
        out.insert(0, coarser)
    return out


def _at(image: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(1, 1, *shape): smoothed and resampled."""
    if tuple(image.shape[2:]) == shape:
        return image
    grid = Grid.regular(image.shape[2:])
    coarse = grid.resized(shape[::-1])
    return resample(antialiased(Image(image[0].cpu(), grid), coarse), coarse).data[None].to(image.device)


def _at_scale(displacement: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The displacement on another number of voxels, in voxels of those."""
    if displacement is None:
        return torch.zeros(1, len(shape), *shape, dtype=like.dtype, device=like.device)
    ratio = torch.tensor([n / m for n, m in zip(shape, displacement.shape[2:], strict=True)][::-1], dtype=like.dtype, device=like.device)
    return resize_voxels(displacement, shape) * ratio.reshape(1, -1, *[1] * len(shape))


def _smoothed(u: torch.Tensor, times: int) -> torch.Tensor:
    """Means over three voxels along every axis, `times` times, the border continued."""
    return _Boxes.apply(u, times)  # type: ignore[no-untyped-call]


class _Boxes(torch.autograd.Function):
    """The box mean with a continued border is a symmetric matrix, so its gradient is itself: nothing need be kept, and no copy is made per axis."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, u: torch.Tensor, times: int) -> torch.Tensor:
        ctx.times = times  # type: ignore[attr-defined]
        return _boxes(u, times)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _boxes(gradients[0], ctx.times), None  # type: ignore[attr-defined]


def _boxes(u: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        for axis in range(2, u.dim()):
            n = u.shape[axis]
            total = u.clone()
            total.narrow(axis, 1, n - 1).add_(u.narrow(axis, 0, n - 1))
            total.narrow(axis, 0, n - 1).add_(u.narrow(axis, 1, n - 1))
            total.select(axis, 0).add_(u.select(axis, 0))
            total.select(axis, n - 1).add_(u.select(axis, n - 1))
            u = total.div_(3)
    return u
