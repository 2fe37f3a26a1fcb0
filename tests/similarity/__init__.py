"""What the tests of the losses share."""

from __future__ import annotations

import torch


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shape_of(ndim: int) -> tuple[int, ...]:
    return (7, 6, 9)[:ndim]
