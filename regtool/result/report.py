"""The report of what a registration found, or of how it failed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from regtool.errors import RegtoolError
from regtool.evaluation.summary import LABEL_INTERPOLATION
from regtool.geometry.grid import Grid
from regtool.geometry.images import Image
from regtool.io.files import sha256
from regtool.methods.resolve import Resolved
from regtool.registration.pipeline import Registered
from regtool.report.files import PAGE
from regtool.report.schema import (
    Check,
    DisplacementLength,
    ErrorFacts,
    FailureReport,
    GridFacts,
    Grids,
    ImageFacts,
    InverseResidual,
    Jacobian,
    ModelFacts,
    Outputs,
    RegistrationReport,
    Scores,
    Seconds,
    Similarity,
    StageFacts,
    TimePoint,
)
from regtool.result.outcome import Outcome, RunStart
from regtool.runtime import peak_memory_mb, versions


def report_of(outcome: Outcome) -> RegistrationReport:
    """All but the files, which are not written yet."""
    start, first, checks = outcome.start, outcome.done[0], checks_of(outcome)
    parameters = start.resolved.parameters
    series = tuple(TimePoint(name=f"time point {t}", **_findings(d)) for t, d in enumerate(outcome.done)) if len(outcome.done) > 1 else None
    return RegistrationReport(
        status="ok" if all(check.passed for check in checks) else "qc_failed",
        method=parameters.method or "refine",
        model=model_facts(start.resolved),
        fixed=image_facts(start.fixed_source, start.fixed),
        moving=image_facts(start.moving_source, start.moving),
        outputs=Outputs(),
        **_findings(first),
        seconds=seconds_of(start),
        peak_memory_mb=peak_memory_mb(),
        planned_memory_mb=round(first.plan.peak_bytes / 2**20, 1),
        grids=Grids(network=_grid_facts(first.plan.network_grid), refine=_grid_facts(first.plan.refine_grid)),
        device=str(outcome.device),
        threads=torch.get_num_threads(),
        seed=parameters.run.seed,
        versions=versions(),
        command=start.command,
        warnings=tuple(start.warnings),
        qc=checks,
        inverse_residual_mm=_residuals(outcome),
        time_points=series,
        losses=tuple(round(x, 6) for x in first.losses) or None,
        before=_scores(outcome.scores.before),
        after=_scores(outcome.scores.after),
    )


def up_to_date(report: RegistrationReport, start: RunStart) -> RegistrationReport:
    """With the seconds, the memory and the warnings of now."""
    now = {"seconds": seconds_of(start), "peak_memory_mb": peak_memory_mb(), "warnings": tuple(start.warnings)}
    return report.model_copy(update=now)


def failure_report(error: Exception, start: RunStart) -> FailureReport:
    """What is known of a run that has failed."""
    explained = error if isinstance(error, RegtoolError) else RegtoolError(f"{type(error).__name__}: {error}")
    parameters = start.resolved.parameters
    return FailureReport(
        status="failed",
        error=ErrorFacts(type=type(error).__name__, what=explained.what, tip=explained.tip, exit_code=explained.exit_code),
        method=parameters.method or "refine",
        fixed=image_facts(start.fixed_source, start.fixed),
        moving=image_facts(start.moving_source, start.moving),
        outputs=Outputs(qc=PAGE),
        seconds=seconds_of(start),
        peak_memory_mb=peak_memory_mb(),
        seed=parameters.run.seed,
        versions=versions(),
        command=start.command,
        warnings=tuple(start.warnings),
    )


def checks_of(outcome: Outcome) -> tuple[Check, ...]:
    """The `[qc]` limits that are set, against the worst time point."""
    limits, after, done = outcome.start.resolved.parameters.qc, outcome.scores.after, outcome.done
    values: list[tuple[str, float | None, float | None, int]] = [
        ("max_folding_percent", max(d.jacobian.folding_percent for d in done), limits.max_folding_percent, 1),
        ("min_similarity_gain", min(d.similarity[1] - d.similarity[0] for d in done), limits.min_similarity_gain, -1),
        ("max_displacement_mm", max(float(d.displacement.magnitude().max()) for d in done), limits.max_displacement_mm, 1),
        ("min_dice", after.get("dice", {}).get("mean"), limits.min_dice, -1),
        ("max_tre_mm", after.get("tre_mm", {}).get("mean"), limits.max_tre_mm, 1),
    ]
    return tuple(
        Check(name=name, value=value, limit=limit, passed=sign * (value - limit) <= 0)
        for name, value, limit, sign in values
        if value is not None and limit is not None
    )


def image_facts(source: Path | None, image: Image) -> ImageFacts:
    """Of an image, and of the file or folder that it comes from."""
    grid, path, digest = image.grid, None if source is None else str(source.resolve()), None if source is None else sha256(source)
    return ImageFacts(path=path, sha256=digest, size=grid.size, spacing=grid.spacing, orientation=grid.orientation())


def model_facts(resolved: Resolved) -> ModelFacts:
    """Of the model file, or of weights that were learned on the pair."""
    if resolved.card is not None and resolved.model is not None:
        return ModelFacts(name=resolved.card["name"], sha256=sha256(resolved.model))
    return ModelFacts(name="learned on this pair" if resolved.parameters.method else None, sha256=None)


def seconds_of(start: RunStart) -> Seconds:
    """Of a run that is not over yet; `start` is the time before the work began (imports)."""
    names = ("start", "read", "align", "network", "refine", "warp", "write", "qc")
    return Seconds(**{name: round(start.clock.seconds.get(name, 0.0), 3) for name in names}, total=round(start.elapsed, 3))


def _findings(one: Registered) -> dict[str, Any]:
    """What is said of each time point."""
    length = one.displacement.magnitude()
    return {
        "similarity": Similarity(name=one.metric[0], reason=one.metric[1], before=one.similarity[0], after=one.similarity[1]),
        "jacobian": Jacobian(**asdict(one.jacobian)),
        "displacement_mm": DisplacementLength(mean=float(length.mean()), max=float(length.max())),
        "stages": tuple(StageFacts(**asdict(stage) | {"seconds": round(stage.seconds, 3)}) for stage in one.stages),
    }


def _residuals(outcome: Outcome) -> InverseResidual | tuple[InverseResidual, ...] | None:
    """How far each inverse misses."""
    found = tuple(InverseResidual(mean=r.mean_mm, max=r.max_mm, covered_percent=r.covered_percent) for _, r in outcome.inverses)
    return found if len(found) > 1 else found[0] if found else None


def _grid_facts(grid: Grid | None) -> GridFacts | None:
    return None if grid is None else GridFacts(size=grid.size, spacing=grid.spacing)


def _scores(found: dict[str, Any]) -> Scores | None:
    if not found:
        return None
    return Scores(**found, label_interpolation=LABEL_INTERPOLATION if "dice" in found else None)
