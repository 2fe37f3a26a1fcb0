"""Where `--align auto` puts a part of one image in the whole of another, whatever the headers say.

    python examples/benchmarks/parts.py DATA

One image of each pair is cut down, the fixed or the moving one, and its header is off by nothing, 15 mm, 40 mm or as much as brings the centres
together. Counted is how often the part lies within 6 mm (volumes) or 5 % of the field of view (pictures) of where the alignment of the whole images
puts it, in the mean over 200 points. Pictures without a place in their headers lose it by being cut.
"""

from __future__ import annotations

import csv
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from regtool.config.registration import Align
from regtool.geometry.images import Image
from regtool.geometry.sampling import transform_points
from regtool.geometry.transforms import Affine, Transform
from regtool.io.images import read_image
from regtool.preprocessing.foreground import box_slices
from regtool.registration.initialization import align

VOLUMES = {
    "lung": ("lungct_pair/baseline.mha", "lungct_pair/followup.mha"),
    "brains": ("brain3d_pair/subject1.nii.gz", "brain3d_pair/subject2.nii.gz"),
    "T2 to T1": ("brain3d_multimodal_mni/patient07/T1.nii.gz", "brain3d_multimodal_mni/patient07/T2.nii.gz"),
    "visits": ("brain3d_multimodal_native/patient01/study1_FLAIR.nii.gz", "brain3d_multimodal_native/patient01/study2_FLAIR.nii.gz"),
    "T1 to FLAIR, visits": ("brain3d_multimodal_native/patient01/study1_FLAIR.nii.gz", "brain3d_multimodal_native/patient01/study2_T1W.nii.gz"),
}
PARTS: dict[int, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    3: {
        "lower 35 %": ((0, 0, 0), (1, 1, 0.35)),
        "upper 40 %": ((0, 0, 0.6), (1, 1, 1)),
        "middle half": ((0.25, 0.25, 0.25), (0.75, 0.75, 0.75)),
        "corner": ((0.45, 0.4, 0.4), (1, 1, 1)),
        "half": ((0, 0, 0), (0.5, 1, 1)),
        "half along y": ((0, 0.5, 0), (1, 1, 1)),
        "third": ((0.1, 0.3, 0.3), (0.45, 0.65, 0.65)),
    },
    2: {"middle": ((0.2, 0.2), (0.8, 0.8)), "first corner": ((0, 0), (0.6, 0.6)), "last corner": ((0.4, 0.3), (1, 0.8)), "half": ((0, 0.5), (1, 1))},
}
OFF: tuple[float | None, ...] = (0.0, 15.0, 40.0, None)  # mm; None: centre on centre


def main(data: Path) -> None:
    """Prints one line for each set: how many parts were found, of how many."""
    for name, files in VOLUMES.items():
        images = (read_image(data / files[0]).grey(), read_image(data / files[1]).grey())
        whole = align(*images, Align(), Transform.identity(3)).affine
        counts = [0] * len(OFF)
        for (low, high), which, (k, off) in itertools.product(PARTS[3].values(), (0, 1), enumerate(OFF)):
            counts[k] += missed(images, whole, which, low, high, off) < 6
        print(f"{name}: " + ", ".join(f"{n} of {2 * len(PARTS[3])}" for n in counts), flush=True)
    for name, pairs in pictures(data).items():
        found = total = 0
        for one, other in pairs:
            images = (read_image(one).grey(), read_image(other).grey())
            whole = align(*images, Align(), Transform.identity(2)).affine
            for (low, high), which in itertools.product(PARTS[2].values(), (0, 1)):
                found += missed(images, whole, which, low, high, 0.0) < 0.05 * float(np.mean(images[0].grid.extent))
                total += 1
        print(f"{name}: {found} of {total}", flush=True)


def pictures(data: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Eight pairs of each set: one heart in two phases, slices and chests of two people."""
    folder = data / "cardiac2d"
    with (folder / "pairs_test.csv").open(encoding="utf-8") as file:
        hearts = [(folder / row["fixed"], folder / row["moving"]) for row in list(csv.DictReader(file))[::16][:8]]
    others = {"slices": "brain2d_labelled/images/*", "T1 slices": "brain2d_unlabelled/*.nrrd", "chest X-rays": "chestxray_lungs/images/*.png"}
    return {"hearts": hearts, **{name: list(itertools.pairwise(sorted(data.glob(files))))[:8] for name, files in others.items()}}


def missed(images: tuple[Image, Image], truth: Affine, which: int, low: tuple[float, ...], high: tuple[float, ...], off: float | None) -> float:
    """Mean distance (mm) from where the whole images' alignment, `truth`, has the part that is cut from the fixed (0) or moving (1) image."""
    ndim = truth.ndim
    small, first = cut(images[which], low, high)
    kept = small.grid
    points = kept.to_physical(np.random.default_rng(0).random((200, ndim)) * (np.array(kept.size) - 1))
    if which == 1:
        points = moved(truth.inverse(), points)
    expected = moved(truth, points)
    if ndim == 2:  # its header says no place
        small = Image(small.data, replace(kept, origin=images[which].grid.origin))
        points, expected = (points - first, expected) if which == 0 else (points, expected - first)
        pair = (small, images[1]) if which == 0 else (images[0], small)
    else:
        fixed, moving = (small, images[1]) if which == 0 else (images[0], small)
        there = moved(truth, fixed.grid.centre[None])[0]
        shift = fixed.grid.centre - (moving.grid.centre if off is None else there)
        shift = shift if off is None else shift + off * np.array([1, -1, 1]) / np.sqrt(3)
        expected = expected + shift
        pair = (fixed, Image(moving.data, replace(moving.grid, origin=tuple((np.array(moving.grid.origin) + shift).tolist()))))
    return float(np.linalg.norm(moved(align(*pair, Align(), Transform.identity(ndim)).affine, points) - expected, axis=1).mean())


def cut(image: Image, low: tuple[float, ...], high: tuple[float, ...]) -> tuple[Image, np.ndarray]:
    """From `low` to `high` of every axis (x first), and by how many mm its origin lies off that of the whole."""
    where = box_slices(image.grid, tuple(reversed(list(zip(low, high, strict=True)))))
    grid = image.grid.cut(where)
    return Image(image.data[:, *where].contiguous(), grid), np.array(grid.origin) - np.array(image.grid.origin)


def moved(affine: Affine, points: np.ndarray) -> np.ndarray:
    """(P, D) mm."""
    return transform_points(Transform((affine,)), points)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
