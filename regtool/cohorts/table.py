"""The table of results of a cohort."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regtool.cohorts.folder import PairFolder
from regtool.io.files import write_text

COLUMNS = (
    "id", "status", "error", "exit_code", "seconds", "similarity", "similarity_before", "similarity_after", "dice_before", "dice_after",
    "tre_mm_before", "tre_mm_after", "folding_percent", "jacobian_min", "jacobian_sd_log", "displacement_mm_mean", "displacement_mm_max",
    "warnings", "fixed", "moving",
)  # fmt: skip


def row_of(pair: PairFolder) -> dict[str, Any]:
    """One row of the table, by column; `status` is ok, qc_failed, failed or not_run. What is not known is left out."""
    row: dict[str, Any] = {"id": pair.id, "status": "not_run", "fixed": str(pair.inputs["fixed"]), "moving": str(pair.inputs["moving"])}
    report = pair.report()
    if report is None:
        failure = pair.failure()
        if failure is None:
            return row
        error = failure.error
        return row | {"status": "failed", "error": error.what, "exit_code": error.exit_code, "seconds": failure.seconds.total}
    similarity, jacobian, displacement = report.similarity, report.jacobian, report.displacement_mm
    row |= {"status": report.status, "exit_code": report.exit_code, "seconds": report.seconds.total}
    row |= {"similarity": similarity.name, "similarity_before": similarity.before, "similarity_after": similarity.after}
    row |= {"folding_percent": jacobian.folding_percent, "jacobian_min": jacobian.min, "jacobian_sd_log": jacobian.sd_log}
    row |= {"displacement_mm_mean": displacement.mean, "displacement_mm_max": displacement.max, "warnings": len(report.warnings)}
    failed = [f"{check.name} is {check.value:.4g}, limit {check.limit:g}" for check in report.qc if not check.passed]
    row |= {"error": "; ".join(failed)} if failed else {}
    for when, scores in (("before", report.before), ("after", report.after)):
        if scores is not None and scores.dice is not None:
            row |= {f"dice_{when}": scores.dice.mean, **{f"dice_{when}_{label}": value for label, value in scores.dice.labels.items()}}
        if scores is not None and scores.tre_mm is not None:
            row[f"tre_mm_{when}"] = scores.tre_mm.mean
    return {column: value for column, value in row.items() if value == value}  # what is no number is not known


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """CSV, UTF-8: `COLUMNS`, then Dice label by label, in the order of the labels."""
    found = {name for row in rows for name in row} - {*COLUMNS}
    columns = [*COLUMNS, *sorted(found, key=lambda name: (int(name.rpartition("_")[2]), name.split("_")[1] == "after"))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else re.sub(r"\s+", " ", value) if isinstance(value, str) else value
