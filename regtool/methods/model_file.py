"""Engines out of model files, and into them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from regtool.config.schema import Parameters
from regtool.errors import ModelError, ParameterError, did_you_mean
from regtool.io.models import read_card, read_tensors, write_model
from regtool.methods import build, citation_of, names
from regtool.methods.base import Engine
from regtool.runtime import seeded


def load_model(
    path: Path, ndim: int | None = None, device: torch.device | None = None, parameters: Parameters | None = None
) -> tuple[Engine, dict[str, Any]]:
    """The trained engine, ready to predict, and the model's card.

    ndim: the images' dimension, None for whatever the model is made for; parameters: complete, those to learn on with; left out: the model's own.
    Raises ModelError for a damaged file, another dimension, an unknown method, or weights that do not fit the engine exactly.
    """
    card = read_card(path)
    if ndim is not None and card["dimension"] != ndim:
        raise ModelError(
            f"{path.name} is made for {card['dimension']}-D images, these are {ndim}-D", tip="`regtool models list` shows each model's dimension"
        )
    if card["method"] not in names():
        raise ModelError(
            f"{path}: made with the method {card['method']!r}, which this regtool lacks; {did_you_mean(card['method'], names())}",
            tip="upgrade regtool",
        )
    try:
        with seeded(0):  # the weights that it is built with are of no use
            engine = build(parameters or Parameters.model_validate(card["parameters"]), card["dimension"])
    except (ValueError, ParameterError) as error:
        raise ModelError(
            f"{path}: its parameters are not those of this regtool: {str(error).splitlines()[0]}", tip="use the regtool version that wrote it"
        ) from error
    engine.drop_training_parts()
    _load(engine, read_tensors(path), path)
    return engine.to(device or torch.device("cpu")).eval(), card


def save_model(
    path: Path, engine: Engine, parameters: Parameters, *, name: str, training: dict[str, Any], licence: str = "", citation: str = ""
) -> dict[str, Any]:
    """Writes what `displacement` needs as a model file; returns its card.

    training: whatever is known of how the weights came about (JSON-able); citation: left out: that of the method.
    """
    kept = copy.deepcopy(engine)
    kept.drop_training_parts()
    resolved = parameters.model_copy(update={"engine": engine.settings.model_dump()})
    card = {
        "method": parameters.method,
        "dimension": engine.ndim,
        "name": name,
        "parameters": resolved.model_dump(mode="json"),
        "training": training,
        "licence": licence,
        "citation": citation or citation_of(str(parameters.method)),
    }
    return write_model(path, kept.state_dict(), card)


def _load(engine: Engine, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """ModelError naming the first tensor that is missing, superfluous or of another shape."""
    wanted = engine.state_dict()
    for key in sorted(wanted.keys() | tensors.keys()):
        if key not in tensors or key not in wanted:
            raise ModelError(
                f"{path}: weights {key} are {'missing' if key in wanted else 'not part of this method'}", tip="use the regtool version that wrote it"
            )
        if tensors[key].shape != wanted[key].shape:
            raise ModelError(
                f"{path}: weights {key} have shape {tuple(tensors[key].shape)}, expected {tuple(wanted[key].shape)}",
                tip="use the regtool version that wrote it",
            )
    engine.load_state_dict(tensors, strict=True)
