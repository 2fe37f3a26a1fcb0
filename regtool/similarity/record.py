"""What is known of a similarity: one record a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from regtool.config.registration import SimilarityMetric

Compare = Callable[[torch.Tensor, torch.Tensor, "SimilarityMetric", torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """One way to compare images; calling it is calling `metric`.

    metric: (fixed, warped, section, weight) to a scalar, higher is better, differentiable; fixed, warped: (N, C, *shape); section: of the parameter
    file (window, bins); weight: (N, 1, *shape) >= 0, where it counts, or None. objective: what refining raises for its sake; left out: the metric.
    volumes: float32 images of the finest level, gradient included, that refining by it takes. across_modalities: whether it is for two contrasts.
    windowed: whether it compares windows, of which those that show nothing in the fixed image tell nothing, so that they need not be refined.
    """

    metric: Compare
    objective: Compare | None = None
    volumes: int
    across_modalities: bool = False
    windowed: bool = False

    def __call__(self, fixed: torch.Tensor, warped: torch.Tensor, section: SimilarityMetric, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The metric."""
        return self.metric(fixed, warped, section, weight)

    def refinement_objective(
        self, fixed: torch.Tensor, warped: torch.Tensor, section: SimilarityMetric, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What refining raises."""
        return (self.objective or self.metric)(fixed, warped, section, weight)
