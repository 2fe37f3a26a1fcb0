"""`regtool train LIST -m METHOD -o RUN_DIR`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regtool.cli.console import clock, emit, stderr
from regtool.cli.grouped import Sets, grouped
from regtool.cli.options import OUTPUT, RUN, FixHeader, MethodOptions, ResultOptions, RunOptions, command_line, overrides_of

if TYPE_CHECKING:
    from rich.table import Table

    from regtool.report.schema import TrainingReport
    from regtool.training.run import ProgressEvent

DATA = "Pairs"
EVERY_SECONDS = 10.0  # between lines where stderr is no terminal
NAMES = {
    "similarity": "similarity",
    "dice": "Dice",
    "tre_voxels": "landmark error (voxels)",
    "epe_voxels": "displacement error (voxels)",
    "folding_percent": "folding (%)",
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is learned from."""

    data: Annotated[
        Path | None,
        typer.Argument(
            help="PAIRS.csv (fixed,moving,…), IMAGES.csv (image,…: all pairs) or a folder of images (all pairs).", metavar="LIST", show_default=False
        ),
    ] = None
    synthetic: Annotated[
        bool,
        typer.Option("--synthetic", help="Instead of LIST: pairs made from noise, as [synthesis] says; no images are needed.", rich_help_panel=DATA),
    ] = False
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            help="A list to validate with. Left out: a part of LIST is held out, by id, or synthetic pairs of their own.",
            metavar="LIST",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None
    atlas: Annotated[
        Path | None,
        typer.Option(
            "--atlas", help="With a list of images: the fixed image of every pair.", metavar="FILE", rich_help_panel=DATA, show_default=False
        ),
    ] = None
    atlas_labels: Annotated[
        Path | None, typer.Option("--atlas-labels", help="Its label map.", metavar="FILE", rich_help_panel=DATA, show_default=False)
    ] = None
    fix_header: FixHeader = False


@dataclass(frozen=True)
class TrainingOptions:
    """How long."""

    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Updates of the weights.", min=1, rich_help_panel=RUN, show_default=False),
        Sets("train.steps"),
    ] = None
    max_time: Annotated[
        float | None,
        typer.Option(
            "--max-time", help="End after so many minutes of this run.", metavar="MINUTES", min=0.0, rich_help_panel=RUN, show_default=False
        ),
        Sets("train.max_minutes"),
    ] = None


@grouped
def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.", metavar="RUN_DIR", rich_help_panel=OUTPUT)],
    data: DataOptions,
    method: MethodOptions,
    training: TrainingOptions,
    run: RunOptions,
    reporting: ResultOptions,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the state in RUN_DIR; from the beginning where there is none.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Train METHOD on a list of pairs, or on synthetic ones; the result is a model for `register --model`.

    RUN_DIR gets model.safetensors (the best by validation), state.safetensors (to go on from), history.csv, curves.png, parameters.toml and, last,
    report.json. SIGTERM and Ctrl-C write a checkpoint and end, SIGUSR1 writes one and goes on; `--resume` continues to the same weights as an
    uninterrupted run.

    `regtool train pairs.csv -m voxelmorph -o run`

    `regtool train images.csv --atlas atlas.nii.gz -p brain.toml -o run --resume`

    `regtool train --synthetic -m voxelmorph --set synthesis.size=[96,96] -o run`

    `torchrun --nproc-per-node 4 -m regtool train pairs.csv -p brain.toml -o run`
    """
    reporting.start_logs(at_least=1)
    overrides = overrides_of(method.overrides, method, training, run)
    from regtool.cli.signals import graceful_shutdown
    from regtool.workflows.train import Request
    from regtool.workflows.train import train as work

    request = Request(
        output=output,
        parameter_file=method.parameter_file,
        overrides=overrides,
        resume=resume,
        overwrite=reporting.overwrite,
        command=command_line(),
        **vars(data),
    )
    with view(reporting.quiet) as watch:
        report = work(request, watch, graceful_shutdown)
    if report is not None:  # of several processes the first one talks
        emit(report, summary(report, output), reporting.as_json)


def summary(report: TrainingReport, output: Path) -> list[tuple[str, str]]:
    """The short table."""
    rows = [
        ("method", str(report.method)),
        ("pairs", f"{report.pairs or 'synthetic ones, no two alike,'} to learn from, {report.validation_pairs} to validate with"),
        ("steps", f"{report.steps} in {report.minutes:.1f} minutes; the model is that of step {report.best_step}"),
    ]
    if report.before is not None and report.after is not None:
        for key, name in NAMES.items():
            if key in report.before and key in report.after:
                rows.append((name, f"{report.before[key]:.4f} before, {report.after[key]:.4f} after"))
    return [*rows, ("model", str(output / report.outputs.model)), ("curves", str(output / report.outputs.curves))]


@contextlib.contextmanager
def view(quiet: bool) -> Iterator[Callable[[ProgressEvent], None] | None]:
    """A table that renews itself on a terminal, now and then a line elsewhere, nothing when quiet."""
    if quiet:
        yield None
        return
    if not stderr.is_terminal:
        last = [0.0]

        def line(moment: ProgressEvent) -> None:
            if moment.is_new or time.monotonic() - last[0] > EVERY_SECONDS or moment.progress.step == moment.steps:
                last[0] = time.monotonic()
                stderr.print(_line(moment))

        yield line
        return
    from rich.live import Live

    with Live(console=stderr, refresh_per_second=4) as live:
        yield lambda moment: live.update(_table(moment))


def _line(moment: ProgressEvent) -> str:
    terms = ", ".join(f"{name} {value:.4f}" for name, value in moment.terms.items())
    text = f"step {moment.progress.step} of {moment.steps}: {terms}; {moment.pairs_per_second:.2f} pairs/s, {clock(moment.seconds_left)} left"
    return text + (f"; validation: {_validation(moment)}" if moment.is_new else "")


def _table(moment: ProgressEvent) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("step", f"{moment.progress.step} of {moment.steps}")
    table.add_row("", ProgressBar(total=moment.steps, completed=moment.progress.step, width=40))
    table.add_row("loss", "   ".join(f"{name} {value:.4f}" for name, value in moment.terms.items()))
    if moment.progress.latest is not None:
        table.add_row("validation", f"{_validation(moment)} (step {moment.progress.validated_at}; best: step {moment.progress.best_at})")
    table.add_row("speed", f"{moment.pairs_per_second:.2f} pairs/s, {clock(moment.seconds_left)} left")
    table.add_row("memory", f"{moment.memory_mb:.0f} MB")
    return table


def _validation(moment: ProgressEvent) -> str:
    found = [(name, getattr(moment.progress.latest, key)) for key, name in NAMES.items()]
    return ", ".join(f"{name} {value:.4f}" for name, value in found if value is not None)
