"""The course of a training as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, float | None]

TITLES = {
    "similarity": "similarity",
    "dice": "soft Dice",
    "tre_voxels": "landmark error, voxels",
    "epe_voxels": "displacement error, voxels",
    "folding_percent": "folding, % of the voxels",
}


def curves_png(history: Sequence[Row], title: str) -> bytes:
    """A panel with every term of the loss and one for each validated number, against steps. history: rows as in history.csv, `step` in each."""
    terms = [name for name in _columns(history) if name.startswith("loss.")]
    validated = [name for name in TITLES if any(row.get(f"validation.{name}") is not None for row in history)]
    panels = 1 + len(validated)
    figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for name in terms:
        axes[0].plot(*_line(history, name), label=name.removeprefix("loss."), linewidth=1)
    axes[0].set_title("terms of the loss, weighted")
    axes[0].legend(fontsize=8)
    for axis, name in zip(axes[1:], validated, strict=True):
        axis.plot(*_line(history, f"validation.{name}"), marker="o", markersize=3, color="black", linewidth=1)
        axis.set_title(f"validation: {TITLES[name]}")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _columns(history: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in history for name in row))


def _line(history: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], value) for row in history if (value := row.get(name)) is not None]
    return [float(step) for step, _ in points if step is not None], [float(value) for _, value in points]
