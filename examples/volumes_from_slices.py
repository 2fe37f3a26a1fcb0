"""Turns 2-D weights of dirnet into weights that see a volume, from which a training in 3-D can start.

    python examples/volumes_from_slices.py [dirnet_2d] START.safetensors [-p parameter_files/dirnet_synthetic_3d.toml]

From fresh weights dirnet learns nothing on synthetic volumes. A volume has slices along three planes: each plane gets the 2-D network's kernels, set
into the middle of kernels three voxels thick, as channels of its own, three times as many in all; and each component of the displacement is the mean
of those of the two planes in which it lies (kernels inflated after Carreira 2017). What the planes have to tell each other is left to training.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F

from regtool.io.models import find_model, read_card, write_model
from regtool.methods import build, citation_of, read_parameters
from regtool.methods.model_file import load_model

PLANES = tuple(combinations(range(3), 2))  # axes of the array, slowest first


def inflated(flat: dict[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    """The tensors of a 2-D regressor for all three planes of a volume. head: the name of its last layer, whose outputs are x and y."""
    return {name: _vector(x, name, head) if x.dim() == 1 else _kernels(x, name, head, first=x.shape[1] == 2) for name, x in flat.items()}


def _vector(x: torch.Tensor, name: str, head: str) -> torch.Tensor:
    """(C,) to (3 C,); of the head (2,), x and y, to (3,), each the mean over its planes."""
    if name != f"{head}.bias":
        return x.repeat(len(PLANES))
    bias = x.new_zeros(3)
    for slow, fast in PLANES:
        bias[2 - fast] += x[0] / 2
        bias[2 - slow] += x[1] / 2
    return bias


def _kernels(x: torch.Tensor, name: str, head: str, *, first: bool) -> torch.Tensor:
    """(O, I, k, k) to (3 O, I or 3 I, k, k, k), each plane seeing itself only; of the head to (3, 3 I, 1, 1, 1)."""
    planes = []
    for across in (2, 1, 0):  # the axis that each of PLANES lacks
        beside = [0] * 6
        beside[2 * (2 - across)] = beside[2 * (2 - across) + 1] = x.shape[-1] // 2
        planes.append(F.pad(x.unsqueeze(2 + across), beside))
    if name == f"{head}.weight":
        whole = x.new_zeros(3, 3 * x.shape[1], 1, 1, 1)
        for (slow, fast), part, kernels in zip(PLANES, whole.chunk(3, dim=1), planes, strict=True):
            part[2 - fast] += kernels[0] / 2
            part[2 - slow] += kernels[1] / 2
        return whole
    if first:
        return torch.cat(planes)
    whole = x.new_zeros(3 * x.shape[0], 3 * x.shape[1], *planes[0].shape[2:])
    for rows, kernels, plane in zip(whole.chunk(3), planes, range(3), strict=True):
        rows.chunk(3, dim=1)[plane].copy_(kernels)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="dirnet_2d", help="2-D weights of dirnet, a file or a name")
    parser.add_argument("start", type=Path)
    parser.add_argument("-p", "--parameters", type=Path, default=Path(__file__).parents[1] / "parameter_files" / "dirnet_synthetic_3d.toml")
    options = parser.parse_args()
    source = find_model(options.model)
    card = read_card(source)
    parameters = read_parameters(options.parameters)
    if (card["method"], card["dimension"], parameters.method) != ("dirnet", 2, "dirnet"):
        parser.error("expected 2-D weights of dirnet, and a parameter file for it")
    engine = build(parameters, 3)
    tensors = inflated({name: x.float() for name, x in load_model(source, 2)[0].state_dict().items()}, "network.head")
    try:
        engine.load_state_dict(tensors)
    except RuntimeError as error:
        parser.error(f"{source} and {options.parameters} are not of the same network (engine.kernels: three times as many as in 2-D): {error}")
    write_model(
        options.start,
        tensors,
        {
            "method": card["method"],
            "dimension": 3,
            "name": options.start.stem,
            "parameters": parameters.model_dump(mode="json"),
            "training": {"data": f"none; {card['name']} in three planes"},
            "licence": card["licence"],
            "citation": citation_of(card["method"]),
        },
    )


if __name__ == "__main__":
    main()
