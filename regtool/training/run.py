"""The steps of a training: when it validates, writes and ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from regtool.io.events import Events
from regtool.methods.pretrained import pretrained
from regtool.preprocessing.batch import Batch
from regtool.report.schema import REPORT
from regtool.runtime import StopRequest, peak_memory_mb
from regtool.training.run_folder import MODEL, PAIRS, STATE, RunFolder, TrainingState, numbers
from regtool.training.trainer import Trainer

log = logging.getLogger("regtool")

DRAWN = 16  # synthetic pairs in pairs.png


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


class TrainingRun:
    """The steps of one training, and when what is written."""

    def __init__(self, trainer: Trainer, folder: RunFolder, source: Path | None, resume: bool, watch: Watch | None) -> None:
        self.source, self.resume, self.parameters, self.section = source, resume, folder.parameters, folder.parameters.train
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
        if self.resume and (self.folder.folder / STATE).exists():
            self.progress = self.folder.resume(self.trainer)
            return
        if self.resume:
            log.warning("%s holds no state yet: the training starts from the beginning", self.folder.folder)
        self.trainer.check()
        if self.trainer.ranks.first:
            for name in (REPORT, STATE, MODEL, PAIRS):
                (self.folder.folder / name).unlink(missing_ok=True)
            self.folder.open(self.source)
            if self.source is None:
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
