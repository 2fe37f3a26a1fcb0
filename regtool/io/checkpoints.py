"""The state of a training, from which it goes on: tensors and a JSON record in one safetensors file, written atomically, never unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from regtool.errors import InputError, ModelError
from regtool.io.files import atomic
from regtool.io.models import tensor_file_header

FORMAT = "regtool-training/1"


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Atomically: the file before stays whole until this one is. record: JSON-able. OutputError where it cannot be written (disk full)."""
    from safetensors.torch import save

    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(flat, {"format": FORMAT, "record": json.dumps(record)}))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors on the CPU, record). InputError for a missing, damaged or foreign file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    tip = "start again with --overwrite, or go on from model.safetensors of an earlier copy"
    try:
        metadata = tensor_file_header(path, "resume state").get("__metadata__") or {}
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is no resume state of this regtool (format {metadata.get('format')}, expected {FORMAT})", tip=tip)
        return load(path.read_bytes()), json.loads(metadata["record"])
    except (ModelError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"the resume state cannot be read: {error}", tip=tip) from error
