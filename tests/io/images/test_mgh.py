"""FreeSurfer's volumes."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from regtool.errors import GeometryError, InputError
from regtool.io.images import (
    read_image,
)
from tests.conftest import DATA


@pytest.mark.data
def test_mgz_against_its_nifti_twin(tmp_path: Path) -> None:
    """nibabel's test volume: 3 x 4 x 5, two frames."""
    with pytest.raises(GeometryError, match="orthonormal"):  # its cosines are made up
        read_image(DATA / "formats" / "nibabel" / "test.mgz")
    image = read_image(DATA / "formats" / "nibabel" / "test.mgz", fix_header=True)
    assert image.data.shape == (2, 5, 4, 3)


def test_mgh_geometry(tmp_path: Path) -> None:
    """Hand-made: 2 mm voxels, axes L, S, A; the centre voxel (n / 2) sits at c_ras."""
    header = struct.pack(">iiiiiiih15f", 1, 4, 6, 8, 1, 4, 0, 1, 2, 2, 2, -1, 0, 0, 0, 0, 1, 0, 1, 0, 10, 20, 30)
    voxels = np.arange(4 * 6 * 8, dtype=">i2")
    (tmp_path / "v.mgz").write_bytes(gzip.compress(header.ljust(284, b"\0") + voxels.tobytes()))
    image = read_image(tmp_path / "v.mgz")
    assert image.grid.orientation() == "LSA"
    assert image.grid.to_physical(np.array([2.0, 3, 4])) == pytest.approx([-10, -20, 30])
    assert float(image.data[0, 1, 2, 3]) == 1 * 24 + 2 * 4 + 3
    (tmp_path / "cut.mgz").write_bytes(gzip.compress(header))
    with pytest.raises(InputError):
        read_image(tmp_path / "cut.mgz")
