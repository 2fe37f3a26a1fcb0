"""`regtool models`: list, info, import, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Model files: list, look into, verify, import.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Model = Annotated[str, typer.Argument(help="A model's name or file.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Models that come with regtool."""
    from regtool.cli.console import emit
    from regtool.workflows.models import list_models

    found = list_models()
    rows = [(m["name"], f"{m['method']}, {m['dimension']}-D, {m['megabytes']} MB, licence: {m['licence']}") for m in found]
    emit({"models": found}, rows or [("none", "no model comes with this version; a method then learns on the pair itself")], as_json)


@app.command()
def info(model: Model, as_json: Json = False) -> None:
    """What is in a model file: method, parameters, training, licence, citation."""
    import json

    from regtool.cli.console import emit
    from regtool.workflows.models import info as look

    card = look(model)
    rows = [(key, json.dumps(value) if isinstance(value, dict) else str(value)) for key, value in card.items()]
    emit(card, rows, as_json)


@app.command()
def verify(model: Model, as_json: Json = False) -> None:
    """Check that a model's weights are whole, finite, and fit its method."""
    from regtool.cli.console import emit
    from regtool.workflows.models import verify as check

    result = check(model)
    emit(result, [(key, str(value)) for key, value in result.items()], as_json)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Published Keras weights (.h5) of VoxelMorph-1 or -2, CVPR 2018.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model file to write (.safetensors).")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Turn published weights into a model file."""
    from regtool.cli.console import emit
    from regtool.workflows.models import import_keras

    card = import_keras(source, output, overwrite)
    engine = ", ".join(f"{key} {value}" for key, value in card["parameters"]["engine"].items())
    rows = [("model", str(output)), ("method", f"{card['method']}, {card['dimension']}-D, {engine}"), ("citation", card["citation"])]
    emit({"file": str(output), **card}, rows, as_json)
