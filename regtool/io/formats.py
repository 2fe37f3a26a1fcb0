"""Which file formats there are, and what the name of a file says of its format. All that regtool knows of suffixes is here.

A file in `images/`, `transforms/` or `points/` that declares `FORMAT` is one format; nothing has to be registered. The suffixes are read from the
text of the declaration, so they must stand in it as they are; the module is imported when a file of its format is read or written.
Nothing heavy is imported: the command line lists suffixes from here.
"""

from __future__ import annotations

import ast
import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from regtool.config.choices import declaring_files, module_of
from regtool.errors import RegtoolError

log = logging.getLogger("regtool")

Kind = Literal["images", "transforms", "points"]

HERE = Path(__file__).resolve().parent
FOLDERS: dict[Kind, list[Path]] = {"images": [HERE / "images"], "transforms": [HERE / "transforms"], "points": [HERE / "points"]}
DECLARATION = re.compile(r"^FORMAT = .*", re.MULTILINE | re.DOTALL)
HEAD = 1 << 16  # bytes of a file that are looked at to tell formats apart


@dataclass(frozen=True, kw_only=True)
class Format:
    """What all formats have. suffixes: in lower case, with their dots (`.nii.gz`). recognise: asked with the path and the first bytes of a file (none
    where it is yet to be written) where formats share a suffix; the one without it takes what the others leave.
    """

    kind: ClassVar[Kind]
    suffixes: tuple[str, ...]
    recognise: Callable[[Path, bytes], bool] | None = None


F = TypeVar("F", bound=Format)


@dataclass(frozen=True)
class _Declared:
    """A format as its file declares it. module: name of the file."""

    module: str
    suffixes: tuple[str, ...]
    written: bool


def image_suffixes(written: bool = False) -> tuple[str, ...]:
    """Of images that can be read, or written."""
    return _suffixes("images", written)


def transform_suffixes() -> tuple[str, ...]:
    """Of transforms that can be read and written: formats of their own, then images of displacements."""
    return tuple(dict.fromkeys((*_suffixes("transforms"), *image_suffixes(written=True))))


def point_suffixes() -> tuple[str, ...]:
    """Of points and meshes."""
    return _suffixes("points")


def is_list(path: Path) -> bool:
    """Whether a name is one of a table of pairs or images, rather than of an image."""
    return suffix_of(path) in (".csv", ".tsv") or (suffix_of(path) == ".txt" and path.is_file())


def suffix_of(path: Path) -> str:
    """In lower case: `.nii.gz` for `a.b.nii.gz`, else the last one; "" where there is none."""
    name = path.name.lower()
    return next((suffix for suffix in _compound() if name.endswith(suffix)), path.suffix.lower())


def stem_of(path: Path) -> str:
    """The name without its suffix; all of the name of a folder."""
    return path.name if path.is_dir() else path.name[: len(path.name) - len(suffix_of(path))]


def find_format(record: type[F], path: Path, *, written: bool = False) -> F | None:
    """The format of a file to be read, or written; None where its suffix is of none."""
    suffix = suffix_of(path)
    found = [load_format(record, d.module) for d in _declared(record.kind) if suffix in d.suffixes and (d.written or not written)]
    if len(found) > 1:
        head = b"" if written else head_of(path)
        found = [f for f in found if f.recognise is not None and f.recognise(path, head)] or [f for f in found if f.recognise is None]
    return found[0] if found else None


def all_formats(record: type[F]) -> list[F]:
    """Every one, imported."""
    return [load_format(record, d.module) for d in _declared(record.kind)]


def load_format(record: type[F], module: str) -> F:
    """What one file declares. RegtoolError where it cannot be imported or declares another record: it may be the user's own."""
    found = module_of(f"regtool.io.{record.kind}", module).FORMAT
    if not isinstance(found, record):
        raise RegtoolError(
            f"regtool.io.{record.kind}.{module}: expected FORMAT to be of type {record.__name__}, got {type(found).__name__}",
            tip="docs/extending.md has an example",
        )
    return found


def head_of(path: Path) -> bytes:
    """The first bytes of a file, by which formats are told apart; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def _suffixes(kind: Kind, written: bool = False) -> tuple[str, ...]:
    """First those that are written too; those that formats share come last, since they say the least."""
    found = [suffix for d in sorted(_declared(kind), key=lambda d: not d.written) if d.written or not written for suffix in d.suffixes]
    return tuple(sorted(dict.fromkeys(found), key=found.count))


def _compound() -> tuple[str, ...]:
    """Suffixes with several dots."""
    return tuple(suffix for kind in FOLDERS for suffix in _suffixes(kind) if suffix.count(".") > 1)


def _declared(kind: Kind) -> tuple[_Declared, ...]:
    return _read_declarations(tuple(FOLDERS[kind]))


@functools.cache
def _read_declarations(folders: tuple[Path, ...]) -> tuple[_Declared, ...]:
    """By name of their files."""
    out = []
    for file, match in declaring_files(folders, DECLARATION):
        try:
            out.append(_declaration(file.stem, match[0]))
        except (SyntaxError, ValueError) as error:  # one broken file must not break every command
            log.warning("%s is left out: %s", file, error)
    return tuple(out)


def _declaration(module: str, text: str) -> _Declared:
    """Of `FORMAT = ...Format(suffixes=(...), ...)`. SyntaxError and ValueError for another text."""
    call = getattr(ast.parse(text).body[0], "value", None)
    given = {keyword.arg: keyword.value for keyword in call.keywords} if isinstance(call, ast.Call) else {}
    suffixes = ast.literal_eval(given["suffixes"]) if "suffixes" in given else None
    if not isinstance(suffixes, tuple) or not all(isinstance(s, str) and s.startswith(".") and s == s.lower() for s in suffixes):
        raise ValueError("expected FORMAT = ...Format(suffixes=('.abc',), ...), the suffixes in lower case with their dots")
    return _Declared(module, suffixes, "write" in given)
