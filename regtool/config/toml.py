"""The tables of a parameter file before they are validated: read, merged, overridden; and what is wrong with them, with file, line and key."""

from __future__ import annotations

import copy
import logging
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from regtool.errors import ParameterError, did_you_mean

log = logging.getLogger("regtool")
RENAMED = {  # sections and keys of older files and models
    "measure": "metric",
    "similarity": "training_similarity",
    "regularity": "regularization",
    "engine.turned": "engine.point_reflection",
}


def explained(
    error: ValidationError, schema: type[BaseModel], path: Path | None, lines: dict[str, int], prefix: str = "", overrides: tuple[str, ...] = ()
) -> ParameterError:
    """The first trouble as `vm.toml:5: engine.variatn: unknown parameter; did you mean 'variant'?`."""
    trouble = error.errors()[0]
    where = [str(p) for p in trouble["loc"] if not isinstance(p, int)]
    key = ".".join([*([prefix] if prefix else []), *where])
    by_override = next((o for o in reversed(overrides) if _within(o.partition("=")[0].strip(), key)), None)
    if by_override is not None:
        place = f"--set {by_override}"
    else:
        line = lines.get(key) or next((number for name, number in lines.items() if _within(name, key)), None)
        place = f"{path}:{line}" if path and line else str(path) if path else "parameters"
    if trouble["type"] == "extra_forbidden":
        message = f"unknown parameter; {did_you_mean(where[-1], known_keys(schema, where[:-1]))}"
    else:
        text = trouble["msg"].removeprefix("Value error, ")
        message = f"{text[0].lower()}{text[1:]}, got {trouble['input']!r}"
    more = len(error.errors()) - 1
    return ParameterError(
        f"{place}: {key}: {message}" + (f" (and {more} more)" if more else ""),
        tip="`regtool parameters init METHOD` prints every parameter with its meaning",
    )


def _within(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is a section of the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def known_keys(schema: type[BaseModel], where: list[str]) -> list[str]:
    """The keys of the section at `where`."""
    for name in where:
        inner = schema.model_fields[name].annotation if name in schema.model_fields else None
        schema = next((t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel)), schema)
    return list(schema.model_fields)


def read_tables(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The tables of a file, and the line of each `section.key`; old names become today's, with a warning for each."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(
            f"cannot read the parameter file {path}: {getattr(error, 'strerror', None) or error}", tip="-p takes a TOML file"
        ) from error
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", str(error))
        line = found.group(1) if found and found.group(1) else len(text.splitlines())
        raise ParameterError(f"{path}:{line}: not valid TOML: {error}", tip="strings need quotes, sections look like [train]") from error
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\- ]+)\]", line):
            section = header.group(1).strip()
            lines[section] = number
        elif key := re.match(r"\s*([\w\-.]+)\s*=", line):
            lines[f"{section}.{key.group(1)}" if section else key.group(1)] = number
    tables = with_new_names(tables, lambda old, new: log.warning("%s:%s: %s is now called %s", path, lines.get(old, "?"), old, new))
    return tables, {new_name(key): number for key, number in lines.items()}


def with_new_names(tables: dict[str, Any], note: Callable[[str, str], None] | None = None) -> dict[str, Any]:
    """The tables of an older file or model with today's names; what is given under both names stays as under the new one. note: of (old, new)."""
    out = copy.deepcopy(tables)
    for old, new in RENAMED.items():
        holder, name = _holder(out, old)
        if name not in holder:
            continue
        value = holder.pop(name)
        target, new_name = _holder(out, new)
        there = target.get(new_name, value)
        target[new_name] = merged(value, there) if isinstance(value, dict) and isinstance(there, dict) else there
        if note is not None:
            note(old, new)
    return out


def new_name(key: str) -> str:
    """Today's name of a dotted key or section."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _holder(tables: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The table that holds a dotted key, and the last part of the key; an empty table where there is none."""
    *sections, name = key.split(".")
    for section in sections:
        inner = tables.get(section)
        if not isinstance(inner, dict):
            return {}, name
        tables = inner
    return tables, name


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Tables merged key by key, `high` winning."""
    out = dict(low)
    for key, value in high.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def set_value(values: dict[str, Any], override: str) -> None:
    """`section.key=value` into `values`; value in TOML notation, a bare word is a string."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ParameterError(f"--set {override}: expected section.key=value", tip="for example --set oneshot.iterations=100")
    try:
        value = tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if new_name(key.strip()) != key.strip():
        log.warning("--set %s: %s is now called %s", override, key.strip(), new_name(key.strip()))
    *sections, name = new_name(key.strip()).split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ParameterError(f"--set {override}: {section} is no section", tip="`regtool parameters init METHOD` prints every parameter")
    values[name] = value
