"""`regtool train`: a method learns from a list of pairs, or from synthetic ones."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regtool.config.schema import Parameters
from regtool.errors import InputError, OutOfMemory, ParameterError, UsageError
from regtool.geometry.images import Image
from regtool.geometry.transforms import Affine, Transform
from regtool.io.events import Events
from regtool.io.files import check_folder
from regtool.io.pairs import Pairs, read_list, split
from regtool.methods import engine_section, read_parameters
from regtool.methods.base import Engine
from regtool.methods.pretrained import first_engine, parent, pretrained
from regtool.methods.resolve import resolve
from regtool.preprocessing.batch import Batch
from regtool.registration.initialization import align
from regtool.registration.memory import check_training, too_large
from regtool.report.schema import REPORT, TrainingReport
from regtool.runtime import (
    Graceful,
    StopRequest,
    computing,
    gathered_warnings,
    memory_limit_bytes,
    out_of_memory_explained,
    peak_memory_mb,
    pick_device,
    seeded,
    uninterrupted,
)
from regtool.training.augmentation import augmented
from regtool.training.dataset import Align, Dataset, Order
from regtool.training.distributed import DistributedContext, process_group
from regtool.training.run_folder import MODEL, PAIRS, STATE, RunFolder, TrainingState, numbers
from regtool.training.synthesis import synthetic
from regtool.training.trainer import Trainer, evenly_spaced

log = logging.getLogger("regtool")

PLANNED_ON = 4  # training pairs whose size is looked at before the first step
DRAWN = 16  # synthetic pairs in pairs.png
LEARNING, VALIDATING = 0, 1  # streams of synthetic pairs that have none in common
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


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """What a watcher is told. terms: weighted, means since the last row of the history; is_new: a validation was just made."""

    progress: TrainingState
    steps: int
    terms: dict[str, float]
    pairs_per_second: float
    seconds_left: float
    memory_mb: float
    is_new: bool


Watch = Callable[[ProgressEvent], None]


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
            progress = _TrainingRun(
                request,
                parameters,
                Trainer(_first_engine(request, parameters, len(shape)), parameters, feed, device, ranks),
                folder,
                watch,
            ).run(held_out.pairs, asked)
        return folder.report(progress, command=request.command, warnings=warnings) if ranks.first else None


def _first_engine(request: Request, parameters: Parameters, ndim: int) -> Engine:
    """The network that learns, its fresh weights from the seed."""
    with seeded(parameters.run.seed):
        return first_engine(_learning(parameters, request.synthetic), ndim)


class _Feed:
    """Pairs in a shuffled order, augmented; each draw has random numbers of its own."""

    def __init__(self, source: Dataset, pairs: Pairs, parameters: Parameters, name: str) -> None:
        self.source, self.pairs, self.augment, self.seed = source, pairs, parameters.augment, parameters.run.seed
        self.order = Order(len(pairs), self.seed)
        self.fingerprint, self.told = _fingerprint(pairs), {"data": name, "pairs": len(pairs)}

    def some(self) -> Iterator[Batch]:
        """A few, to see how large they are."""
        return (self.source.sample(i) for i in evenly_spaced(len(self.pairs), PLANNED_ON))

    def pair(self, draw: int) -> Batch:
        generator = torch.Generator().manual_seed(hash((self.seed, draw)) % 2**63)
        return augmented(self.source.sample(self.order.index(draw)), self.augment, generator)[0]

    def name(self, draw: int) -> str:
        return self.pairs[self.order.index(draw)].id


class _SyntheticFeed:
    """Pairs made when they are asked for, no two alike."""

    fingerprint = "synthetic"

    def __init__(self, parameters: Parameters, device: torch.device) -> None:
        self.parameters, self.device = parameters, device
        self.told = {"data": "synthetic images, none of a patient"}

    def some(self) -> Iterator[Batch]:
        """One tells how large they all are."""
        yield self.pair(0)

    def pair(self, draw: int) -> Batch:
        return synthetic(self.parameters.synthesis, self.parameters.preprocess, (self.parameters.run.seed, LEARNING, draw), self.device)

    def name(self, draw: int) -> str:
        return f"synthetic pair {draw}"


class _HeldOut:
    """The pairs to validate with, the same ones every time."""

    def __init__(self, pair: Callable[[int], Batch], chosen: Sequence[int], fingerprint: str) -> None:
        self._pair, self._chosen, self.count, self.fingerprint = pair, chosen, len(chosen), fingerprint

    def pairs(self) -> Iterator[Batch]:
        """One after the other."""
        return (self._pair(i) for i in self._chosen)


class _TrainingRun:
    """The steps of one training, and when what is written."""

    def __init__(self, request: Request, parameters: Parameters, trainer: Trainer, folder: RunFolder, watch: Watch | None) -> None:
        self.request, self.parameters, self.section = request, parameters, parameters.train
        self.trainer, self.folder, self.watch = trainer, folder, watch if trainer.ranks.first else None
        self.progress = TrainingState()

    def run(self, held_out: Callable[[], Iterable[Batch]], asked: StopRequest) -> TrainingState:
        """Up to `steps`, `max_minutes` or a signal; a checkpoint at the end in any case but an error."""
        first, section = self.trainer.ranks.first, self.section
        self._begin(held_out)
        progress = self.progress
        spent, began, since = progress.seconds, time.perf_counter(), progress.step
        sums: dict[str, float] = {}
        ticked = (since, began)
        with Events(self.folder.folder if section.tensorboard and first else None) as events:
            while progress.step < section.steps:
                for name, value in self.trainer.update(progress.step).items():
                    sums[name] = sums.get(name, 0.0) + value
                progress.step += 1
                now = time.perf_counter()
                progress.seconds = spent + now - began
                late = section.max_minutes is not None and now - began >= 60 * section.max_minutes
                stop, save = self._agreed(asked, late or self._past_its_best())
                last = stop or progress.step == section.steps
                validated = first and ((last and asked.stop is None) or progress.step % section.validate_every == 0) and self._validate(held_out)
                if first and (last or validated or progress.step % section.log_every == 0):
                    steps = progress.step - ticked[0]
                    speed = steps * section.batch_size * section.accumulate * self.trainer.ranks.world / max(now - ticked[1], 1e-9)
                    self._note(
                        {name: value / steps for name, value in sums.items()}, speed, (now - began) / (progress.step - since), validated, events
                    )
                    sums, ticked = {}, (progress.step, time.perf_counter())
                if first and (last or save or progress.step % section.checkpoint_every == 0):
                    self._save(last)
                if stop:
                    break
        return progress

    def _past_its_best(self) -> bool:
        """Whether the held-out pairs have got no better for `train.patience` validations."""
        patience, progress = self.section.patience, self.progress
        return (
            patience is not None and progress.best is not None and progress.validated_at - progress.best_at >= patience * self.section.validate_every
        )

    def _begin(self, held_out: Callable[[], Iterable[Batch]]) -> None:
        """From the state in the folder, or from the start with a look at how the pairs are now."""
        if self.request.resume and (self.request.output / STATE).exists():
            self.progress = self.folder.resume(self.trainer)
            return
        if self.request.resume:
            log.warning("%s holds no state yet: the training starts from the beginning", self.request.output)
        self.trainer.check()
        if self.trainer.ranks.first:
            for name in (REPORT, STATE, MODEL, PAIRS):
                (self.request.output / name).unlink(missing_ok=True)
            self.folder.open(self.request.data)
            if self.request.synthetic:
                self.folder.draw_pairs([self.trainer.feed.pair(draw) for draw in range(DRAWN)])
            self._validate(held_out)
            self.progress.before = self.progress.latest

    def _validate(self, held_out: Callable[[], Iterable[Batch]]) -> bool:
        """Looks at the held-out pairs, keeps the weights if they are the best so far; False where there are none."""
        progress = self.progress
        pairs = held_out()
        found = self.trainer.validate(pairs)
        if found is None:
            return False
        progress.latest, progress.validated_at = found, progress.step
        if (progress.step > 0 or pretrained(self.parameters)) and (progress.best is None or found.score > progress.best.score):
            progress.best, progress.best_at = found, progress.step
            self.folder.save_model(self.trainer, progress)
        return True

    def _note(self, terms: dict[str, float], speed: float, seconds_a_step: float, is_new: bool, events: Events) -> None:
        """A row of the history, and a word to who watches."""
        progress, section = self.progress, self.section
        row: dict[str, float | None] = {
            "step": progress.step,
            "seconds": round(progress.seconds, 2),
            "learning_rate": self.trainer.rate(progress.step - 1),
        }
        row |= {"pairs_per_second": round(speed, 4), "memory_mb": peak_memory_mb()}
        row |= {f"loss.{name}": value for name, value in terms.items()}
        if is_new and progress.latest is not None:
            row |= {f"validation.{name}": value for name, value in numbers(progress.latest).items()}
        progress.history.append(row)
        events.add(progress.step, row)
        if (warning := self.trainer.engine.warning()) is not None:
            log.warning("%s", warning)
        if self.watch is not None:
            left = (section.steps - progress.step) * seconds_a_step
            if section.max_minutes is not None:
                left = min(left, max(0.0, 60 * section.max_minutes - progress.seconds))
            self.watch(
                ProgressEvent(
                    progress=progress,
                    steps=section.steps,
                    terms=terms,
                    pairs_per_second=speed,
                    seconds_left=left,
                    memory_mb=peak_memory_mb(),
                    is_new=is_new,
                )
            )

    def _save(self, last: bool) -> None:
        """A checkpoint; without held-out pairs the latest weights are the best ones."""
        if self.progress.best is None:
            self.progress.best_at = self.progress.step
            self.folder.save_model(self.trainer, self.progress)
        self.folder.save(self.trainer, self.progress)
        if last:
            self.folder.draw_curves(self.progress)
            log.info("checkpoint after step %d in %s; --resume goes on from it", self.progress.step, self.folder.folder)

    def _agreed(self, asked: StopRequest, late: bool) -> tuple[bool, bool]:
        """(stop, save), the same in every process: one that stopped alone would leave the others waiting for it."""
        wanted = torch.tensor([float(asked.stop is not None or late), float(asked.save)])
        asked.save = False
        if self.trainer.ranks.world > 1:
            wanted = wanted.to(self.trainer.device)
            torch.distributed.all_reduce(wanted)
        return bool(wanted[0] > 0), bool(wanted[1] > 0)


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


def _sources(request: Request, parameters: Parameters, limit_bytes: int, device: torch.device) -> tuple[_Feed | _SyntheticFeed, _HeldOut]:
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
        held_out = _HeldOut(lambda i: made(seed=(parameters.run.seed, VALIDATING, i)), range(wanted), "synthetic")
    else:
        kept = Dataset(validating, parameters, limit_bytes // 8, aligner, fix_header=request.fix_header)
        held_out = _HeldOut(kept.sample, evenly_spaced(len(validating), wanted), _fingerprint(validating))
    if learning is None or request.data is None:
        return _SyntheticFeed(parameters, device), held_out
    unsupervised = not any(weight for _, weight in parameters.supervision)
    source = Dataset(learning, parameters, limit_bytes // 4, aligner, images_only=unsupervised, fix_header=request.fix_header)
    return _Feed(source, learning, parameters, request.data.name), held_out


def _largest_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the pairs. InputError where some are 2-D and some 3-D."""
    found = sorted({len(shape) for shape in shapes})
    if len(found) > 1:
        raise InputError("the pairs to learn from and those to validate with are of unequal dimension", tip="see --validation and synthesis.size")
    return max(shapes, key=math.prod)


def _fingerprint(pairs: Pairs) -> str:
    """Tells lists apart: their length, and a digest of a thousand of their ids."""
    digest = hashlib.sha256("\n".join(pairs[i].id for i in evenly_spaced(len(pairs), 1000)).encode()).hexdigest()
    return f"{len(pairs)} ({digest[:12]})"


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
