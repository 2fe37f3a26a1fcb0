"""Model files: what is written comes back, and everything else is refused in one clear line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from regtool.errors import InputError, ModelError, OutputError, UsageError
from regtool.io import models
from regtool.io.models import find_model, read_card, read_tensors, write_model
from regtool.workflows import models as workflow

CARD: dict[str, Any] = {
    "method": "voxelmorph", "dimension": 3, "name": "test", "parameters": {"method": "voxelmorph"}, "training": {"steps": 3},
    "licence": "", "citation": "",
}  # fmt: skip
TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_model(tmp_path / "m.safetensors", TENSORS, CARD)
    return tmp_path / "m.safetensors"


def test_round_trip(path: Path) -> None:
    card = read_card(path)
    assert {k: card[k] for k in CARD} == CARD
    back = read_tensors(path)
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[k], TENSORS[k]) for k in back)


def test_reading_a_card_needs_no_torch(path: Path) -> None:
    code = f"import sys; from regtool.workflows.models import info; info({str(path)!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_same_model_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "again.safetensors", dict(reversed(TENSORS.items())), CARD)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def refused(path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as error:
        read_tensors(path)
    assert error.value.tip
    assert "\n" not in error.value.what
    assert error.value.exit_code == 3


@pytest.mark.parametrize("keep", [3, 8, 100, -1])
def test_cut_off(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "cut off|not a regtool model")


def test_empty_and_missing(tmp_path: Path) -> None:
    (tmp_path / "e.safetensors").touch()
    with pytest.raises(InputError, match="empty"):
        read_card(tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="not found"):
        read_card(tmp_path / "none.safetensors")


def test_too_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    refused(path, "longer than its header says")


def test_a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert read_card(path)
    refused(path, "weights have changed")


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file(TENSORS, path)
    refused(path, "no regtool model")
    save_file(TENSORS, path, {"format": "pt"})
    refused(path, "no regtool model")
    save_file(TENSORS, path, {"format": "regtool-model/2", "card": "{}"})
    refused(path, "model format regtool-model/2")
    save_file(TENSORS, path, {"format": "regtool-model/1"})
    refused(path, "card is damaged")
    save_file(TENSORS, path, {"format": "regtool-model/1", "card": "[1"})
    refused(path, "card is damaged")
    save_file(TENSORS, path, {"format": "regtool-model/1", "card": json.dumps({**CARD, "dimension": "3"})})
    refused(path, "no valid 'dimension'")


@pytest.mark.parametrize("kind", ["zip", "pickle", "gzip", "text", "json list"])
def test_other_files_under_a_false_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.safetensors"
    if kind == "zip":
        torch.save(TENSORS, path)
    else:
        listed = b"[1, 2]"
        contents = {"pickle": pickle.dumps(list(range(99))), "gzip": b"\x1f\x8b\x08" + bytes(range(50)), "text": b"hello, I am no model at all"}
        path.write_bytes(contents.get(kind, len(listed).to_bytes(8, "little") + listed))
    refused(path, {"zip": "PyTorch or zip", "pickle": "pickle", "gzip": "gzip"}.get(kind, "not a regtool model"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    write_model(tmp_path / "n.safetensors", {"a": torch.tensor([1.0, bad])}, CARD)
    refused(tmp_path / "n.safetensors", "not all finite")


def test_a_card_that_lacks_something_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no valid 'training'"):
        write_model(tmp_path / "x.safetensors", TENSORS, {k: v for k, v in CARD.items() if k != "training"})
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        write_model(tmp_path / "file" / "m.safetensors", TENSORS, CARD)


def test_names_and_paths(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(path)) == path
    with pytest.raises(InputError, match="not found"):
        find_model(str(tmp_path / "other.safetensors"))
    monkeypatch.setattr(models, "BUNDLED", tmp_path)
    assert find_model("m") == path
    assert [m["name"] for m in workflow.list_models()] == ["test"]
    (tmp_path / "brain.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="did you mean 'brain'"):
        find_model("brian")


def test_import_refuses_other_files(tmp_path: Path) -> None:
    import h5py

    source = tmp_path / "w.h5"
    source.write_bytes(b"not hdf5")
    with pytest.raises(ModelError, match="not an HDF5 file"):
        workflow.import_keras(source, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        workflow.import_keras(source, tmp_path / "m.pt")
    with h5py.File(source, "w") as file:
        file["x"] = 1
    with pytest.raises(ModelError, match="no Keras weights"):
        workflow.import_keras(source, tmp_path / "m.safetensors")
    for weights, match in (((3, 3, 2, 16), "another network"), ((5, 7), "no convolution")):
        with h5py.File(source, "w") as file:
            file.attrs["layer_names"] = ["c"]
            group = file.create_group("c")
            group.attrs["weight_names"] = ["k", "b"]
            group["k"], group["b"] = torch.zeros(weights), torch.zeros(weights[-1])
        with pytest.raises(ModelError, match=match):
            workflow.import_keras(source, tmp_path / "m.safetensors")
    source.write_bytes(source.read_bytes()[:900])
    with pytest.raises(ModelError):
        workflow.import_keras(source, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
