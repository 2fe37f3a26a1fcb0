"""Which parameters and which model a run has: defaults < what the model brings < parameter file < command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regtool.engines import engine_section, names, read_parameters
from regtool.engines._engine import Engine
from regtool.engines._model import load_model
from regtool.errors import ModelError, ParameterError, did_you_mean
from regtool.io.models import find_model, read_card
from regtool.parameters import MODEL_SECTIONS, Parameters, Section


@dataclass(frozen=True)
class Resolved:
    """parameters: complete, the engine's table included; engine: trained, or None where there is none or it learns on the pair."""

    parameters: Parameters
    engine_parameters: Section | None
    engine: Engine | None = None
    card: dict[str, Any] | None = None
    model: Path | None = None


def resolve(parameter_file: Path | None, overrides: tuple[str, ...], ndim: int | None) -> Resolved:
    """ndim: the images' dimension; None only validates and loads no weights.

    Raises UsageError for an unknown method, ParameterError for a wrong parameter, ModelError for a model that is broken or does not fit.
    """
    asked = read_parameters(parameter_file, overrides)
    if asked.run.model is None:
        own = engine_section(asked, parameter_file, overrides)
        return Resolved(_with_engine(asked, own), own)
    path = find_model(asked.run.model)
    card = read_card(path)
    brought = _brought(card, path)
    parameters = read_parameters(parameter_file, overrides, brought)
    if parameters.method != card["method"]:
        raise ModelError(f"{path.name} is a {card['method']} model, not {parameters.method}", tip=f"use -m {card['method']}, or leave -m out")
    own = engine_section(parameters, parameter_file, overrides)
    if own != engine_section(read_parameters(None, (), brought)):
        raise ParameterError(f"[engine] differs from what {path.name} was trained with", tip="leave [engine] out where a model is given")
    run = parameters.run.model_copy(update={"model": str(path.resolve())})
    parameters = _with_engine(parameters, own).model_copy(update={"run": run})
    return Resolved(parameters, own, None if ndim is None else load_model(path, ndim)[0], card, path)


def _brought(card: dict[str, Any], path: Path) -> dict[str, Any]:
    """The sections that a model brings with it; ModelError where this regtool has no use for them."""
    brought = {k: v for k, v in card["parameters"].items() if k in MODEL_SECTIONS} | {"method": card["method"]}
    if card["method"] not in names():
        raise ModelError(
            f"{path.name} was made with the method {card['method']!r}, which this regtool lacks; {did_you_mean(card['method'], names())}",
            tip="upgrade regtool",
        )
    try:
        engine_section(read_parameters(None, (), brought))
    except ParameterError as error:
        raise ModelError(f"{path.name}: its parameters are not those of this regtool: {error.what}", tip="use the regtool that wrote it") from error
    return brought


def _with_engine(parameters: Parameters, own: Section | None) -> Parameters:
    return parameters if own is None else parameters.model_copy(update={"engine": own.model_dump()})
