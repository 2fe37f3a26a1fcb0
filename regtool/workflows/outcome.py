"""What register found, as a report, and as the folder it writes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from regtool.config.resolve import dump
from regtool.config.schema import Quality
from regtool.evaluation.summary import LABEL_INTERPOLATION, annotation_metrics
from regtool.geometry.images import Image, Labels, Landmarks
from regtool.geometry.inversion import invert
from regtool.geometry.sampling import transform_points, warp_labels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.files import explained, sha256, staged_folder, strict_json, write_text
from regtool.io.images import write_displacement, write_image, write_labels
from regtool.io.transforms import write_transform
from regtool.methods.resolve import Resolved
from regtool.registration.pair import Annotations
from regtool.registration.pipeline import Registered
from regtool.report.content import Frame, LandmarkErrors, PageContent
from regtool.runtime import Clock, peak_memory_mb, versions

Threshold = tuple[str, float, float, bool]  # name, value, limit, passed


@dataclass(frozen=True)
class Evaluation:
    """before, after: as in report.json, empty where nothing was given; warped_labels: the moving labels on the fixed grid."""

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    warped_labels: Labels | None = None


@dataclass(frozen=True)
class Outcome:
    """Everything a run found. fixed_source, moving_source: where the images come from, None for images in memory; before: its first transform."""

    fixed_source: Path | None
    moving_source: Path | None
    fixed: Image
    moving: Image
    warped: Image
    done: tuple[Registered, ...]
    resolved: Resolved
    device: torch.device
    evaluation: Evaluation
    command: str
    warnings: list[str]
    clock: Clock
    started: float
    annotations: Annotations
    before: Transform


class OutputHook(Protocol):
    """What a verb that does more than `register` adds to it."""

    verb: str

    def write(self, outcome: Outcome, report: dict[str, Any], stage: Path, name: str) -> dict[str, str]:
        """Puts files into the folder that shall be called `name`, and into the report what is to say of them; their names by kind."""


def evaluated(labels: tuple[Labels, Labels] | None, landmarks: tuple[Landmarks, Landmarks] | None, start: Transform, found: Transform) -> Evaluation:
    """Dice (labels carried with the nearest neighbour) and target registration error before (`start`) and after (`found`)."""
    before, _ = annotation_metrics(labels, landmarks, start, shapes=False)
    after, warped = annotation_metrics(labels, landmarks, found, shapes=False)
    return Evaluation(before, after, warped)


def thresholds(outcome: Outcome) -> list[Threshold]:
    """The `[qc]` limits against the worst time point."""
    limits: Quality = outcome.resolved.parameters.qc
    after, done = outcome.evaluation.after, outcome.done
    values: list[tuple[str, float | None, float | None, int]] = [
        ("max_folding_percent", max(d.jacobian.folding_percent for d in done), limits.max_folding_percent, 1),
        ("min_similarity_gain", min(d.similarity[1] - d.similarity[0] for d in done), limits.min_similarity_gain, -1),
        ("max_displacement_mm", max(float(d.displacement.magnitude().max()) for d in done), limits.max_displacement_mm, 1),
        ("min_dice", after.get("dice", {}).get("mean"), limits.min_dice, -1),
        ("max_tre_mm", after.get("tre_mm", {}).get("mean"), limits.max_tre_mm, 1),
    ]
    return [(name, value, limit, sign * (value - limit) <= 0) for name, value, limit, sign in values if value is not None and limit is not None]


def report_of(outcome: Outcome, checks: list[Threshold]) -> dict[str, Any]:
    """report.json, but for `outputs` and the seconds that are not over yet. Similarities: higher is better."""
    parameters, first = outcome.resolved.parameters, outcome.done[0]
    report: dict[str, Any] = {
        "status": "ok" if all(passed for *_, passed in checks) else "qc_failed",
        "method": parameters.method or "refine",
        "model": _model(outcome.resolved),
        "fixed": described(outcome.fixed_source, outcome.fixed),
        "moving": described(outcome.moving_source, outcome.moving),
        "outputs": {},
        **_found(first),
        "seconds": seconds(outcome),
        "peak_memory_mb": peak_memory_mb(),
        "planned_memory_mb": round(first.plan.peak_bytes / 2**20, 1),
        "grids": {
            name: {"size": list(grid.size), "spacing": list(grid.spacing)}
            for name, grid in (("network", first.plan.network_grid), ("refine", first.plan.refine_grid))
            if grid is not None
        },
        "device": str(outcome.device),
        "threads": torch.get_num_threads(),
        "seed": parameters.run.seed,
        "versions": versions(),
        "command": outcome.command,
        "warnings": outcome.warnings,
        "qc": [{"name": n, "value": v, "limit": lim, "passed": p} for n, v, lim, p in checks],
    }
    if len(outcome.done) > 1:
        report["time_points"] = [{"name": f"time point {t}", **_found(d)} for t, d in enumerate(outcome.done)]
    if first.losses:
        report["losses"] = [round(x, 6) for x in first.losses]
    for when, values in (("before", outcome.evaluation.before), ("after", outcome.evaluation.after)):
        if values:
            report[when] = {**values, "label_interpolation": LABEL_INTERPOLATION} if "dice" in values else values
    return report


def write_folder(outcome: Outcome, report: dict[str, Any], checks: list[Threshold], output: Path, extra: OutputHook | None = None) -> None:
    """All of the output folder or nothing; `report` gets its `outputs`, `seconds` and, with an inverse, `inverse_residual_mm`."""
    run, done, clock = outcome.resolved.parameters.run, outcome.done, outcome.clock
    with staged_folder(output) as stage:
        with clock("write"):
            files: dict[str, Any] = {"warped": f"warped.{run.format}"}
            write_image(outcome.warped, stage / files["warped"])
            for t, one in enumerate(done):
                for kind, name in _write_one(outcome, one, stage, f"_t{t:03d}" if len(done) > 1 else "", report).items():
                    files[kind] = name if len(done) == 1 else [*files.get(kind, []), name]
            if outcome.evaluation.warped_labels is not None:
                files["warped_labels"] = f"warped_labels.{run.format}"
                write_labels(outcome.evaluation.warped_labels, stage / files["warped_labels"])
            pair = f"{_name(outcome.fixed_source)} {_name(outcome.moving_source)}"
            opening = f"Repeats this registration:\nregtool {extra.verb if extra else 'register'} {pair} -p parameters.toml -o AGAIN"
            write_text(stage / "parameters.toml", dump(outcome.resolved.parameters, opening, outcome.resolved.engine_parameters))
            files |= extra.write(outcome, report, stage, output.resolve().name) if extra else {}
        report["folder"], report["outputs"] = str(output.resolve()), files
        if run.qc:
            files["qc"] = "qc.html"
            with clock("qc"):
                _write_page(outcome, report, checks, stage)
        report["seconds"], report["peak_memory_mb"] = seconds(outcome), peak_memory_mb()
        write_text(stage / "report.json", strict_json(report) + "\n")


def _write_one(outcome: Outcome, one: Registered, stage: Path, tag: str, report: dict[str, Any]) -> dict[str, str]:
    """The field, the transform and perhaps the inverse of one time point; their names by kind."""
    run = outcome.resolved.parameters.run
    files = {"displacement": f"displacement{tag}.{run.format}", "transform": f"transform{tag}.h5"}
    write_displacement(one.displacement, stage / files["displacement"])
    write_transform(one.transform, stage / files["transform"], outcome.fixed.grid)
    if run.inverse:
        inverse, residual = invert(one.transform, outcome.moving.grid)
        files["inverse"] = f"inverse_displacement{tag}.{run.format}"
        write_displacement(inverse, stage / files["inverse"])
        found = {"mean": residual.mean_mm, "max": residual.max_mm, "covered_percent": residual.covered_percent}
        report["inverse_residual_mm"] = found if not tag else [*report.get("inverse_residual_mm", []), found]
    return files


def _write_page(outcome: Outcome, report: dict[str, Any], checks: list[Threshold], stage: Path) -> None:
    report["seconds"] = seconds(outcome)
    frames = tuple(Frame(f"{t}", d.start.grey(), d.warped.grey(), d.displacement, d.determinant) for t, d in enumerate(outcome.done))
    title = page_title(outcome.fixed_source, outcome.moving_source)
    write_page(PageContent(title, outcome.fixed.grey(), frames, report, checks, _contours(outcome), _errors(outcome)), stage)


def write_page(content: PageContent, folder: Path) -> None:
    """qc.png and qc.html into an existing folder."""
    from regtool.report.page import qc_html, qc_png  # a quarter of a second, with matplotlib

    with explained(folder):
        (folder / "qc.png").write_bytes(qc_png(content))
        (folder / "qc.html").write_text(qc_html(content), encoding="utf-8")


def _contours(outcome: Outcome) -> tuple[Labels, Labels, Labels] | None:
    """Of the fixed image, and of the moving one before and after."""
    from regtool.report.volumes import display_grid

    if outcome.annotations.labels is None or outcome.evaluation.warped_labels is None:
        return None
    fixed, moving = outcome.annotations.labels
    coarse = display_grid(outcome.fixed.grid)  # a full resampling would take longer than the rest of the page
    return fixed, warp_labels(moving, outcome.before, coarse, vote=False), outcome.evaluation.warped_labels


def _errors(outcome: Outcome) -> LandmarkErrors | None:
    if outcome.annotations.landmarks is None:
        return None
    fixed, moving = (one.points for one in outcome.annotations.landmarks)
    before, after = (moving - transform_points(t, fixed) for t in (outcome.before, outcome.done[0].transform))
    return LandmarkErrors(fixed, before, after)


def seconds_of(clock: Clock, total: float) -> dict[str, float]:
    """By stage; `start` is the time before the workflow began (imports), `total` all of it."""
    names = ("start", "read", "align", "network", "refine", "warp", "write", "qc")
    return {**{name: round(clock.seconds.get(name, 0.0), 3) for name in names}, "total": round(total, 3)}


def seconds(outcome: Outcome) -> dict[str, float]:
    """Those of a run that is not over yet."""
    return seconds_of(outcome.clock, time.perf_counter() - outcome.started)


def _found(one: Registered) -> dict[str, Any]:
    return {
        "similarity": {"name": one.metric[0], "reason": one.metric[1], "before": one.similarity[0], "after": one.similarity[1]},
        "jacobian": asdict(one.jacobian),
        "displacement_mm": {"mean": float(one.displacement.magnitude().mean()), "max": float(one.displacement.magnitude().max())},
        "stages": [asdict(s) | {"seconds": round(s.seconds, 3)} for s in one.stages],
    }


def _model(resolved: Resolved) -> dict[str, str | None]:
    if resolved.card is not None and resolved.model is not None:
        return {"name": resolved.card["name"], "sha256": sha256(resolved.model)}
    return {"name": "learned on this pair" if resolved.parameters.method else None, "sha256": None}


def described(source: Path | None, image: Image) -> dict[str, Any]:
    """Path, SHA-256, size, spacing (mm) and orientation, as in report.json."""
    shown: DisplacementField | Image = image
    found: dict[str, Any] = {"path": str(source.resolve()), "sha256": sha256(source)} if source is not None else {"path": None}
    return {**found, "size": list(shown.grid.size), "spacing": list(shown.grid.spacing), "orientation": shown.grid.orientation()}


def page_title(fixed: Path | None, moving: Path | None) -> str:
    """`moving.mha to fixed.mha`, without folders."""
    return " to ".join(source.resolve().name if source is not None else "image in memory" for source in (moving, fixed))


def _name(source: Path | None) -> str:
    return str(source) if source is not None else "image in memory"
