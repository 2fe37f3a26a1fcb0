"""Model files: what there is, what is in one, whether it is sound, and importing published weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regtool.config.schema import Grid, Parameters, Preprocess, Regularization, TrainingSimilarity
from regtool.errors import ModelError, UsageError
from regtool.io.files import refuse_existing, require_file, sha256
from regtool.io.models import bundled, find_model, read_card
from regtool.methods import names, summary

if TYPE_CHECKING:
    from regtool.io.keras import Convolution
    from regtool.methods.base import Engine


def methods() -> list[dict[str, str]]:
    """Every method's name and one line on it; no torch."""
    return [{"name": name, "summary": summary(name)} for name in names()]


def list_models() -> list[dict[str, Any]]:
    """The models that come with regtool: name, method, dimension, licence, MB; no torch."""
    found = []
    for path in bundled():
        card = read_card(path)
        found.append({**{key: card[key] for key in ("name", "method", "dimension", "licence")}, "megabytes": round(path.stat().st_size / 2**20, 1)})
    return found


def info(model: str) -> dict[str, Any]:
    """The card of a model (name or path), its path and hash; no torch."""
    path = find_model(model)
    return {"file": str(path), "sha256": sha256(path), **read_card(path)}


def changed_parameters(card: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Section by section, what a model's parameters say otherwise than the defaults; how runs of its training were made is left out."""
    standard = Parameters().model_dump(mode="json")
    sections = {name: values for name, values in card["parameters"].items() if isinstance(values, dict) and name != "run"}
    changed = {name: {k: v for k, v in values.items() if v != standard.get(name, {}).get(k)} for name, values in sections.items()}
    return {name: values for name, values in changed.items() if values}


def verify(model: str) -> dict[str, Any]:
    """Whether a model's weights are those that were written, finite, and fit its method exactly; ModelError where not."""
    from regtool.methods.model_file import load_model

    path = find_model(model)
    engine, card = load_model(path)
    weights = sum(tensor.numel() for tensor in engine.state_dict().values())
    return {"file": str(path), "sha256": sha256(path), "name": card["name"], "method": card["method"], "weights": weights, "status": "ok"}


def import_keras(source: Path, output: Path, overwrite: bool = False) -> dict[str, Any]:
    """VoxelMorph's published Keras weights (vm1 or vm2 of CVPR 2018, 2-D or 3-D) as a model file; returns its card.

    The network saw arrays in the axis order they are stored in and put out displacements in that order; ours has x first, which is the last
    axis: the components of the last layer are reversed, so nothing is left to do at run time. Raises ModelError for any other network.
    """
    from regtool.io.keras import read_convolutions
    from regtool.methods.model_file import save_model

    if output.suffix != ".safetensors":
        raise UsageError(f"a model file ends in .safetensors, got {output.name}", tip=f"-o {output.with_suffix('.safetensors')}")
    require_file(source, "Keras weight file")
    refuse_existing([output], overwrite)
    engine, parameters = _published(read_convolutions(source), source)
    training = {
        "source": source.name,
        "source_sha256": sha256(source),
        "images": "skull-stripped, affinely aligned T1 brains of 1 mm voxels, FreeSurfer-normalised intensities / 255",
    }
    return save_model(output, engine, parameters, name=output.stem, training=training, licence="that of the published weights")


def _published(layers: list[Convolution], source: Path) -> tuple[Engine, Parameters]:
    """The engine whose convolutions have exactly these shapes, with these weights; and the parameters its authors used."""
    from regtool.methods import build
    from regtool.methods.voxelmorph import DECODER
    from regtool.runtime import seeded

    arrays = [array for layer in layers for array in (layer.kernel, layer.bias)]
    if layers:
        arrays[-2:] = [array[::-1].copy() for array in arrays[-2:]]
    for variant, ndim in itertools.product(DECODER, sorted({layer.kernel.ndim - 2 for layer in layers})):
        parameters = _as_published(variant)
        with seeded(0):
            engine = build(parameters, ndim)
        weights = list(engine.state_dict().values())  # in the order in which the layers run
        if [tuple(w.shape) for w in weights] == [a.shape for a in arrays]:
            for weight, array in zip(weights, arrays, strict=True):
                weight.copy_(weight.new_tensor(array))
            return engine, parameters
    shapes = ", ".join("x".join(map(str, layer.kernel.shape)) for layer in layers[:3])
    raise ModelError(
        f"{source} is another network than VoxelMorph-1 or -2 of CVPR 2018: {len(layers)} convolutions, the first {shapes}",
        tip="only the CVPR 2018 network can be imported; later VoxelMorph releases changed it",
    )


FREESURFER_TOP = 0.46667  # where the 99.9th percentile of a T1 brain lies then: white matter is set to 110 of 255, the brightest reach 119


def _as_published(variant: str) -> Parameters:
    """What the authors did, 1 mm voxels and LNCC over 9, but for images in any unit: theirs were FreeSurfer-normalised T1 divided by 255."""
    return Parameters(
        method="voxelmorph",
        grid=Grid(spacing_mm=1.0),
        preprocess=Preprocess(intensity="percentile", percentiles=(0.0, 99.9), top=FREESURFER_TOP),
        engine={"variant": variant, "integration_steps": 0},
        training_similarity=TrainingSimilarity(name="lncc", window=9),
        regularization=Regularization(diffusion={"vm1": 1.0, "vm2": 1.5}[variant]),
    )
