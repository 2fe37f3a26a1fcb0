"""What a caller hands over, as the workflows take it: paths, images, points, transforms, and options that are parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from regtool.api.options import PathLike
from regtool.api.results import Registration
from regtool.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import SimpleITK as sitk
    import torch

    from regtool.geometry.images import Landmarks
    from regtool.io.images import Source
    from regtool.io.transforms import TransformSource
    from regtool.workflows.register import Request

    ImageLike = PathLike | sitk.Image | np.ndarray | torch.Tensor  # an array needs a spacing: regtool.Image(array, spacing=...)
    PointsLike = PathLike | np.ndarray | torch.Tensor | Sequence[Sequence[float]]
    OneTransform = PathLike | sitk.Transform | sitk.Image | Registration
    TransformLike = OneTransform | Sequence[OneTransform]

G = TypeVar("G")
IMAGE = "a path, a SimpleITK image, or regtool.Image(array, spacing=(x, y, z))"


def request_of(
    verb: str,
    fixed: ImageLike,
    moving: ImageLike,
    options: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> Request:
    """A registration. options: as named in the call; overrides: of parameters."""
    from regtool.workflows.register import Request

    initial = options.get("initial_transform")
    chain = None if initial is None or isinstance(initial, str | os.PathLike) else transforms_of("initial_transform", initial)
    return Request(
        **pair_of(fixed, moving, options),
        output=path_of(options.get("output")),
        parameter_file=path_of(options.get("parameters")),
        overrides=overrides,
        initial_transform=None if chain is None else single(chain),
        overwrite=bool(options.get("overwrite")),
        command=f"regtool.{verb}(...)",
    )


def parameter_overrides(options: Mapping[str, Any], learns: bool = False) -> dict[str, Any]:
    """What `settings` and the options ask of the parameters; an option wins. learns: as of `registration_overrides`."""
    from regtool.cli.options import MethodOptions, OutputOptions, RunOptions, SeriesOptions, registration_overrides
    from regtool.config.toml import merged

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for name, converted in (("model", os.fspath), ("refine", str), ("output", Path), ("initial_transform", _path_alone)):
        if name in given:
            given[name] = converted(given[name])
    asked = registration_overrides(
        _group(MethodOptions, given), _group(SeriesOptions, given), _group(OutputOptions, given), _group(RunOptions, given), learns=learns
    )
    return merged(_settings(options.get("settings")), asked)


def _group(group: type[G], given: Mapping[str, Any]) -> G:
    """Those of the options that are in a group of the command line's."""
    names = {f.name for f in fields(group)}  # type: ignore[arg-type]
    return group(**{name: value for name, value in given.items() if name in names})


def _settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """`{"section.key": value}` and `{"section": {"key": value}}` as nested dicts of plain values."""
    from regtool.config.toml import merged, nested

    for key in settings or {}:
        if not isinstance(key, str):
            raise TypeError(f'settings: expected names of parameters such as "oneshot.iterations", got {key!r}')
    return merged(*(nested(key, _plain(value)) for key, value in (settings or {}).items()))


def _plain(value: Any) -> Any:
    """Without paths, and without the numbers and arrays of numpy and torch."""
    if isinstance(value, Mapping):
        return _settings(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def pair_of(fixed: ImageLike, moving: ImageLike, options: Mapping[str, Any]) -> dict[str, Any]:
    """The images and what is known of them, as a request takes them."""
    found: dict[str, Any] = {"fixed": image_of("fixed", fixed), "moving": image_of("moving", moving), "fix_header": bool(options.get("fix_header"))}
    for side in ("fixed", "moving"):
        for name in (f"{side}_mask", f"{side}_labels"):
            if options.get(name) is not None:
                found[name] = image_of(name, options[name], found[side])
        if options.get(f"{side}_landmarks") is not None:
            found[f"{side}_landmarks"] = points_of(f"{side}_landmarks", options[f"{side}_landmarks"])
    return found


def image_of(name: str, value: Any, on: Source | None = None) -> Source:
    """A path or a SimpleITK image. on: the image on whose grid a bare array lies. TypeError for anything else."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    from regtool.io.arrays import is_array, is_image, on_grid_of
    from regtool.io.images import read_grid

    if is_image(value):
        return value
    if is_array(value):
        if on is None:
            raise TypeError(f"{name}: an array has no spacing, and regtool works in millimetres; expected {IMAGE}")
        return on_grid_of(value, read_grid(on) if isinstance(on, Path) else on, name)
    raise TypeError(f"{name}: expected {IMAGE}, got {type(value).__name__}")


def optional_image(name: str, value: ImageLike | None, on: Source | None = None) -> Source | None:
    """`image_of`, where there is one."""
    return None if value is None else image_of(name, value, on)


def points_of(name: str, value: PointsLike) -> Path | Landmarks:
    """TypeError for what is neither a path nor (P, D) numbers."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    import numpy as np
    import torch

    from regtool.geometry.images import Landmarks

    try:
        points = np.array(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise TypeError(f"{name}: expected a path or (P, 2) or (P, 3) numbers in mm, got {type(value).__name__} of shape {np.shape(value)}")
    return Landmarks(points)


def transforms_of(name: str, value: Any) -> list[TransformSource]:
    """In the order given. TypeError for what is no transform."""
    if isinstance(value, list | tuple):
        return [one for each in value for one in transforms_of(name, each)]
    if isinstance(value, str | os.PathLike):
        return [Path(value)]
    if isinstance(value, Registration):
        if len(value.found.transforms) > 1:
            raise UsageError(f"{name}: a time series has a transform for each time point", tip="result.transforms[0] is that of the first")
        return [value.found.transforms[0]]
    from regtool.io.arrays import is_image, is_transform

    if is_transform(value) or is_image(value):
        return [value]
    raise TypeError(
        f"{name}: expected a path, a SimpleITK transform, a displacement image or a result of regtool.register, or a list of those, "
        f"got {type(value).__name__}"
    )


def single(chain: Sequence[TransformSource]) -> TransformSource:
    """Several transforms as one."""
    from regtool.workflows.warp import read_transforms

    return chain[0] if len(chain) == 1 else read_transforms(chain)


def path_of(value: PathLike | None) -> Path | None:
    """Of any kind of path."""
    return None if value is None else Path(value)


def _path_alone(value: Any) -> Path | None:
    """None for a transform in memory, which is no parameter."""
    return Path(value) if isinstance(value, str | os.PathLike) else None


def text_of(value: object) -> str | None:
    """As it would stand on the command line."""
    return None if value is None else str(value)
