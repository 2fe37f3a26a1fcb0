"""A few numbers as a tensor on the device that needs them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch


def vector(values: Iterable[float], like: torch.Tensor) -> torch.Tensor:
    """(n,) the values, of the dtype and on the device of `like`, to be read only. Made once: a GPU would have to wait for each copy."""
    return _vector(tuple(values), like.dtype, like.device)


@functools.lru_cache(maxsize=256)
def _vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # it may be made while predicting and used while learning
        return torch.tensor(values, dtype=dtype, device=device)
