"""How good registrations are: one pair before and after, every pair of a list in one run, or two runs against each other."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from regtool.config.choices import Protocol
from regtool.errors import InputError, RegtoolError, UsageError
from regtool.evaluation.field import field_scores, inverse_consistency
from regtool.evaluation.intensity import intensity_agreement, nmse
from regtool.evaluation.learn2reg import NOTE, learn2reg_scores
from regtool.evaluation.statistics import mean_interval, paired
from regtool.evaluation.summary import LABEL_INTERPOLATION, annotation_metrics, lower_is_better, numbers, primary_metric
from regtool.geometry.images import Image
from regtool.geometry.sampling import displacement_on, mask_on_grid, moving_indices, voxel_grid, warp
from regtool.geometry.transforms import Transform
from regtool.io.files import refuse_existing, write_text
from regtool.io.images import suffix_of
from regtool.io.intact import nifti_kind
from regtool.io.learn2reg import read_learn2reg
from regtool.io.pairs import EXTRAS, Pair, read_list
from regtool.io.transforms import FIELDS, ITK, read_transform
from regtool.registration.pair import Annotations
from regtool.registration.pipeline import check_pair
from regtool.runtime import gathered_warnings, out_of_memory_explained
from regtool.workflows.register import Request, read_inputs
from regtool.workflows.warp import read_transforms

log = logging.getLogger("regtool")

PairCallback = Callable[[str, int, int], None]  # what, how many are done, of how many
COLUMNS = ("id", "run", "metric", "value")


@dataclass(frozen=True)
class EvaluatedPair:
    """A pair whose images are read: what is measured of it before, and after a transform."""

    fixed: Image
    moving: Image
    request: Request
    annotations: Annotations
    protocol: Protocol

    @classmethod
    def read(cls, request: Request, protocol: Protocol) -> EvaluatedPair:
        """Raises as `register` does for what it cannot read, and InputError for a time series: it has many transforms."""
        fixed, moving, annotations = read_inputs(request)
        check_pair(fixed, moving)
        if moving.time is not None:
            raise InputError(f"{request.moving} is a time series", tip="evaluate one time point at a time: extract it as a 3-D image")
        return cls(fixed.grey(), moving.grey(), request, annotations, protocol)

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """(*shape) bool on the fixed grid, where intensities and the Jacobian count."""
        mask = self.annotations.fixed_mask
        return None if mask is None else mask_on_grid(mask, self.fixed.grid)

    @cached_property
    def span(self) -> tuple[float, float]:
        """Least and largest intensity of the moving image."""
        return self.moving.minimum, float(self.moving.data.max())

    def before(self) -> dict[str, Any]:
        """As the headers say."""
        if self.protocol == "learn2reg":
            return self._learn2reg(torch.zeros(self.fixed.grid.ndim, *self.fixed.grid.shape))
        return self._scores(Transform.identity(self.fixed.grid.ndim))[0]

    def after(self, transforms: Sequence[Path], inverse: Path | None = None) -> dict[str, Any]:
        """Through a transform; inverse: from moving to fixed, for `nmse` and `inverse_consistency_mm`."""
        if self.protocol == "learn2reg":
            return self._learn2reg(self._voxels(transforms))
        transform = read_transforms(transforms, self.fixed.grid)
        scores, warped = self._scores(transform)
        scores |= field_scores(displacement_on(transform, self.fixed.grid), self.mask)
        if inverse is not None:
            scores |= self._inverse_scores(transform, read_transform(inverse, self.moving.grid), warped)
        return scores

    def _scores(self, transform: Transform) -> tuple[dict[str, Any], Image]:
        warped = warp(self.moving, transform, self.fixed.grid)
        scores, _ = annotation_metrics(self.annotations.labels, self.annotations.landmarks, transform, shapes=True)
        return scores | asdict(intensity_agreement(self.fixed, warped, self.mask, self.span)), warped

    def _inverse_scores(self, forward: Transform, backward: Transform, warped: Image) -> dict[str, Any]:
        grid = self.moving.grid
        known = torch.zeros(grid.voxels, dtype=torch.bool)
        for part, index in moving_indices(self.fixed.grid, backward, grid):
            known[part] = torch.as_tensor(((index >= 0) & (index <= torch.tensor(self.fixed.grid.size) - 1)).all(dim=1))
        missed = inverse_consistency(forward, backward, grid, self.fixed.grid)
        again = warp(warped, backward, grid)
        return {"nmse": nmse(self.moving, again, known.reshape(grid.shape)), "inverse_consistency_mm": asdict(missed)}

    def _learn2reg(self, displacement: torch.Tensor) -> dict[str, Any]:
        return learn2reg_scores(displacement, (self.fixed.grid, self.moving.grid), self.annotations.labels, self.annotations.landmarks, self.mask)

    def _voxels(self, transforms: Sequence[Path]) -> torch.Tensor:
        """(D, *shape) `u` with `warped[v] = moving[v + u[v]]`: of a file as the challenge stores it, or of any other transform."""
        grid = self.fixed.grid
        if len(transforms) == 1 and _is_learn2reg(transforms[0], grid.ndim):
            return read_learn2reg(transforms[0], grid).to_voxels()
        out = torch.empty(grid.ndim, grid.voxels)
        still = voxel_grid(grid.shape, torch.empty(0, dtype=torch.float64)).reshape(-1, grid.ndim)
        for part, index in moving_indices(self.moving.grid, read_transforms(transforms, grid), grid):
            out[:, part] = (index - still[part]).T.float()
        return out.reshape(-1, *grid.shape)


def evaluate(request: Request, transforms: Sequence[Path] = (), inverse: Path | None = None, protocol: Protocol = "regtool") -> dict[str, Any]:
    """One pair, as `evaluate --json` prints it: `before`, and with a transform `after`; a missing input leaves its keys out.

    request: images, masks, labels and landmarks, all else in it unused; transforms: in the order points travel from fixed to moving; inverse: from
    moving to fixed, left out: that of the folder which `register --inverse` wrote. Raises UsageError, InputError, GeometryError.
    """
    started = time.perf_counter()
    if inverse is not None and not transforms:
        raise UsageError("--inverse-transform goes with --transform", tip="name the transform that it undoes")
    if inverse is not None and protocol == "learn2reg":
        raise UsageError("Learn2Reg's script knows no inverse", tip="leave --inverse-transform out")
    with gathered_warnings() as warnings, out_of_memory_explained():
        pair = EvaluatedPair.read(request, protocol)
        report: dict[str, Any] = {
            "fixed": str(request.fixed),
            "moving": str(request.moving),
            **({"transform": [str(t) for t in transforms]} if transforms else {}),
            **_stated(protocol),
            "before": pair.before(),
        }
        if transforms:
            report["after"] = pair.after(transforms, inverse or _own_inverse(transforms))
        report |= {"seconds": round(time.perf_counter() - started, 3), "warnings": warnings}
    return report


def evaluate_list(
    source: Path,
    runs: Sequence[Path] = (),
    protocol: Protocol = "regtool",
    *,
    table: Path | None = None,
    skip_missing: bool = False,
    fix_header: bool = False,
    overwrite: bool = False,
    on_progress: PairCallback | None = None,
) -> dict[str, Any]:
    """Every pair of a list before, and after each run; runs against the first one; `cases` with the worst first.

    runs: folders with `<id>/` as `register` and `cohort` write it, or a transform file `<id>.h5`, `<id>.nii.gz`, ... a pair; table: a CSV to write,
    one row a pair, run and metric; skip_missing: leave pairs out that some run lacks (else InputError with all their ids). A pair that cannot be
    read does not stop the others: it is listed under `failed`. Raises UsageError for an existing table, InputError for a list that is none.
    """
    if table is not None:
        refuse_existing([table], overwrite)
    started = time.perf_counter()
    pairs = list(read_list(source, isolated=True))
    names = _names(runs)
    found = {name: {pair.id: _result(run, pair.id) for pair in pairs} for name, run in zip(names, runs, strict=True)}
    pairs, missing = _present(pairs, found, dict(zip(names, runs, strict=True)), skip_missing)
    cases, failed = [], []
    with gathered_warnings(once=True) as warnings, out_of_memory_explained():
        for k, pair in enumerate(pairs):
            try:
                cases.append(_case(pair, {name: results[pair.id] for name, results in found.items()}, protocol, fix_header))
            except RegtoolError as error:
                log.warning("%s is left out: %s", pair.id, error.what)
                failed.append({"id": pair.id, "error": error.what, "exit_code": error.exit_code})
            if on_progress is not None:
                on_progress(pair.id, k + 1, len(pairs))
    if not cases:
        raise InputError(f"no pair of {source} could be evaluated", tip=f"the first of them: {failed[0]['error']}" if failed else None)
    report = {"list": str(source), **_stated(protocol), "pairs": len(cases), **_summary(cases, names), "missing": missing, "failed": failed}
    if table is not None:
        write_text(table, _csv(cases))
        report["table"] = str(table)
    return report | {"seconds": round(time.perf_counter() - started, 3), "warnings": warnings}


def _stated(protocol: Protocol) -> dict[str, str]:
    """What a reader must know to compare the numbers with others."""
    stated = {"protocol": protocol, "label_interpolation": LABEL_INTERPOLATION}
    return stated | {"note": NOTE} if protocol == "learn2reg" else stated


def _case(pair: Pair, results: Mapping[str, Path | None], protocol: Protocol, fix_header: bool) -> dict[str, Any]:
    """`{id, before, runs {name: after}}` of one pair."""
    extras = {f"{side}_{name}": getattr(entry, name) for side, entry in (("fixed", pair.fixed), ("moving", pair.moving)) for name in EXTRAS}
    measured = EvaluatedPair.read(Request(pair.fixed.image, pair.moving.image, fix_header=fix_header, **extras), protocol)
    after = {name: measured.after((result,), _own_inverse((result,))) for name, result in results.items() if result is not None}
    return {"id": pair.id, "before": measured.before(), "runs": after}


def _summary(cases: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Means of all pairs, runs compared, and the cases with the worst first."""
    flat = [{"before": numbers(case["before"]), **{name: numbers(case["runs"][name]) for name in names}} for case in cases]
    columns = {name: _columns([row[name] for row in flat]) for name in ("before", *names)}
    means = {name: {metric: asdict(mean_interval(list(values.values()))) for metric, values in found.items()} for name, found in columns.items()}
    compared = []
    for other in names[1:]:
        first, second = columns[names[0]], columns[other]
        metrics = {m: _compared(first[m], second[m]) for m in first if m in second}
        compared.append({"first": names[0], "second": other, "metrics": metrics})
    metric = primary_metric(columns[names[-1] if names else "before"])
    if metric is not None:
        sign = -1 if lower_is_better(metric) else 1

        def badness(k: int) -> float:
            """Of two runs, how much the last one is worse than the first; of one, its value."""
            value = flat[k][names[-1] if names else "before"].get(metric, float("nan"))
            value -= flat[k][names[0]].get(metric, float("nan")) if len(names) > 1 else 0
            return sign * value if value == value else float("-inf")  # what is no number comes first

        cases = [cases[k] for k in sorted(range(len(cases)), key=badness)]
    runs = {name: means[name] for name in names}
    return {"before": means["before"], "runs": runs, **({"compared": compared} if compared else {}), "worst_by": metric, "cases": cases}


def _columns(rows: list[dict[str, float]]) -> dict[str, dict[int, float]]:
    """By metric the value of every row that has it, in the order of first appearance."""
    out: dict[str, dict[int, float]] = {}
    for k, row in enumerate(rows):
        for metric, value in row.items():
            out.setdefault(metric, {})[k] = value
    return out


def _compared(first: Mapping[int, float], second: Mapping[int, float]) -> dict[str, Any]:
    both = [k for k in first if k in second]
    return asdict(paired([first[k] for k in both], [second[k] for k in both]))


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names where they differ, else their paths. UsageError for one that is named twice, InputError for one that is none."""
    for run in runs:
        if not run.is_dir():
            raise InputError(f"the run {run} is no folder", tip="name the folder that `regtool cohort -o` wrote")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice", tip="name two different folders to compare them")
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) and "before" not in short else [str(run) for run in runs]


def _result(run: Path, name: str) -> Path | None:
    """What `run` holds for the pair `name`, or None."""
    folder = run / name
    if (folder / "transform.h5").exists() or any(folder.glob("TransformParameters.*.txt")):
        return folder
    return next((path for suffix in (*ITK, *FIELDS) if (path := run / f"{name}{suffix}").exists()), None)


def _present(
    pairs: list[Pair], found: Mapping[str, Mapping[str, Path | None]], runs: Mapping[str, Path], skip: bool
) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs that every run has a result for, and the ids that each lacks."""
    missing = {name: [id for id, result in results.items() if result is None] for name, results in found.items()}
    missing = {name: ids for name, ids in missing.items() if ids}
    for name, ids in missing.items():
        if not skip or len(ids) == len(pairs):
            raise InputError(
                f"{len(ids)} of {len(pairs)} pairs have no result in {runs[name]}: {', '.join(ids)}",
                tip="expected a folder or transform file for each id; --skip-missing leaves these pairs out"
                if len(ids) < len(pairs)
                else "expected a folder or transform file for each id, as `regtool cohort -o` writes them",
            )
        log.warning("%d of %d pairs have no result in %s: %s", len(ids), len(pairs), runs[name], ", ".join(ids))
    return [pair for pair in pairs if not any(pair.id in ids for ids in missing.values())], missing


def _own_inverse(transforms: Sequence[Path]) -> Path | None:
    """The inverse beside the transform, where there is just one and it is a folder that `register --inverse` wrote."""
    if len(transforms) != 1 or not transforms[0].is_dir():
        return None
    return next(iter(sorted(transforms[0].glob("inverse_displacement.*"))), None)


def _is_learn2reg(path: Path, ndim: int) -> bool:
    """Whether a file is a NIfTI of one axis more than the image, as the challenge's fields are (a field of ITK has five axes)."""
    return path.is_file() and suffix_of(path) in (".nii", ".nii.gz") and nifti_kind(path)[0] == ndim + 1


def _csv(cases: Sequence[Mapping[str, Any]]) -> str:
    """One row a pair, run and metric; the run `before` is the state before any."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in cases:
        for run, scores in (("before", case["before"]), *case["runs"].items()):
            writer.writerows((case["id"], run, metric, repr(value)) for metric, value in numbers(scores).items())
    return out.getvalue()
