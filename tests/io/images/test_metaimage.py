"""MetaImage headers that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from regtool.errors import GeometryError
from regtool.io.images import (
    read_grid,
    read_image,
)


def mha(path: Path, **changes: str) -> Path:
    header = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "0 0 0",
        "ElementSpacing": "1 1 1", "DimSize": "4 5 6", "ElementType": "MET_UCHAR", **changes, "ElementDataFile": "LOCAL",
    }  # fmt: skip
    path.write_bytes("".join(f"{k} = {v}\n" for k, v in header.items()).encode() + bytes(range(120)))
    return path


def test_sheared_metaimage(tmp_path: Path) -> None:
    path = mha(tmp_path / "m.mha", TransformMatrix="1 0 0 0.2 1 0 0 0 1")
    with pytest.raises(GeometryError, match="orthonormal"):
        read_image(path)
    assert read_image(path, fix_header=True).data.shape == (1, 6, 5, 4)


@pytest.mark.parametrize("spacing", ["0 1 1", "-1 1 1"])
def test_zero_or_negative_spacing(tmp_path: Path, spacing: str) -> None:
    with pytest.raises(GeometryError, match="spacing"):
        read_grid(mha(tmp_path / "m.mha", ElementSpacing=spacing))
