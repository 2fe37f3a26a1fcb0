"""Lists of pairs and of images: what is read, what is said about broken ones, and how they are split."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from regtool.errors import InputError, UsageError
from regtool.io.pairs import AllPairs, Entry, Pair, Pairs, read_list, split


def touched(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def listed(folder: Path, text: str | bytes, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def images(n: int) -> AllPairs:
    return AllPairs(tuple(Entry(id=f"i{k}", image=Path(f"i{k}.nii")) for k in range(n)))


def pairs_of(*edges: tuple[str, str]) -> Pairs:
    return tuple(Pair(f"p{k}", Entry(id=f, image=Path(f)), Entry(id=m, image=Path(m))) for k, (f, m) in enumerate(edges))


def ids(pairs: Pairs) -> set[str]:
    return {pair.id for pair in pairs}


FULL = "id,fixed,moving,fixed_labels,moving_labels,fixed_landmarks,moving_landmarks,fixed_mask,moving_mask\n"


def test_a_whole_row(tmp_path: Path) -> None:
    names = ["f.nii.gz", "sub/m.mha", "fl.nii", "ml.nii", "f.csv", "m.fcsv", "fm.png", "mm.png"]
    touched(tmp_path, *names)
    (pair,) = read_list(listed(tmp_path, FULL + "one," + ",".join(names) + "\n"))
    f, m, fl, ml, fp, mp, fm, mm = (tmp_path / name for name in names)
    assert pair == Pair("one", Entry(id="f", image=f, labels=fl, landmarks=fp, mask=fm), Entry(id="m", image=m, labels=ml, landmarks=mp, mask=mm))


@pytest.mark.parametrize(
    "text",
    [
        "fixed,moving\na.nii.gz,b.nii\n",
        "\ufefffixed,moving\r\n\r\na.nii.gz,b.nii\r\n\r\n",
        "fixed;moving;id\na.nii.gz;b.nii;\n;;\n",
        "moving\tfixed\nb.nii\ta.nii.gz",
        'Fixed , "moving", #age\n"a.nii.gz", b.nii, 40\n',
    ],
    ids=["plain", "windows", "semicolon", "tab", "quoted"],
)
def test_tables_of_every_kind(tmp_path: Path, text: str) -> None:
    touched(tmp_path, "a.nii.gz", "b.nii")
    (pair,) = read_list(listed(tmp_path, text))
    assert (pair.id, pair.fixed.image, pair.moving.image) == ("b_to_a", tmp_path / "a.nii.gz", tmp_path / "b.nii")
    assert pair.fixed.labels is None and pair.moving.mask is None


def test_all_ordered_pairs_of_images(tmp_path: Path) -> None:
    touched(tmp_path, *(f"{c}.nii" for c in "abc"), "al.nii", "bl.nii")
    pairs = read_list(listed(tmp_path, "image,labels\na.nii,al.nii\nb.nii,bl.nii\nc.nii,\n"))
    assert [pair.id for pair in pairs] == ["b_to_a", "c_to_a", "a_to_b", "c_to_b", "a_to_c", "b_to_c"]
    assert [(pair.fixed.id, pair.moving.id) for pair in pairs] == list(itertools.permutations("abc", 2))
    assert pairs[2].moving.labels == tmp_path / "al.nii" and pairs[1].moving.labels is None
    assert pairs[-1] == pairs[5] and pairs[1:3] == (pairs[1], pairs[2])
    with pytest.raises(IndexError):
        pairs[6]


def test_a_million_pairs_take_no_room() -> None:
    pairs = images(2000)
    assert len(pairs) == 2000 * 1999
    rng = np.random.default_rng(0)
    for k in rng.integers(len(pairs), size=200):
        pair = pairs[int(k)]
        assert pair.fixed != pair.moving
        i, j = int(pair.fixed.id[1:]), int(pair.moving.id[1:])
        assert k == i * 1999 + j - (j > i)


def test_a_folder_of_images(tmp_path: Path) -> None:
    touched(tmp_path, "b.nii.gz", "a.PNG", "old.hdr", "old.img", "lone.img", ".hidden.nii", "notes.txt", "t.csv", "empty/readme.txt")
    series = tmp_path / "scan"
    series.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(2):
        slice_ = sitk.GetImageFromArray(np.full((1, 4, 5), k, np.int16))
        for tag, value in (("0020|000e", "1.2.3"), ("0020|0032", f"0\\0\\{k}"), ("0008|0060", "CT"), ("0020|0013", str(k))):
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(series / f"{k}.dcm"))
        writer.Execute(slice_)
    pairs = read_list(tmp_path)
    assert isinstance(pairs, AllPairs)
    assert [entry.image.name for entry in pairs.images] == ["a.PNG", "b.nii.gz", "lone.img", "old.hdr", "scan"]
    assert [entry.id for entry in pairs.images] == ["a", "b", "lone", "old", "scan"]


def test_every_image_to_an_atlas(tmp_path: Path) -> None:
    touched(tmp_path, "a.nii", "b.nii", "bl.nii", "mean.nii.gz", "meanl.nii")
    source = listed(tmp_path, "id,image,labels\nx,a.nii,\ny,b.nii,bl.nii\n")
    pairs = read_list(source, tmp_path / "mean.nii.gz", tmp_path / "meanl.nii")
    atlas = Entry(id="mean", image=tmp_path / "mean.nii.gz", labels=tmp_path / "meanl.nii")
    assert [(pair.id, pair.fixed, pair.moving.id) for pair in pairs] == [("x_to_mean", atlas, "x"), ("y_to_mean", atlas, "y")]
    (own,) = read_list(source, tmp_path / "sub" / ".." / "b.nii")
    assert own.id == "x_to_y" and own.fixed.labels == tmp_path / "bl.nii"
    with pytest.raises(UsageError, match="without an atlas"):
        read_list(source, None, tmp_path / "meanl.nii")
    with pytest.raises(UsageError, match="lists pairs"):
        read_list(listed(tmp_path, "fixed,moving\na.nii,b.nii\n", "pairs.csv"), tmp_path / "mean.nii.gz")
    with pytest.raises(InputError, match="no image besides the atlas"):
        read_list(listed(tmp_path, "image\na.nii\n", "one.csv"), tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"1 of 4 files .*none\.nii"):
        read_list(source, tmp_path / "none.nii")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list is an empty file"),
        ("\n;\n", "the header has nothing"),
        ("fixed\na.nii\n", "expected the columns fixed,moving or image"),
        ("fixed,moving,fixed_label\na.nii,b.nii,\n", "unknown column 'fixed_label'; did you mean 'fixed_labels'"),
        ("image,moving\na.nii,b.nii\n", "unknown column 'moving'"),
        ("fixed,moving,moving\na.nii,b.nii,b.nii\n", "the column moving comes 2 times"),
        ("fixed,moving\na.nii,b.nii,c.nii\n", r"list\.csv:2: 3 columns, expected 2"),
        ("fixed,moving\na.nii,b.nii\n\n,b.nii\n", r"list\.csv:4: no fixed image"),
        ("fixed,moving\na.nii,b.nii\na.nii,b.nii\n", "the id 'b_to_a' comes twice"),
        ("id,image\n1,a.nii\n1,b.nii\n", "the id '1' comes twice"),
        ("id,fixed,moving\n../x,a.nii,b.nii\n", "cannot be the name of a folder"),
        ("fixed,moving,fixed_labels,moving_labels\na.nii,b.nii,a.nii,\n", r"list\.csv:2: labels are given for one image only"),
        ("fixed,moving\n", "lists no pairs"),
        ("image\n", "no images, expected at least two"),
        ("image\na.nii\n", "1 image, expected at least two"),
        (b"fixed,moving\n\xe9.nii,b.nii\n", "is no text file"),
        ('fixed,moving\n"a.nii,b.nii\n', "columns, expected 2"),
    ],
)
def test_broken_lists(tmp_path: Path, text: str | bytes, message: str) -> None:
    touched(tmp_path, "a.nii", "b.nii")
    with pytest.raises(InputError, match=message):
        read_list(listed(tmp_path, text))


def test_wrong_sources(tmp_path: Path) -> None:
    touched(tmp_path, "a.nii.gz", "c/a.png", "c/a.nii")
    with pytest.raises(InputError, match="list not found"):
        read_list(tmp_path / "none.csv")
    with pytest.raises(InputError, match="is an image, expected a list"):
        read_list(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="1 image, expected at least two"):
        read_list(tmp_path)
    with pytest.raises(InputError, match="'a' comes twice"):
        read_list(tmp_path / "c")


def test_all_missing_files_at_once(tmp_path: Path) -> None:
    touched(tmp_path, "there.nii")
    (tmp_path / "empty.nii").touch()
    rows = "".join(f"there.nii,m{k}.nii,l{k}.nii,there.nii\n" for k in range(12)) + "there.nii,empty.nii,,\n"
    with pytest.raises(InputError) as caught:
        read_list(listed(tmp_path, "fixed,moving,moving_labels,fixed_labels\n" + rows))
    assert caught.value.what.startswith("25 of 26 files")
    assert "m4.nii" in caught.value.what and "m5.nii" not in caught.value.what and caught.value.what.endswith(", ...")


@pytest.mark.parametrize(("n", "share", "held"), [(20, 0.2, 4), (20, 0.1, 2), (10, 0.1, 2), (6, 0.9, 4), (4, 0.5, 2), (3, 0.5, 0), (5, 0.05, 0)])
def test_whole_images_are_held_out(n: int, share: float, held: int) -> None:
    training, validation = split(images(n), share, 1)
    used = [{entry.id for pair in part for entry in (pair.fixed, pair.moving)} for part in (training, validation)]
    assert len(used[1]) == held
    assert not used[0] & used[1]
    assert len(used[0]) + len(used[1]) == n
    assert len(training) == (n - held) * (n - held - 1)


def test_a_split_depends_on_ids_and_seed_alone() -> None:
    pairs = images(30)
    held = ids(split(pairs, 0.2, 5)[1])
    assert ids(split(AllPairs(pairs.images[::-1]), 0.2, 5)[1]) == held
    assert ids(split(pairs, 0.2, 6)[1]) != held
    single = pairs_of(*((f"f{k}", f"m{k}") for k in range(30)))
    assert ids(split(single[::-1], 0.2, 5)[1]) == ids(split(single, 0.2, 5)[1])
    assert [pair.id for pair in split(single, 0.2, 5)[0]] == [pair.id for pair in single if pair.id not in ids(split(single, 0.2, 5)[1])]


def test_pairs_that_share_an_image_stay_together() -> None:
    """Both directions of 20 pairs, some of them chained: no image is on both sides."""
    edges = [edge for k in range(20) for edge in ((f"a{k}", f"b{k}"), (f"b{k}", f"a{k}"))] + [("b0", "a1"), ("c", "./b0")]
    for seed in range(10):
        training, validation = split(pairs_of(*edges), 0.1, seed)
        files = [{entry.image.resolve() for pair in part for entry in (pair.fixed, pair.moving)} for part in (training, validation)]
        assert not files[0] & files[1]
        assert len(validation) == 4
        assert len(training) + len(validation) == len(edges)


def test_groups_are_the_connected_components() -> None:
    rng = np.random.default_rng(0)
    for seed in range(30):
        edges = [(f"{g}-{i}", f"{g}-{j}") for g in range(8) for i, j in rng.integers(5, size=(6, 2))]
        pairs = pairs_of(*edges)
        indices = [[int(side.split("-")[0]) * 5 + int(side[-1]) for side in edge] for edge in edges]
        graph = coo_matrix((np.ones(len(edges)), np.array(indices).T), shape=(40, 40))
        component = connected_components(graph, directed=False)[1][np.array(indices)[:, 0]]
        training, validation = (sorted(int(component[int(pair.id[1:])]) for pair in part) for part in split(pairs, 0.3, seed))
        assert validation and not set(training) & set(validation)
        assert len(validation) <= round(0.3 * len(edges))


def test_connected_and_small_lists() -> None:
    atlas = pairs_of(*(("atlas", f"m{k}") for k in range(20)))
    training, validation = split(atlas, 0.25, 0)
    assert (len(training), len(validation)) == (15, 5)
    assert not ids(training) & ids(validation)
    groups = pairs_of(*((f"{g}{i}", f"{g}{i + 1}") for g, n in (("a", 9), ("b", 6)) for i in range(n)))
    assert {pair.fixed.id[0] for pair in split(groups, 0.1, 0)[1]} == {"b"}  # none is small enough: the smallest
    for pairs in (atlas, images(10)):
        assert split(pairs, 0.0, 0) == (pairs, ())
    assert len(split(atlas[:1], 0.9, 0)[0]) == 1
    assert len(split(atlas[:2], 0.99, 0)[0]) == 1
