"""Ferrante et al. (MLMI 2018), rows a to h: a network trained on the target domain, on another one or not at all, then adapted to each test pair.

    python examples/benchmarks/ferrante.py CARDIAC XRAY -o DIR --minutes 20 --pairs 20 --converged 3000 -- --threads 1

CARDIAC: a folder with pairs_train.csv and pairs_test.csv of cine MR slices with labels; XRAY: one with chest X-rays in `images` and, under the same
names, lung labels (right 1, left 2) in `labels`: as in the paper an X-ray is registered to its mirror image. Each is the other's source domain.
unet with l = 2 throughout; affine alignment first; nothing is repaired, refined or rolled back. What comes after `--` goes to `regtool train`.
Prints a table for each domain: MAD of the intensities, Dice, contour mean distance in pixels, similarity, folding, seconds a pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from regtool.config.registration import Align, Metric, Oneshot
from regtool.config.schema import Parameters
from regtool.evaluation.intensity import intensity_agreement
from regtool.evaluation.overlap import dice
from regtool.evaluation.surface import surface_distances
from regtool.geometry.images import Image, Labels
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics
from regtool.geometry.sampling import displacement_on, warp, warp_labels
from regtool.geometry.transforms import DisplacementField, Transform
from regtool.io.images import read_image, read_labels, write_image, write_labels
from regtool.io.pairs import Pair, read_list
from regtool.methods import build, read_parameters
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model
from regtool.preprocessing.batch import Batch
from regtool.preprocessing.pair import image_on_grid, prepare
from regtool.preprocessing.resolution import network_grid
from regtool.registration.adaptation import learn
from regtool.registration.initialization import align

FILES = {"cardiac": "unet_cardiac_mri_2d.toml", "xray": "unet_chest_xray_2d.toml"}
COUNTING = {"cardiac": (255,), "xray": (1, 2)}
TESTED = 3  # every third X-ray
PARAMETER_FILES = Path(__file__).parents[2] / "parameter_files"


@dataclass(frozen=True)
class Subject:
    """A test pair: images, labels, and the alignment between them."""

    fixed: Image
    moving: Image
    labels: tuple[Labels, Labels]
    aligned: Transform

    def batch(self, parameters: Parameters) -> Batch:
        """As the network sees it."""
        grid = network_grid(self.fixed.grid, parameters.grid)
        sides = ((self.fixed, Transform.identity(grid.ndim)), (self.moving, self.aligned))
        return Batch(*(image_on_grid(prepare(image, grid, parameters.preprocess), t, grid) for image, t in sides))


def mirrored_lists(source: Path, folder: Path) -> tuple[Path, Path]:
    """(training list, test list) of each X-ray and its mirror image, whose lungs have changed sides."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[bool, list[str]] = {True: [], False: []}
    for i, path in enumerate(sorted((source / "images").iterdir())):
        image, labels = read_image(path), read_labels(source / "labels" / path.name)
        flipped = labels.data.flip(-1)
        swapped = torch.where(flipped == 1, 2, torch.where(flipped == 2, 1, flipped))
        names = [f"{path.stem}{kind}.mha" for kind in ("", "_mirror", "_labels", "_mirror_labels")]
        write_image(image, folder / names[0])
        write_image(Image(image.data.flip(-1), image.grid), folder / names[1])
        write_labels(labels, folder / names[2])
        write_labels(Labels(swapped.to(labels.data.dtype), labels.grid), folder / names[3])
        rows[i % TESTED == 0].append(f"{path.stem},{','.join(names)}\n")
    out = folder / "train.csv", folder / "test.csv"
    for path, test in zip(out, (False, True), strict=True):
        path.write_text("id,fixed,moving,fixed_labels,moving_labels\n" + "".join(rows[test]), encoding="utf-8")
    return out


def trained(domain: str, pairs: Path, run: Path, minutes: float, more: list[str]) -> Path:
    """The model of one domain; a run that is there goes on."""
    file = PARAMETER_FILES / FILES[domain]
    command = ["regtool", "train", str(pairs), "-p", str(file), "-o", str(run), "--max-time", f"{minutes:g}", "--resume", "-q", *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    print(f"{domain}: {report['steps']} steps in {report['minutes']:.1f} minutes, best at {report['best_step']}", file=sys.stderr)
    return run / "model.safetensors"


def subject(pair: Pair) -> Subject:
    """Read and aligned."""
    fixed, moving = read_image(pair.fixed.image), read_image(pair.moving.image)
    labels = read_labels(pair.fixed.labels), read_labels(pair.moving.labels)
    return Subject(fixed, moving, labels, Transform((align(fixed, moving, Align(), Transform.identity(fixed.grid.ndim)).affine,)))


def scores(subject: Subject, transform: Transform, counting: tuple[int, ...]) -> list[float]:
    """MAD, Dice, contour mean distance, correlation, folding in percent."""
    fixed, moving = subject.fixed, subject.moving
    alike = intensity_agreement(fixed, warp(moving, transform, fixed.grid), span=(float(moving.data.min()), float(moving.data.max())))
    warped = warp_labels(subject.labels[1], transform, fixed.grid, vote=False)
    distance = statistics.mean(d.masd for d in surface_distances(subject.labels[0], warped, counting).values())
    folding = jacobian_statistics(jacobian_determinant(displacement_on(transform, fixed.grid))).folding_percent
    return [alike.mad_intensity, dice(subject.labels[0], warped, counting).mean, distance, alike.ncc, folding]


def adapted(subject: Subject, engine: Engine, parameters: Parameters, oneshot: Oneshot, known: bool) -> Transform:
    """Fixed to moving through the network after so many steps on the pair."""
    batch = subject.batch(parameters)
    learned = learn(engine, batch, oneshot, Metric(name="ncc"), trained=known).engine
    with torch.no_grad():
        u = learned.displacement(batch.fixed, batch.moving)
    grid = network_grid(subject.fixed.grid, parameters.grid)
    return Transform((DisplacementField.from_voxels(u, grid),)).then(subject.aligned)


def table(domain: str, models: dict[str, Path], subjects: list[Subject], converged: int, rate: float | None) -> None:
    """Rows a to h and what they are compared with."""
    other = next(name for name in models if name != domain)
    counting = COUNTING[domain]
    columns = "| row | pre-trained on | steps | MAD | Dice | contour, pixels | NCC | folding | s |"
    print(f"\n{domain}, {len(subjects)} pairs\n\n{columns}\n{'|---' * 9}|")

    def row(name: str, on: str, steps: str, found: list[list[float]], seconds: float) -> None:
        mad, overlap, distance, alike, folding = (statistics.mean(column) for column in zip(*found, strict=True))
        numbers = f"{mad:.4f} | {overlap:.3f} | {distance:.2f} | {alike:.3f} | {folding:.3f} % | {seconds / len(found):.1f}"
        print(f"| {name} | {on} | {steps} | {numbers} |", flush=True)

    plan = [("c", domain, 0), ("b", domain, 50), ("a", domain, converged), ("f", other, 0), ("e", other, 50), ("d", other, converged)]
    row("before", "", "", [scores(s, Transform.identity(s.fixed.grid.ndim), counting) for s in subjects], 0)
    row("aligned", "", "", [scores(s, s.aligned, counting) for s in subjects], 0)
    for name, on, steps in [*plan, ("h", "", 50), ("g", "", converged)]:
        if on:
            engine, card = load_model(models[on])
            parameters = Parameters.model_validate(card["parameters"])
        else:
            torch.manual_seed(0)
            parameters = read_parameters(PARAMETER_FILES / FILES[domain])
            engine = build(parameters, subjects[0].fixed.grid.ndim)
        started = time.perf_counter()
        oneshot = Oneshot(iterations=steps, patience=max(steps, 1), learning_rate=rate)
        fields = [adapted(s, engine, parameters, oneshot, bool(on)) for s in subjects]
        seconds = time.perf_counter() - started
        row(name, on or "nothing", str(steps), [scores(s, field, counting) for s, field in zip(subjects, fields, strict=True)], seconds)


def main() -> None:
    """Trains both domains, then prints both tables."""
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cardiac", type=Path)
    parser.add_argument("xray", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20, help="of training in each domain")
    parser.add_argument("--pairs", type=int, default=20, help="test pairs in each domain, spread over those there are")
    parser.add_argument("--converged", type=int, default=3000, help="steps that count as converged")
    parser.add_argument("--rate", type=float, help="learning rate on the pair; the paper's is 1e-4; left out: regtool's defaults")
    options = parser.parse_args(own.split())
    torch.set_num_threads(1)
    lists = {
        "cardiac": (options.cardiac / "pairs_train.csv", options.cardiac / "pairs_test.csv"),
        "xray": mirrored_lists(options.xray, options.output / "xray_pairs"),
    }
    models = {domain: trained(domain, pairs, options.output / domain, options.minutes, more.split()) for domain, (pairs, _) in lists.items()}
    for domain, (_, test) in lists.items():
        pairs = read_list(test)
        chosen = [pairs[i * len(pairs) // options.pairs] for i in range(min(options.pairs, len(pairs)))]
        table(domain, models, [subject(pair) for pair in chosen], options.converged, options.rate)


if __name__ == "__main__":
    main()
