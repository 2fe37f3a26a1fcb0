"""Model files: safetensors (never unpickled) whose metadata is the model's card, readable without torch.

Metadata: `format` = "regtool-model/1" and `card`, a JSON object: method, dimension, name, parameters (complete and resolved, preprocessing
and grid included), training, licence, citation, tensors_sha256. Weights may be stored in half precision. The models that come with regtool lie in one
folder, METHOD_2d or METHOD_3d each, beside the list of their hashes (as `sha256sum` writes it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regtool.config.toml import with_new_names
from regtool.errors import ModelError, UsageError, did_you_mean
from regtool.io.files import atomic, require_file, sha256, write_text

if TYPE_CHECKING:
    import torch

FORMAT = "regtool-model/1"
BUNDLED = Path(__file__).resolve().parents[1] / "weights"
HASHES = "SHA256SUMS"
LARGEST_HEADER = 100_000_000  # the safetensors format's own limit, bytes
CARD: dict[str, type | tuple[type, ...]] = {
    "method": str, "dimension": int, "name": str, "parameters": dict, "training": dict, "licence": str, "citation": str, "tensors_sha256": str,
}  # fmt: skip
MAGIC = {
    b"PK\x03\x04": "a PyTorch or zip archive",
    b"\x80": "a Python pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
}


def find_model(name: str) -> Path:
    """A model by file path, or by the name of one that comes with regtool. UsageError with the nearest name where there is neither."""
    path = Path(name)
    if path.suffix or path.exists() or len(path.parts) > 1:
        require_file(path, "model file")
        return path
    known = {file.stem: file for file in bundled()}
    if name not in known:
        tip = "`regtool models list` shows them; a model file is named by its path"
        raise UsageError(f"unknown model {name!r}" + (f"; {did_you_mean(name, known)}" if known else ""), tip=tip)
    return known[name]


def bundled() -> list[Path]:
    """The model files that come with regtool, sorted."""
    return sorted(BUNDLED.glob("*.safetensors"))


def bundled_model(method: str, ndim: int) -> Path | None:
    """The model that comes with regtool for a method and a dimension; None where there is none."""
    path = BUNDLED / f"{method}_{ndim}d.safetensors"
    return path if path.exists() else None


def is_bundled(path: Path) -> bool:
    """Whether a model file is one that comes with regtool."""
    return path.resolve().parent == BUNDLED.resolve()


def write_hashes(folder: Path) -> None:
    """The list that `sha256sum -c` and `read_tensors` verify a folder of bundled models by."""
    rows = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors"))]
    write_text(folder / HASHES, "".join(rows))


def write_model(path: Path, tensors: Mapping[str, torch.Tensor], card: Mapping[str, Any]) -> dict[str, Any]:
    """Atomically. card: as in CARD, `tensors_sha256` is filled in here. Returns the whole card; ModelError where it lacks something."""
    from safetensors.torch import save

    flat = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    data = save(flat)
    whole = {**card, "tensors_sha256": _tensors_sha256(data)}
    _check_card(whole, path)
    end = 8 + int.from_bytes(data[:8], "little")
    # safetensors itself writes metadata in random order; the same model must give the same bytes
    header = json.dumps({"__metadata__": {"format": FORMAT, "card": json.dumps(whole)}, **json.loads(data[8:end])}).encode()
    header += b" " * (-len(header) % 8)
    with atomic(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    return whole


def read_card(path: Path) -> dict[str, Any]:
    """The card from the file's header alone; no torch. ModelError for anything but an undamaged regtool model."""
    metadata = tensor_file_header(path).get("__metadata__")
    form = metadata.get("format") if isinstance(metadata, dict) else None
    if not isinstance(form, str) or not form.startswith("regtool-model/"):
        raise ModelError(f"{path} is a safetensors file, but no regtool model: it has no model card", tip="`regtool models list` shows usable models")
    if form != FORMAT:
        raise ModelError(f"{path} has model format {form}, this regtool reads {FORMAT}", tip="upgrade regtool")
    try:
        card = json.loads(metadata["card"])  # type: ignore[index]  # a dictionary, or it would have no format
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: the model card is damaged", tip="copy the file again") from error
    _check_card(card, path)
    return {**card, "parameters": with_new_names(card["parameters"])}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The weights, on the CPU, as they are stored.

    ModelError where the file is damaged, no regtool model, or holds weights that are not finite; and where it lies among the models that come with
    regtool but is not as it came.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    card = read_card(path)
    data = path.read_bytes()
    if is_bundled(path):
        _check_hash(path, data)
    if _tensors_sha256(data) != card["tensors_sha256"]:
        raise ModelError(f"{path} is damaged: its weights have changed since it was written", tip="copy or download it again")
    try:
        tensors: dict[str, torch.Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is damaged: {error}", tip="copy or download it again") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: weights {name} are not all finite", tip="the training diverged; use an earlier checkpoint")
    return tensors


def tensor_file_header(path: Path, what: str = "model file") -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of length, then that many of JSON; its offsets must fill the file exactly.

    Raises InputError where there is no file, ModelError where it is another kind of file, cut off or too long.
    """
    require_file(path, what)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        kind = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
        length = int.from_bytes(start, "little")
        if kind and length > LARGEST_HEADER:
            tip = (
                "`regtool models import` converts published Keras weights (.h5)"
                if "HDF5" in kind
                else "regtool reads safetensors only; it never unpickles"
            )
            raise ModelError(f"{path} is {kind}, not a regtool model", tip=tip)
        if len(start) < 8 or not 2 <= length <= LARGEST_HEADER:
            raise ModelError(f"{path} is not a regtool model (no safetensors header)", tip="a model file ends in .safetensors")
        if 8 + length > size:
            raise ModelError(f"{path} is cut off: {size} bytes, its header alone needs {8 + length}", tip="copy or download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{path} is not a regtool model (its header is no safetensors header)", tip="copy or download it again") from error
    if size != expected:
        what = "cut off" if size < expected else "longer than its header says"
        raise ModelError(f"{path} is {what}: {size} bytes, expected {expected}", tip="copy or download it again")
    return header


def _check_card(card: Any, path: Path) -> None:
    """ModelError unless every field is there with its type."""
    if not isinstance(card, dict):
        raise ModelError(f"{path}: the model card is damaged", tip="copy the file again")
    for key, kind in CARD.items():
        if not isinstance(card.get(key), kind):
            raise ModelError(f"{path}: the model card has no valid {key!r}", tip="copy the file again, or write it with regtool")


def _check_hash(path: Path, data: bytes) -> None:
    """ModelError unless a bundled model is the one in the list of hashes."""
    hashes = path.parent / HASHES
    listed = hashes.read_text(encoding="utf-8").splitlines() if hashes.exists() else []
    if f"{hashlib.sha256(data).hexdigest()}  {path.name}" not in listed:
        raise ModelError(f"{path} is not the model that came with regtool: its hash is not the one in {HASHES}", tip="install regtool again")


def _tensors_sha256(data: bytes) -> str:
    """Hex digest of everything after the header."""
    return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
