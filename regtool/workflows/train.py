"""`regtool train`: a method learns from a list of pairs, or from synthetic ones."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regtool.config.schema import Parameters
from regtool.errors import InputError, OutOfMemory, ParameterError, UsageError
from regtool.geometry.images import Image
from regtool.geometry.transforms import Affine, Transform
from regtool.io.files import check_folder
from regtool.io.pairs import read_list, split
from regtool.methods import engine_section, read_parameters
from regtool.methods.base import Engine
from regtool.methods.pretrained import first_engine, parent, pretrained
from regtool.methods.resolve import resolve
from regtool.registration.initialization import align
from regtool.registration.memory import check_training, too_large
from regtool.report.schema import REPORT, TrainingReport
from regtool.runtime import (
    Graceful,
    computing,
    gathered_warnings,
    memory_limit_bytes,
    out_of_memory_explained,
    pick_device,
    seeded,
    uninterrupted,
)
from regtool.training.dataset import Align, Dataset
from regtool.training.distributed import DistributedContext, process_group
from regtool.training.feeds import VALIDATING, Feed, HeldOut, SyntheticFeed, fingerprint_of
from regtool.training.run import TrainingRun, Watch
from regtool.training.run_folder import MODEL, STATE, RunFolder
from regtool.training.synthesis import synthetic
from regtool.training.trainer import Trainer, evenly_spaced

log = logging.getLogger("regtool")

SUPERVISED = {"supervision": {"dice": 1.0, "displacement": 0.1}}  # of synthetic pairs, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line says. data, validation: PAIRS.csv, IMAGES.csv or a folder; synthetic: instead of data.

    output: the run folder; overrides: `{"section": {"key": value}}`.
    """

    data: Path | None
    output: Path
    parameter_file: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    validation: Path | None = None
    atlas: Path | None = None
    atlas_labels: Path | None = None
    resume: bool = False
    overwrite: bool = False
    fix_header: bool = False
    command: str = ""
    synthetic: bool = False


def train(request: Request, watch: Watch | None = None, graceful: Graceful = uninterrupted) -> TrainingReport | None:
    """Trains, and returns the report; None in all processes but the first, where several train together.

    graceful: around the steps, tells when to stop.

    Raises UsageError and ParameterError (wrong or changed parameters, a run that is there), InputError (lists, images, resume state),
    OutOfMemory with the largest grid that fits, DivergedError, OutputError. The last checkpoint stays whole in any case.
    """
    ranks = DistributedContext(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))  # set by torchrun
    parameters = _parameters(request)
    _check_output(request)
    with gathered_warnings(once=True) as warnings, computing(parameters.run.threads):
        device = _device(parameters, ranks)
        limit = memory_limit_bytes(parameters.run.max_memory_gb)
        feed, held_out = _sources(request, parameters, limit, device)
        shape = _largest_shape([tuple(pair.fixed.shape[2:]) for part in (feed.some(), held_out.pairs()) for pair in part])
        most = limit if device.type != "cuda" else min(limit, torch.cuda.mem_get_info(device)[0])
        check_training(parameters, shape, most)
        origin = parent(parameters)
        identity = {
            "model to start from": origin and origin["sha256"],
            "pairs": feed.fingerprint,
            "validation pairs": held_out.fingerprint,
            "processes": ranks.world,
        }
        told = {**feed.told, "validation_pairs": held_out.count, "device": str(device), **({"parent": origin} if origin else {})}
        folder = RunFolder(request.output, parameters, identity, {**told, "seed": parameters.run.seed})
        with _memory_explained(parameters, shape, most), graceful() as asked, process_group(ranks, device):
            # nothing here may hold the trainer: its share in the group of processes has to be gone before the group is
            progress = TrainingRun(
                Trainer(_first_engine(request, parameters, len(shape)), parameters, feed, device, ranks), folder, request.data, request.resume, watch
            ).run(held_out.pairs, asked)
        return folder.report(progress, command=request.command, warnings=warnings) if ranks.first else None


def _first_engine(request: Request, parameters: Parameters, ndim: int) -> Engine:
    """The network that learns, its fresh weights from the seed."""
    with seeded(parameters.run.seed):
        return first_engine(_learning(parameters, request.synthetic), ndim)


def _parameters(request: Request) -> Parameters:
    """Resolved, the method's own table included; UsageError without a method."""
    if request.synthetic == (request.data is not None):
        raise UsageError("give either a list of pairs or --synthetic", tip="--synthetic makes its own pairs; `regtool train --help` shows both")
    parameters = read_parameters(request.parameter_file, request.overrides, SUPERVISED if request.synthetic else None)
    if pretrained(parameters):
        parameters = resolve(request.parameter_file, request.overrides, None).parameters
    own = engine_section(parameters, request.parameter_file, request.overrides)
    if own is None:
        raise UsageError("no method is named to train", tip="name one with -m; `regtool methods` lists them")
    if request.synthetic and not any(weight for _, weight in parameters.supervision) and parameters.synthesis.similarity == 0:
        raise ParameterError(
            "supervision.dice, supervision.displacement and synthesis.similarity are all 0: there is nothing to learn from",
            tip=f"leave them out: {SUPERVISED['supervision']} is usual",
        )
    return parameters.model_copy(update={"engine": own.model_dump()})


def _learning(parameters: Parameters, of_synthetic: bool) -> Parameters:
    """What the engine learns with. A model file keeps training_similarity.weight, for whoever goes on with real images."""
    if not of_synthetic:
        return parameters
    return parameters.model_copy(
        update={"training_similarity": parameters.training_similarity.model_copy(update={"weight": parameters.synthesis.similarity})}
    )


def _check_output(request: Request) -> None:
    """UsageError where the folder holds a run and neither --resume nor --overwrite is given; OutputError where nothing can be written."""
    if request.output.exists() and not request.output.is_dir():
        raise UsageError(f"{request.output} is a file, -o needs a folder", tip="name another output with -o")
    if request.resume and request.overwrite:
        raise UsageError("--resume and --overwrite exclude each other", tip="--resume goes on, --overwrite starts anew")
    check_folder(request.output)
    there = [name for name in (STATE, MODEL, REPORT) if (request.output / name).exists()]
    if there and not request.resume and not request.overwrite:
        raise UsageError(
            f"{request.output} holds a training already", tip="--resume goes on with it, --overwrite starts anew; -o names another place"
        )


def _device(parameters: Parameters, ranks: DistributedContext) -> torch.device:
    """One GPU a process where several train together. UsageError for bf16 elsewhere than on CUDA."""
    name = parameters.run.device
    if ranks.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if parameters.train.precision == "bf16" and device.type != "cuda":
        raise UsageError(
            f"train.precision bf16 needs a CUDA device, this is {device}", tip="gradients in bf16 are not reliable elsewhere; use float32"
        )
    return device


def _sources(request: Request, parameters: Parameters, limit_bytes: int, device: torch.device) -> tuple[Feed | SyntheticFeed, HeldOut]:
    """(to learn from, to validate with)."""
    wanted, aligner = parameters.train.validation_pairs, _aligner(parameters)
    learning = validating = None
    if request.data is not None:
        learning = read_list(request.data, request.atlas, request.atlas_labels)
    if request.validation is not None:
        validating = read_list(request.validation, request.atlas, request.atlas_labels)
    elif learning is not None:
        learning, validating = split(learning, parameters.train.validation_share, parameters.run.seed)
    if validating is None:
        made = functools.partial(synthetic, parameters.synthesis, parameters.preprocess, device=device)
        held_out = HeldOut(lambda i: made(seed=(parameters.run.seed, VALIDATING, i)), range(wanted), "synthetic")
    else:
        kept = Dataset(validating, parameters, limit_bytes // 8, aligner, fix_header=request.fix_header)
        held_out = HeldOut(kept.sample, evenly_spaced(len(validating), wanted), fingerprint_of(validating))
    if learning is None or request.data is None:
        return SyntheticFeed(parameters, device), held_out
    unsupervised = not any(weight for _, weight in parameters.supervision)
    source = Dataset(learning, parameters, limit_bytes // 4, aligner, images_only=unsupervised, fix_header=request.fix_header)
    return Feed(source, learning, parameters, request.data.name), held_out


def _largest_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the pairs. InputError where some are 2-D and some 3-D."""
    found = sorted({len(shape) for shape in shapes})
    if len(found) > 1:
        raise InputError("the pairs to learn from and those to validate with are of unequal dimension", tip="see --validation and synthesis.size")
    return max(shapes, key=math.prod)


def _aligner(parameters: Parameters) -> Align | None:
    """What `[align]` asks for, for a pair of images and their masks."""
    if parameters.align.method == "none":
        return None

    def aligned(fixed: Image, moving: Image, fixed_mask: Image | None, moving_mask: Image | None) -> Affine:
        return align(fixed, moving, parameters.align, Transform.identity(fixed.grid.ndim), fixed_mask, moving_mask).affine

    return aligned


@contextlib.contextmanager
def _memory_explained(parameters: Parameters, shape: tuple[int, ...], limit_bytes: int) -> Iterator[None]:
    """Running out of memory after all, with the grid that would fit into half of what there was."""
    try:
        with out_of_memory_explained():
            yield
    except OutOfMemory as error:
        raise too_large(parameters, shape, limit_bytes / 2, "does not fit into memory") from error
