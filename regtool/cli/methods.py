"""`regtool methods`."""

from __future__ import annotations

from regtool.cli.options import Json


def methods(as_json: Json = False) -> None:
    """List the registration methods."""
    from regtool.cli.console import emit
    from regtool.workflows.models import methods as found

    rows = found()
    emit({"methods": rows}, [(m["name"], m["summary"]) for m in rows], as_json)
