"""T2 to T1 under known elastic fields: Deform-GAN 1 and 2 against VoxelMorph with the local gradient loss (Zhang et al. 2020, Table 1), in 2-D.

    python examples/benchmarks/contrasts.py FOLDER -o DIR --minutes 4

FOLDER holds T1.nii.gz, T2.nii.gz and lesions.nii.gz of one patient, aligned. Axial slices are taken every 3 mm on a grid of 1.5 mm: two of three
to learn from, T2 deformed by a new random field in every step, the rest to test with fields that were never seen. Printed for each method:
steps, RMSE of intensities against the undeformed T2 in percent of its largest value, Dice of the lesions, mean error of the field in mm inside
the head, folding. Networks alone: nothing is refined, repaired or rolled back. Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from methods import network_field

from regtool.config.schema import Parameters
from regtool.evaluation.overlap import dice
from regtool.geometry.images import Image, Labels
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics
from regtool.geometry.sampling import displacement_on, warp, warp_labels
from regtool.geometry.transforms import Transform
from regtool.io.images import read_image, read_labels
from regtool.io.transforms import read_transform
from regtool.methods.model_file import load_model

SPACING, STEP = 1.5, 3.0  # mm in the slice, between slices
COMMON = (
    "--threads 1 --set align.method=none --set train.learning_rate=1e-3 --set train.ema=0.99 --set train.batch_size=4 --set train.validation_share=0"
)
AUGMENT = "--set augment.elastic_voxels=8 --set augment.elastic_spacing=16 --set augment.flip=0.5 --set augment.rotation_degrees=10"
GAN = "-m deformgan --set engine.channels=[16,32,64,128] --set engine.warmup_steps=200"
METHODS = {
    "VoxelMorph-LG": "-m voxelmorph --set training_similarity.name=lg --set training_similarity.weight=2 --set regularization.diffusion=1",
    "Deform-GAN-1": f"{GAN} --set engine.variant=1",
    "Deform-GAN-2": f"{GAN} --set engine.variant=2",
}


def write_slices(folder: Path, output: Path) -> tuple[list[int], list[int]]:
    """`T1_k.mha`, `T2_k.mha`, `lesions_k.mha` of every slice with tissue; the numbers to learn from and those to test with."""
    t1 = sitk.ReadImage(str(folder / "T1.nii.gz"), sitk.sitkFloat32)
    size = [int(n * s / SPACING) for n, s in zip(t1.GetSize()[:2], t1.GetSpacing()[:2], strict=True)]
    planes = int(t1.GetSize()[2] * t1.GetSpacing()[2] / STEP)
    grid = sitk.Image([*size, planes], sitk.sitkFloat32)
    grid.SetSpacing([SPACING, SPACING, STEP])
    grid.SetOrigin(t1.GetOrigin())
    grid.SetDirection(t1.GetDirection())
    numbers = []
    for name, interpolation in (("T1", sitk.sitkLinear), ("T2", sitk.sitkLinear), ("lesions", sitk.sitkNearestNeighbor)):
        volume = sitk.GetArrayFromImage(sitk.Resample(sitk.ReadImage(str(folder / f"{name}.nii.gz")), grid, sitk.Transform(), interpolation))
        if name == "T1":
            numbers = [k for k in range(planes) if (volume[k] > volume.mean()).mean() > 0.15]
        for k in numbers:
            image = sitk.GetImageFromArray(volume[k].astype(np.float32 if name != "lesions" else np.uint8))
            image.SetSpacing([SPACING, SPACING])
            sitk.WriteImage(image, str(output / f"{name}_{k}.mha"))
    return [k for k in numbers if k % 3], [k for k in numbers if k % 3 == 0]


def write_field(reference: sitk.Image, amplitude_mm: float, knots_mm: float, seed: int, path: Path) -> None:
    """A cubic B-spline through random knots, largest displacement `amplitude_mm`."""
    rng = np.random.default_rng(seed)
    size = [int(np.ceil(s * n / knots_mm)) + 3 for s, n in zip(reference.GetSpacing(), reference.GetSize(), strict=True)]
    parts = []
    for _ in range(2):
        coarse = sitk.GetImageFromArray(rng.standard_normal(size[::-1]).astype(np.float32))
        coarse.SetSpacing([knots_mm] * 2)
        coarse.SetOrigin([-knots_mm] * 2)
        parts.append(sitk.GetArrayFromImage(sitk.Resample(coarse, reference, sitk.Transform(), sitk.sitkBSpline, 0.0)))
    field = np.stack(parts, -1)
    field *= amplitude_mm / np.linalg.norm(field, axis=-1).max()
    image = sitk.GetImageFromArray(field.astype(np.float32), isVector=True)
    image.CopyInformation(reference)
    sitk.WriteImage(image, str(path))


def tested(model: Path, output: Path, numbers: list[int], amplitude: float) -> list[float]:
    """RMSE %, lesion Dice, field error in mm, folding %; and the first three before."""
    engine, card = load_model(model)
    parameters = Parameters.model_validate(card["parameters"])
    rows = []
    for k in numbers:
        fixed, source, lesions = read_image(output / f"T1_{k}.mha"), read_image(output / f"T2_{k}.mha"), read_labels(output / f"lesions_{k}.mha")
        for seed in range(3):
            write_field(sitk.ReadImage(str(output / f"T1_{k}.mha")), amplitude, 40.0, 100 * k + seed, output / "field.mha")
            truth = read_transform(output / "field.mha", fixed.grid)
            moving, carried = warp(source, truth, fixed.grid), warp_labels(lesions, truth, fixed.grid, vote=False)
            found = network_field(engine, parameters, fixed, moving, Transform.identity(2))
            rows.append(
                [
                    *scores(fixed, source, moving, lesions, carried, found, truth),
                    *scores(fixed, source, moving, lesions, carried, Transform.identity(2), truth),
                ]
            )
    return [float(np.nanmean(column)) for column in zip(*rows, strict=True)]


def scores(fixed: Image, source: Image, moving: Image, lesions: Labels, carried: Labels, found, truth) -> list[float]:
    """RMSE %, Dice (NaN without lesions), |u(x) + d(x + u(x))| in mm inside the head, folding %."""
    difference = warp(moving, found, fixed.grid).data - source.data
    displacement = displacement_on(found, fixed.grid)
    together = displacement_on(found.then(truth), fixed.grid).data.norm(dim=0)
    head = fixed.data[0] > fixed.data.mean()
    overlap = dice(lesions, warp_labels(carried, found, fixed.grid, vote=False), [1]).mean if bool(lesions.data.any()) else float("nan")
    folding = jacobian_statistics(jacobian_determinant(displacement)).folding_percent
    return [float(100 * difference.square().mean().sqrt() / source.data.max()), overlap, float(together[head].mean()), folding]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--amplitude", type=float, default=12.0, help="mm")
    parser.add_argument("--only", choices=sorted(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    learning, testing = write_slices(options.folder, options.output)
    pairs = options.output / "pairs.csv"
    pairs.write_text("fixed,moving\n" + "".join(f"T1_{k}.mha,T2_{k}.mha\n" for k in learning), encoding="utf-8")
    print(f"{len(learning)} slices to learn from, {len(testing)} to test with", file=sys.stderr)
    for name, more in METHODS.items():
        if options.only not in (None, name):
            continue
        run = options.output / name
        command = ["regtool", "train", str(pairs), "-o", str(run), "--max-time", f"{options.minutes:g}", "--resume"]
        subprocess.run([*command, *f"{more} {COMMON} {AUGMENT}".split()], check=True, stdout=subprocess.DEVNULL)
        steps = json.loads((run / "report.json").read_text(encoding="utf-8"))["steps"]
        found = tested(run / "model.safetensors", options.output, testing, options.amplitude)
        print(f"| {name} | {steps} | {found[0]:.2f} | {found[1]:.3f} | {found[2]:.2f} | {found[3]:.3f} |", flush=True)
        print(f"before: RMSE {found[4]:.2f} %, Dice {found[5]:.3f}, {found[6]:.2f} mm", file=sys.stderr)


if __name__ == "__main__":
    main()
