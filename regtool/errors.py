"""Every error a user can meet, each with its exit code and, where one exists, the tip that gets him further.

RegtoolError 1           something failed while running
├── OutputError 1        a result could not be written (no permission, disk full)
├── DivergedError 1      an optimisation produced NaN
├── UsageError 2         the command line is wrong (unknown method, result exists already)
│   └── ParameterError 2 the parameter file or --set is wrong
├── InputError 3         a file is missing, broken or of the wrong kind
│   ├── GeometryError 3  spacing, direction, dimension or overlap do not allow a registration
│   └── ModelError 3     a model file is corrupt, foreign or made for other images
└── OutOfMemory 5        the work does not fit into memory

Exit code 4 is no error: the registration was done but quality control failed. 130 and 143 mean interrupted and terminated.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_QUALITY = 4
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class RegtoolError(Exception):
    """A failure that is explained to the user: one line `what`, and a `tip` on how to go on."""

    exit_code = 1

    def __init__(self, what: str, tip: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.tip = tip


class OutputError(RegtoolError):
    """A result could not be written."""


class DivergedError(RegtoolError):
    """An optimisation left the finite numbers."""


class UsageError(RegtoolError):
    """The command line asks for something that does not exist or is not allowed."""

    exit_code = 2


class ParameterError(UsageError):
    """A parameter file or a `--set` is wrong."""


class InputError(RegtoolError):
    """An input file is missing, broken, or not what its place needs."""

    exit_code = 3


class GeometryError(InputError):
    """Geometry does not allow what was asked."""


class ModelError(InputError):
    """A model file is corrupt, foreign, or does not fit."""


class OutOfMemory(RegtoolError):
    """The work does not fit into memory."""

    exit_code = 5


def nearest_name(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` may have meant."""
    return next(iter(difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'lncc'?` for the nearest known word, else the list of all."""
    names = sorted(known)
    near = nearest_name(word, names)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(names)}"


def expected_one_of(word: str, known: Iterable[str]) -> str:
    """`expected none, center or moments; did you mean 'center'?`, the question only where a name is near."""
    names = list(known)
    near = nearest_name(word, names)
    return f"expected {', '.join(names[:-1])} or {names[-1]}" + (f"; did you mean {near!r}?" if near else "")
