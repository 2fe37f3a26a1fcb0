"""Names of single numbers, and which of them should be high."""

from __future__ import annotations

import torch

from regtool.evaluation.summary import common_labels, lower_is_better, numbers, primary_metric, shape_scores
from regtool.geometry.grid import Grid
from regtool.geometry.images import Labels


def test_numbers() -> None:
    scores = {
        "dice": {"mean": 0.5, "labels": {"1": 0.4, "17": 0.6}},
        "tre_mm": {"mean": 2.0, "p95": 3.0, "each": (1.0, 3.0)},
        "jacobian": {"min": 0.1, "mean": 1.0, "folding_percent": 0.0},
        "ncc": 0.9,
        "num_foldings": 0,
    }
    assert numbers(scores) == {
        "dice": 0.5, "dice.1": 0.4, "dice.17": 0.6, "tre_mm": 2.0, "tre_mm.p95": 3.0, "jacobian.min": 0.1, "jacobian.mean": 1.0,
        "jacobian.folding_percent": 0.0, "ncc": 0.9, "num_foldings": 0.0,
    }  # fmt: skip


def test_direction() -> None:
    assert [name for name in ("dice", "dice.17", "ncc", "tre_mm", "mad_intensity", "mi", "hd95_mm.1") if lower_is_better(name)] == [
        "tre_mm", "mad_intensity", "hd95_mm.1",
    ]  # fmt: skip
    assert (
        primary_metric(["ncc", "tre_mm", "dice"]) == "dice" and primary_metric(["ncc", "tre_mm"]) == "tre_mm" and primary_metric(["sdlogj"]) is None
    )


def test_labels_in_common() -> None:
    grid = Grid.regular((2, 3))
    a, b = (Labels(torch.tensor(v)[None], grid) for v in ([[0, 1, 2], [3, 3, 0]], [[0, 1, 4], [3, 0, 0]]))
    assert common_labels(a, b) == {1, 3}
    assert shape_scores(a, b, ()) == {}
    assert shape_scores(a, b, (1,))["hd_mm"] == {"mean": 0.0, "labels": {"1": 0.0}}
