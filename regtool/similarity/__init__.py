"""Losses by the names they have in the parameter file: similarities (higher is better) and regularities (lower is smoother)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from regtool.config.registration import Metric
from regtool.similarity.lg import lg
from regtool.similarity.lncc import lncc
from regtool.similarity.mi import mi
from regtool.similarity.mind import mind
from regtool.similarity.mse import mse
from regtool.similarity.ncc import ncc
from regtool.similarity.ngf import ngf
from regtool.similarity.regularization import bending, diffusion, folding, l2, tv

Similarities = dict[str, Callable[..., torch.Tensor]]
# (fixed, warped, the section of the parameter file, weight or None) -> scalar, not yet multiplied by the section's weight
SIMILARITIES: Similarities = {
    "lncc": lambda fixed, warped, metric, weight=None, information=False: lncc(fixed, warped, weight, metric.window or 9, information),
    "ncc": lambda fixed, warped, metric, weight=None: ncc(fixed, warped, weight),  # noqa: ARG005
    "mse": lambda fixed, warped, metric, weight=None: mse(fixed, warped, weight),  # noqa: ARG005
    "mi": lambda fixed, warped, metric, weight=None: mi(fixed, warped, weight, metric.bins),
    "mind": lambda fixed, warped, metric, weight=None: mind(fixed, warped, weight),  # noqa: ARG005
    "ngf": lambda fixed, warped, metric, weight=None: ngf(fixed, warped, weight),  # noqa: ARG005
    "lg": lambda fixed, warped, metric, weight=None: lg(fixed, warped, weight, metric.window or 7),
}
# what refining raises for the sake of one: more where windows match well, and where the whole image has its strongest edges
REFINEMENT_OBJECTIVES: Similarities = SIMILARITIES | {
    "lncc": lambda fixed, warped, metric, weight=None: (
        SIMILARITIES["lncc"](fixed, warped, metric, weight, information=True) + SIMILARITIES["ncc"](fixed, warped, metric, weight)
    )
}
REGULARIZATIONS: dict[str, Callable[..., torch.Tensor]] = {"diffusion": diffusion, "bending": bending, "tv": tv, "l2": l2, "folding": folding}


def similarity(
    fixed: torch.Tensor, warped: torch.Tensor, metric: Metric, weight: torch.Tensor | None = None, among: Similarities = SIMILARITIES
) -> torch.Tensor:
    """That of `metric.name`, of every channel by itself, and then their mean by `metric.channel_weights`; a scalar, higher is better.

    fixed, warped: (N, C, *shape); weight: (N, 1, *shape) >= 0, where similarity counts. One channel has no weight beside another.
    """
    one, channels = among[metric.name], fixed.shape[1]
    if channels == 1:
        return one(fixed, warped, metric, weight)
    shares = metric.channel_weights or (1.0,) * channels
    parts = [share * one(fixed[:, c : c + 1], warped[:, c : c + 1], metric, weight) for c, share in enumerate(shares)]
    return torch.stack(parts).sum() / sum(shares)
