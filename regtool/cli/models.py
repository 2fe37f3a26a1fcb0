"""`regtool models`: list, info, import, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regtool.cli.options import Json, Overwrite

app = typer.Typer(help="Model files: list, look into, verify, import.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A model's name or file.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Models that come with regtool: what -m METHOD uses without --model."""
    from regtool.cli.console import emit
    from regtool.workflows.models import list_models

    found = list_models()
    rows = [(m["name"], f"{m['method']}, {m['dimension']}-D, {m['megabytes']} MB, licence: {m['licence']}") for m in found]
    emit({"models": found}, rows or [("none", "no model comes with this version; a method then learns on the pair itself")], as_json)


@app.command()
def info(model: Model, as_json: Json = False) -> None:
    """What is in a model file: method, training, scores, limits, licence, citation, and the parameters that are not the defaults (--json: all)."""
    from regtool.cli.console import emit
    from regtool.workflows.models import changed_parameters
    from regtool.workflows.models import info as look

    card = look(model)
    rows = [(key, str(value)) for key, value in card.items() if key not in ("training", "parameters")]
    for section, values in (*card["training"].items(), *changed_parameters(card).items()):
        parts = values.items() if isinstance(values, dict) else [("", values)]
        rows += [(f"{section} {name}".replace("_", " ").strip(), _text(value)) for name, value in parts if value is not None]
    emit(card, rows, as_json)


def _text(value: object) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


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
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn published weights into a model file."""
    from regtool.cli.console import emit
    from regtool.workflows.models import import_keras

    card = import_keras(source, output, overwrite)
    engine = ", ".join(f"{key} {value}" for key, value in card["parameters"]["engine"].items())
    rows = [("model", str(output)), ("method", f"{card['method']}, {card['dimension']}-D, {engine}"), ("citation", card["citation"])]
    emit({"file": str(output), **card}, rows, as_json)
