"""Sums over sliding windows, by doubling: a window of 9 costs four additions an axis, none of which can cancel (a running sum can)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 1 << 18  # numbers handled at once on a CPU: they stay in its cache, several times faster than passing whole volumes through memory


def window_sum(x: torch.Tensor, window: int, axes: Iterable[int]) -> torch.Tensor:
    """The sum over `window` (odd) voxels centred on each, along every one of `axes` (non-negative); zeros beyond the ends. Same shape as x.

    It is its own adjoint, so its gradient is a window sum and nothing is kept for it.
    """
    return _WindowSum.apply(x, window, tuple(axes))  # type: ignore[no-untyped-call]


def sliding_sum(x: torch.Tensor, window: int, axis: int) -> torch.Tensor:
    """The sums over all `window` neighbours there are along an axis of length n: n - window + 1 of them."""
    n = x.shape[axis] - window + 1
    power, width, start, total = x, 1, 0, None  # power holds sums of `width` neighbours
    while True:
        if window & width:
            part = power.narrow(axis, start, n)
            total = part if total is None else total + part
            start += width
        if 2 * width > window:
            break
        m = power.shape[axis] - width
        power = power.narrow(axis, 0, m) + power.narrow(axis, width, m)
        width *= 2
    assert total is not None
    return total


class _WindowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, window: int, axes: tuple[int, ...]) -> torch.Tensor:
        ctx.window, ctx.axes = window, axes
        for axis in axes:
            x = sliding_sum(F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [window // 2, window // 2]), window, axis)
        return x

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return window_sum(upstream, ctx.window, ctx.axes), None, None


def window_count(n: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """(n,) how many voxels of an axis of length n the window centred on each one holds."""
    at = torch.arange(n, device=like.device)
    return (torch.clamp(at + window // 2, max=n - 1) - torch.clamp(at - window // 2, min=0) + 1).to(like.dtype)


def chunks(n: int, size: int, device: torch.device) -> Iterator[slice]:
    """Slices of an axis of length n whose every step holds `size` numbers; elsewhere than on a CPU just one."""
    step = max(1, CHUNK // max(1, size)) if device.type == "cpu" else n
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
