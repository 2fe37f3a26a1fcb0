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

from regtool.data.dataset import Dataset
from regtool.engines._model import load_model
from regtool.geometry.sampling import warp_voxels
from regtool.io.pairs import Pairs, read_list
from regtool.parameters import Parameters
from regtool.workflows.register import Request, register

ALONE = (
    "guard.repair_folds=false",
    "guard.max_folding_percent=100",
    "refine.iterations=0",
    "qc.max_folding_percent=100",
    "run.qc=false",
    "run.threads=1",
)


def cycled_nmse(model: Path, pairs: Pairs) -> float:
    """Mean of |A - T(T(A, phi_AB), phi_BA)|^2 / |A|^2, phi_BA found for the two images that phi_AB and its counterpart made."""
    engine, card = load_model(model)
    parameters = Parameters.model_validate(card["parameters"])
    source = Dataset(pairs, parameters, 2**28, images_only=True)
    found = []
    for i in range(len(pairs)):
        pair = source.sample(i)
        with torch.no_grad():
            forth = warp_voxels(pair.moving, engine.displacement(pair.fixed, pair.moving))
            back = warp_voxels(pair.fixed, engine.displacement(pair.moving, pair.fixed))
            cycled = warp_voxels(forth, engine.displacement(back, forth))
            found.append(float((pair.moving - cycled).square().sum() / pair.moving.square().sum()))
    return statistics.mean(found)


def evaluated(pairs: Pairs, overrides: tuple[str, ...]) -> tuple[float, float, float]:
    """Mean Dice before and after, mean folding in percent."""
    before, after, folding = [], [], []
    for pair in pairs:
        request = Request(
            pair.fixed.image, pair.moving.image, None, None, overrides, fixed_labels=pair.fixed.labels, moving_labels=pair.moving.labels
        )
        report = register(request).report
        before.append(report["before"]["dice"]["mean"])
        after.append(report["after"]["dice"]["mean"])
        folding.append(report["jacobian"]["folding_percent"])
    return statistics.mean(before), statistics.mean(after), statistics.mean(folding)


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
    model = (*ALONE, f'run.model="{run / "model.safetensors"}"')
    before, alone, folding = evaluated(pairs, (*model, "align.method=none"))
    aligned = evaluated(pairs, ALONE)[1]
    both = evaluated(pairs, model)[1]
    nmse = cycled_nmse(run / "model.safetensors", pairs)
    shown = f"`regtool train {options.training.name} {more}`"
    numbers = f"{report['steps']} | {report['minutes']:.1f} | {before:.3f} | {alone:.3f} | {folding:.3f} % | {aligned:.3f} | {both:.3f} | {nmse:.4f}"
    print(f"| {options.name} | {shown} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
