"""What a registration knows at its start, and what it has found at its end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regtool.evaluation.summary import annotation_metrics
from regtool.geometry.images import Annotations, Image, Labels
from regtool.geometry.inversion import Residual
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.methods.resolve import Resolved
from regtool.registration.pipeline import Registered
from regtool.runtime import Clock


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What a run knows before it registers.

    fixed_source, moving_source: where the images come from, None for images in memory; before: the transform at the start; warnings: grows while the
    run goes on; started: `time.perf_counter()`.
    """

    fixed_source: Path | None
    moving_source: Path | None
    fixed: Image
    moving: Image
    annotations: Annotations
    before: Transform
    resolved: Resolved
    command: str
    warnings: list[str]
    clock: Clock
    started: float

    @property
    def title(self) -> str:
        """`moving.mha to fixed.mha`, without folders."""
        return " to ".join(source.resolve().name if source is not None else "image in memory" for source in (self.moving_source, self.fixed_source))

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.started


@dataclass(frozen=True, kw_only=True)
class AnnotationScores:
    """Dice and target registration error before and after, empty where nothing was given; warped_labels: the moving labels on the fixed grid."""

    before: dict[str, Any]
    after: dict[str, Any]
    warped_labels: Labels | None

    @classmethod
    def of(cls, annotations: Annotations, before: Transform, after: Transform) -> AnnotationScores:
        """Through both transforms; labels are carried with the nearest neighbour."""
        both = annotations.labels, annotations.landmarks
        start, _ = annotation_metrics(*both, before, shapes=False)
        end, warped = annotation_metrics(*both, after, shapes=False)
        return cls(before=start, after=end, warped_labels=warped)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has found. warped: the moving image, all its time points; done: one for each time point that was registered.

    inverses: from moving to fixed for each of them, empty where none was asked for.
    """

    start: RunStart
    device: torch.device
    warped: Image
    done: tuple[Registered, ...]
    inverses: tuple[tuple[DisplacementField, Residual], ...]
    scores: AnnotationScores
