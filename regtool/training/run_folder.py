"""The folder of a training: the best model, the state to go on from, the history and its curves, the parameters, and the report at the end."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regtool.config.resolve import MODEL_SECTIONS, dump
from regtool.config.schema import Parameters
from regtool.config.toml import new_name
from regtool.errors import InputError, ParameterError
from regtool.io.checkpoints import read_checkpoint, write_checkpoint
from regtool.io.files import atomic, require_file, sha256, write_text
from regtool.methods import engine_section
from regtool.methods.model_file import save_model
from regtool.preprocessing.batch import Batch
from regtool.report.curves import Row, curves_png
from regtool.report.files import write_report
from regtool.report.pairs import pairs_png
from regtool.report.schema import REPORT, ModelFacts, TrainingOutputs, TrainingReport, ValidationScores
from regtool.runtime import peak_memory_mb, versions
from regtool.training.trainer import Trainer, Validation

log = logging.getLogger("regtool")

MODEL, STATE, HISTORY, CURVES, PARAMETERS, PAIRS = (
    "model.safetensors", "state.safetensors", "history.csv", "curves.png", "parameters.toml", "pairs.png",
)  # fmt: skip
FREE = (
    "max_minutes",
    "patience",
    "validation_pairs",
    "validate_every",
    "checkpoint_every",
    "log_every",
    "tensorboard",
)  # of [train]: may change on resuming


@dataclass(kw_only=True)
class TrainingState:
    """Where a training stands. step: updates done; before: validation of the untrained network; best_at: the step of the model that is kept."""

    step: int = 0
    seconds: float = 0.0
    before: Validation | None = None
    latest: Validation | None = None
    validated_at: int = 0
    best: Validation | None = None
    best_at: int = 0
    history: list[Row] = field(default_factory=list)


class RunFolder:
    """Everything a training writes. identity: what must be the same for a training to go on (lists, processes)."""

    def __init__(self, folder: Path, parameters: Parameters, identity: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        self.folder, self.parameters, self.identity, self.training = folder, parameters, dict(identity), dict(training)

    def open(self, source: Path | None) -> None:
        """Writes the resolved parameters. source: the list of pairs, None for synthetic ones."""
        opening = f"Repeats this training:\nregtool train {source or '--synthetic'} -p {PARAMETERS} -o AGAIN"
        write_text(self.folder / PARAMETERS, dump(self.parameters, opening, engine_section(self.parameters)))

    def save_model(self, trainer: Trainer, progress: TrainingState) -> None:
        """The weights that are kept, as a model that every verb takes."""
        with trainer.kept_weights() as engine:
            record = {**self.training, "steps": progress.step, "minutes": round(progress.seconds / 60, 2)}
            if progress.best is not None:
                record["validation"] = numbers(progress.best)
            save_model(self.folder / MODEL, engine, self.parameters, name=self.folder.resolve().name, training=record)

    def save(self, trainer: Trainer, progress: TrainingState) -> None:
        """A checkpoint: the history first, the state last, each whole or as it was before."""
        self._write_history(progress.history)
        record = {
            "step": progress.step,
            "seconds": progress.seconds,
            "best_at": progress.best_at,
            "validated_at": progress.validated_at,
            **{
                name: None if v is None else asdict(v)
                for name, v in (("before", progress.before), ("latest", progress.latest), ("best", progress.best))
            },
            "identity": self.identity,
            "parameters": deciding(self.parameters),
        }
        write_checkpoint(self.folder / STATE, trainer.state(), record)

    def draw_curves(self, progress: TrainingState) -> None:
        """The picture of the history."""
        with atomic(self.folder / CURVES) as temporary:
            temporary.write_bytes(curves_png(progress.history, f"{self.parameters.method}, {progress.step} steps"))

    def draw_pairs(self, pairs: Sequence[Batch]) -> None:
        """The picture of some synthetic pairs."""
        with atomic(self.folder / PAIRS) as temporary:
            temporary.write_bytes(pairs_png(pairs, f"the first {len(pairs)} pairs"))

    def resume(self, trainer: Trainer) -> TrainingState:
        """Restores the trainer. InputError for an unreadable state or other lists, ParameterError naming the parameters that have changed."""
        path = self.folder / STATE
        tensors, record = read_checkpoint(path)
        now, then = deciding(self.parameters), {new_name(key): value for key, value in record.get("parameters", {}).items()}
        then = deciding(Parameters()) | then  # a parameter that is younger than the state had today's default
        changed = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
        if changed:
            raise ParameterError(
                f"the training in {self.folder} had other parameters: {'; '.join(changed)}",
                tip=f"give the same ones (they are in {self.folder / PARAMETERS}), or train anew in another folder",
            )
        for name, value in self.identity.items():
            if record.get("identity", {}).get(name) != value:
                raise InputError(
                    f"the training in {self.folder} had other {name}: {record.get('identity', {}).get(name)}, now {value}",
                    tip="resume with the same list and as many processes, or train anew in another folder",
                )
        try:
            trainer.restore(tensors)
            best, latest, before = (None if record[k] is None else Validation(**record[k]) for k in ("best", "latest", "before"))
            progress = TrainingState(
                step=record["step"],
                seconds=record["seconds"],
                before=before,
                latest=latest,
                validated_at=record["validated_at"],
                best=best,
                best_at=record["best_at"],
            )
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"{path} is no state of this training: {str(error).splitlines()[0]}", tip="train anew with --overwrite") from error
        progress.history = [row for row in self._read_history() if (row["step"] or 0) <= progress.step]
        log.info("going on after step %d", progress.step)
        return progress

    def report(self, progress: TrainingState, *, command: str, warnings: Sequence[str]) -> TrainingReport:
        """Written as report.json, last."""
        drawn = PAIRS if (self.folder / PAIRS).exists() else None
        found = TrainingReport(
            status="ok",
            method=str(self.parameters.method),
            folder=str(self.folder.resolve()),
            outputs=TrainingOutputs(model=MODEL, state=STATE, history=HISTORY, curves=CURVES, parameters=PARAMETERS, pairs=drawn),
            model=ModelFacts(name=self.folder.resolve().name, sha256=sha256(self.folder / MODEL)),
            steps=progress.step,
            best_step=progress.best_at,
            **self.training,
            minutes=round(progress.seconds / 60, 2),
            before=_scores(progress.before),
            after=_scores(progress.best),
            peak_memory_mb=peak_memory_mb(),
            versions=versions(),
            command=command,
            warnings=tuple(warnings),
        )
        write_report(found, self.folder / REPORT)
        return found

    def _write_history(self, history: list[Row]) -> None:
        columns = list(dict.fromkeys(name for row in history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.folder / HISTORY, text.getvalue())

    def _read_history(self) -> list[Row]:
        path = self.folder / HISTORY
        require_file(path, "history of the training")
        try:
            with path.open(encoding="utf-8", newline="") as file:
                return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]
        except (ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is damaged: {error}", tip="train anew with --overwrite") from error


def numbers(validation: Validation) -> dict[str, float]:
    """What is known, by name."""
    return {name: round(value, 6) for name, value in asdict(validation).items() if value is not None}


def _scores(validation: Validation | None) -> ValidationScores | None:
    return None if validation is None else ValidationScores(**numbers(validation))


def deciding(parameters: Parameters) -> dict[str, Any]:
    """The parameters that decide which weights a training arrives at, by dotted name."""
    tables = parameters.model_dump(mode="json", include={*MODEL_SECTIONS, "align", "augment", "synthesis", "train"})
    free = (*FREE, "steps") if parameters.train.schedule == "constant" else FREE
    found = {"run.seed": parameters.run.seed, "method": tables.pop("method")}
    for section, table in tables.items():
        found |= {f"{section}.{key}": value for key, value in table.items() if section != "train" or key not in free}
    return found
