"""`regtool evaluate`: how good a registration is, before and after; or every one of a list, and one run against another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from regtool.config.choices import Protocol
from regtool.errors import InputError, RegtoolError, UsageError
from regtool.evaluation.learn2reg import NOTE
from regtool.evaluation.pair import EvaluatedPair
from regtool.evaluation.runs import Case, cases_csv, summarized
from regtool.evaluation.summary import LABEL_INTERPOLATION
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.files import refuse_existing, write_text
from regtool.io.inputs import PairFiles, named, read_pair
from regtool.io.learn2reg import is_learn2reg, read_learn2reg
from regtool.io.pairs import EXTRAS, Pair, read_list
from regtool.io.runs import find_result, inverse_beside, pairs_with_results, run_names
from regtool.io.transforms import TransformSource, read_transform
from regtool.registration.pipeline import check_pair
from regtool.report.schema import EvaluationListReport, EvaluationReport, FailedCase, Scores
from regtool.runtime import gathered_warnings, out_of_memory_explained
from regtool.workflows.warp import read_transforms

log = logging.getLogger("regtool")

PairCallback = Callable[[str, int, int], None]  # what, how many are done, of how many


def evaluate(
    files: PairFiles, transforms: Sequence[TransformSource] = (), inverse: TransformSource | None = None, protocol: Protocol = "regtool"
) -> EvaluationReport:
    """One pair, as `evaluate --json` prints it: `before`, and with a transform `after`; a missing input leaves its keys out.

    transforms: in the order points travel from fixed to moving; inverse: from moving to fixed, left out: that of the folder which
    `register --inverse` wrote. Raises UsageError, InputError, GeometryError.
    """
    started = time.perf_counter()
    if inverse is not None and not transforms:
        raise UsageError("--inverse-transform goes with --transform", tip="name the transform that it undoes")
    if inverse is not None and protocol == "learn2reg":
        raise UsageError("Learn2Reg's script knows no inverse", tip="leave --inverse-transform out")
    with gathered_warnings() as warnings, out_of_memory_explained():
        pair = _read(files, protocol)
        before = pair.before()
        after = _after(pair, transforms, inverse) if transforms else None
    return EvaluationReport(
        fixed=named(files.fixed),
        moving=named(files.moving),
        transform=tuple(named(t) for t in transforms) or None,
        protocol=protocol,
        label_interpolation=LABEL_INTERPOLATION,
        note=_note(protocol),
        before=Scores(**before),
        after=None if after is None else Scores(**after),
        seconds=round(time.perf_counter() - started, 3),
        warnings=tuple(warnings),
    )


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
) -> EvaluationListReport:
    """Every pair of a list before, and after each run; runs against the first one; `cases` with the worst first.

    runs: folders with `<id>/` as `register` and `cohort` write it, or a transform file `<id>.h5`, `<id>.nii.gz`, ... a pair; table: a CSV to write,
    one row a pair, run and metric; skip_missing: leave pairs out that some run lacks (else InputError with all their ids). A pair that cannot be
    read does not stop the others: it is listed under `failed`. Raises UsageError for an existing table, InputError for a list that is none.
    """
    if table is not None:
        refuse_existing([table], overwrite)
    started = time.perf_counter()
    pairs = list(read_list(source, isolated=True))
    names = run_names(runs)
    found = {name: {pair.id: find_result(run, pair.id) for pair in pairs} for name, run in zip(names, runs, strict=True)}
    pairs, missing = pairs_with_results(pairs, found, dict(zip(names, runs, strict=True)), skip_missing)
    cases, failed = list[Case](), list[FailedCase]()
    with gathered_warnings(once=True) as warnings, out_of_memory_explained():
        for k, pair in enumerate(pairs):
            try:
                cases.append(_case(pair, {name: results[pair.id] for name, results in found.items()}, protocol, fix_header))
            except RegtoolError as error:
                log.warning("%s is left out: %s", pair.id, error.what)
                failed.append(FailedCase(id=pair.id, error=error.what, exit_code=error.exit_code))
            if on_progress is not None:
                on_progress(pair.id, k + 1, len(pairs))
    if not cases:
        raise InputError(f"no pair of {source} could be evaluated", tip=f"the first of them: {failed[0].error}" if failed else None)
    summary = summarized(cases, names)
    if table is not None:
        write_text(table, cases_csv(cases))
    return EvaluationListReport(
        list=str(source),
        protocol=protocol,
        label_interpolation=LABEL_INTERPOLATION,
        note=_note(protocol),
        pairs=len(cases),
        **asdict(summary) | {"compared": [asdict(one) for one in summary.compared] or None},
        missing=missing,
        failed=tuple(failed),
        table=None if table is None else str(table),
        seconds=round(time.perf_counter() - started, 3),
        warnings=tuple(warnings),
    )


def _read(files: PairFiles, protocol: Protocol) -> EvaluatedPair:
    """InputError for what cannot be read, and for a time series: it has many transforms."""
    fixed, moving, annotations = read_pair(files)
    check_pair(fixed, moving)
    if moving.time is not None:
        raise InputError(
            f"the moving image ({named(files.moving)}) is a time series", tip="evaluate one time point at a time: extract it as a 3-D image"
        )
    return EvaluatedPair(fixed.grey(), moving.grey(), annotations, protocol)


def _after(pair: EvaluatedPair, transforms: Sequence[TransformSource], inverse: TransformSource | None) -> Mapping[str, object]:
    if inverse is None and pair.protocol == "regtool":
        inverse = inverse_beside(transforms)
    found: Transform | DisplacementField
    only = transforms[0] if len(transforms) == 1 else None
    if pair.protocol == "learn2reg" and isinstance(only, Path) and is_learn2reg(only, pair.fixed.grid.ndim):
        found = read_learn2reg(only, pair.fixed.grid)
    else:
        found = read_transforms(transforms, pair.fixed.grid)
    return pair.after(found, None if inverse is None else read_transform(inverse, pair.moving.grid))


def _case(pair: Pair, results: Mapping[str, Path | None], protocol: Protocol, fix_header: bool) -> Case:
    extras = {f"{side}_{name}": getattr(entry, name) for side, entry in (("fixed", pair.fixed), ("moving", pair.moving)) for name in EXTRAS}
    measured = _read(PairFiles(fixed=pair.fixed.image, moving=pair.moving.image, fix_header=fix_header, **extras), protocol)
    after = {name: _after(measured, (result,), None) for name, result in results.items() if result is not None}
    return Case(id=pair.id, before=measured.before(), runs=after)


def _note(protocol: Protocol) -> str | None:
    """What a reader must know to compare the numbers with others."""
    return NOTE if protocol == "learn2reg" else None
