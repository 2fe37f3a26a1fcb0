"""Deformable registration of medical images. `regtool.register(fixed, moving)` is the whole of it; the command line does the same.

Every verb of the command line is a function with the verb's options by name. Nothing heavy is loaded before the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import regtool.errors as errors
    from regtool.api import transform
    from regtool.api.results import Jacobian, Registration
    from regtool.api.verbs import (
        cohort,
        evaluate,
        evaluate_list,
        finetune_list,
        finetune_oneshot,
        jacobian,
        register,
        train,
        warp,
        warp_points,
    )
    from regtool.io.arrays import Image

    __version__: str

__all__ = [
    "Image",
    "Jacobian",
    "Registration",
    "__version__",
    "cohort",
    "errors",
    "evaluate",
    "evaluate_list",
    "finetune_list",
    "finetune_oneshot",
    "jacobian",
    "register",
    "train",
    "transform",
    "warp",
    "warp_points",
]

PLACES = {"Image": "regtool.io.arrays", "Jacobian": "regtool.api.results", "Registration": "regtool.api.results"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("regtool")
    if name not in __all__:
        raise AttributeError(f"module 'regtool' has no attribute {name!r}")
    if name in ("errors", "transform"):
        return import_module("regtool.errors" if name == "errors" else "regtool.api.transform")
    return getattr(import_module(PLACES.get(name, "regtool.api.verbs")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
