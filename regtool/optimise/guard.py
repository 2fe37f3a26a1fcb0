"""Each stage of a registration is kept only where it helps: the result is never worse than the start."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 1e-6  # of the similarity: rounding is no loss


@dataclass(frozen=True)
class Stage:
    """What became of one stage. similarity: after it (higher is better); reason: why it was rolled back, or what it chose."""

    name: str
    kept: bool
    seconds: float
    similarity: float
    reason: str = ""


def objection(before: float, after: float, folding_percent: float, max_folding_percent: float) -> str:
    """Why a stage must be rolled back, or "" where it may stay. NaN counts as worse."""
    if not after >= before - TOLERANCE:
        return f"similarity would fall from {before:.6g} to {after:.6g}"
    if folding_percent > max_folding_percent:
        return f"{folding_percent:.3g} % of the voxels would fold, {max_folding_percent:g} % are allowed"
    return ""
