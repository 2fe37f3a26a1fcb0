"""The tables of a parameter file before they are validated: read, merged, overridden; and what is wrong with them, with file, line and key."""

from __future__ import annotations

import copy
import logging
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from regtool.errors import ParameterError, did_you_mean, nearest_name

T = TypeVar("T")
log = logging.getLogger("regtool")
RENAMED = {  # sections and keys of older files and models
    "measure": "metric",
    "similarity": "training_similarity",
    "regularity": "regularization",
    "engine.turned": "engine.point_reflection",
}


def explained(troubles: Sequence[ErrorDetails], schema: type[BaseModel], place: Callable[[str], str], prefix: str = "") -> ParameterError:
    """The first trouble as `vm.toml:5: engine.variatn: unknown parameter; did you mean 'variant'?`. place: who or what said `section.key`."""
    trouble = troubles[0]
    where = [str(p) for p in trouble["loc"] if not isinstance(p, int)]
    key = ".".join([*([prefix] if prefix else []), *where])
    if trouble["type"] == "extra_forbidden":
        message = f"unknown parameter; {did_you_mean(where[-1], known_keys(schema, where[:-1]))}"
    else:
        text = trouble["msg"].removeprefix("Value error, ")
        message = f"{text[0].lower()}{text[1:]}, got {trouble['input']!r}"
        if trouble["type"] == "literal_error" and (near := nearest_name(str(trouble["input"]), re.findall(r"'([^']*)'", trouble["ctx"]["expected"]))):
            message += f"; did you mean {near!r}?"
    more = f" (and {len(troubles) - 1} more)" if len(troubles) > 1 else ""
    return ParameterError(f"{place(key)}: {key}: {message}{more}", tip="`regtool parameters init METHOD` prints every parameter with its meaning")


def place_in_file(path: Path | None, lines: Mapping[str, int], overrides: Mapping[str, Any]) -> Callable[[str], str]:
    """Where a key stands, as `vm.toml:5`; `parameters` for what no file says."""

    def place(key: str) -> str:
        if path is None or _holds(overrides, key):
            return "parameters"
        line = nearest(lines, key)
        return f"{path}:{line}" if line else str(path)

    return place


def nearest(known: Mapping[str, T], key: str) -> T | None:
    """What is known of a dotted key, or of a section that it is in, or of the first key that is in it."""
    return known.get(key) or next((value for name, value in known.items() if _within(name, key)), None)


def _within(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is a section of the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _holds(table: Mapping[str, Any], key: str) -> bool:
    """Whether a nested table says something of a dotted key or section."""
    name, _, rest = key.partition(".")
    inner = table.get(name)
    return name in table and (not rest or not isinstance(inner, Mapping) or _holds(inner, rest))


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


def with_new_names(tables: Mapping[str, Any], note: Callable[[str, str], None] | None = None) -> dict[str, Any]:
    """The tables of an older file or model with today's names; what is given under both names stays as under the new one. note: of (old, new)."""
    out = copy.deepcopy(dict(tables))
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


def merged(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merged key by key, the later ones winning."""
    out: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            there = out.get(key)
            out[key] = merged(there if isinstance(there, dict) else {}, value) if isinstance(value, dict) else value
    return out


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"section": {"key": value}}` of `section.key`."""
    for name in reversed(key.split(".")):
        value = {name: value}
    table: dict[str, Any] = value
    return table


def parse_override(text: str) -> tuple[str, Any]:
    """(today's dotted key, value) of `section.key=value`; the value in TOML notation, a bare word is a string. ParameterError for another form."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ParameterError(f"--set {text}: expected section.key=value", tip="for example --set oneshot.iterations=100")
    if new_name(key) != key:
        log.warning("--set %s: %s is now called %s", text, key, new_name(key))
    try:
        return new_name(key), tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return new_name(key), value
