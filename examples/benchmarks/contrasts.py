"""T2 to T1 under known elastic fields: Deform-GAN 1 and 2 against VoxelMorph with the local gradient loss (Zhang et al. 2020, Table 1).

    python examples/benchmarks/contrasts.py FOLDER -o DIR --minutes 6 [--fields 6] [--amplitude 12]

FOLDER holds T1.nii.gz, T2.nii.gz and lesions.nii.gz of one patient, aligned. Each method learns from this pair alone, its T2 deformed by a new random
field in every step; it is tested on fields it has not seen. Printed for each method: steps, RMSE of intensities against the undeformed T2, percent of
its largest value; Dice of the lesion mask; mean error of the field in mm inside the head; folding. Networks alone: nothing is refined or repaired.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from regtool.workflows.register import Request, register

COMMON = "--set grid.spacing_mm=4 --set align.method=none --threads 1 --set train.learning_rate=1e-3 --set train.ema=0.99 --set run.seed=1 "
COMMON += "--set augment.elastic_voxels=4 --set augment.elastic_spacing=8 --set augment.flip=0.5 --set augment.rotation_degrees=10"
WIDTH = "--set engine.channels=[8,16,32,64] --set train.batch_size=1 --set engine.warmup_steps=60"
METHODS = {
    "VoxelMorph-LG": f"-m voxelmorph --set similarity.name=lg --set similarity.weight=2 --set regularity.diffusion=1 {COMMON}",
    "Deform-GAN-1": f"-m deformgan --set engine.variant=1 {WIDTH} {COMMON}",
    "Deform-GAN-2": f"-m deformgan --set engine.variant=2 {WIDTH} {COMMON}",
}
ALONE = (
    "guard.repair_folds=false",
    "guard.max_folding_percent=100",
    "refine.iterations=0",
    "qc.max_folding_percent=100",
    "run.qc=false",
    "align.method=none",
)


def random_field(reference: sitk.Image, amplitude_mm: float, knots_mm: float, seed: int) -> sitk.DisplacementFieldTransform:
    """Cubic B-spline through random knots, largest displacement `amplitude_mm`."""
    rng = np.random.default_rng(seed)
    extent = [s * n for s, n in zip(reference.GetSpacing(), reference.GetSize(), strict=True)]
    size = [max(4, int(np.ceil(e / knots_mm)) + 3) for e in extent]
    parts = []
    for _ in range(3):
        coarse = sitk.GetImageFromArray(rng.standard_normal(size[::-1]).astype(np.float32))
        coarse.SetSpacing([knots_mm] * 3)
        coarse.SetDirection(reference.GetDirection())
        direction = np.array(reference.GetDirection()).reshape(3, 3)
        coarse.SetOrigin((np.array(reference.GetOrigin()) - direction @ np.full(3, knots_mm)).tolist())
        parts.append(sitk.GetArrayFromImage(sitk.Resample(coarse, reference, sitk.Transform(), sitk.sitkBSpline, 0.0)))
    field = np.stack(parts, -1)
    field *= amplitude_mm / np.linalg.norm(field, axis=-1).max()
    image = sitk.GetImageFromArray(field.astype(np.float64), isVector=True)
    image.CopyInformation(reference)
    return sitk.DisplacementFieldTransform(image)


def tested(model: Path, folder: Path, work: Path, fields: int, amplitude: float) -> list[float]:
    """RMSE %, lesion Dice, field error in mm, folding %; and the first three before."""
    t2, lesions = sitk.ReadImage(str(folder / "T2.nii.gz"), sitk.sitkFloat32), sitk.ReadImage(str(folder / "lesions.nii.gz"), sitk.sitkUInt8)
    truth = sitk.GetArrayViewFromImage(t2)
    head = truth > truth.mean()
    rows = []
    for seed in range(101, 101 + fields):
        field = random_field(t2, amplitude, 40.0, seed)
        vectors = np.moveaxis(sitk.GetArrayFromImage(field.GetDisplacementField()), -1, 0)
        moved, labels = work / "moving.nii.gz", work / "moving_lesions.nii.gz"
        field = sitk.DisplacementFieldTransform(field)
        sitk.WriteImage(sitk.Resample(t2, t2, field, sitk.sitkLinear, 0.0), str(moved))
        sitk.WriteImage(sitk.Resample(lesions, t2, field, sitk.sitkNearestNeighbor, 0), str(labels))
        overrides = (*ALONE, f'run.model="{model}"')
        labelled = {"fixed_labels": folder / "lesions.nii.gz", "moving_labels": labels}
        request = Request(folder / "T1.nii.gz", moved, overrides=overrides, **labelled)
        result = register(request)
        u = result.displacements[0].data.numpy()
        error, before = residual(u, vectors, t2)[head].mean(), np.linalg.norm(vectors, axis=0)[head].mean()
        start = sitk.GetArrayFromImage(sitk.ReadImage(str(moved)))
        rmse = [float(np.sqrt(np.mean((x - truth) ** 2)) / truth.max() * 100) for x in (result.warped.data[0].numpy(), start)]
        dice = [result.report[when]["dice"]["mean"] for when in ("after", "before")]
        rows.append([rmse[0], dice[0], error, result.report["jacobian"]["folding_percent"], rmse[1], dice[1], before])
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def residual(u: np.ndarray, d: np.ndarray, grid: sitk.Image) -> np.ndarray:
    """|u(x) + d(x + u(x))| in mm: zero where the registration undoes the field."""
    field = sitk.GetImageFromArray(np.moveaxis(u, 0, -1).astype(np.float64), isVector=True)
    field.CopyInformation(grid)
    outer = sitk.GetImageFromArray(np.moveaxis(d, 0, -1), isVector=True)
    outer.CopyInformation(grid)
    carried = sitk.Resample(outer, grid, sitk.DisplacementFieldTransform(field), sitk.sitkLinear)
    return np.linalg.norm(np.moveaxis(u, 0, -1) + sitk.GetArrayFromImage(carried), axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--fields", type=int, default=6)
    parser.add_argument("--amplitude", type=float, default=12.0, help="mm")
    parser.add_argument("--only", choices=sorted(METHODS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    pairs = options.output / "pairs.csv"
    pairs.write_text(f"fixed,moving\n{folder / 'T1.nii.gz'},{folder / 'T2.nii.gz'}\n", encoding="utf-8")
    for name, more in METHODS.items():
        if options.only in (None, name):
            run = options.output / name
            command = ["regtool", "train", str(pairs), "-o", str(run), "--max-time", f"{options.minutes:g}", "--resume", *more.split()]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            steps = json.loads((run / "report.json").read_text(encoding="utf-8"))["steps"]
            found = tested(run / "model.safetensors", folder, options.output, options.fields, options.amplitude)
            print(f"| {name} | {steps} | {found[0]:.2f} | {found[1]:.3f} | {found[2]:.2f} | {found[3]:.3f} |", flush=True)
            print(f"before: RMSE {found[4]:.2f} %, Dice {found[5]:.3f}, {found[6]:.2f} mm", file=sys.stderr)


if __name__ == "__main__":
    main()
