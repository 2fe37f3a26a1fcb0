"""`regtool doctor FIXED MOVING`."""

from __future__ import annotations

import typer

from regtool.cli.console import emit
from regtool.cli.grouped import grouped
from regtool.cli.options import Json, PairOptions


@grouped
def doctor(pair: PairOptions, as_json: Json = False) -> None:
    """Look at a pair before registering it: geometry, intensities, overlap, what is wrong with it, and the command to run.

    Answers for broken headers too; exit code 3 only where an image cannot be read at all.

    `regtool doctor fixed.nii.gz moving.nii.gz`
    """
    from regtool.errors import InputError
    from regtool.io.itk import silence_itk
    from regtool.workflows.doctor import doctor as examine

    silence_itk()

    found = examine(*pair.paths())
    emit(found.as_dict(), found.table(), as_json)
    if found.unreadable:
        raise typer.Exit(InputError.exit_code)
