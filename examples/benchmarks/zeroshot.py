"""A method's bundled weights on hearts they have never seen: the network alone, nothing aligned, refined, repaired or rolled back.

    python examples/benchmarks/zeroshot.py PAIRS.csv [--methods pyramid,...] [--passes 2] [--every 4] [--max-voxels N] [--threads 2]

PAIRS.csv: 2-D pairs with labels whose identifiers end in ES_to_ED and ED_to_ES (the moving image first). Each pair also with the intensities of the
fixed image turned over. --passes: the network looks again at the pair as registered so far, always. Prints the mean Dice before and after (labels
carried with the nearest neighbour), folding, and inverse consistency: the mean length in voxels of what is left of the displacement there followed
by that of the images exchanged.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path

import torch

from regtool.evaluation.overlap import dice
from regtool.geometry.composition import compose_voxels
from regtool.geometry.images import Labels
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics
from regtool.geometry.sampling import warp_labels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import read_image, read_labels
from regtool.io.pairs import read_list
from regtool.methods.resolve import resolve
from regtool.preprocessing.pair import image_on_grid, prepare
from regtool.preprocessing.resolution import network_grid


def overlap(labels: tuple[Labels, ...], transform: Transform) -> float:
    """Mean Dice of the labels in the fixed map."""
    fixed, moving = labels
    return dice(fixed, warp_labels(moving, transform, fixed.grid, vote=False), fixed.data.unique()[1:].tolist()).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--methods", default="pyramid")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="of the pairs of each direction")
    parser.add_argument("--max-voxels", type=int, help="of the network's grid; left out: those of the weights")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = read_list(arguments.pairs)
    heads = ["method", "direction", "fixed image", "pairs", "before", "network", "folding", "inverse consistency, voxels"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    trained = {method: resolve(None, {"method": method}, 2) for method in arguments.methods.split(",")}
    for (method, resolved), way, inverted in product(trained.items(), ("ES_to_ED", "ED_to_ES"), (False, True)):
        engine, parameters = resolved.engine, resolved.parameters
        if engine is None:
            parser.error(f"{method} has no 2-D weights")
        numbers = []
        for row in [row for row in rows if row.id.endswith(way)][:: arguments.every]:
            images = [read_image(side.image).grey() for side in (row.fixed, row.moving)]
            labels = tuple(read_labels(side.labels) for side in (row.fixed, row.moving) if side.labels is not None)
            grid = network_grid(images[0].grid, parameters.grid, arguments.max_voxels)
            fixed, moving = (image_on_grid(prepare(image, grid, parameters.preprocess), Transform.identity(2), grid) for image in images)
            fixed = 1 - fixed if inverted else fixed
            with torch.inference_mode():
                there, back = (list(engine.passes(*pair, arguments.passes))[-1] for pair in ((fixed, moving), (moving, fixed)))
            field = DisplacementField.from_voxels(there[0], grid)
            folding = jacobian_statistics(jacobian_determinant(field)).folding_percent
            left = float(compose_voxels(back, there).norm(dim=1).mean())
            numbers.append((overlap(labels, Transform.identity(2)), overlap(labels, Transform((field,))), folding, left))
        before, after, folds, inverse = (statistics.mean(column) for column in zip(*numbers, strict=True))
        contrast = "inverted" if inverted else "as it is"
        print(f"| {method} | {way} | {contrast} | {len(numbers)} | {before:.3f} | {after:.3f} | {folds:.4f} % | {inverse:.2f} |", flush=True)


if __name__ == "__main__":
    main()
