"""The methods. One file here is one method. It declares, besides a docstring whose first line describes it:

- `CITATION`: the paper to cite;
- `Parameters`: a `Section`, the method's own `[engine]`;
- `DEFAULTS`: what the paper has in the other sections, {section: {key: value}};
- `engine()`: the class, a subclass of `Engine`.

Nothing has to be registered anywhere: a file with an `engine()` is a method. It is imported as any module. The files that come with regtool load
torch inside `engine()` only, so that listing and checking takes no second; a method of one's own need not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from regtool.config.choices import methods, module_of
from regtool.config.resolve import load as load_parameters
from regtool.config.resolve import validated
from regtool.config.schema import Parameters
from regtool.config.section import Section
from regtool.errors import ParameterError, RegtoolError, UsageError, did_you_mean

if TYPE_CHECKING:
    from regtool.methods.base import Engine


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(methods())


def summary(name: str) -> str:
    """First line of the method's docstring; nothing is imported. UsageError for an unknown name."""
    return methods()[_known(name)]


def parameters_of(name: str) -> type[Section]:
    """The method's `Parameters`, its `[engine]` section. UsageError for an unknown name, RegtoolError where the file declares no such class."""
    found = getattr(_module(name), "Parameters", None)
    if not (isinstance(found, type) and issubclass(found, Section)):
        raise RegtoolError(f"method {name!r} declares no `class Parameters(Section)`")
    return found


def defaults_of(name: str) -> dict[str, Any]:
    """What the method's paper has in the other sections: its `DEFAULTS`. UsageError for an unknown name."""
    return dict(getattr(_module(name), "DEFAULTS", {}))


def citation_of(name: str) -> str:
    """The paper to cite for the method: its `CITATION`, empty where it has none. UsageError for an unknown name."""
    return str(getattr(_module(name), "CITATION", ""))


def read_parameters(path: Path | None, overrides: Mapping[str, Any] | None = None, base: dict[str, Any] | None = None) -> Parameters:
    """`parameters.load` with the method's own defaults at the bottom. UsageError for an unknown method."""
    return load_parameters(path, overrides, base, defaults_of)


@functools.cache
def load(name: str) -> type[Engine]:
    """The method's engine class; imports torch. UsageError with the nearest name for an unknown one, RegtoolError where `engine()` gives no class."""
    from regtool.methods.base import Engine

    found: type[Engine] = _module(name).engine()
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise RegtoolError(f"method {name!r}: expected engine() to give a subclass of Engine, got {found!r}", tip="docs/extending.md has an example")
    return found


def engine_section(parameters: Parameters, path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Section | None:
    """`[engine]` as the method's own `Parameters`; None without a method. UsageError for an unknown method, ParameterError for a wrong `[engine]`."""
    if parameters.method is not None:
        return validated(parameters_of(parameters.method), parameters.engine, "engine", path, overrides)
    if parameters.engine:
        raise ParameterError(f"engine.{next(iter(parameters.engine))}: [engine] needs a method", tip="name one with -m or `method =`")
    return None


def build(parameters: Parameters, ndim: int, channels: int = 1) -> Engine:
    """An engine with fresh weights as a parameter file describes it. UsageError for an unknown method, ParameterError for a wrong `[engine]`."""
    if parameters.method is None:
        raise UsageError("no method is named, so there is no network to build", tip="name one with -m")
    own = validated(parameters_of(parameters.method), parameters.engine, "engine")
    return load(parameters.method)(own, parameters, ndim=ndim, channels=channels)


def _module(name: str) -> ModuleType:
    return module_of(__name__, _known(name))


def _known(name: str) -> str:
    if name not in names():
        raise UsageError(f"unknown method {name!r}; {did_you_mean(name, names())}", tip="`regtool methods` lists them")
    return name
