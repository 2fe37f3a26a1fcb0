"""`regtool parameters init|check|explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regtool.cli.console import emit
from regtool.cli.options import Json, Overwrite, Set, overrides_of

app = typer.Typer(help="Parameter files: print one with every field explained, or check one.", no_args_is_help=True)


@app.command()
def init(
    method: Annotated[
        str | None, typer.Argument(help="A registration method, see `regtool methods`. Left out: no network.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.toml", help="Left out: stdout.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the numbers of the algorithm that few ever change.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Print a parameter file of METHOD, each field with its meaning and default."""
    from regtool.config.resolve import dump
    from regtool.io.files import refuse_existing, write_text
    from regtool.methods import parameters_of, read_parameters

    engine = parameters_of(method)() if method else None
    name = output.name if output else "FILE.toml"
    opening = f"Register:  regtool register FIXED MOVING -p {name}\nCheck:     regtool parameters check {name}"
    text = dump(read_parameters(None, {"method": method} if method else None), opening, engine, documented=True, advanced=everything)
    if output is None:
        print(text, end="")
        return
    refuse_existing([output], overwrite)
    write_text(output, text)
    emit({"output": str(output)}, [("written to", str(output))], False)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A parameter file.")], overrides: Set = None, as_json: Json = False) -> None:
    """Check FILE without running anything: unknown keys, wrong types and values are named with their line."""
    from regtool.methods import engine_section, read_parameters

    given = overrides_of(overrides)
    parameters = read_parameters(file, given)
    engine = engine_section(parameters, file, given)
    found = parameters.model_copy(update={"engine": engine.model_dump() if engine else {}}).model_dump(mode="json")
    emit({"file": str(file), "valid": True, "parameters": found}, [(str(file), f"valid, method {parameters.method or 'none'}")], as_json)


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="section.key, for example align.overlap_power.", metavar="SECTION.KEY")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="Whose [engine] is meant, and whose defaults.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Tell all about one parameter: meaning, unit, range, default, and what a tuned number was chosen on."""
    from regtool.config.resolve import explanation
    from regtool.methods import parameters_of, read_parameters

    parameters = read_parameters(None, {"method": method} if method else None)
    found = explanation(key, parameters, parameters_of(method)() if method else None)
    emit(found, [(name.replace("_", " "), str(value)) for name, value in found.items()], as_json)
