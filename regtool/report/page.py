"""The quality page of one registration: one HTML string that needs nothing beside it, readable in light and dark.

Numbers come from the report alone. Every text is escaped, and the policy in the head lets only our own script run, by its hash: neither a file
name nor a label can become markup, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from regtool.report.content import LandmarkErrors, PageContent
from regtool.report.figures import qc_png
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
CURVE = 560, 150  # pixels of the loss curve


def qc_html(content: PageContent) -> str:
    """The whole page; the same content always gives the same page."""
    report = content.report
    status = str(report.get("status", "done"))
    tone, verdict = VERDICTS.get(status, ("warn", status.replace("_", " ")))
    style, script = ((TEMPLATE / name).read_text(encoding="utf-8") for name in ("style.css", "viewer.js"))
    volumes = viewer(content)
    checks = [_check(*threshold) for threshold in content.thresholds]
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
            warnings=report.get("warnings") or [],
            viewer=volumes,
            coarsened=volumes["size"] != volumes["native"],
            across=_across_modalities((report.get("similarity") or {}).get("name")),
            comparison=_comparison(report),
            per_label=_per_label(report),
            deformation=_deformation(report),
            landmarks=_landmarks(report, content.landmarks),
            stages=[_stage(s) for s in report.get("stages") or []],
            time_points=[_time_point(t, one) for t, one in enumerate(report.get("time_points") or [])],
            curve=_curve(report.get("losses") or []),
            tables=[(heading, rows) for heading, rows in (("Images", _images(report)), ("Run", _run(report)), ("Seconds", _seconds(report))) if rows],
            command=_command(report.get("command")),
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


def _check(name: str, value: float, limit: float, passed: bool) -> dict[str, Any]:
    """`max_tre_mm` as landmark error, 1.5 mm, at most 5 mm."""
    bare, unit = _bare(name.removeprefix("max_").removeprefix("min_"))
    words = {"dice": "mean Dice", "tre": "mean landmark error", "displacement": "largest displacement"}.get(bare, bare)
    bound = f"at {'least' if name.startswith('min_') else 'most'} {number(limit)}{unit}"
    return {"key": name, "name": words, "value": f"{number(value)}{unit}", "limit": bound, "passed": passed}


def _findings(report: dict[str, Any], checks: list[dict[str, Any]]) -> list[str]:
    """What stands under the verdict: the thresholds that failed, the error, or how many passed."""
    error = report.get("error") or {}
    if error:
        return [f"{prefix}{error[key]}" for key, prefix in (("what", ""), ("tip", "tip: ")) if error.get(key)]
    failed = [f"{c['name']}: {c['value']}, should be {c['limit']}" for c in checks if not c["passed"]]
    return failed or [f"{len(checks)} of {len(checks)} thresholds met" if checks else "no thresholds were set"]


def _comparison(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before, after) of everything that was measured twice."""
    rows: list[tuple[str, str, str]] = []
    similarity = report.get("similarity") or {}
    if similarity:
        rows.append((f"similarity, {similarity.get('name', '')}", number(similarity.get("before")), number(similarity.get("after"))))
    before, after = report.get("before") or {}, report.get("after") or {}
    for key, value in after.items():
        name, unit = NAMES.get(key, _bare(key)[0]), _bare(key)[1]
        for part in ("mean", "median", "p95") if isinstance(value, dict) else ("",):
            pair = [(x.get(key) or {}).get(part) if part else x.get(key) for x in (before, after)]
            if all(isinstance(x, int | float) for x in pair):
                title = f"{name}, {'95th percentile' if part == 'p95' else part}" if part else name
                rows.append((title, *(f"{number(x)}{unit}" for x in pair)))  # type: ignore[arg-type]
    return rows


def _per_label(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, Dice before, Dice after)."""
    before, after = (((report.get(when) or {}).get("dice") or {}).get("labels") or {} for when in ("before", "after"))
    return [(str(label), number(before.get(label)), number(value)) for label, value in after.items()]


def _deformation(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Lengths and volume changes."""
    length, jacobian = report.get("displacement_mm") or {}, report.get("jacobian") or {}
    rows = [(f"displacement, {words}", f"{number(length[key])} mm") for key, words in (("mean", "mean"), ("max", "largest")) if key in length]
    if "folding_percent" in jacobian:
        rows.append(("folding", f"{number(jacobian['folding_percent'])} % of the voxels"))
    words = {"min": "smallest", "max": "largest", "mean": "mean", "sd_log": "spread of its logarithm"}
    return rows + [(f"Jacobian determinant, {words[key]}", number(jacobian[key])) for key in words if key in jacobian]


def _landmarks(report: dict[str, Any], errors: LandmarkErrors | None) -> list[tuple[int, str, str]]:
    """(index, before, after) mm, the worst first; the index counts from 0."""
    before, after = (((report.get(when) or {}).get("tre_mm") or {}).get("each") or [] for when in ("before", "after"))
    if errors is None or not len(before) == len(after) == len(errors.points):
        return []
    return [(k, number(before[k]), number(after[k])) for k in sorted(range(len(after)), key=lambda k: -after[k])]


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    """The alignment alone may be left out without harm: the headers agree already."""
    kept = bool(stage.get("kept"))
    words = "kept" if kept else "not used" if stage.get("name") == "align" else "rolled back"
    numbers = {key: number(stage[key]) if stage.get(key) is not None else "" for key in ("similarity", "seconds")}
    return {"name": str(stage.get("name")), "kept": kept, "words": words, "reason": str(stage.get("reason") or ""), **numbers}


def _time_point(index: int, one: dict[str, Any]) -> tuple[str, ...]:
    """Time, similarity before and after, folding, largest displacement."""
    similarity, values = one["similarity"], (one["jacobian"]["folding_percent"], one["displacement_mm"]["max"])
    return (str(index), number(similarity["before"]), number(similarity["after"]), f"{number(values[0])} %", f"{number(values[1])} mm")


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


def _images(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Path, size, spacing, orientation and hash of both images."""
    rows = []
    for role in ("fixed", "moving"):
        facts = report.get(role) or {}
        size = " × ".join(str(n) for n in facts.get("size") or [])
        spacing = " × ".join(number(s) for s in facts.get("spacing") or [])
        parts = (
            (role, str(facts.get("path") or "")), ("size", size), ("spacing", f"{spacing} mm" if spacing else ""),
            ("axes", str(facts.get("orientation") or "")), ("SHA-256", (facts.get("sha256") or "")[:16]),
        )  # fmt: skip
        rows += [(name, value) for name, value in parts if value]
    return rows


def _run(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Method, model, similarity, device, seed, memory, versions."""
    model, similarity = report.get("model") or {}, report.get("similarity") or {}
    rows = [("method", str(report["method"]))] if report.get("method") else []
    if model.get("name"):
        rows.append(("model", " ".join(str(x) for x in (model["name"], (model.get("sha256") or "")[:12]) if x)))
    if similarity.get("reason"):
        rows.append(("similarity", f"{similarity.get('name')}: {similarity['reason']}"))
    rows += [(key, str(report[key])) for key in ("device", "threads", "seed") if report.get(key) is not None]
    if report.get("peak_memory_mb") is not None:
        rows.append(("peak memory", f"{report['peak_memory_mb']:.0f} MB"))
    return rows + [(str(name), str(version)) for name, version in (report.get("versions") or {}).items()]


def _seconds(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the time went."""
    return [(name, f"{number(value)} s") for name, value in (report.get("seconds") or {}).items() if value or name == "total"]


def _command(command: object) -> str:
    """As it was typed, whether the report holds one string or the words."""
    return shlex.join(str(word) for word in command) if isinstance(command, list | tuple) else str(command or "")


def _bare(name: str) -> tuple[str, str]:
    """`surface_distance_mm` as (surface distance, mm)."""
    for end, unit in UNITS.items():
        if name.endswith(end):
            return name.removesuffix(end).replace("_", " "), unit
    return name.replace("_", " "), ""
