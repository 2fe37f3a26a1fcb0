"""How images are compared, and how smooth fields are. One file here that declares a `SIMILARITY` is one similarity; nothing has to be registered.

Similarities are higher where images are more alike; regularizations are lower where a field is smoother.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from regtool.config.choices import module_of, similarities
from regtool.config.registration import Metric
from regtool.errors import RegtoolError
from regtool.similarity.record import Similarity
from regtool.similarity.regularization import bending, diffusion, folding, l2, tv


class _Similarities(Mapping[str, Similarity]):
    """By the names they have in the parameter file."""

    def __getitem__(self, name: str) -> Similarity:
        if name not in similarities():
            raise KeyError(name)
        found = module_of(__name__, name).SIMILARITY
        if not isinstance(found, Similarity):
            raise RegtoolError(
                f"{__name__}.{name}: expected SIMILARITY to be a Similarity, got {type(found).__name__}", tip="docs/extending.md has an example"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(similarities())

    def __len__(self) -> int:
        return len(similarities())


SIMILARITIES: Mapping[str, Similarity] = _Similarities()
REGULARIZATIONS: dict[str, Callable[..., torch.Tensor]] = {"diffusion": diffusion, "bending": bending, "tv": tv, "l2": l2, "folding": folding}


def similarity(
    fixed: torch.Tensor, warped: torch.Tensor, metric: Metric, weight: torch.Tensor | None = None, *, objective: bool = False
) -> torch.Tensor:
    """That of `metric.name`, of every channel by itself, and then their mean by `metric.channel_weights`; a scalar, higher is better.

    fixed, warped: (N, C, *shape); weight: (N, 1, *shape) >= 0, where similarity counts. One channel has no weight beside another. objective: what
    refining raises for the sake of the similarity, instead of itself.
    """
    record, channels = SIMILARITIES[metric.name], fixed.shape[1]
    one = record.refinement_objective if objective else record
    if channels == 1:
        return one(fixed, warped, metric, weight)
    shares = metric.channel_weights or (1.0,) * channels
    parts = [share * one(fixed[:, c : c + 1], warped[:, c : c + 1], metric, weight) for c, share in enumerate(shares)]
    return torch.stack(parts).sum() / sum(shares)
