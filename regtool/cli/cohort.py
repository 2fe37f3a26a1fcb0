"""`regtool cohort PAIRS.csv -o DIR`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from regtool.cli.console import clock, emit, stderr
from regtool.cli.grouped import grouped
from regtool.cli.options import (
    OUTPUT,
    RUN,
    FixHeader,
    MethodOptions,
    OutputOptions,
    ResultOptions,
    RunOptions,
    SeriesOptions,
    command_line,
    registration_overrides,
)
from regtool.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from regtool.report.schema import CohortReport
    from regtool.workflows.cohort import CohortEvent

PAIRS = "Pairs"
LATEST = 5  # pairs that the table on a terminal shows below those running
STYLES = {"ok": "green", "qc_failed": "yellow", "failed": "red"}


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(found.group(1)), int(found.group(2))) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UsageError(f"--shard {text}: expected i/n with i from 1 to n", tip="--shard 2/8 takes the second of eight parts")
    return part, parts


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which pairs."""

    pairs: Annotated[
        Path | None,
        typer.Argument(help="PAIRS.csv (fixed,moving,…), or with --template a list of images or a folder.", metavar="PAIRS.csv", show_default=False),
    ] = None
    template: Annotated[
        Path | None,
        typer.Option("--template", help="The fixed image of every pair.", metavar="FILE", rich_help_panel=PAIRS, show_default=False),
    ] = None
    bids_dir: Annotated[
        Path | None,
        typer.Option(
            "--bids-dir", help="A BIDS dataset: its subjects are brought onto the template.", metavar="DIR", rich_help_panel=PAIRS, show_default=False
        ),
    ] = None
    ending: Annotated[str, typer.Option("--suffix", help="With --bids-dir: which images.", metavar="T1w", rich_help_panel=PAIRS)] = "T1w"
    shard: Annotated[
        str, typer.Option("--shard", help="Only the i-th of n parts, for job arrays; all may write to one DIR.", metavar="i/n", rich_help_panel=PAIRS)
    ] = "1/1"
    fix_header: FixHeader = False


@dataclass(frozen=True)
class CohortOutputOptions(OutputOptions):
    """The same, and how it is named."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the cohort: DIR/ID/ for each pair.", metavar="DIR", rich_help_panel=OUTPUT)
    ] = None
    bids: Annotated[
        bool | None,
        typer.Option("--bids/--no-bids", help="Name outputs as BIDS derivatives; with --bids-dir the default.", rich_help_panel=OUTPUT),
    ] = None


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """How the pairs are worked off."""

    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Pairs at a time.", min=1, max=1024, rich_help_panel=RUN)] = 1
    resume: Annotated[bool, typer.Option("--resume", help="Go on: finished pairs whose files are unchanged stay.", rich_help_panel=RUN)] = False
    retry: Annotated[int, typer.Option("--retry", help="Times that a pair which crashed is tried again.", min=0, max=100, rich_help_panel=RUN)] = 0
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", help="Give a pair up after so long.", metavar="SECONDS", min=1.0, rich_help_panel=RUN, show_default=False),
    ] = None
    fail_fast: Annotated[bool, typer.Option("--fail-fast/--keep-going", help="End with the first pair that fails.", rich_help_panel=RUN)] = False
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="Register on the Dask cluster behind it.", metavar="ADDRESS", rich_help_panel=RUN, show_default=False),
    ] = None


@grouped
def cohort(
    source: SourceOptions,
    method: MethodOptions,
    registration: SeriesOptions,
    written: CohortOutputOptions,
    work: WorkOptions,
    run: RunOptions,
    reporting: ResultOptions,
) -> int:
    """Register every pair of a list, each in a process of its own: a broken file or a crash costs that pair alone.

    DIR gets a folder for each pair, as `register` writes it, results.csv with a row for each, and cohort.html: summary, box plots, outliers. Threads,
    memory and GPUs are divided between --jobs. Ctrl-C keeps what is finished; `--resume` goes on. The exit code is that of the worst pair: 1
    (crashed), 5, 2, 3, 4 or 0.

    `regtool cohort pairs.csv -m voxelmorph --model brain.safetensors -o results --jobs 4`

    `regtool cohort pairs.csv -o results --resume --shard $SLURM_ARRAY_TASK_ID/8`

    `regtool cohort --bids-dir study --template MNI152.nii.gz -o study/derivatives/regtool`
    """
    reporting.start_logs()
    if written.output is None:
        raise UsageError("the output folder is missing", tip="-o DIR")
    if work.resume and reporting.overwrite:
        raise UsageError("--resume keeps what is finished, --overwrite does not", tip="choose one of them")
    part = _shard(source.shard)
    overrides = registration_overrides(method, registration, written, run)
    from regtool.cli.signals import graceful_shutdown
    from regtool.workflows import cohort as workflow

    request = workflow.Request(
        source=source.pairs,
        output=written.output,
        parameter_file=method.parameter_file,
        overrides=overrides,
        template=source.template,
        bids_dir=source.bids_dir,
        ending=source.ending,
        bids=written.bids if written.bids is not None else source.bids_dir is not None,
        overwrite=reporting.overwrite,
        shard=part,
        fix_header=source.fix_header,
        command=command_line(),
        **vars(work),
    )
    with _view(reporting.quiet) as watch:
        report = workflow.cohort(request, watch, graceful_shutdown)
    emit(report, _summary(report, written.output), reporting.as_json)
    return report.exit_code


def _summary(report: CohortReport, output: Path) -> list[tuple[str, str]]:
    counts = [f"{report.ok} ok"]
    words = {"qc_failed": "failed quality control", "failed": "failed", "not_run": "not run", "skipped": "of all were finished before"}
    counts += [f"{report[key]} {text}" for key, text in words.items() if report[key]]
    rows = [("pairs", f"{report.pairs}: {', '.join(counts)}")]
    if report.pairs_per_minute is not None:
        rows.append(("speed", f"{report.pairs_per_minute:.1f} pairs a minute, {clock(report.seconds)} in all"))
    rows += [(one.id, one.error or "") for one in report.not_good[:LATEST]]
    more = len(report.not_good) - LATEST
    rows += [("", f"and {more} more")] if more > 0 else []
    return [*rows, ("table", str(output / report.outputs.results)), ("page", str(output / report.outputs.page))]


@contextlib.contextmanager
def _view(quiet: bool) -> Iterator[Callable[[CohortEvent], None] | None]:
    """A table that renews itself on a terminal, a line for each pair elsewhere, nothing when quiet."""
    if quiet:
        yield None
        return
    if not stderr.is_terminal:

        def line(moment: CohortEvent) -> None:
            if moment.finished is not None:
                left = "" if moment.seconds_left is None or moment.done + moment.skipped == moment.total else f", {clock(moment.seconds_left)} left"
                stderr.print(escape(f"[{moment.done + moment.skipped}/{moment.total}] {moment.finished['id']}: {_outcome(moment.finished)}{left}"))

        yield line
        return
    from rich.live import Live

    latest: list[Mapping[str, Any]] = []
    with Live(console=stderr, refresh_per_second=4) as live:

        def update(moment: CohortEvent) -> None:
            if moment.finished is not None:
                latest.append(moment.finished)
            live.update(_table(moment, latest[-LATEST:]))

        yield update


def _table(moment: CohortEvent, latest: list[Mapping[str, Any]]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    done = moment.done + moment.skipped
    counts = [f"{done} of {moment.total}"] + [f"{n} {what}" for n, what in ((moment.failed, "failed"), (moment.skipped, "finished before")) if n]
    table.add_row("pairs", ", ".join(counts))
    table.add_row("", ProgressBar(total=moment.total, completed=done, width=40))
    left = "" if moment.seconds_left is None else f", {clock(moment.seconds_left)} left"
    table.add_row("speed", f"{moment.pairs_per_minute:.1f} pairs a minute{left}")
    for name, seconds in moment.running.items():
        table.add_row("now", f"{escape(name)}  {seconds:.0f} s")
    for row in reversed(latest):
        style = STYLES.get(row["status"], "dim")
        table.add_row("", f"[dim]{escape(row['id'])}[/dim]  [{style}]{escape(_outcome(row))}[/{style}]")
    return table


def _outcome(row: Mapping[str, Any]) -> str:
    """`ok, lncc 0.21 to 0.60, Dice 0.71 to 0.86, 0.8 s`."""
    parts = [row["status"].replace("_", " ")]
    if row["status"] == "failed":
        return f"FAILED: {row.get('error', '')}"
    for column, name, unit in (("similarity", row.get("similarity", ""), ""), ("dice", "Dice", ""), ("tre_mm", "landmarks", " mm")):
        if f"{column}_after" in row:
            parts.append(f"{name} {row[f'{column}_before']:.3g} to {row[f'{column}_after']:.3g}{unit}")
    return ", ".join([*parts, *([row["error"]] if row.get("error") else []), f"{row['seconds']:.1f} s"])
