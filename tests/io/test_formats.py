"""What names of files say, and what the files of formats declare."""

from __future__ import annotations

from pathlib import Path

import pytest

from regtool.io.formats import Format, all_formats, find_format, image_suffixes, point_suffixes, stem_of, suffix_of, transform_suffixes
from regtool.io.images.record import ImageFormat
from regtool.io.points.record import PointFormat
from regtool.io.transforms.record import TransformFormat


@pytest.mark.parametrize(
    ("name", "stem", "suffix"),
    [
        ("a.nii", "a", ".nii"),
        ("a.b.NII.GZ", "a.b", ".nii.gz"),
        ("a.mrk.json", "a", ".mrk.json"),
        ("a.b.json", "a.b", ".json"),
        ("a.tar.gz", "a.tar", ".gz"),
        ("a", "a", ""),
    ],
)
def test_names(name: str, stem: str, suffix: str) -> None:
    assert (stem_of(Path(name)), suffix_of(Path(name))) == (stem, suffix)


def test_folders_have_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "patient.1").mkdir()
    assert stem_of(tmp_path / "patient.1") == "patient.1"


def test_what_is_read_and_written() -> None:
    assert set(image_suffixes(written=True)) == {".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"}
    others = {".hdr", ".img", ".tif", ".tiff", ".png", ".jpg", ".gipl", ".mgz", ".mgh", ".dcm"}
    assert set(image_suffixes()) == {*image_suffixes(written=True), *others}
    assert set(transform_suffixes()) == {".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm", *image_suffixes(written=True)}
    assert set(point_suffixes()) == {".csv", ".tsv", ".txt", ".pts", ".fcsv", ".mrk.json", ".json", ".vtk", ".stl"}


@pytest.mark.parametrize("record", [ImageFormat, TransformFormat, PointFormat])
def test_declarations_are_what_their_files_hold(record: type[Format]) -> None:
    formats = all_formats(record)
    listed = {"images": image_suffixes(), "transforms": transform_suffixes(), "points": point_suffixes()}[record.kind]
    assert {suffix for f in formats for suffix in f.suffixes} <= set(listed)
    for suffix in listed:
        sharing = [f for f in formats if suffix in f.suffixes]
        assert len(sharing) < 2 or sum(f.recognise is None for f in sharing) <= 1, f"{suffix}: the contents must decide"


def test_contents_decide_where_formats_share_a_suffix(tmp_path: Path) -> None:
    for name, text, module in (
        ("a.txt", '(Transform "EulerTransform")\n', "elastix"),
        ("b.txt", "#Insight Transform File V1.0\n", "itk"),
        ("TransformParameters.0.txt", "", "elastix"),
    ):
        (tmp_path / name).write_text(text)
        found = find_format(TransformFormat, tmp_path / name)
        assert found is not None and found.read.__module__ == f"regtool.io.transforms.{module}"
    assert find_format(TransformFormat, tmp_path / "a.foo") is None
