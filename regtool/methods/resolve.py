"""Which parameters and which model a run has: defaults < what the model brings < parameter file < command line."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regtool.config.choices import NO_MODEL
from regtool.config.resolve import MODEL_SECTIONS
from regtool.config.schema import Parameters
from regtool.config.section import Section
from regtool.config.toml import merged
from regtool.errors import ModelError, ParameterError, did_you_mean
from regtool.io.models import bundled_model, find_model, is_bundled, read_card
from regtool.methods import engine_section, names, read_parameters
from regtool.methods.base import Engine
from regtool.methods.model_file import load_model
from regtool.runtime import gathered_warnings

log = logging.getLogger("regtool")
DEFAULT_METHOD: str | None = "pyramid"  # of `register` without -m, where its weights for the dimension are in the package


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """parameters: complete, the engine's table included; engine: trained, or None where there is none or it learns on the pair; by_default: nobody
    asked for its weights.
    """

    parameters: Parameters
    engine_parameters: Section | None
    engine: Engine | None = None
    card: dict[str, Any] | None = None
    model: Path | None = None
    by_default: bool = False


Resolver = Callable[[Path | None, Mapping[str, Any], int | None], Resolved]


def resolve(parameter_file: Path | None, overrides: Mapping[str, Any], ndim: int | None) -> Resolved:
    """ndim: the images' dimension; None only validates and loads no weights.

    Without `run.model` the method's own weights that come with regtool for that dimension are taken, unless the [engine] that is asked for is
    another than theirs; where there are none, or with `run.model = "none"`, the method learns on the pair.

    Raises UsageError for an unknown method, ParameterError for a wrong parameter, ModelError for a model that is broken or does not fit.
    """
    asked = read_parameters(parameter_file, overrides)
    wanted = _bundled(asked, ndim) if asked.run.model is None else asked.run.model
    if wanted is None or wanted == NO_MODEL:
        own = engine_section(asked, parameter_file, overrides)
        return Resolved(parameters=_with_engine(asked, own), engine_parameters=own)
    path = find_model(str(wanted))
    card = read_card(path)
    brought = _brought(card, path)
    if asked.grid.size is not None:
        brought.pop("grid", None)  # it goes without the model's spacing and limit
    parameters = read_parameters(parameter_file, overrides, brought)
    if parameters.method != card["method"]:
        raise ModelError(f"{path.name} is a {card['method']} model, not {parameters.method}", tip=f"use -m {card['method']}, or leave -m out")
    own = engine_section(parameters, parameter_file, overrides)
    if own != engine_section(read_parameters(None, None, brought)):
        if asked.run.model is None:
            log.warning("[engine] is not that of the weights that come with regtool (%s): the method learns on the pair", path.stem)
            return resolve(parameter_file, merged(overrides, {"run": {"model": NO_MODEL}}), ndim)
        raise ParameterError(f"[engine] differs from what {path.name} was trained with", tip="leave [engine] out where a model is given")
    run = parameters.run.model_copy(update={"model": path.stem if is_bundled(path) else str(path.resolve())})
    parameters = _with_engine(parameters, own).model_copy(update={"run": run})
    engine = None if ndim is None else load_model(path, ndim, parameters=parameters)[0]
    return Resolved(
        parameters=parameters,
        engine_parameters=own,
        engine=engine,
        card=card,
        model=path,
        by_default=asked.method is None and asked.run.model is None,
    )


class Remembered:
    """`resolve` that keeps what the last few calls came to, weights included, as long as parameter file and model are as they were.

    What is kept is shared by all who ask: its network is not to be changed. Threads may call at once.
    """

    def __init__(self, resolver: Resolver = resolve, most: int = 4) -> None:
        self._resolve, self._most, self._lock = resolver, most, threading.Lock()
        self._known: dict[tuple[object, ...], tuple[Resolved, list[str], object]] = {}

    def __call__(self, parameter_file: Path | None, overrides: Mapping[str, Any], ndim: int | None) -> Resolved:
        """As `resolve`; warnings are said again."""
        key = (parameter_file, json.dumps(overrides, sort_keys=True, default=str), ndim, Path.cwd())
        with self._lock:
            known = self._known.pop(key, None)
            if known is not None and known[2] == _stamps(parameter_file, known[0].model):
                for warning in known[1]:
                    log.warning("%s", warning)
            else:
                with gathered_warnings() as warnings:
                    resolved = self._resolve(parameter_file, overrides, ndim)
                known = resolved, warnings, _stamps(parameter_file, resolved.model)
            self._known[key] = known
            if len(self._known) > self._most:
                del self._known[next(iter(self._known))]  # the one that nobody has asked for longest
        return known[0]


def _stamps(*files: Path | None) -> list[tuple[int, int] | None]:
    """By which a changed file is known."""
    return [(file.stat().st_mtime_ns, file.stat().st_size) if file is not None and file.exists() else None for file in files]


def _bundled(asked: Parameters, ndim: int | None) -> Path | None:
    """The model that comes with regtool for the method asked for, or left out; None where there is none."""
    method = asked.method or DEFAULT_METHOD
    return None if method is None or ndim is None else bundled_model(method, ndim)


def _brought(card: dict[str, Any], path: Path) -> dict[str, Any]:
    """The sections that a model brings with it; ModelError where this regtool has no use for them."""
    brought = {k: v for k, v in card["parameters"].items() if k in MODEL_SECTIONS} | {"method": card["method"]}
    if card["method"] not in names():
        raise ModelError(
            f"{path.name} was made with the method {card['method']!r}, which this regtool lacks; {did_you_mean(card['method'], names())}",
            tip="upgrade regtool",
        )
    try:
        engine_section(read_parameters(None, None, brought))
    except ParameterError as error:
        raise ModelError(f"{path.name}: its parameters are not those of this regtool: {error.what}", tip="use the regtool that wrote it") from error
    return brought


def _with_engine(parameters: Parameters, own: Section | None) -> Parameters:
    return parameters if own is None else parameters.model_copy(update={"engine": own.model_dump()})
