"""`regtool evaluate`: how good a registration is, or every one of a cohort."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regtool.cli.console import emit, stderr
from regtool.cli.grouped import grouped
from regtool.cli.options import EXTRA, IMAGES, AnnotationOptions, FixHeader, PairOptions, ResultOptions, choice
from regtool.config.choices import Protocol
from regtool.errors import UsageError
from regtool.io.formats import is_list

if TYPE_CHECKING:
    from regtool.report.schema import Difference, EvaluationListReport, EvaluationReport, MeanFacts

COHORT = "Cohort"
WORST = 5  # cases that the table names
LABELS = 12  # labels that the table names one by one
HEADLINES = (  # what the table shows, of all that is in the JSON
    ("dice", "Dice", ""), ("hd95_mm", "HD95", " mm"), ("sd95_mm", "95 % surface distance, pooled", " mm"), ("assd_mm", "ASSD", " mm"),
    ("masd_mm", "mean surface distance", " mm"), ("major_axis_difference_mm", "major axis, difference", " mm"),
    ("minor_axis_difference_mm", "minor axis, difference", " mm"), ("hd95_voxels", "HD95", " voxels"), ("tre_mm", "landmark error", " mm"),
    ("tre_mm.median", "  median", " mm"), ("tre_mm.p95", "  95 %", " mm"), ("tre_mm.worst30", "  worst 30 %", " mm"), ("ncc", "NCC", ""),
    ("lncc", "LNCC", ""), ("mi", "mutual information", " nats"), ("ssim", "SSIM", ""), ("mad_intensity", "intensity difference (MAD)", ""),
    ("rmse_percent", "RMSE", " %"), ("nmse", "NMSE there and back", ""), ("inverse_consistency_mm", "inverse consistency", " mm"),
    ("jacobian.min", "Jacobian, least", ""), ("jacobian.max", "Jacobian, largest", ""), ("jacobian.folding_percent", "folding", " %"),
    ("nondiffeomorphic_volume_percent", "non-diffeomorphic volume", " %"), ("jacobian.sd_log", "SD of log Jacobian", ""),
    ("sdlogj", "SDlogJ", ""), ("num_foldings", "number of foldings", ""),
)  # fmt: skip


@dataclass(frozen=True)
class EvaluatedPairOptions(PairOptions):
    """The two images, or a list of pairs."""

    fixed: Annotated[
        Path | None,
        typer.Argument(metavar="FIXED|PAIRS.csv", help="The image that stays; or a list of pairs, as `cohort` takes it.", show_default=False),
    ] = None


@dataclass(frozen=True)
class OnePairOptions(AnnotationOptions):
    """What is known of one pair."""

    transform: Annotated[
        list[Path] | None,
        typer.Option(
            "--transform",
            "-t",
            metavar="FILE",
            help="From fixed to moving, any format or folder that `warp` takes; may be repeated. Left out: only the state before.",
            rich_help_panel=IMAGES,
            show_default=False,
        ),
    ] = None
    inverse_transform: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="From moving to fixed, for NMSE and inverse consistency. Left out: the one in the folder of --transform, if any.",
            rich_help_panel=IMAGES,
            show_default=False,
        ),
    ] = None
    fixed_mask: Annotated[
        Path | None,
        typer.Option(help="Where intensities and the Jacobian count: above zero.", rich_help_panel=EXTRA, show_default=False),
    ] = None


@dataclass(frozen=True)
class ListOptions:
    """Of a list: the runs, and what becomes of it."""

    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--runs",
            metavar="DIR",
            help="Folder that `cohort` wrote for this list. Twice or more: compared with the first, pair by pair.",
            rich_help_panel=COHORT,
            show_default=False,
        ),
    ] = None
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write a table, one row a pair, run and metric.", rich_help_panel=COHORT, show_default=False),
    ] = None
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out pairs that a run has no result for.", rich_help_panel=COHORT)] = (
        False
    )


@grouped
def evaluate(
    pair: EvaluatedPairOptions,
    of_pair: OnePairOptions,
    of_list: ListOptions,
    reporting: ResultOptions,
    protocol: Annotated[
        Protocol,
        choice(
            Protocol,
            "--protocol",
            help="learn2reg: the numbers of that challenge's published script, its always-zero fold count included.",
            show_default=True,
        ),
    ] = "regtool",
    fix_header: FixHeader = False,
) -> int:
    """How good a registration is, before and after: overlap, surface distances, landmark error, intensities, folding.

    `regtool evaluate fixed.nii.gz moving.nii.gz -t result/ --fixed-labels f_seg.nii.gz --moving-labels m_seg.nii.gz`

    `regtool evaluate pairs.csv --runs results/ --csv numbers.csv`

    `regtool evaluate pairs.csv --runs old/ --runs new/`
    """
    reporting.start_logs()
    if pair.only is not None and (of_list.runs or is_list(pair.only)):
        _refuse(of_pair, f"{pair.only} is a list of pairs", "the list itself names labels, landmarks and masks; --runs names the results")
        from regtool.workflows.evaluate import evaluate_list

        found = evaluate_list(
            pair.only,
            of_list.runs or (),
            protocol,
            table=of_list.csv,
            skip_missing=of_list.skip_missing,
            fix_header=fix_header,
            overwrite=reporting.overwrite,
            on_progress=None if reporting.quiet else _tell,
        )
        emit(found, list_rows(found), reporting.as_json)
        return max((failure.exit_code for failure in found.failed), default=0)
    _refuse(of_list, "one pair is evaluated", "a list of pairs alone is followed by --runs", *(["--overwrite"] if reporting.overwrite else []))
    fixed, moving = pair.paths()
    from regtool.io.inputs import PairFiles
    from regtool.workflows.evaluate import evaluate as work

    known = {name: path for name, path in vars(of_pair).items() if name not in ("transform", "inverse_transform")}
    files = PairFiles(fixed=fixed, moving=moving, fix_header=fix_header, **known)
    report = work(files, of_pair.transform or (), of_pair.inverse_transform, protocol)
    emit(report, pair_rows(report), reporting.as_json)
    return 0


def pair_rows(report: EvaluationReport) -> list[tuple[str, str]]:
    """The table of one pair."""
    from regtool.evaluation.summary import numbers

    before, after = numbers(report.before.model_dump()), numbers(report.after.model_dump() if report.after else {})
    rows = _heading(report, "dice" in before)
    for key, name, unit in _shown({**before, **after}):
        parts = [f"{_number(values[key])}{unit} {when}" for when, values in (("before", before), ("after", after)) if key in values]
        rows.append((name, ", ".join(parts) if before and after else parts[0].removesuffix(" before")))
    return rows


def list_rows(report: EvaluationListReport) -> list[tuple[str, str]]:
    """The table of a list: means with their confidence intervals, runs compared, the worst cases."""
    from regtool.evaluation.summary import numbers

    columns = {"before": report.before, **report.runs}
    rows = [("pairs", str(report.pairs)), *_heading(report, "dice" in report.before)]
    for key, name, unit in _shown({k: None for values in columns.values() for k in values}):
        parts = [f"{_interval(values[key])}{unit} {when}" for when, values in columns.items() if key in values]
        rows.append((name, ", ".join(parts) if report.runs else parts[0].removesuffix(" before")))
        for pairing in report.compared or ():
            if key in pairing.metrics:
                rows.append((f"  {pairing.second} - {pairing.first}", _difference(pairing.metrics[key], unit)))
    names, metric = list(report.runs), report.worst_by
    change = f", {names[-1]} - {names[0]}" if len(names) > 1 else ""
    for case in report.cases[:WORST] if metric else ():
        found = {"before": numbers(case.before.model_dump()), **{name: numbers(case.runs[name].model_dump()) for name in names}}
        shown = ", ".join(f"{_number(values[metric])} {when}" for when, values in found.items() if metric in values)
        rows.append((f"worst {metric}{change}", f"{case.id}: {shown if names else shown.removesuffix(' before')}"))
    rows += [("left out", f"{failure.id}: {failure.error}") for failure in report.failed]
    return [*rows, *([("written to", report.table)] if report.table else [])]


def _heading(report: EvaluationReport | EvaluationListReport, labels: bool) -> list[tuple[str, str]]:
    rows = [("note", report.note)] if report.note else []
    return [*rows, *([("labels carried by", f"{report.label_interpolation} neighbour")] if labels else [])]


def _shown(known: Iterable[str]) -> list[tuple[str, str, str]]:
    """(key, name, unit) of what the table shows; the labels of Dice one by one where they are few."""
    names = list(known)
    out = []
    for key, name, unit in HEADLINES:
        if key in names:
            out.append((key, name, unit))
        if key == "dice":
            labels = [k for k in names if k.startswith("dice.")]
            out += [(k, f"  label {k.removeprefix('dice.')}", "") for k in labels if 1 < len(labels) <= LABELS]
    return out


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def _interval(found: MeanFacts) -> str:
    known = found.low == found.low
    return f"{_number(found.mean)} ({_number(found.low)} to {_number(found.high)})" if known else _number(found.mean)


def _difference(found: Difference, unit: str) -> str:
    p = found.p
    chance = "" if p != p else f", p {p:.2g}" if p >= 1e-4 else ", p < 0.0001"
    return f"{_interval(found.difference)}{unit}{chance}, n {found.difference.n}"


def _refuse(options: object, why: str, tip: str, *more: str) -> None:
    """UsageError where one of a group of options, or of `more`, is given."""
    given = [*(f"--{name.replace('_', '-')}" for name, value in vars(options).items() if value), *more]
    if given:
        raise UsageError(f"{', '.join(given)}: {why}", tip=tip)


def _tell(name: str, done: int, pairs: int) -> None:
    """A line every tenth of the pairs."""
    if pairs > 1 and (done == pairs or done % max(1, pairs // 10) == 0):
        stderr.print(f"evaluated {done} of {pairs} pairs, last {name}", markup=False)
