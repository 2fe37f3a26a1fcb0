"""Puts trained models into the package, in half precision, with their cards: what `-m METHOD` then uses without `--model`.

    python examples/bundle_weights.py [RUN...] [--results FILE.json] [--folder regtool/weights]

RUN: a folder that `regtool train --synthetic` wrote. Each becomes METHOD_2d or METHOD_3d.safetensors with the largest grid it may work on, its
training, its limits, its method's paper and, with --results (what `examples/benchmarks/everything.py` keeps), its scores. Half precision is taken
where it moves no displacement of eight synthetic pairs by 0.05 voxel. Then the list of hashes is written anew, and a table printed. More than 25 MB
in all is an error. Without RUN the scores of FILE.json are written onto the cards of all that is bundled.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from regtool.config.schema import Parameters
from regtool.io.models import BUNDLED, read_card, read_tensors, write_hashes, write_model
from regtool.methods import citation_of, read_parameters
from regtool.methods.model_file import load_model
from regtool.training.synthesis import synthetic

MAX_VOXELS = {2: 256 * 256, 3: 300_000}  # of the network grid
MOST_DRIFT = 0.05  # voxels
MOST_MEGABYTES = 25.0
PAIRS = 8
LEARNING = ("training_similarity", "regularization", "supervision", "augment", "synthesis", "train")  # sections that a training goes by


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The kernels in half precision; biases and the statistics of normalisations, which weigh nothing, stay as they are."""
    return {name: x.half() if x.is_floating_point() and x.dim() > 1 else x for name, x in tensors.items()}


def drift(one: Path, other: Path) -> tuple[float, float]:
    """(mean, largest) distance in voxels between the displacements of two models on synthetic pairs."""
    engines = [load_model(path)[0] for path in (one, other)]
    parameters = Parameters.model_validate(read_card(one)["parameters"])
    found = []
    for seed in range(PAIRS):
        pair = synthetic(parameters.synthesis, parameters.preprocess, (2**31, seed), torch.device("cpu"))
        with torch.inference_mode():
            a, b = (engine.displacement(pair.fixed, pair.moving) for engine in engines)
        found.append((a - b).norm(dim=1))
    distances = torch.cat(found)
    return float(distances.mean()), float(distances.max())


def scores_of(card: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """`scores`, by set, of a method in its dimension; nothing where there are none."""
    scores: dict[str, dict[str, Any]] = {}
    for row in results.values():
        if row["method"] == card["method"] and row["dimension"] == card["dimension"]:
            own = scores.setdefault(row["set"], {"measure": row["measure"], "pairs": row["pairs"], "before": round(row["before"], 4)})
            own["network and refining" if row["refined"] else "network"] = round(row["after"], 4)
    return {"scores": scores} if scores else {}


def card_of(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The card of the training, with what a user of the bundled model wants to know."""
    card = read_card(run / "model.safetensors")
    parameters = Parameters.model_validate(card["parameters"])
    ndim, name = card["dimension"], f"{card['method']}_{card['dimension']}d"
    parameters = parameters.model_copy(update={"grid": parameters.grid.model_copy(update={"max_voxels": MAX_VOXELS[ndim]})})
    recipe = Path(__file__).parents[1] / "parameter_files" / f"{card['method']}_synthetic_{ndim}d.toml"
    newer = read_parameters(recipe).engine  # has settings that came after the training
    parameters = parameters.model_copy(update={"engine": {**newer, **parameters.engine}})
    synthesis = parameters.synthesis
    reach = round(100 * (2 * synthesis.amplitude + synthesis.translation))
    size = " x ".join(map(str, synthesis.size))
    limits = (
        f"learned from synthetic shapes of {size} voxels that move by up to about {reach} % of the image, aligned to some degrees; sees at most "
        f"{MAX_VOXELS[ndim]} voxels of an image: larger motion is for the alignment, finer detail for refining"
    )
    command = f"regtool train --synthetic -p parameter_files/{recipe.name}"
    if "parent" in card["training"]:  # it went on from other weights, not quite as the file says
        command += f" --set run.model={card['training']['parent']['name']} --set run.seed={parameters.run.seed}"
        own, wanted = (one.model_dump(mode="json") for one in (parameters, read_parameters(recipe)))
        differing = [(f"{name}.{key}", value) for name in LEARNING for key, value in own[name].items() if value != wanted[name][key]]
        command += "".join(f" --set {key}={json.dumps(value, separators=(',', ':'))}" for key, value in differing)
    training = {"command": command, **card["training"]}
    return {
        **card,
        "name": name,
        "parameters": parameters.model_dump(mode="json"),
        "training": {**training, **scores_of(card, results), "limits": limits},
        "licence": "Apache-2.0",
        "citation": citation_of(card["method"]),
    }


def bundle(run: Path, folder: Path, results: dict[str, Any]) -> str:
    """Writes one model; a row of the table."""
    tensors, card = read_tensors(run / "model.safetensors"), card_of(run, results)
    path = folder / f"{card['name']}.safetensors"
    with tempfile.TemporaryDirectory() as scratch:  # where no list of hashes is asked for
        write_model(Path(scratch) / path.name, halved(tensors), card)
        mean, largest = drift(run / "model.safetensors", Path(scratch) / path.name)
    half = largest < MOST_DRIFT
    card["training"]["stored"] = f"half precision; no displacement moves by more than {largest:.3f} voxel" if half else "single precision"
    write_model(path, halved(tensors) if half else tensors, card)
    steps, minutes, megabytes = card["training"].get("steps"), card["training"].get("minutes"), path.stat().st_size / 1e6
    return f"| {card['name']} | {steps} | {minutes} | {megabytes:.2f} | {'half' if half else 'single'} | {mean:.4f} | {largest:.4f} |"


def score(path: Path, results: dict[str, Any]) -> str:
    """Writes the scores onto the card of a bundled model, where those of other sets stay; a row of the table."""
    card = read_card(path)
    found = scores_of(card, results).get("scores", {})
    scores = {**card["training"].get("scores", {}), **found}
    write_model(path, read_tensors(path), {**card, "training": {**card["training"], **({"scores": scores} if scores else {})}})
    return f"| {card['name']} | {', '.join(found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--folder", type=Path, default=BUNDLED)
    options = parser.parse_args()
    if not options.runs and options.results is None:
        parser.error("give runs to bundle, or --results to write their scores onto what is bundled")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.results.read_text(encoding="utf-8")) if options.results else {}
    if options.runs:
        print("| model | steps | minutes | MB | precision | mean change, voxels | largest change |\n|---|---|---|---|---|---|---|")
        for run in options.runs:
            print(bundle(run, options.folder, results), flush=True)
    else:
        print("| model | sets scored |\n|---|---|")
        for path in sorted(options.folder.glob("*.safetensors")):
            print(score(path, results))
    write_hashes(options.folder)
    total = sum(path.stat().st_size for path in options.folder.glob("*.safetensors")) / 1e6
    print(f"\n{total:.1f} MB in {options.folder}")
    if total > MOST_MEGABYTES:
        sys.exit(f"more than {MOST_MEGABYTES:g} MB")


if __name__ == "__main__":
    main()
