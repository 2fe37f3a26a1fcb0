"""Points and meshes: hand-written files of every kind, round trips, and what is said about broken ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from regtool.config.choices import PointSpace as Space
from regtool.errors import GeometryError, InputError
from regtool.geometry.images import Landmarks
from regtool.io.points import check_points_writable, is_point_file, map_points, read_points, write_points
from tests.conftest import random_grid

LPS = np.array([[1.5, -2.25, 3.0], [40.0, 50.0, -60.125], [0.0, 0.0, 7.0]])
RAS = LPS * [-1, -1, 1]

FCSV = """# Markups fiducial file version = 4.11
# CoordinateSystem = {space}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
vtkMRMLMarkupsFiducialNode_0,{p[0][0]},{p[0][1]},{p[0][2]},0,0,0,1,1,1,0,F-1,"left, upper",vtkMRMLScalarVolumeNode1
vtkMRMLMarkupsFiducialNode_1,{p[1][0]},{p[1][1]},{p[1][2]},0,0,0,1,1,1,0,F-2,,
vtkMRMLMarkupsFiducialNode_2,{p[2][0]},{p[2][1]},{p[2][2]},0,0,0,1,1,1,0,F-3,,
"""
VTK = """# vtk DataFile Version 3.0
{title}
ASCII
DATASET POLYDATA
POINTS 3 float
{p[0][0]} {p[0][1]} {p[0][2]} {p[1][0]} {p[1][1]} {p[1][2]}
{p[2][0]} {p[2][1]} {p[2][2]}
POLYGONS 1 4
3 0 1 2

POINT_DATA 3
SCALARS thickness float 1
LOOKUP_TABLE default
1 2 3
"""
STL = """solid liver
facet normal 0 0 1
outer loop
vertex {p[0][0]} {p[0][1]} {p[0][2]}
vertex {p[1][0]} {p[1][1]} {p[1][2]}
vertex {p[2][0]} {p[2][1]} {p[2][2]}
endloop
endfacet
endsolid liver
"""


def markups(space: str | None = "LPS", points: np.ndarray = LPS, **more: object) -> str:
    control = [
        {"id": str(k), "label": f"F-{k}", "position": p, "positionStatus": "defined", "orientation": [1.0] * 9} for k, p in enumerate(points.tolist())
    ]
    control.append({"id": "9", "label": "unplaced", "position": None, "positionStatus": "undefined"})
    markup = {"type": "Fiducial", "controlPoints": control, "display": {"opacity": 0.5}, **more}
    if space is not None:
        markup["coordinateSystem"] = space
    return json.dumps({"@schema": "any", "markups": [markup]})


def binary_vtk(kind: str = "float") -> bytes:
    head = f"# vtk DataFile Version 4.2\nvtk output\nBINARY\nDATASET POLYDATA\nPOINTS 3 {kind}\n".encode()
    rest = (
        b"\nPOLYGONS 1 4\n"
        + np.array([3, 0, 1, 2], ">i4").tobytes()
        + b"\nPOINT_DATA 3\nSCALARS t float 1\nLOOKUP_TABLE default\n"
        + bytes(range(12))
        + b"\n"
    )
    return head + LPS.astype(">f4" if kind == "float" else ">f8").tobytes() + rest


def binary_stl(points: np.ndarray = LPS) -> bytes:
    record = np.zeros(1, dtype=[("n", "<f4", 3), ("v", "<f4", (3, 3)), ("a", "<u2")])
    record["v"], record["a"] = points, 77
    return b"made by hand".ljust(80, b" ") + (1).to_bytes(4, "little") + record.tobytes()


FILES: dict[str, tuple[str | bytes, Space]] = {
    "plain.csv": ("x,y,z\n" + "".join(",".join(map(str, p)) + "\n" for p in LPS.tolist()), "lps"),
    "ras.csv": ("x,y,z\n" + "".join(",".join(map(str, p)) + "\n" for p in RAS.tolist()), "ras"),
    "no_header.csv": ("".join(", ".join(map(str, p)) + "\n" for p in LPS.tolist()), "lps"),
    "ants.csv": ("x,y,z,t,label,comment\n" + "".join(",".join(map(str, p)) + ",0,7,c\n" for p in LPS.tolist()), "lps"),
    "columns.csv": ("\ufeff# from a lab\nid;Z;Y;X\n" + "".join(f"a;{z};{y};{x}\n" for x, y, z in LPS.tolist()), "lps"),
    "points.txt": ("point\n3\n" + "\n".join(" ".join(map(str, p)) for p in LPS.tolist()), "lps"),
    "points.pts": ("point\n3\n" + "\n".join(" ".join(map(str, p)) for p in LPS.tolist()) + "\n", "lps"),
    "ras.fcsv": (FCSV.format(space="RAS", p=RAS.tolist()), "lps"),
    "zero.fcsv": (FCSV.format(space="0", p=RAS.tolist()), "lps"),
    "lps.fcsv": (FCSV.format(space="LPS", p=LPS.tolist()), "ras"),
    "one.fcsv": (FCSV.format(space="1", p=LPS.tolist()), "lps"),
    "lps.mrk.json": (markups(), "lps"),
    "ras.mrk.json": (markups("RAS", RAS), "lps"),
    "default.mrk.json": (markups(None), "lps"),
    "ascii.vtk": (VTK.format(title="vtk output", p=LPS.tolist()), "lps"),
    "slicer.vtk": (VTK.format(title="3D Slicer output. SPACE=RAS", p=RAS.tolist()), "lps"),
    "float.vtk": (binary_vtk(), "lps"),
    "double.vtk": (binary_vtk("double"), "lps"),
    "ascii.stl": (STL.format(p=LPS.tolist()), "lps"),
    "binary.stl": (binary_stl(), "lps"),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_kind_is_read_as_lps(name: str, tmp_path: Path) -> None:
    content, space = FILES[name]
    landmarks = read_points(write(tmp_path, name, content), space, ndim=3)
    assert landmarks.points.dtype == np.float64
    assert np.allclose(landmarks.points, LPS, atol=1e-6)
    if name.endswith((".fcsv", ".mrk.json")):
        assert len(landmarks.names) == 3
        assert all(n.startswith("F-") for n in landmarks.names)


@pytest.mark.parametrize("name", FILES)
def test_mapping_keeps_the_rest_of_the_file(name: str, tmp_path: Path) -> None:
    content, space = FILES[name]
    source, out = write(tmp_path, name, content), tmp_path / "out" / name
    moved = map_points(source, out, lambda p: 2 * p + [10, 20, 30], 3, space)
    want = 2 * LPS + [10, 20, 30]
    assert np.allclose(moved.points, want, atol=1e-5)
    assert np.allclose(read_points(out, space, ndim=3).points, want, atol=1e-4)
    before, after = source.read_bytes(), out.read_bytes()
    if name.endswith(".vtk"):
        cut = before.index(b"POLYGONS")
        assert after.endswith(before[cut:])
        assert before[: before.index(b"POINTS") + 8] == after[: before.index(b"POINTS") + 8]
    if name == "binary.stl":
        assert after[:84] == before[:84]
        assert after[-2:] == before[-2:]
        assert np.allclose(np.linalg.norm(np.frombuffer(after[84:96], "<f4")), 1)
    if name == "ants.csv":
        assert after.decode().splitlines()[1].endswith(",0,7,c")
    if name == "columns.csv":
        assert after.decode().splitlines()[:2] == ["# from a lab", "id;Z;Y;X"]
    if name.endswith(".fcsv"):
        assert b'"left, upper",vtkMRMLScalarVolumeNode1' in after
    if name.endswith(".mrk.json"):
        tree = json.loads(after)
        assert tree["markups"][0]["display"] == {"opacity": 0.5}
        assert tree["markups"][0]["controlPoints"][3]["position"] is None


def test_normals_of_stl_follow_the_vertices(tmp_path: Path) -> None:
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    for name, content in (("a.stl", STL.format(p=corners.tolist())), ("b.stl", binary_stl(corners))):
        map_points(write(tmp_path, name, content), tmp_path / f"out_{name}", lambda p: p[:, [2, 0, 1]], 3)
        raw = (tmp_path / f"out_{name}").read_bytes()
        normal = np.frombuffer(raw[84:96], "<f4") if name == "b.stl" else np.array(raw.split(b"facet normal")[1].split()[:3], float)
        assert np.allclose(normal, [1, 0, 0])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".pts", ".fcsv", ".mrk.json", ".vtk"])
@pytest.mark.parametrize("space", ["lps", "ras", "voxel"])
def test_round_trips(ndim: int, suffix: str, space: Space, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 1)
    points = np.random.default_rng(0).uniform(-100, 100, (7, ndim))
    path = tmp_path / f"p{suffix}"
    write_points(Landmarks(points, tuple("abcdefg")), path, space, grid)
    back = read_points(path, space, grid, ndim)
    assert np.allclose(back.points, points, atol=1e-5)
    if suffix in (".csv", ".tsv", ".fcsv", ".mrk.json"):
        assert back.names == tuple("abcdefg")


def test_kinds_may_be_changed_while_mapping(tmp_path: Path) -> None:
    source = write(tmp_path, "ras.fcsv", FCSV.format(space="RAS", p=RAS.tolist()))
    map_points(source, tmp_path / "out.csv", lambda p: p + 1, 3)
    assert (tmp_path / "out.csv").read_text().splitlines()[:2] == ["x,y,z,label", "2.5,-1.25,4,F-1"]


def test_elastix_indices_count_in_voxels(ndim: int, tmp_path: Path) -> None:
    grid = random_grid(ndim, "oblique", 1)
    index = np.arange(2 * ndim, dtype=float).reshape(2, ndim)
    rows = "\n".join(" ".join(map(str, r)) for r in index.tolist())
    for head in ("index\n2\n", "2\n"):
        path = write(tmp_path, "i.txt", head + rows)
        assert np.allclose(read_points(path, grid=grid, ndim=ndim).points, grid.to_physical(index))
        with pytest.raises(GeometryError, match="voxels"):
            read_points(path, ndim=ndim)
    other = random_grid(ndim, "flipped", 2)
    map_points(path, tmp_path / "o.txt", lambda p: p, ndim, grid=grid, out_grid=other)
    assert np.allclose(read_points(tmp_path / "o.txt", grid=other).points, grid.to_physical(index), atol=1e-5)


def test_ants_points_in_2d(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", "x,y,z,t\n1,2,0,0\n3,4,0,0\n")
    assert read_points(path, ndim=2).points.tolist() == [[1, 2], [3, 4]]
    map_points(path, tmp_path / "o.csv", lambda p: p + 1, 2)
    assert (tmp_path / "o.csv").read_text() == "x,y,z,t\n2,3,0,0\n4,5,0,0\n"


def test_dimensions_are_compared(tmp_path: Path) -> None:
    flat, deep = write(tmp_path, "a.csv", "x,y\n1,2\n"), write(tmp_path, "b.csv", "x,y,z\n1,2,3\n")
    assert read_points(flat).points.shape == (1, 2)
    for path, ndim in ((flat, 3), (deep, 2)):
        with pytest.raises(GeometryError, match=f"expected {ndim}-D"):
            read_points(path, ndim=ndim)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y,z\n1,2,3\n1,two,3\n", r"a.csv:3: 'two' is not a finite number"),
        ("a.csv", "x,y,z\n1,2,3\n\n1,nan,3\n", r"a.csv:4: 'nan'"),
        ("a.csv", "x,y,z\n1,2,3\n1,2\n", r"a.csv:3: 2 columns, expected 3"),
        ("a.csv", "x,y,z\n", "holds no points"),
        ("a.csv", "# nothing\n\n", "holds no points"),
        ("a.csv", "a,b,c\n1,2,3\n", "no columns x and y"),
        ("a.csv", "1,2,3,4\n", "no columns x and y"),
        ("a.csv", "", "empty file"),
        ("a.csv", b"x,y\n\xff\xfe,1\n", "no text file"),
        ("a.txt", "point\n3\n1 2 3\n", "announces 3 points and holds 1"),
        ("a.txt", "point\n1\n1 b 3\n", r"a.txt:3: 'b'"),
        ("a.txt", "point\n2\n1 2 3\n1 2\n", r"a.txt:4: 2 coordinates, expected 3"),
        ("a.txt", "hello world\n", "no elastix point file"),
        ("a.fcsv", FCSV.format(space="IJK", p=LPS.tolist()), "unknown CoordinateSystem 'IJK'"),
        ("a.fcsv", "# CoordinateSystem = LPS\nid,1\n", r"a.fcsv:2: 2 columns"),
        ("a.fcsv", FCSV.format(space="LPS", p=[["x", 1, 2]] * 3), r"a.fcsv:4: 'x'"),
        ("a.json", "{", "no JSON"),
        ("a.json", "{}", "no markups"),
        ("a.json", markups("IJK"), "markup 1 is not in LPS or RAS"),
        ("a.json", markups(coordinateUnits="um"), "markup 1"),
        ("a.json", markups().replace("-2.25", '"no"'), "control point 1 of markup 1"),
        ("a.json", json.dumps({"markups": [{"controlPoints": []}]}), "holds no points"),
        ("a.vtk", "hello", "no legacy VTK"),
        ("a.vtk", "# vtk DataFile Version 3.0\nt\nASCII\nDATASET STRUCTURED_GRID\n", "no POINTS"),
        ("a.vtk", "# vtk DataFile Version 3.0\nt\nASCII\nDATASET POLYDATA\nPOINTS 3 float\n1 2 3\n", "ends before them"),
        ("a.vtk", "# vtk DataFile Version 3.0\nt\nASCII\nDATASET POLYDATA\nPOINTS 1 float\n1 b 3\n", "no number"),
        ("a.vtk", "# vtk DataFile Version 3.0\nt\nASCII\nDATASET POLYDATA\nPOINTS 1 float\n1 nan 3\n", "point 1 is NaN"),
        ("a.vtk", "# vtk DataFile Version 3.0\nt\nASCII\nDATASET POLYDATA\nPOINTS 1 int\n1 2 3\n", "type int"),
        ("a.vtk", binary_vtk()[:90], "ends before them"),
        ("a.stl", "hello", "no STL"),
        ("a.stl", STL.format(p=LPS.tolist()).replace("vertex 0.0 0.0 7.0\n", ""), "2 vertices"),
        ("a.stl", binary_stl()[:-10], "no STL file, or it is truncated"),
        ("a.ply", "ply\n", "not read from .ply"),
    ],
)
def test_bad_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_points(write(tmp_path, name, content), ndim=3)


def test_missing_files_and_unwritable_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_points(tmp_path / "missing.csv")
    for name in ("a.stl", "a.ply", "a"):
        with pytest.raises(InputError):
            write_points(Landmarks(LPS), tmp_path / name)
    check_points_writable(tmp_path / "a.stl", Path("b.stl"))
    assert not list(tmp_path.iterdir())


def test_point_normals_of_vtk_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "a.vtk", VTK.format(title="t", p=LPS.tolist()) + "NORMALS n float\n1 0 0 1 0 0 1 0 0\n")
    with caplog.at_level(logging.WARNING, logger="regtool"):
        read_points(path)
    assert "normals" in caplog.text


def test_kinds_by_name(tmp_path: Path) -> None:
    assert is_point_file(Path("a.mrk.json"))
    assert not is_point_file(Path("a.nii.gz"))
    assert is_point_file(write(tmp_path, "a.vtk", VTK.format(title="t", p=LPS.tolist())))
    assert not is_point_file(write(tmp_path, "b.vtk", "# vtk DataFile Version 3.0\nt\nASCII\nDATASET STRUCTURED_POINTS\n"))


@pytest.mark.parametrize(
    "text", ['{"markups":[3]}', '{"markups":[{"controlPoints":3}]}', '{"markups":[{"controlPoints":[3]}]}', '{"markups":3}', "[]"]
)
def test_markups_of_another_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.mrk.json").write_text(text)
    with pytest.raises(InputError, match="no markups"):
        read_points(tmp_path / "p.mrk.json")
