"""Losses by the names they have in the parameter file: similarities (higher is better) and regularities (lower is smoother)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from regtool.losses.regularity import diffusion
from regtool.losses.similarity import lncc, mse, ncc
from regtool.parameters import Similarity

# (fixed, warped, the [similarity] section, weight or None) -> scalar, not yet multiplied by the section's weight
SIMILARITIES: dict[str, Callable[..., torch.Tensor]] = {
    "lncc": lambda fixed, warped, parameters=Similarity(), weight=None: lncc(fixed, warped, weight, parameters.window or 9),  # noqa: B008
    "ncc": lambda fixed, warped, parameters=None, weight=None: ncc(fixed, warped, weight),  # noqa: ARG005
    "mse": lambda fixed, warped, parameters=None, weight=None: mse(fixed, warped, weight),  # noqa: ARG005
}
REGULARITIES: dict[str, Callable[..., torch.Tensor]] = {"diffusion": diffusion}
