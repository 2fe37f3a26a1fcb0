"""TensorBoard event files of a training, for those who watch it so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from regtool.errors import UsageError


class Events:
    """`with Events(folder) as events: events.add(step, row)`; with None for the folder it does nothing. UsageError without the package."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UsageError("train.tensorboard needs the package tensorboard", tip="pip install 'regtool[tensorboard]'") from error
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, step: int, row: Mapping[str, float | None]) -> None:
        """Every number of a row of the history."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name.replace(".", "/", 1), value, step)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
