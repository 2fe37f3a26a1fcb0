"""Lists of what to register: a table of pairs, a table of images, or a folder of images.

PAIRS.csv has the columns `fixed,moving` and optionally `id, fixed_labels, moving_labels, fixed_landmarks, moving_landmarks, fixed_mask,
moving_mask`; IMAGES.csv has `image` and optionally `id, labels, landmarks, mask`. Paths are relative to the table; columns whose name begins with #
are ignored.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, overload

from regtool.errors import InputError, UsageError, did_you_mean
from regtool.io.files import require_file
from regtool.io.formats import image_suffixes, stem_of, suffix_of
from regtool.io.images import is_image

EXTRAS = ("labels", "landmarks", "mask")
PAIR_COLUMNS = ("id", "fixed", "moving", *(f"{side}_{extra}" for extra in EXTRAS for side in ("fixed", "moving")))
IMAGE_COLUMNS = ("id", "image", *EXTRAS)
NAMED = 10  # missing files that an error names
LONGEST_ID = 200  # bytes: file systems take 255, and temporary names are longer


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An image and what belongs to it. line: where in the list it stands, None for a file of a folder."""

    id: str
    image: Path
    labels: Path | None = None
    landmarks: Path | None = None
    mask: Path | None = None
    line: int | None = field(default=None, compare=False)

    @property
    def files(self) -> dict[str, Path]:
        """What is given, by name."""
        found = {"image": self.image, "labels": self.labels, "landmarks": self.landmarks, "mask": self.mask}
        return {name: path for name, path in found.items() if path is not None}


@dataclass(frozen=True)
class Pair:
    """Two images to be registered. id: unique in its list, and the name of a file or folder."""

    id: str
    fixed: Entry
    moving: Entry


Pairs = Sequence[Pair]
T = TypeVar("T", Entry, Pair)


@dataclass(frozen=True)
class AllPairs(Sequence[Pair]):
    """Every ordered pair of different images, each made when it is asked for: a thousand images have a million."""

    images: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.images) * (len(self.images) - 1)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Pair, ...]: ...

    def __getitem__(self, index: int | slice) -> Pair | tuple[Pair, ...]:
        """Pair 0 has the first image as the fixed one."""
        if isinstance(index, slice):
            return tuple(self[k] for k in range(len(self))[index])
        fixed, moving = divmod(range(len(self))[index], len(self.images) - 1)
        return _pair(self.images[fixed], self.images[moving + (moving >= fixed)])


def read_list(source: Path, atlas: Path | None = None, atlas_labels: Path | None = None, isolated: bool = False) -> Pairs:
    """The pairs of a PAIRS.csv; of an IMAGES.csv or a folder every ordered pair of images or, with an atlas, each image as moving to the atlas.

    An atlas that is in the list itself brings its labels, landmarks and mask from there. Raises InputError for what is missing, malformed, listed
    twice or too little (all missing files at once), UsageError for an atlas with a list of pairs and for atlas labels without an atlas. isolated: an
    empty file is no reason to refuse the list, where each pair may fail alone; and every missing one is named.
    """
    if atlas_labels is not None and atlas is None:
        raise UsageError("atlas labels are given without an atlas", tip="name the atlas image too")
    if source.is_dir():
        images = _unique(_folder(source), source)
    else:
        header, rows = _table(source)
        if "image" not in header:
            if atlas is not None:
                raise UsageError(f"{source} lists pairs, an atlas goes with a list of images", tip="leave the atlas out, or list images")
            pairs = _unique([_pair_of_row(source, line, row) for line, row in rows], source)
            if not pairs:
                raise InputError(f"{source} lists no pairs", tip="below the header, expected one line for each pair")
            _require([entry for pair in pairs for entry in (pair.fixed, pair.moving)], source, isolated)
            return pairs
        images = _unique([_entry(source, line, row) for line, row in rows], source)
    if atlas is None:
        if len(images) < 2:
            raise InputError(f"{source} holds {len(images) or 'no'} image{'s' * (len(images) != 1)}, expected at least two", tip=_folder_tip(source))
        _require(images, source, isolated)
        return AllPairs(images)
    return _to_atlas(images, source, atlas, atlas_labels, isolated)


def split(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """(training, validation) pairs; which is held out depends on ids and seed alone, not on the order of the list.

    Of all pairs of images, `share` of the images (at least two) are held out, and no pair mixes the two parts. Of listed pairs, those that share an
    image file stay together, as long as the list then falls apart into groups; where everything is connected (by an atlas, say) single pairs are held
    out. Validation is empty for `share` 0, and where the list is too small: less than half an image or pair, or nothing left to train on.
    """
    if isinstance(pairs, AllPairs):
        count = round(share * len(pairs.images))
        if count == 0 or len(pairs.images) < 4:
            return pairs, ()
        ranked = sorted(pairs.images, key=lambda entry: _rank(entry.id, seed))
        held = {entry.id for entry in ranked[: min(max(count, 2), len(ranked) - 2)]}
        training, validation = (tuple(entry for entry in pairs.images if (entry.id in held) == out) for out in (False, True))
        return AllPairs(training), AllPairs(validation)
    count = min(round(share * len(pairs)), len(pairs) - 1)
    if count <= 0:
        return pairs, ()
    groups = _groups(pairs)
    if len(groups) == 1:
        groups = [[pair] for pair in pairs]
    groups.sort(key=lambda group: min(_rank(pair.id, seed) for pair in group))
    held = set()
    for group in groups:
        if len(held) + len(group) <= count:
            held |= {pair.id for pair in group}
    if not held:
        held = {pair.id for pair in min(groups, key=len)}
    return tuple(pair for pair in pairs if pair.id not in held), tuple(pair for pair in pairs if pair.id in held)


def _groups(pairs: Pairs) -> list[list[Pair]]:
    """The pairs that are connected by the image files they share."""
    parent: dict[Path, Path] = {}

    def root(path: Path) -> Path:
        while parent.setdefault(path, path) != path:
            parent[path] = path = parent[parent[path]]
        return path

    files = [(pair.fixed.image.resolve(), pair.moving.image.resolve()) for pair in pairs]
    for fixed, moving in files:
        parent[root(fixed)] = root(moving)
    groups: dict[Path, list[Pair]] = {}
    for pair, (fixed, _) in zip(pairs, files, strict=True):
        groups.setdefault(root(fixed), []).append(pair)
    return list(groups.values())


def _rank(name: str, seed: int) -> bytes:
    """A random order of names that stays when others are added."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def _to_atlas(images: tuple[Entry, ...], source: Path, atlas: Path, labels: Path | None, isolated: bool) -> Pairs:
    """Each image as moving to the atlas, without the atlas itself."""
    own = next((entry for entry in images if entry.image.resolve() == atlas.resolve()), Entry(id=stem_of(atlas), image=atlas))
    fixed = Entry(id=own.id, image=own.image, labels=labels or own.labels, landmarks=own.landmarks, mask=own.mask, line=own.line)
    moving = [entry for entry in images if entry is not own]
    if not moving:
        raise InputError(f"{source} holds no image besides the atlas", tip=_folder_tip(source))
    _require([fixed, *moving], source, isolated)
    return tuple(_pair(fixed, entry) for entry in moving)


def _pair(fixed: Entry, moving: Entry, name: str | None = None) -> Pair:
    return Pair(name or f"{moving.id}_to_{fixed.id}", fixed, moving)


def _pair_of_row(source: Path, line: int, row: dict[str, str]) -> Pair:
    """InputError where labels or landmarks are given for one image only: they would count for nothing."""
    for extra in EXTRAS[:2]:
        if bool(row.get(f"fixed_{extra}")) != bool(row.get(f"moving_{extra}")):
            raise InputError(f"{source}:{line}: {extra} are given for one image only", tip=f"fixed_{extra} and moving_{extra} go together")
    fixed, moving = (
        _entry(source, line, {"image": row[side], **{extra: row.get(f"{side}_{extra}", "") for extra in EXTRAS}}) for side in ("fixed", "moving")
    )
    return _pair(fixed, moving, row.get("id"))


def _entry(source: Path, line: int, row: dict[str, str]) -> Entry:
    image = source.parent / row["image"]
    labels, landmarks, mask = (source.parent / row[extra] if row.get(extra) else None for extra in EXTRAS)
    return Entry(id=row.get("id") or stem_of(image), image=image, labels=labels, landmarks=landmarks, mask=mask, line=line)


def _folder(folder: Path) -> list[Entry]:
    """Its images by name: files of a known suffix, the header alone of those in two files, and folders with a DICOM series."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if is_image(path) and not (suffix_of(path) == ".img" and path.with_suffix(".hdr").exists()):
            found.append(Entry(id=stem_of(path), image=path))
    return found


def _folder_tip(source: Path) -> str:
    return f"regtool reads {' '.join(image_suffixes())} and folders of DICOM files" if source.is_dir() else "expected one line for each image"


def _table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns, and (line number, cells by column) of every row that is not blank. InputError for what is no list of pairs or images."""
    require_file(path, "list")
    if suffix_of(path) in image_suffixes():
        raise InputError(f"{path} is an image, expected a list", tip="name a PAIRS.csv, an IMAGES.csv or a folder of images")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file", tip="save it as CSV in UTF-8") from error
    delimiter = max(",;\t", key=next((line for line in text.splitlines() if line.strip()), "").count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}", tip="save it as CSV in UTF-8") from error
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    _check_header(header, path)
    required = ("image",) if "image" in header else ("fixed", "moving")
    out = []
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}:{line}: {len(cells)} columns, expected {len(header)} as in the header", tip="quote cells that hold a comma")
        row = dict(zip(header, cells, strict=True))
        for name in required:
            if not row[name]:
                raise InputError(f"{path}:{line}: no {name} image")
        out.append((line, row))
    return header, out


def _check_header(header: Sequence[str], path: Path) -> None:
    """InputError for columns that lack, are unknown or come twice."""
    if "image" not in header and not {"fixed", "moving"} <= set(header):
        found = ", ".join(header)[:80] or "nothing"
        raise InputError(f"{path}: expected the columns fixed,moving or image, the header has {found}", tip="the first line names the columns")
    known = IMAGE_COLUMNS if "image" in header else PAIR_COLUMNS
    for name in header:
        if name.startswith("#"):
            continue
        if name not in known:
            raise InputError(f"{path}: unknown column {name!r}; {did_you_mean(name, known)}", tip="a column whose name begins with # is ignored")
        if header.count(name) > 1:
            raise InputError(f"{path}: the column {name} comes {header.count(name)} times")


def _unique(listed: Iterable[T], source: Path) -> tuple[T, ...]:
    """InputError for an id that comes twice, or that no file can have as its name: results are named after it."""
    out: dict[str, T] = {}
    for one in listed:
        if one.id in out:
            lines = [_line(entry) for entry in (out[one.id], one)]
            where = f": in lines {lines[0]} and {lines[1]}" if None not in lines else ""
            raise InputError(f"{source}: the id {one.id!r} comes twice{where}", tip="a column id gives each line a name of its own")
        if one.id in (".", "..") or any(c in one.id for c in "/\\:\0") or len(one.id.encode()) > LONGEST_ID:
            where = f":{_line(one)}" if _line(one) is not None else ""
            raise InputError(f"{source}{where}: the id {one.id!r} cannot be the name of a folder", tip="use letters, digits, _ and -")
        out[one.id] = one
    return tuple(out.values())


def _line(one: Entry | Pair) -> int | None:
    return one.line if isinstance(one, Entry) else one.moving.line


def _require(entries: Iterable[Entry], source: Path, isolated: bool) -> None:
    """One InputError for all files that are missing or, unless `isolated`, empty."""
    listed: dict[Path, int | None] = {}
    for entry in entries:
        for path in entry.files.values():
            listed.setdefault(path, entry.line)
    missing = [path for path in listed if not path.exists() or (not isolated and path.is_file() and path.stat().st_size == 0)]
    if missing:
        shown = missing if isolated else missing[:NAMED]
        names = ", ".join(str(path) if listed[path] is None else f"line {listed[path]}: {path}" for path in shown)
        what = "missing" if isolated else "missing or empty"
        more = ", ..." if len(missing) > len(shown) else ""
        raise InputError(f"{len(missing)} of {len(listed)} files in {source} are {what}: {names}{more}", tip="paths are relative to the list")
