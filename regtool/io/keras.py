"""The convolutions of a network that was published as Keras weights (.h5)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regtool.errors import ModelError
from regtool.io.files import require_file


@dataclass(frozen=True)
class Convolution:
    """One layer in torch's order. kernel: (outputs, inputs, *kernel shape), axes as the arrays the network was trained on; bias: (outputs,)."""

    name: str
    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]


def read_convolutions(path: Path) -> list[Convolution]:
    """All convolutions of a Keras file, whole model or weights alone, in the order of its layers.

    Raises InputError for a missing file, ModelError for one that is no HDF5, no Keras file, or has layers with other weights.
    """
    import h5py

    require_file(path, "Keras weight file")
    tip = "expected weights that Keras saved (model.save or model.save_weights, .h5)"
    if not h5py.is_hdf5(path):
        raise ModelError(f"{path} is not an HDF5 file", tip=tip)
    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            layers = group.attrs.get("layer_names")
            if layers is None:
                raise ModelError(f"{path} holds no Keras weights (no layer names)", tip=tip)
            found = [_layer(group[_text(layer)], _text(layer), path) for layer in layers]
    except (OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path} is damaged: {error}", tip="copy or download it again") from error
    return [layer for layer in found if layer is not None]


def _layer(group: Any, name: str, path: Path) -> Convolution | None:
    """None for a layer without weights."""
    arrays = [np.asarray(group[_text(weight)], dtype=np.float32) for weight in group.attrs.get("weight_names", ())]
    if not arrays:
        return None
    if len(arrays) > 2 or not arrays[0].shape[:-2] or arrays[-1].shape != arrays[0].shape[-1:]:
        raise ModelError(
            f"{path}: layer {name!r} is no convolution with bias: {[a.shape for a in arrays]}", tip="only VoxelMorph's weights can be imported"
        )
    kernel = np.moveaxis(arrays[0], (-1, -2), (0, 1))  # Keras: (*kernel shape, inputs, outputs)
    return Convolution(name, np.ascontiguousarray(kernel), arrays[1])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
