"""A parameter file becomes Parameters: defaults < what a model brings < file < overrides; and back into a file."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from regtool.config.choices import methods
from regtool.config.schema import Parameters
from regtool.config.section import Section, choices_of
from regtool.config.toml import explained, merged, nearest, new_name, place_in_file, read_tables, with_new_names
from regtool.errors import ParameterError, did_you_mean

S = TypeVar("S", bound=Section)
log = logging.getLogger("regtool")


_INIT_TIP = "`regtool parameters init --all` prints every parameter with its meaning"
MODEL_SECTIONS = ("method", "grid", "preprocess", "engine", "training_similarity", "regularization", "supervision")  # what a model brings with it
Defaults = Callable[[str], dict[str, Any]]


def load(
    path: Path | None, overrides: Mapping[str, Any] | None = None, base: dict[str, Any] | None = None, defaults: Defaults | None = None
) -> Parameters:
    """`defaults(method)` < `base` (what a model brings) < file < `overrides` (`{"section": {"key": value}}`), validated.

    Raises ParameterError naming file, line, key and the nearest known key; UsageError/InputError-like trouble with the file likewise.
    """
    tables: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if path is not None:
        tables, lines = read_tables(path)
    overrides = with_new_names(overrides or {}, lambda old, new: log.warning("%s is now called %s", old, new))
    values = merged(copy.deepcopy(base or {}), tables, overrides)
    if isinstance(values.get("method"), str) and values["method"].lower() in methods():
        values["method"] = values["method"].lower()
    if defaults is not None and isinstance(values.get("method"), str):
        values = merged(copy.deepcopy(defaults(values["method"])), values)
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        raise explained(error.errors(), Parameters, place_in_file(path, lines, overrides)) from error


def check_overrides(overrides: Mapping[str, Any], said: Mapping[str, str]) -> None:
    """ParameterError for overrides that are wrong whatever a parameter file holds; said: the words that gave each `section.key`, for the message.

    What depends on other keys, and `[engine]`, which is the method's, is left to `load`.
    """
    try:
        Parameters.model_validate(overrides)
    except ValidationError as error:
        alone = [e for e in error.errors() if e["type"] != "value_error" or not isinstance(e["input"], Mapping)]
        if alone:
            raise explained(alone, Parameters, lambda key: nearest(said, key) or "parameters") from error


def validated(schema: type[S], table: dict[str, Any], prefix: str, path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> S:
    """One raw table (`[engine]`) through its own schema, errors explained as for the rest of the file."""
    try:
        return schema.model_validate(table)
    except ValidationError as error:
        place = place_in_file(path, read_tables(path)[1] if path else {}, overrides or {})
        raise explained(error.errors(), schema, place, prefix) from error


def dump(parameters: Parameters, opening: str, engine: Section | None = None, *, documented: bool = False, advanced: bool = True) -> str:
    """The whole file as TOML, `opening` as its first comment lines; with each field's meaning beside it where `documented`.

    advanced: with the numbers that few ever change too.
    """
    out = [*(f"# {line}" for line in opening.splitlines()), "", *_rows(parameters, documented, advanced)]
    for name in type(parameters).model_fields:
        section = engine if name == "engine" else getattr(parameters, name)
        if isinstance(section, BaseModel):
            out += _table(name, section, documented, advanced)
    return "\n".join(out) + "\n"


def _table(name: str, section: BaseModel, documented: bool, advanced: bool) -> list[str]:
    """A section, its own tables last; nothing of one that has only what is left out."""
    rows = _rows(section, documented, advanced)
    out = ["", f"[{name}]", *rows] if rows else []
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, dict) and (advanced or not is_advanced(info)):
            out += [line for inner, table in value.items() for line in _table(f"{name}.{key}.{inner}", table, documented, advanced)]
    return out


def _rows(section: BaseModel, documented: bool, advanced: bool) -> list[str]:
    import tomlkit

    out = []
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel | dict) or (is_advanced(info) and not advanced):
            continue
        comment = f"  # {info.description}" if documented else ""
        if value is not None:
            out.append(f"{key} = {tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string()}{comment}")
        elif documented:
            out.append(f"# {key} ={comment}")
    return out


def is_advanced(info: FieldInfo) -> bool:
    """Whether a field is one of the numbers that few ever change."""
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get("advanced"))


def explanation(key: str, parameters: Parameters, engine: Section | None = None) -> dict[str, Any]:
    """What there is to know of one parameter: key, meaning, value (the default), and where they apply unit, range, choices, chosen_on.

    ParameterError, with the nearest key, where there is none of that name. engine: the method's own section.
    """
    *sections, name = new_name(key.strip()).split(".")
    holder: BaseModel = parameters
    for section in sections:
        inner = engine if holder is parameters and section == "engine" and engine is not None else getattr(holder, section, None)
        if not isinstance(inner, BaseModel):
            raise ParameterError(f"{key}: there is no section {section}; {did_you_mean(section, list(type(holder).model_fields))}", tip=_INIT_TIP)
        holder = inner
    fields = type(holder).model_fields
    if name not in fields:
        raise ParameterError(f"{key}: unknown parameter; {did_you_mean(name, list(fields))}", tip=_INIT_TIP)
    info, value = fields[name], getattr(holder, name)
    if isinstance(value, BaseModel):
        return {"key": key, "meaning": type(value).__doc__ or "", "parameters": ", ".join(type(value).model_fields)}
    facts = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(limit, short):g}" for limit in info.metadata for short, sign in signs.items() if hasattr(limit, short)]
    found = {
        "key": ".".join([*sections, name]),
        "meaning": info.description,
        "default": "left out" if value is None else value if isinstance(value, str | bool | int | float) else str(value),
        "unit": facts.get("unit"),
        "range": " and ".join(limits),
        "choices": ", ".join(choices_of(info.annotation)),
        "chosen_on": facts.get("chosen_on"),
    }
    return {name: fact for name, fact in found.items() if fact not in (None, "")}
