"""The scores of many pairs: means over them, one run against another, and which pairs are worst."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regtool.evaluation.statistics import Mean, Paired, mean_interval, paired
from regtool.evaluation.summary import lower_is_better, numbers, primary_metric

COLUMNS = ("id", "run", "metric", "value")
Scores = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair. before: its scores as the headers say; runs: after each run, by name."""

    id: str
    before: Scores
    runs: Mapping[str, Scores]


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """A run against the first one. metrics: by the names that `numbers` gives, where both have them."""

    first: str
    second: str
    metrics: dict[str, Paired]


@dataclass(frozen=True, kw_only=True)
class RunsSummary:
    """before, runs: means by metric; compared: each run but the first; cases: the worst by `worst_by` first, as they came where that is None."""

    before: dict[str, Mean]
    runs: dict[str, dict[str, Mean]]
    compared: tuple[RunComparison, ...]
    worst_by: str | None
    cases: tuple[Case, ...]


def summarized(cases: Sequence[Case], names: Sequence[str]) -> RunsSummary:
    """names: of the runs, in their order; every case has them all. Of several runs, the worst case is where the last lost most to the first."""
    flat = [{"before": numbers(case.before), **{name: numbers(case.runs[name]) for name in names}} for case in cases]
    columns = {name: _columns([row[name] for row in flat]) for name in ("before", *names)}
    means = {name: {metric: mean_interval(list(values.values())) for metric, values in found.items()} for name, found in columns.items()}
    compared = []
    for other in names[1:]:
        first, second = columns[names[0]], columns[other]
        metrics = {m: _compared(first[m], second[m]) for m in first if m in second}
        compared.append(RunComparison(first=names[0], second=other, metrics=metrics))
    last = names[-1] if names else "before"
    metric = primary_metric(columns[last])
    ordered = list(cases)
    if metric is not None:
        sign = -1 if lower_is_better(metric) else 1

        def badness(k: int) -> float:
            """Of two runs, how much the last one is worse than the first; of one, its value."""
            value = flat[k][last].get(metric, math.nan) - (flat[k][names[0]].get(metric, math.nan) if len(names) > 1 else 0)
            return -math.inf if math.isnan(value) else sign * value  # what is no number comes first

        ordered = [cases[k] for k in sorted(range(len(cases)), key=badness)]
    runs = {name: means[name] for name in names}
    return RunsSummary(before=means["before"], runs=runs, compared=tuple(compared), worst_by=metric, cases=tuple(ordered))


def cases_csv(cases: Sequence[Case]) -> str:
    """One row a pair, run and metric; the run `before` is the state before any."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in cases:
        for run, scores in (("before", case.before), *case.runs.items()):
            writer.writerows((case.id, run, metric, repr(value)) for metric, value in numbers(scores).items())
    return out.getvalue()


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """By metric the value of every row that has it, in the order of first appearance."""
    out: dict[str, dict[int, float]] = {}
    for k, row in enumerate(rows):
        for metric, value in row.items():
            out.setdefault(metric, {})[k] = value
    return out


def _compared(first: Mapping[int, float], second: Mapping[int, float]) -> Paired:
    both = [k for k in first if k in second]
    return paired([first[k] for k in both], [second[k] for k in both])
