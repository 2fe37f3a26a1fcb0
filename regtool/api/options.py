"""The options that functions of the Python API share, each with its type and its meaning."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from regtool.config.choices import Alignment, ImageFormat, TimeMode

if TYPE_CHECKING:
    from regtool.api.conversion import ImageLike, PointsLike, TransformLike

PathLike = str | os.PathLike[str]


class ParameterOptions(TypedDict, total=False):
    """The method, and parameters one by one or in a file."""

    method: Annotated[str | None, "registration method; left out: the best for the dimension"]
    parameters: Annotated[PathLike | None, "parameter file, as -p"]
    settings: Annotated[Mapping[str, Any] | None, 'single parameters, as --set: {"oneshot.iterations": 100} or {"oneshot": {"iterations": 100}}']


class DeviceOptions(TypedDict, total=False):
    """Where to compute."""

    device: Annotated[str | None, "auto, cpu, cuda, cuda:N or mps"]
    threads: Annotated[int | None, "CPU threads while the call lasts; left out: as many as torch has. Calls at the same time share the number"]


class RunOptions(DeviceOptions, total=False):
    """Where and with what to compute."""

    max_memory: Annotated[float | None, "GB that may be used; the network grid is coarsened to fit"]
    seed: Annotated[int | None, "of every random number"]


class PairOptions(TypedDict, total=False):
    """What is known of the two images."""

    fixed_mask: Annotated[ImageLike | None, "where the fixed image counts: above zero. A bare array lies on its image's grid"]
    moving_mask: Annotated[ImageLike | None, "where the moving image counts"]
    fixed_labels: Annotated[
        ImageLike | None, "label map of the fixed image: Dice before and after is reported. A bare array lies on its image's grid"
    ]
    moving_labels: Annotated[ImageLike | None, "label map of the moving image; it is warped too"]
    fixed_landmarks: Annotated[PointsLike | None, "points in the fixed image, a file or (P, D) mm LPS: their distances are reported"]
    moving_landmarks: Annotated[PointsLike | None, "the same points in the moving image"]
    fix_header: Annotated[bool | None, "repair directions that are no rotation and spacings at or below zero"]


class OutputOptions(TypedDict, total=False):
    """What is found and written."""

    inverse: Annotated[bool | None, "find the inverse displacement too"]
    format: Annotated[ImageFormat | None, "of the images written"]
    qc: Annotated[bool | None, "write the quality page"]
    overwrite: Annotated[bool | None, "replace an existing result"]


class RegistrationOptions(ParameterOptions, OutputOptions, RunOptions, total=False):
    """How to register."""

    model: Annotated[PathLike | None, 'trained model, a name or a file; "none": the method learns on the pair itself']
    align: Annotated[Alignment | None, "first bring the images together: by their centres, centres of mass, a rigid or an affine map"]
    initial_transform: Annotated[TransformLike | None, "from fixed to moving, to start from: a file, a SimpleITK transform or displacement, a result"]
    similarity: Annotated[str | None, "what a good match is: auto, lncc, ncc, mse, mi, mind, lg, ..."]
    refine: Annotated[Literal["auto", "none"] | int | None, "steps at each resolution of optimising the displacement itself"]
    symmetric: Annotated[bool | None, "register both ways at once when refining; the inverse is found too"]


class RegisterOptions(RegistrationOptions, PairOptions, total=False):
    """Of `register`."""

    output: Annotated[PathLike | None, "folder to write; left out: nothing is written"]
    time: Annotated[TimeMode | None, "4-D moving image: a transform for each time point, or one for all"]
    on_progress: Annotated[Callable[..., None] | None, "called with what, step, steps, loss and perhaps the similarity"]


class FinetuneOptions(RegistrationOptions, PairOptions, total=False):
    """Of `finetune_oneshot`."""

    from_scratch: Annotated[bool | None, "start from no model: the method learns on the pair alone"]
    iterations: Annotated[int | Literal["until-converged"] | None, "steps at most; left out: 50"]
    on_progress: Annotated[Callable[..., None] | None, "called with what, step, steps, loss and perhaps the similarity"]


class WatchedOptions(TypedDict, total=False):
    """Of what may last for hours."""

    stop: Annotated[threading.Event | None, "set it, in another thread say, and the work is saved and ends; `resume` goes on"]
    on_progress: Annotated[Callable[..., None] | None, "called with an event that says where the work stands"]


class LearningOptions(ParameterOptions, RunOptions, WatchedOptions, total=False):
    """Of what learns from a list."""

    validation: Annotated[PathLike | None, "a list to validate with; left out: a part of the list is held out"]
    fix_header: Annotated[bool | None, "repair directions that are no rotation and spacings at or below zero"]
    overwrite: Annotated[bool | None, "replace an existing result"]


class TrainOptions(LearningOptions, total=False):
    """Of `train`."""

    synthetic: Annotated[bool | None, "instead of a list: pairs made from noise, as [synthesis] says"]
    atlas: Annotated[PathLike | None, "with a list of images: the fixed image of every pair"]
    atlas_labels: Annotated[PathLike | None, "its label map"]
    steps: Annotated[int | None, "updates of the weights"]
    max_time: Annotated[float | None, "end after so many minutes of this run"]
    resume: Annotated[bool | None, "go on from the state in the folder"]


class FinetuneListOptions(LearningOptions, total=False):
    """Of `finetune_list`."""

    model: Annotated[PathLike | None, "trained model to start from, a name or a file"]
    similarity: Annotated[str | None, "what a good match is"]
    iterations: Annotated[int | Literal["until-converged"] | None, "steps at most; left out: 500"]


class CohortOptions(RegistrationOptions, WatchedOptions, total=False):
    """Of `cohort`."""

    template: Annotated[PathLike | None, "the fixed image of every pair"]
    bids_dir: Annotated[PathLike | None, "a BIDS dataset: its subjects are brought onto the template"]
    suffix: Annotated[str | None, "with bids_dir: which images; left out: T1w"]
    bids: Annotated[bool | None, "name outputs as BIDS derivatives; with bids_dir the default"]
    shard: Annotated[tuple[int, int] | None, "(i, n): only the i-th of n parts"]
    jobs: Annotated[int | None, "pairs at a time"]
    resume: Annotated[bool | None, "go on: finished pairs whose files are unchanged stay"]
    retry: Annotated[int | None, "times that a pair which crashed is tried again"]
    timeout: Annotated[float | None, "seconds after which a pair is given up"]
    fail_fast: Annotated[bool | None, "end with the first pair that fails"]
    scheduler: Annotated[str | None, "register on the Dask cluster behind this address"]
    time: Annotated[TimeMode | None, "4-D moving image: a transform for each time point, or one for all"]
    fix_header: Annotated[bool | None, "repair directions that are no rotation and spacings at or below zero"]


class EvaluateOptions(TypedDict, total=False):
    """Of `evaluate`."""

    fixed_mask: Annotated[ImageLike | None, "where intensities and the Jacobian count: above zero"]
    fixed_labels: Annotated[ImageLike | None, "label map of the fixed image"]
    moving_labels: Annotated[ImageLike | None, "label map of the moving image"]
    fixed_landmarks: Annotated[PointsLike | None, "points in the fixed image, a file or (P, D) mm LPS"]
    moving_landmarks: Annotated[PointsLike | None, "the same points in the moving image"]
    fix_header: Annotated[bool | None, "repair directions that are no rotation and spacings at or below zero"]
