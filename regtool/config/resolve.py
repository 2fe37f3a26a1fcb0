"""A parameter file becomes Parameters: defaults < what a model brings < file < `--set section.key=value`; and back into a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from regtool.config.schema import Parameters, Section
from regtool.config.toml import explained, merged, read_tables, set_value

S = TypeVar("S", bound=Section)


MODEL_SECTIONS = ("method", "grid", "preprocess", "engine", "training_similarity", "regularization", "supervision")  # what a model brings with it
Defaults = Callable[[str], dict[str, Any]]


def load(path: Path | None, overrides: tuple[str, ...] = (), base: dict[str, Any] | None = None, defaults: Defaults | None = None) -> Parameters:
    """`defaults(method)` < `base` (what a model brings) < file < `section.key=value` overrides, validated.

    Raises ParameterError naming file, line, key and the nearest known key; UsageError/InputError-like trouble with the file likewise.
    """
    tables: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if path is not None:
        tables, lines = read_tables(path)
    values = merged(copy.deepcopy(base or {}), tables)
    for override in overrides:
        set_value(values, override)
    if defaults is not None and isinstance(values.get("method"), str):
        values = merged(copy.deepcopy(defaults(values["method"])), values)
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        raise explained(error, Parameters, path, lines, overrides=overrides) from error


def validated(schema: type[S], table: dict[str, Any], prefix: str, path: Path | None = None, overrides: tuple[str, ...] = ()) -> S:
    """One raw table (`[engine]`) through its own schema, errors explained as for the rest of the file."""
    try:
        return schema.model_validate(table)
    except ValidationError as error:
        raise explained(error, schema, path, read_tables(path)[1] if path else {}, prefix, overrides) from error


def dump(parameters: Parameters, opening: str, engine: Section | None = None, documented: bool = False) -> str:
    """The whole file as TOML, `opening` as its first comment lines; with each field's meaning beside it where `documented`."""
    import tomlkit

    out = [*(f"# {line}" for line in opening.splitlines()), ""]

    def rows(section: BaseModel) -> None:
        for key, info in type(section).model_fields.items():
            value = getattr(section, key)
            if isinstance(value, BaseModel | dict):
                continue
            comment = f"  # {info.description}" if documented else ""
            if value is None:
                if documented:
                    out.append(f"# {key} ={comment}")
                continue
            out.append(f"{key} = {tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()}{comment}")

    rows(parameters)
    for name in type(parameters).model_fields:
        section = engine if name == "engine" else getattr(parameters, name)
        if isinstance(section, BaseModel):
            out += ["", f"[{name}]"]
            rows(section)
    return "\n".join(out) + "\n"
