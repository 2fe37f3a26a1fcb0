"""Options that belong together as one dataclass, which several verbs share: typer itself only knows the parameters of a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

R = TypeVar("R")


@dataclass(frozen=True)
class Sets:
    """Marks an option that sets a parameter. key: `section.key`; convert: from the option's value to the parameter's, None leaves it alone."""

    key: str
    convert: Callable[[Any], Any] = lambda value: value


def grouped(verb: Callable[..., R]) -> Callable[..., R]:
    """The verb as typer takes it: each parameter that is a dataclass gives way to its fields, which are `Annotated` as parameters of a verb are."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in groups:
            flat += _parameters(groups[name])
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(verb)
    def run(**given: Any) -> R:
        built = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        return verb(**given, **built)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


def given_parameters(group: object) -> Iterator[tuple[str, str, Any]]:
    """(`--option value`, section.key, value of the parameter) of each option in the group that was given and `Sets` a parameter."""
    for name, hint in get_type_hints(type(group), include_extras=True).items():
        value = getattr(group, name)
        for mark in get_args(hint) if get_origin(hint) is Annotated and value is not None else ():
            if isinstance(mark, Sets) and (converted := mark.convert(value)) is not None:
                yield f"--{name.replace('_', '-')} {value}", mark.key, converted


def _parameters(group: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for f in fields(group):
        default = inspect.Parameter.empty if f.default is MISSING else f.default
        yield inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[f.name])
