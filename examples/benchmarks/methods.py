"""Trains a method from scratch for a bounded time with the installed command, then registers a list of test pairs with its network alone.

    python examples/benchmarks/methods.py NAME TRAINING_LIST PAIRS.csv -o DIR --minutes 5 -- -p parameter_files/dirnet_cardiac_mri_2d.toml --threads 1

Prints a row of a table: training command, steps, minutes, mean Dice before; after the network alone, with the folding it leaves (none is
repaired or rolled back); after the default alignment alone; after alignment and network; and the NMSE of the re-deformed image: the moving image
registered to the fixed one, and that result back to the moving image registered the other way (Kim et al. 2019, Table 2). What comes after `--`
goes to `regtool train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from regtool.config.registration import Align
from regtool.config.schema import Parameters
from regtool.evaluation.overlap import counts, dice
from regtool.geometry.images import Image
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics
from regtool.geometry.sampling import displacement_on, warp_labels, warp_voxels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import read_image, read_labels
from regtool.io.pairs import Pairs, read_list
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model
from regtool.preprocessing.pair import image_on_grid, prepare
from regtool.preprocessing.resolution import network_grid
from regtool.registration.initialization import align
from regtool.training.dataset import Dataset


def network_field(engine: Engine, parameters: Parameters, fixed: Image, moving: Image, aligned: Transform) -> Transform:
    """Fixed to moving through the network and `aligned`, with nothing repaired, refined or rolled back."""
    grid = network_grid(fixed.grid, parameters.grid)
    images = [image_on_grid(prepare(x, grid, parameters.preprocess), t, grid) for x, t in ((fixed, Transform.identity(grid.ndim)), (moving, aligned))]
    with torch.no_grad():
        u = engine.displacement(*images)
    return Transform((DisplacementField.from_voxels(u, grid),)).then(aligned)


def evaluated(model: Path, pairs: Pairs) -> list[float]:
    """Mean Dice before, after the network alone, folding in percent then, mean Dice after alignment alone, after alignment and network."""
    engine, card = load_model(model)
    parameters = Parameters.model_validate(card["parameters"])
    rows = []
    for pair in pairs:
        fixed, moving = read_image(pair.fixed.image), read_image(pair.moving.image)
        labels = read_labels(pair.fixed.labels), read_labels(pair.moving.labels)
        there = counts(labels[0].data.flatten()).keys() & counts(labels[1].data.flatten()).keys()

        def score(transform: Transform, labels: tuple = labels, there: set = there) -> float:
            return dice(labels[0], warp_labels(labels[1], transform, labels[0].grid, vote=False), there).mean

        still = Transform.identity(fixed.grid.ndim)
        alone = network_field(engine, parameters, fixed, moving, still)
        aligned = Transform((align(fixed, moving, Align(), still).affine,))
        both = network_field(engine, parameters, fixed, moving, aligned)
        folding = jacobian_statistics(jacobian_determinant(displacement_on(alone, fixed.grid))).folding_percent
        rows.append([score(still), score(alone), folding, score(aligned), score(both)])
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def cycled_nmse(model: Path, pairs: Pairs) -> float:
    """Mean of |A - T(T(A, phi_AB), phi_BA)|^2 / |A|^2, phi_BA found for the two images that phi_AB and its counterpart made."""
    engine, card = load_model(model)
    source = Dataset(pairs, Parameters.model_validate(card["parameters"]), 2**28, images_only=True)
    found = []
    for i in range(len(pairs)):
        pair = source.sample(i)
        with torch.no_grad():
            forth = warp_voxels(pair.moving, engine.displacement(pair.fixed, pair.moving))
            back = warp_voxels(pair.fixed, engine.displacement(pair.moving, pair.fixed))
            cycled = warp_voxels(forth, engine.displacement(back, forth))
        found.append(float((pair.moving - cycled).square().sum() / pair.moving.square().sum()))
    return statistics.mean(found)


def main() -> None:
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("training", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--every", type=int, default=1, help="of the test pairs")
    options = parser.parse_args(own.split())
    torch.set_num_threads(1)
    run = options.output / options.name
    command = ["regtool", "train", str(options.training), "-o", str(run), "--max-time", f"{options.minutes:g}", "--resume", *more.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    pairs = read_list(options.pairs)[:: options.every]
    before, alone, folding, aligned, both = evaluated(run / "model.safetensors", pairs)
    nmse = cycled_nmse(run / "model.safetensors", pairs)
    shown = f"`regtool train {options.training.name} {more}`"
    numbers = f"{report['steps']} | {report['minutes']:.1f} | {before:.3f} | {alone:.3f} | {folding:.3f} % | {aligned:.3f} | {both:.3f} | {nmse:.4f}"
    print(f"| {options.name} | {shown} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
