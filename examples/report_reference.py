"""The tables of docs/report.md and the JSON Schema of the reports, from the reports' own declaration.

python examples/report_reference.py            # prints the tables
python examples/report_reference.py --write    # into docs/report.md, between its two marks, and regtool/report/report.schema.json
"""

from __future__ import annotations

import argparse
import re
import types
import typing
from pathlib import Path

from regtool.report.schema import REPORTS, Record, json_schema

ROOT = Path(__file__).resolve().parents[1]
PAGE, SCHEMA = ROOT / "docs" / "report.md", ROOT / "regtool" / "report" / "report.schema.json"
BEGIN, END = "<!-- keys: from here", "<!-- keys: to here -->"
JSON = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): ""}


def tables() -> str:
    """A section for each report, and one for each record that they share; rows: key, what it holds, whether it may be missing, meaning."""
    waiting: list[type[Record]] = list(REPORTS)
    parts, seen = [], set[type[Record]]()
    while waiting:
        record = waiting.pop(0)
        if record not in seen:
            seen.add(record)
            parts.append(section(record))
            waiting += [inner for info in record.model_fields.values() for inner in records(info.annotation)]
    return "\n".join(parts)


def section(record: type[Record]) -> str:
    """Heading, what it is, and a row for each key."""
    rows = ["| key | holds | | meaning |", "|---|---|---|---|"]
    for key, info in record.model_fields.items():
        optional = "" if info.is_required() or info.default is not None else "may be missing"
        null = " or null" if info.is_required() and type(None) in typing.get_args(info.annotation) else ""
        rows.append(f"| `{key}` | {kind(info.annotation)}{null} | {optional} | {info.description} |")
    about = re.sub(r"\s+", " ", record.__doc__ or "")
    return f"### {record.__name__}\n\n{about}\n\n" + "\n".join(rows) + "\n"


def kind(annotation: object) -> str:
    """What JSON holds: `list of [StageFacts](#stagefacts)`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(found for found in map(kind, arguments) if found)
    if origin is typing.Annotated:
        return kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return f"{kind(arguments[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return JSON.get(typing.cast(type, annotation), "any value")


def records(annotation: object) -> list[type[Record]]:
    """Those that an annotation names."""
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, Record) else []
    return [found for inner in typing.get_args(annotation) for found in records(inner)]


def written(page: str) -> str:
    """The page with the tables of today between its marks."""
    head, _, rest = page.partition(BEGIN)
    mark = BEGIN + rest.partition("\n")[0]
    return f"{head}{mark}\n\n{tables()}\n{END}" + page.partition(END)[2]


def main() -> None:
    """As the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(tables(), end="")
        return
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA.write_text(json_schema(), encoding="utf-8")


if __name__ == "__main__":
    main()
