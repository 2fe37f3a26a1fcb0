"""The quality page of one registration: one HTML string that needs nothing beside it, readable in light and dark.

Numbers come from the report alone. Every text is escaped, and the policy in the head lets only our own script run, by its hash: neither a file
name nor a label can become markup, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from regtool.report.content import LandmarkErrors, PageContent
from regtool.report.figures import qc_png
from regtool.report.schema import Check, FailureReport, ImageFacts, Record, RegistrationReport, Scores, StageFacts, TimePoint
from regtool.report.volumes import viewer
from regtool.similarity import SIMILARITIES

__all__ = ["qc_html", "qc_png"]

TEMPLATE = Path(__file__).parent / "template"
VERDICTS = {"ok": ("good", "Passed"), "qc_failed": ("bad", "Quality control failed"), "failed": ("bad", "The run failed")}
NAMES = {
    "dice": "Dice",
    "hd95_mm": "Hausdorff distance, 95 %",
    "assd_mm": "mean surface distance",
    "tre_mm": "landmark error",
    "ncc": "global correlation",
    "mad_intensity": "mean absolute difference",
    "rmse_percent": "root mean square error",
    "nmse": "normalised mean squared error",
}
UNITS = {"_mm": " mm", "_percent": " %", "_mb": " MB"}
PARTS = {"mean": "mean", "median": "median", "p95": "95th percentile"}
CURVE = 560, 150  # pixels of the loss curve


def qc_html(content: PageContent) -> str:
    """The whole page; the same content always gives the same page."""
    report = content.report
    done = report if isinstance(report, RegistrationReport) else None
    tone, verdict = VERDICTS[report.status]
    style, script = ((TEMPLATE / name).read_text(encoding="utf-8") for name in ("style.css", "viewer.js"))
    volumes = viewer(content)
    checks = [_check(check) for check in done.qc] if done else []
    tables = (("Images", _images(report)), ("Run", _run(report)), ("Seconds", _seconds(report)))
    return str(
        environment().get_template("page.html").render(
            title=content.title,
            style=style,
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
            tone=tone,
            verdict=verdict,
            findings=_findings(report, checks),
            checks=checks,
            warnings=report.warnings or (),
            viewer=volumes,
            coarsened=volumes["size"] != volumes["native"],
            across=done is not None and _across_modalities(done.similarity.name),
            comparison=_comparison(done) if done else [],
            per_label=_per_label(done) if done else [],
            deformation=_deformation(done) if done else [],
            landmarks=_landmarks(done, content.landmarks) if done else [],
            stages=[_stage(stage) for stage in done.stages] if done else [],
            time_points=[_time_point(t, one) for t, one in enumerate(done.time_points or ())] if done else [],
            curve=_curve(done.losses or ()) if done else None,
            tables=[(heading, rows) for heading, rows in tables if rows],
            command=report.command or "",
        )
    )  # fmt: skip


@cache
def _across_modalities(name: str | None) -> bool:
    """Whether the similarity is one for two modalities: then a difference image would mislead."""
    return name is not None and name in SIMILARITIES and SIMILARITIES[name].across_modalities


def environment() -> Environment:
    """Templates of this package; every text is escaped."""
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FileSystemLoader(TEMPLATE))


def number(value: object) -> str:
    """Four digits for floats; whatever else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _check(check: Check) -> dict[str, Any]:
    """`max_tre_mm` as landmark error, 1.5 mm, at most 5 mm."""
    bare, unit = _bare(check.name.removeprefix("max_").removeprefix("min_"))
    words = {"dice": "mean Dice", "tre": "mean landmark error", "displacement": "largest displacement"}.get(bare, bare)
    bound = f"at {'least' if check.name.startswith('min_') else 'most'} {number(check.limit)}{unit}"
    return {"key": check.name, "name": words, "value": f"{number(check.value)}{unit}", "limit": bound, "passed": check.passed}


def _findings(report: RegistrationReport | FailureReport, checks: list[dict[str, Any]]) -> list[str]:
    """What stands under the verdict: the thresholds that failed, the error, or how many passed."""
    if isinstance(report, FailureReport):
        return [report.error.what, *([f"tip: {report.error.tip}"] if report.error.tip else [])]
    failed = [f"{c['name']}: {c['value']}, should be {c['limit']}" for c in checks if not c["passed"]]
    return failed or [f"{len(checks)} of {len(checks)} thresholds met" if checks else "no thresholds were set"]


def _comparison(report: RegistrationReport) -> list[tuple[str, str, str]]:
    """(name, before, after) of everything that was measured twice."""
    similarity = report.similarity
    rows = [(f"similarity, {similarity.name}", number(similarity.before), number(similarity.after))]
    before, after = report.before or Scores(), report.after or Scores()
    for key in Scores.model_fields:
        name, unit = NAMES.get(key, _bare(key)[0]), _bare(key)[1]
        start, end = getattr(before, key), getattr(after, key)
        found = [(name, start, end)]
        if isinstance(start, Record) and isinstance(end, Record):
            found = [(f"{name}, {words}", start[part], end[part]) for part, words in PARTS.items() if part in start and part in end]
        rows += [(title, f"{number(x)}{unit}", f"{number(y)}{unit}") for title, x, y in found if isinstance(x, float) and isinstance(y, float)]
    return rows


def _per_label(report: RegistrationReport) -> list[tuple[str, str, str]]:
    """(label, Dice before, Dice after)."""
    before, after = (scores.dice.labels if scores and scores.dice else {} for scores in (report.before, report.after))
    return [(label, number(before.get(label)), number(value)) for label, value in after.items()]


def _deformation(report: RegistrationReport) -> list[tuple[str, str]]:
    """Lengths and volume changes."""
    length, jacobian = report.displacement_mm, report.jacobian
    return [
        ("displacement, mean", f"{number(length.mean)} mm"),
        ("displacement, largest", f"{number(length.max)} mm"),
        ("folding", f"{number(jacobian.folding_percent)} % of the voxels"),
        ("Jacobian determinant, smallest", number(jacobian.min)),
        ("Jacobian determinant, largest", number(jacobian.max)),
        ("Jacobian determinant, mean", number(jacobian.mean)),
        ("Jacobian determinant, spread of its logarithm", number(jacobian.sd_log)),
    ]


def _landmarks(report: RegistrationReport, errors: LandmarkErrors | None) -> list[tuple[int, str, str]]:
    """(index, before, after) mm, the worst first; the index counts from 0."""
    before, after = (scores.tre_mm.each if scores and scores.tre_mm else () for scores in (report.before, report.after))
    if errors is None or not len(before) == len(after) == len(errors.points):
        return []
    return [(k, number(before[k]), number(after[k])) for k in sorted(range(len(after)), key=lambda k: -after[k])]


def _stage(stage: StageFacts) -> dict[str, Any]:
    """The alignment alone may be left out without harm: the headers agree already."""
    words = "kept" if stage.kept else "not used" if stage.name == "align" else "rolled back"
    facts = {"name": stage.name, "kept": stage.kept, "words": words, "reason": stage.reason}
    return {**facts, "similarity": number(stage.similarity), "seconds": number(stage.seconds)}


def _time_point(index: int, one: TimePoint) -> tuple[str, ...]:
    """Time, similarity before and after, folding, largest displacement."""
    similarity = number(one.similarity.before), number(one.similarity.after)
    return (str(index), *similarity, f"{number(one.jacobian.folding_percent)} %", f"{number(one.displacement_mm.max)} mm")


def _curve(losses: Sequence[float]) -> dict[str, Any] | None:
    """The points of an SVG line, what its ends are called, and how many steps there are."""
    steps = [(k, float(x)) for k, x in enumerate(losses) if math.isfinite(x)]
    if len(steps) < 3:
        return None
    width, height = CURVE
    low, high = min(x for _, x in steps), max(x for _, x in steps)
    span = high - low or 1.0
    points = " ".join(f"{k / (len(losses) - 1) * width:.1f},{(high - x) / span * height:.1f}" for k, x in steps)
    return {"points": points, "width": width, "height": height, "low": number(low), "high": number(high), "steps": len(losses)}


def _images(report: RegistrationReport | FailureReport) -> list[tuple[str, str]]:
    """Path, size, spacing, orientation and hash of both images."""
    both = (("fixed", report.fixed), ("moving", report.moving))
    return [row for role, facts in both if facts is not None for row in _image(role, facts) if row[1]]


def _image(role: str, facts: ImageFacts) -> list[tuple[str, str]]:
    size, spacing = " × ".join(str(n) for n in facts.size), " × ".join(number(s) for s in facts.spacing)
    named = [(role, facts.path or ""), ("size", size), ("spacing", f"{spacing} mm")]
    return [*named, ("axes", facts.orientation), ("SHA-256", (facts.sha256 or "")[:16])]


def _run(report: RegistrationReport | FailureReport) -> list[tuple[str, str]]:
    """Method, model, similarity, device, seed, memory, versions."""
    rows = [("method", report.method)] if report.method else []
    if isinstance(report, RegistrationReport):
        model, similarity = report.model, report.similarity
        rows += [("model", " ".join(x for x in (model.name, (model.sha256 or "")[:12]) if x))] if model.name else []
        rows += [("similarity", f"{similarity.name}: {similarity.reason}")] if similarity.reason else []
        rows += [("device", report.device), ("threads", str(report.threads))]
    rows += [("seed", str(report.seed))] if report.seed is not None else []
    rows += [("peak memory", f"{report.peak_memory_mb:.0f} MB")] if report.peak_memory_mb is not None else []
    return rows + list((report.versions or {}).items())


def _seconds(report: RegistrationReport | FailureReport) -> list[tuple[str, str]]:
    """Where the time went."""
    return [(name, f"{number(value)} s") for name, value in report.seconds.model_dump().items() if value or name == "total"]


def _bare(name: str) -> tuple[str, str]:
    """`surface_distance_mm` as (surface distance, mm)."""
    for end, unit in UNITS.items():
        if name.endswith(end):
            return name.removesuffix(end).replace("_", " "), unit
    return name.replace("_", " "), ""
