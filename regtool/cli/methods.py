"""`regtool methods`."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """List the registration methods."""
    from regtool.cli.console import emit
    from regtool.workflows.models import methods as found

    rows = found()
    emit({"methods": rows}, [(m["name"], m["summary"]) for m in rows], as_json)
