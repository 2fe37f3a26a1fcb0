"""The weighted mean of the weights of two models, one of which was trained on from the other: often better on images unlike those of the training.

    python examples/blend_models.py MODEL OTHER --share 0.3 -o FOLDER

MODEL, OTHER: files or names, of one method, dimension and size of network. --share: of OTHER. Writes FOLDER/model.safetensors with the card of OTHER,
which says of what it is the mean, and no validation, since that was of OTHER; `examples/bundle_weights.py FOLDER` takes it into the package.
(Weights averaged for robustness after Wortsman 2022.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from regtool.io.files import sha256
from regtool.io.models import find_model, read_card, read_tensors, write_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("other")
    parser.add_argument("--share", type=float, required=True, help="of OTHER, 0 to 1")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        parser.error(f"--share: {options.share:g} is not from 0 to 1")
    paths = [find_model(name) for name in (options.model, options.other)]
    cards, tensors = [read_card(path) for path in paths], [read_tensors(path) for path in paths]
    shapes = [{name: x.shape for name, x in each.items()} for each in tensors]
    if cards[0]["method"] != cards[1]["method"] or shapes[0] != shapes[1]:
        parser.error(f"{paths[0]} and {paths[1]} are not of the same network")
    shares = (1 - options.share, options.share)
    mean = {name: shares[0] * x.float() + shares[1] * tensors[1][name].float() for name, x in tensors[0].items()}
    training = {key: value for key, value in cards[1]["training"].items() if not key.startswith("validation")}
    parts = [f"{share:g} of {card['name']} (sha256 {sha256(path)})" for share, card, path in zip(shares, cards, paths, strict=True)]
    options.output.mkdir(parents=True, exist_ok=True)
    write_model(options.output / "model.safetensors", mean, {**cards[1], "training": {**training, "mean_of": " and ".join(parts)}})


if __name__ == "__main__":
    main()
