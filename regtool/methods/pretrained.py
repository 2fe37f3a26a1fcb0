"""A training that starts from a model's weights instead of fresh ones."""

from __future__ import annotations

from regtool.config.choices import NO_MODEL
from regtool.config.schema import Parameters
from regtool.io.files import sha256
from regtool.io.models import find_model, read_card
from regtool.methods import build
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model


def pretrained(parameters: Parameters) -> bool:
    """Whether `run.model` names a model."""
    return parameters.run.model not in (None, NO_MODEL)


def first_engine(parameters: Parameters, ndim: int) -> Engine:
    """With the weights of the model, or fresh ones. Raises ModelError where the model is damaged or of another dimension."""
    return load_model(find_model(str(parameters.run.model)), ndim, parameters=parameters)[0] if pretrained(parameters) else build(parameters, ndim)


def parent(parameters: Parameters) -> dict[str, str] | None:
    """Name and hash of the model."""
    if not pretrained(parameters):
        return None
    path = find_model(str(parameters.run.model))
    return {"name": read_card(path)["name"], "sha256": sha256(path)}
