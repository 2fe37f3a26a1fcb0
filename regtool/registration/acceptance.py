"""Each stage of a registration is kept only where it helps: the result is never worse than the start."""

from __future__ import annotations

from dataclasses import dataclass

MATCH_ALREADY = "the images match already"
SIMILARITY_TOLERANCE = 1e-6  # of the similarity: rounding is no loss
MIN_GAIN = 1e-3  # part of the similarity that deforming must gain: on images that match already it would follow nothing but noise
MIN_GAIN_BY_METRIC = {"mi": 0.04}  # refining T1 and T2 that match gains 0.01 and moves them by 0.65 mm; 0.7 mm apart it gains 0.04 and leaves as much
MIN_INFORMATION = (
    0.25  # nats that aligned images of two modalities share: T1 and T2 20 mm apart 0.38; MR and ultrasound, 0.07 to 0.20, lose by deforming
)


@dataclass(frozen=True)
class Stage:
    """What became of one stage. similarity: after it (higher is better); reason: why it was rolled back, or what it chose."""

    name: str
    kept: bool
    seconds: float
    similarity: float
    reason: str = ""


def rejection_reason(before: float, after: float, folding_percent: float, max_folding_percent: float, least: float = 0.0) -> str:
    """Why a stage must be rolled back, or "" where it may stay. NaN counts as worse. least: what it must gain, as a part of `before`."""
    if not after >= before - SIMILARITY_TOLERANCE:
        return f"similarity would fall from {before:.6g} to {after:.6g}"
    if after - before < least * abs(before):
        return f"similarity would hardly rise, from {before:.6g} to {after:.6g}: {MATCH_ALREADY}"
    if folding_percent > max_folding_percent:
        return f"{folding_percent:.3g} % of the voxels would fold, {max_folding_percent:g} % are allowed"
    return ""


def insufficient_information(information: float) -> str:
    """Why images that share so little mutual information, nats, are not to be deformed, or "" where they may be: any field would raise it."""
    return (
        f"the images share {information:.2g} nats of information, from {MIN_INFORMATION:g} on they are deformed"
        if information < MIN_INFORMATION
        else ""
    )
