"""Losses by the names they have in the parameter file: similarities (higher is better) and regularities (lower is smoother)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from regtool.losses.descriptors import mind
from regtool.losses.gradients import lg, ngf
from regtool.losses.information import mi
from regtool.losses.regularity import bending, diffusion, folding, l2, tv
from regtool.losses.similarity import lncc, mse, ncc
from regtool.parameters import Measure

Similarities = dict[str, Callable[..., torch.Tensor]]
# (fixed, warped, the section of the parameter file, weight or None) -> scalar, not yet multiplied by the section's weight
SIMILARITIES: Similarities = {
    "lncc": lambda fixed, warped, measure, weight=None, information=False: lncc(fixed, warped, weight, measure.window or 9, information),
    "ncc": lambda fixed, warped, measure, weight=None: ncc(fixed, warped, weight),  # noqa: ARG005
    "mse": lambda fixed, warped, measure, weight=None: mse(fixed, warped, weight),  # noqa: ARG005
    "mi": lambda fixed, warped, measure, weight=None: mi(fixed, warped, weight, measure.bins),
    "mind": lambda fixed, warped, measure, weight=None: mind(fixed, warped, weight),  # noqa: ARG005
    "ngf": lambda fixed, warped, measure, weight=None: ngf(fixed, warped, weight),  # noqa: ARG005
    "lg": lambda fixed, warped, measure, weight=None: lg(fixed, warped, weight, measure.window or 7),
}
# what refining raises for the sake of one: more where windows match well, and where the whole image has its strongest edges
RAISED: Similarities = SIMILARITIES | {
    "lncc": lambda fixed, warped, measure, weight=None: (
        SIMILARITIES["lncc"](fixed, warped, measure, weight, information=True) + SIMILARITIES["ncc"](fixed, warped, measure, weight)
    )
}
REGULARITIES: dict[str, Callable[..., torch.Tensor]] = {"diffusion": diffusion, "bending": bending, "tv": tv, "l2": l2, "folding": folding}


def similarity(
    fixed: torch.Tensor, warped: torch.Tensor, measure: Measure, weight: torch.Tensor | None = None, among: Similarities = SIMILARITIES
) -> torch.Tensor:
    """That of `measure.name`, of every channel by itself, and then their mean by `measure.channel_weights`; a scalar, higher is better.

    fixed, warped: (N, C, *shape); weight: (N, 1, *shape) >= 0, where similarity counts. One channel has no weight beside another.
    """
    one, channels = among[measure.name], fixed.shape[1]
    if channels == 1:
        return one(fixed, warped, measure, weight)
    shares = measure.channel_weights or (1.0,) * channels
    parts = [share * one(fixed[:, c : c + 1], warped[:, c : c + 1], measure, weight) for c, share in enumerate(shares)]
    return torch.stack(parts).sum() / sum(shares)
