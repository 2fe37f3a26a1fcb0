"""How a function of the Python API says which options it has, each with its type and its meaning, and what it answers to wrong ones.

Options that several functions share are `TypedDict`s, taken as `**options: Unpack[...]`; their meanings stand beside their types (`Annotated`).
"""

from __future__ import annotations

import builtins
import functools
import inspect
import numbers
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from regtool.errors import UsageError, did_you_mean, expected_one_of

P = ParamSpec("P")
R = TypeVar("R")
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "str"),
    int: ((numbers.Integral,), "int"),
    float: ((numbers.Real,), "float"),
    os.PathLike: ((os.PathLike,), "path"),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its options one by one in signature and docstring; a wrong name or type of one is a TypeError that says what is expected.

    A string that is none of the names an option takes is a UsageError. Numbers of numpy become Python's.
    """
    taken = {option: hint for option, hint in function.__annotations__.items() if option != "return"}
    hints = _hints(types.SimpleNamespace(__annotations__=taken), function.__globals__)
    plain = [p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    shared = _shared(hints)
    named = [inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_bare(hint)) for option, hint in shared.items()]
    signature = inspect.Signature(
        [p.replace(annotation=hints[p.name]) for p in plain] + named, return_annotation=function.__annotations__.get("return")
    )
    module = function.__module__.rpartition(".")[2]
    name = f"regtool.transform.{function.__name__}" if module == "transform" else f"regtool.{function.__name__}"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = next((option for option in kwargs if option not in signature.parameters), None)
        if unknown is not None:
            raise TypeError(f"{name}() has no option {unknown!r}; {did_you_mean(unknown, signature.parameters)}")
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{name}(): {error}") from None
        return function(**{option: _taken(f"{name}({option}=...)", value, hints_of[option]) for option, value in given.items()})  # type: ignore[call-arg]

    hints_of = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = inspect.cleandoc(function.__doc__ or "") + _meanings(shared)
    return call


def _shared(hints: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the TypedDict that a function takes."""
    table = next((get_args(hint)[0] for name, hint in hints.items() if name == "options"), None)
    return {} if table is None else _hints(table, vars(sys.modules[table.__module__]))


def _hints(declared: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """The types of parameters, `Any` for what is imported for type checkers alone: it would make `import regtool` slow."""

    class Names(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            return known[name] if name in known else getattr(builtins, name, Any)

    return get_type_hints(declared, localns=Names(), include_extras=True)


def _meanings(options: Mapping[str, Any]) -> str:
    lines = [f"    {option}: {get_args(hint)[1]}" for option, hint in options.items()]
    return "\n\nOptions, all of them by name:\n" + "\n".join(lines) if lines else ""


def _bare(hint: Any) -> Any:
    """Without its meaning."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _taken(what: str, value: Any, hint: Any) -> Any:
    """The value, with numbers of numpy as Python's; TypeError where it is of none of the types in `hint`."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(_fits(value, choice) for choice in choices):
        names = [name for choice in choices if get_origin(choice) is Literal for name in get_args(choice)]
        if names and isinstance(value, str) and str not in choices:
            if value.lower() not in names:
                raise UsageError(f"{what}: got {value!r}; {expected_one_of(value, names)}")
            return value.lower()
        return value.item() if type(value).__module__ == "numpy" and not getattr(value, "shape", True) else value
    expected = dict.fromkeys(_named(choice) for choice in choices)
    raise TypeError(f"{what}: expected {' or '.join(expected)}, got {type(value).__name__}")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    origin = get_origin(hint) or hint
    if origin is bool:
        return isinstance(value, _booleans())
    if origin is Literal:
        return isinstance(value, str)
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str)
    if origin in (Mapping, Callable):
        return isinstance(value, origin)
    found = KINDS.get(origin, ((origin,), ""))[0]
    return isinstance(value, found) and not (origin in (int, float) and isinstance(value, bool))


def _booleans() -> tuple[type, ...]:
    import numpy as np

    return bool, np.bool_


def _named(hint: Any) -> str:
    origin = get_origin(hint) or hint
    if origin is Literal:
        return "one of " + ", ".join(repr(name) for name in get_args(hint))
    if origin in (Sequence, Mapping, Callable):
        return {Sequence: "a sequence", Mapping: "a dict", Callable: "a function"}[origin]
    return "None" if hint in (None, type(None)) else KINDS.get(origin, ((), getattr(origin, "__name__", str(origin))))[1]
