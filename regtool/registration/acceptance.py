"""Each stage of a registration is kept only where it helps: the result is never worse than the start. The numbers are those of `[guard]`."""

from __future__ import annotations

from dataclasses import dataclass

from regtool.config.registration import Guard

MATCH_ALREADY = "the images match already"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What became of one stage. similarity: after it (higher is better); reason: why it was rolled back, or what it chose."""

    name: str
    kept: bool
    seconds: float
    similarity: float
    reason: str = ""


def rejection_reason(before: float, after: float, folding_percent: float, guard: Guard, least: float = 0.0) -> str:
    """Why a stage must be rolled back, or "" where it may stay. NaN counts as worse. least: what it must gain, as a part of `before`."""
    if not after >= before - guard.tolerance:
        return f"similarity would fall from {before:.6g} to {after:.6g}"
    if after - before < least * abs(before):
        return f"similarity would hardly rise, from {before:.6g} to {after:.6g}: {MATCH_ALREADY}"
    if folding_percent > guard.max_folding_percent:
        return f"{folding_percent:.3g} % of the voxels would fold, {guard.max_folding_percent:g} % are allowed"
    return ""


def least_gain(metric: str, guard: Guard) -> float:
    """The part of the similarity that the first deformation of a pair must gain."""
    return guard.min_gain_mi if metric == "mi" else guard.min_gain


def insufficient_information(information: float, guard: Guard) -> str:
    """Why images that share so little mutual information, nats, are not to be deformed, or "" where they may be: any field would raise it."""
    least = guard.min_information
    return f"the images share {information:.2g} nats of information, from {least:g} on they are deformed" if information < least else ""
