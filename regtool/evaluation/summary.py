"""The metrics of one pair as they stand in reports: nested dictionaries whose keys carry the unit."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from regtool.evaluation.landmarks import exchanged, tre
from regtool.evaluation.lesion import axes
from regtool.evaluation.overlap import BACKGROUND, counts, dice
from regtool.evaluation.surface import surface_distances
from regtool.geometry.images import Labels, Landmarks
from regtool.geometry.sampling import warp_labels
from regtool.geometry.transforms import Transform

log = logging.getLogger("regtool")

LABEL_INTERPOLATION = "nearest"
HIGHER_IS_BETTER = ("dice", "ncc", "lncc", "mi", "ssim")


def annotation_metrics(
    labels: tuple[Labels, Labels] | None, landmarks: tuple[Landmarks, Landmarks] | None, transform: Transform, shapes: bool
) -> tuple[dict[str, Any], Labels | None]:
    """What labels and landmarks (of the fixed, of the moving image) say of a transform, and the moving labels on the fixed ones' grid.

    `dice` and `tre_mm`; shapes: surface distances and axes of the labels too, which take seconds on a whole brain. Labels are carried with the
    nearest neighbour. Raises GeometryError where landmarks or dimensions do not fit; warns where the landmarks look exchanged.
    """
    out: dict[str, Any] = {}
    warped = None
    if labels is not None:
        fixed, moving = labels
        wanted = common_labels(fixed, moving)
        if not wanted:
            log.warning("no label but the background is in both label maps")
        warped = warp_labels(moving, transform, fixed.grid, vote=False)
        out |= overlap_scores(fixed, warped, wanted)
        if shapes and len(fixed.data) == len(moving.data) == 1:
            out |= shape_scores(fixed, warped, wanted)
    if landmarks is not None:
        error = tre(*landmarks, transform)
        out["tre_mm"] = asdict(error)
        if exchanged(*landmarks, transform, error):
            log.warning(
                "fixed and moving landmarks seem to be exchanged: the other way round their error is less than half of the %.3g mm", error.mean
            )
    return out, warped


def common_labels(fixed: Labels, moving: Labels) -> set[int]:
    """The labels that count: those in both maps before either was warped, without the background."""
    return (counts(fixed.data.flatten()).keys() & counts(moving.data.flatten()).keys()) - {BACKGROUND}


def overlap_scores(fixed: Labels, warped: Labels, labels: Iterable[int]) -> dict[str, Any]:
    """`dice {mean, labels {}}`."""
    found = dice(fixed, warped, labels)
    return {"dice": {"mean": found.mean, "labels": {str(k): v for k, v in found.labels.items()}}}


def shape_scores(fixed: Labels, warped: Labels, labels: Iterable[int]) -> dict[str, Any]:
    """`hd_mm, hd95_mm, sd95_mm, assd_mm, masd_mm, major_axis_difference_mm, minor_axis_difference_mm`, each `{mean, labels {}}`.

    A label that the warped map has lost is infinitely far away, and so is the mean: squeezing labels away does not pay.
    """
    wanted = sorted(labels)
    if not wanted:
        return {}
    far = surface_distances(fixed, warped, wanted)
    out = {f"{name}_mm": _by_label({k: getattr(d, name) for k, d in far.items()}) for name in ("hd", "hd95", "sd95", "assd", "masd")}
    sizes = [axes(one, wanted) for one in (fixed, warped)]
    for name in ("major", "minor"):
        lengths = [{k: getattr(x, name) for k, x in size.items()} for size in sizes]
        out[f"{name}_axis_difference_mm"] = _by_label({k: abs(lengths[0][k] - lengths[1].get(k, math.inf)) for k in wanted})
    return out


def _by_label(values: Mapping[int, float]) -> dict[str, Any]:
    return {"mean": sum(values.values()) / len(values), "labels": {str(k): v for k, v in values.items()}}


def numbers(scores: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """One number a metric: `dice`, `dice.3` (label 3), `tre_mm`, `tre_mm.p95`, `jacobian.min` ...; the mean has the name of its metric alone."""
    out: dict[str, float] = {}
    for name, value in scores.items():
        key = f"{before}.{name}" if before else name
        if isinstance(value, Mapping):
            inner = numbers(value, "")
            for part, number in inner.items():
                out[key if part == "mean" and "min" not in inner else f"{key}.{part.removeprefix('labels.')}"] = number
        elif isinstance(value, int | float):
            out[key] = float(value)
    return out


def lower_is_better(name: str) -> bool:
    """Of a name that `numbers` gives. Of the Jacobian only folding and spread are good or bad; nothing else is asked for."""
    return name.split(".")[0] not in HIGHER_IS_BETTER


def primary_metric(names: Iterable[str]) -> str | None:
    """The metric by which cases are ordered: Dice where there are labels, else the landmark error, else correlation."""
    known = set(names)
    return next((name for name in ("dice", "tre_mm", "ncc") if name in known), None)
