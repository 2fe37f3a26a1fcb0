"""Losses by the names they have in the parameter file: similarities (higher is better) and regularities (lower is smoother)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from regtool.losses.descriptors import mind
from regtool.losses.gradients import lg, ngf
from regtool.losses.information import mi
from regtool.losses.regularity import bending, diffusion, folding, l2, tv
from regtool.losses.similarity import lncc, mse, ncc

# (fixed, warped, the section of the parameter file, weight or None) -> scalar, not yet multiplied by the section's weight
SIMILARITIES: dict[str, Callable[..., torch.Tensor]] = {
    "lncc": lambda fixed, warped, measure, weight=None: lncc(fixed, warped, weight, measure.window or 9),
    "ncc": lambda fixed, warped, measure, weight=None: ncc(fixed, warped, weight),  # noqa: ARG005
    "mse": lambda fixed, warped, measure, weight=None: mse(fixed, warped, weight),  # noqa: ARG005
    "mi": lambda fixed, warped, measure, weight=None: mi(fixed, warped, weight, measure.bins),
    "mind": lambda fixed, warped, measure, weight=None: mind(fixed, warped, weight),  # noqa: ARG005
    "ngf": lambda fixed, warped, measure, weight=None: ngf(fixed, warped, weight),  # noqa: ARG005
    "lg": lambda fixed, warped, measure, weight=None: lg(fixed, warped, weight, measure.window or 7),
}
REGULARITIES: dict[str, Callable[..., torch.Tensor]] = {"diffusion": diffusion, "bending": bending, "tv": tv, "l2": l2, "folding": folding}
