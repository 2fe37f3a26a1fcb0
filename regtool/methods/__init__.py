"""The methods. One file here is one method: its docstring's first line describes it, its `CITATION` names the paper, its `Parameters` is the
`[engine]` section, its `DEFAULTS` are what the paper has in the other sections, its one subclass of `Engine` does the work. Nothing has to be
registered anywhere. No torch until `load`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regtool.config.resolve import load as load_parameters
from regtool.config.resolve import validated
from regtool.config.schema import Parameters
from regtool.config.section import Section
from regtool.errors import ParameterError, RegtoolError, UsageError, did_you_mean

if TYPE_CHECKING:
    from regtool.methods.base import Engine

FOLDER = Path(__file__).parent
OTHERS = ("__init__", "base", "model_file", "pretrained", "resolve")  # files here that are no methods
LIGHT = ("typing", "pydantic", "regtool.config.schema", "regtool.config.section", "regtool.config.registration")  # what a `Parameters` may use


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in OTHERS)


def summary(name: str) -> str:
    """First line of the method's docstring, without importing it. UsageError for an unknown name."""
    return (ast.get_docstring(_tree(name)) or "").partition("\n")[0]


@functools.cache
def parameters_of(name: str) -> type[Section]:
    """The method's `Parameters` (its `[engine]` section) without importing torch: only that class of the file is run, with its light imports.

    Raises UsageError for an unknown name, RegtoolError where the file declares no such class.
    """
    tree = _tree(name)
    wanted = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module in LIGHT]
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Parameters"]
    if not found:
        raise RegtoolError(f"method {name!r} declares no `class Parameters(Section)`")
    space: dict[str, Any] = {"__name__": f"{__name__}.{name}"}
    exec(compile(ast.Module([*wanted, *found], []), str(FOLDER / f"{name}.py"), "exec", dont_inherit=True), space)
    schema: type[Section] = space["Parameters"]
    return schema


def defaults_of(name: str) -> dict[str, Any]:
    """What the method's paper has in the other sections: its literal `DEFAULTS`, {section: {key: value}}. UsageError for an unknown name."""
    found: dict[str, Any] = _literal(name, "DEFAULTS", {})
    return found


def citation_of(name: str) -> str:
    """The paper to cite for the method: its literal `CITATION`, empty where it has none. UsageError for an unknown name."""
    found: str = _literal(name, "CITATION", "")
    return found


def read_parameters(path: Path | None, overrides: tuple[str, ...] = (), base: dict[str, Any] | None = None) -> Parameters:
    """`parameters.load` with the method's own defaults at the bottom. UsageError for an unknown method."""
    return load_parameters(path, overrides, base, defaults_of)


def load(name: str) -> type[Engine]:
    """The method's engine class; imports torch. UsageError with the nearest name for an unknown one."""
    _tree(name)
    module = importlib.import_module(f"{__name__}.{name}")
    base: type[Engine] = importlib.import_module(f"{__name__}.base").Engine
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    engine: type[Engine] = next(c for c in classes if issubclass(c, base))
    return engine


def engine_section(parameters: Parameters, path: Path | None = None, overrides: tuple[str, ...] = ()) -> Section | None:
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
    engine = load(parameters.method)
    own = validated(importlib.import_module(engine.__module__).Parameters, parameters.engine, "engine")
    return engine(own, parameters, ndim=ndim, channels=channels)


def _literal(name: str, wanted: str, otherwise: Any) -> Any:
    """The value of a constant of the method's file, without importing it."""
    for node in _tree(name).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == wanted for t in node.targets):
            return ast.literal_eval(node.value)
    return otherwise


@functools.cache
def _tree(name: str) -> ast.Module:
    if name not in names():
        raise UsageError(f"unknown method {name!r}; {did_you_mean(name, names())}", tip="`regtool methods` lists them")
    return ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
