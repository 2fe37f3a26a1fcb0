"""What every section of a parameter file has in common, and how a number is declared in it."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

ByDimension = tuple[float, float]  # a number for images (2-D) and one for volumes (3-D)


def _in_order(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= pair[0] < pair[1] <= 100:
        raise ValueError("expected two numbers from 0 to 100, the lower one first")
    return pair


Percentiles = Annotated[tuple[float, float], AfterValidator(_in_order)]


class Section(BaseModel):
    """A section of the file: immutable, and no key that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _any_case(cls, value: Any, info: ValidationInfo) -> Any:
        """A name from a list is taken in upper or lower case."""
        if isinstance(value, str) and info.field_name and value.lower() in choices_of(cls.model_fields[info.field_name].annotation):
            return value.lower()
        return value


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The names that a field may have, where its annotation is a `Literal`, or one with None."""
    return tuple(choice for part in (annotation, *get_args(annotation)) for choice in get_args(part) if isinstance(choice, str))


def number(default: Any, meaning: str, *, unit: str = "", chosen_on: str = "", **limits: float) -> Any:
    """A number of the algorithm that few ever change: `parameters init --all` prints it, `parameters explain` tells all of it.

    chosen_on: the images on which a tuned number was chosen; empty for one that was not tuned. limits: ge, gt, le, lt.
    """
    facts: dict[str, Any] = {"unit": unit, "chosen_on": chosen_on, "advanced": True}
    return Field(default, description=meaning, json_schema_extra=facts, **limits)  # type: ignore[call-overload]


def of_dimension(pair: ByDimension, ndim: int) -> float:
    """The one of two numbers that is for images of so many dimensions."""
    return pair[ndim - 2]
