"""`regtool finetune-oneshot FIXED MOVING`, or `PAIRS.csv`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regtool.cli import register, train
from regtool.cli.console import emit, progress
from regtool.cli.grouped import grouped
from regtool.cli.options import (
    METHOD,
    ImageOptions,
    MethodOptions,
    OutputOptions,
    RegistrationOptions,
    ResultOptions,
    RunOptions,
    command_line,
    registration_overrides,
)
from regtool.errors import UsageError
from regtool.io.formats import is_list

if TYPE_CHECKING:
    from regtool.report.schema import RegistrationReport
    from regtool.workflows.train import Request as TrainingRequest

OF_ONE_PAIR = ("fixed_mask", "moving_mask", "fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks")


@dataclass(frozen=True)
class FinetunedOptions(ImageOptions):
    """One pair, or a list of them."""

    fixed: Annotated[Path | None, typer.Argument(help="The image that stays; or, alone, PAIRS.csv with a site's few pairs.", show_default=False)] = (
        None
    )


@dataclass(frozen=True)
class AdaptationOptions:
    """What the network starts from, and for how long it learns."""

    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start from no model: the method named by -m learns on the pair alone.", rich_help_panel=METHOD)
    ] = False
    iterations: Annotated[
        str | None,
        typer.Option(
            "--iterations",
            help="Steps at most: 50 where left out, of a list 500; until-converged: 3000, fewer where 300 have brought nothing.",
            metavar="N|until-converged",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            help="With a list: the pairs to stop by. Left out: a quarter of the list.",
            metavar="LIST",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None


@grouped
def finetune_oneshot(
    images: FinetunedOptions,
    method: MethodOptions,
    registration: RegistrationOptions,
    adaptation: AdaptationOptions,
    written: OutputOptions,
    run: RunOptions,
    reporting: ResultOptions,
) -> int:
    """Adapt a trained model to one pair and register that; or learn on the pair from scratch; or adapt to a site's few pairs.

    The folder is as `register` writes it, and holds model.safetensors too: good for similar pairs, with `register --model`. The model it starts from
    stays as it is. The displacement itself is refined only where --refine asks for it.

    `regtool finetune-oneshot fixed.nii.gz moving.nii.gz --model brain.safetensors -o adapted`

    `regtool finetune-oneshot fixed.nii.gz moving.nii.gz -m unet --from-scratch --iterations until-converged -o learned`

    `regtool finetune-oneshot site_pairs.csv --model brain.safetensors -o site`
    """
    from regtool.cli import STARTED

    overrides = registration_overrides(method, registration, written, run, learns=True)
    from regtool.config.toml import merged
    from regtool.workflows.finetune import steps_of_list, steps_of_pair

    if images.only is not None and is_list(images.only):
        for_pair = [registration.initial_transform, written.inverse, written.format, *(getattr(images, name) for name in OF_ONE_PAIR)]
        if any(x is not None for x in for_pair) or adaptation.from_scratch:
            raise UsageError("this option is for one pair, not for a list", tip="masks, labels and landmarks are columns of the list")
        if written.output is None:
            raise UsageError("no folder is named for the adapted model", tip="name one with -o")
        overrides = merged(overrides, steps_of_list(adaptation.iterations))
        from regtool.workflows.train import Request as TrainingRequest

        site = TrainingRequest(
            data=images.only,
            output=written.output,
            parameter_file=method.parameter_file,
            overrides=overrides,
            validation=adaptation.validation,
            overwrite=reporting.overwrite,
            fix_header=images.fix_header,
            command=command_line(),
        )
        return _site(site, reporting)
    if adaptation.validation is not None:
        raise UsageError("--validation goes with a list of pairs", tip="one pair is adapted to for itself; --fixed-labels evaluates the result")
    reporting.start_logs()
    fixed, moving = images.paths()
    from regtool.workflows.finetune import finetune
    from regtool.workflows.register import Request, default_output

    folder = written.output or default_output(fixed, moving)
    request = Request(
        fixed=fixed,
        moving=moving,
        output=folder,
        parameter_file=method.parameter_file,
        overrides=merged(steps_of_pair(adaptation.iterations), overrides),
        overwrite=reporting.overwrite,
        command=command_line(),
        started=STARTED,
        **images.known,
    )
    with progress(reporting.quiet) as on_progress:
        report = finetune(request, adaptation.from_scratch, on_progress).report
    emit(report, _summary(report, folder), reporting.as_json)
    return report.exit_code


def _site(request: TrainingRequest, reporting: ResultOptions) -> int:
    """What `finetune-oneshot PAIRS.csv` does."""
    reporting.start_logs(at_least=1)
    from regtool.cli.signals import graceful_shutdown
    from regtool.workflows.finetune import finetune_site

    with train.view(reporting.quiet) as watch:
        report = finetune_site(request, watch, graceful_shutdown)
    if report is not None:  # of several processes the first one talks
        emit(report, train.summary(report, request.output), reporting.as_json)
    return 0


def _summary(report: RegistrationReport, output: Path) -> list[tuple[str, str]]:
    """That of `register`, and what the network learned."""
    found = report.finetuning
    assert found is not None
    similarity = found.similarity
    rows = register.summary(report, output)
    start = "from scratch" if found.parent is None else f"from {found.parent.name}"
    kept = f"those after step {found.best_step} are kept" if found.best_step else "the weights are those from before"
    learned = [
        ("learned", f"{start}, {found.steps} steps; {kept}" + (" (it diverged)" if found.diverged else "")),
        (f"network alone ({similarity.name})", f"{similarity.before:.4f} before, {similarity.after:.4f} after"),
    ]
    return [*rows[:1], *learned, *rows[1:], ("model", str(output / str(report.outputs.model)))]
