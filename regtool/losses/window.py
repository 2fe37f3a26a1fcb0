"""Sums over sliding windows, by doubling: a window of 9 costs four additions an axis, none of which can cancel (a running sum can)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

CHUNK = 1 << 18  # numbers handled at once on a CPU: they stay in its cache, several times faster than passing whole volumes through memory


def window_sum(x: torch.Tensor, window: int, axes: Iterable[int]) -> torch.Tensor:
    """The sum over `window` (odd) voxels centred on each, along every one of `axes` (non-negative); zeros beyond the ends. Same shape as x.

    It is its own adjoint.
    """
    for axis in axes:
        n = x.shape[axis]
        power = F.pad(x, [0, 0] * (x.dim() - 1 - axis) + [window // 2, window // 2])
        width, start, total = 1, 0, None  # power holds sums of `width` neighbours
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
        x = total
    return x


def window_count(n: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """(n,) how many voxels of an axis of length n the window centred on each one holds."""
    at = torch.arange(n, device=like.device)
    return (torch.minimum(at + window // 2, torch.tensor(n - 1)) - torch.clamp(at - window // 2, min=0) + 1).to(like.dtype)


def chunks(n: int, size: int, device: torch.device) -> Iterator[slice]:
    """Slices of an axis of length n whose every step holds `size` numbers; elsewhere than on a CPU just one."""
    step = max(1, CHUNK // max(1, size)) if device.type == "cpu" else n
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))
