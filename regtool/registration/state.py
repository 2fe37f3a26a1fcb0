"""Where a registration stands: the transform so far, what it scores, and the stages that led to it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from regtool.geometry.transforms import Transform
from regtool.registration.acceptance import Stage, rejection_reason
from regtool.registration.pair import PreparedPair


@dataclass(frozen=True, kw_only=True)
class RegistrationState:
    """transform: fixed to moving; score: its similarity, higher is better; stages: what was tried, kept or not."""

    transform: Transform
    score: float
    stages: tuple[Stage, ...] = ()

    @property
    def deformed(self) -> bool:
        """Whether a stage that deforms was kept."""
        return any(stage.kept and stage.name != "align" for stage in self.stages)

    def noting(self, name: str, started: float, *, kept: bool = False, reason: str = "") -> RegistrationState:
        """With one more stage, begun at `started` of `time.perf_counter`."""
        stage = Stage(name=name, kept=kept, seconds=time.perf_counter() - started, similarity=self.score, reason=reason)
        return replace(self, stages=(*self.stages, stage))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A transform that a stage offers. note: what the stage did; least_gain: part of the similarity that it must gain; forced: taken in any case."""

    stage: str
    transform: Transform
    started: float
    note: str = ""
    folding_percent: float = 0.0
    least_gain: float = 0.0
    forced: bool = False


def accept_if_improved(pair: PreparedPair, state: RegistrationState, candidate: Candidate) -> RegistrationState:
    """Where the registration stands once the candidate is taken or rejected; the last stage says which."""
    score, note = pair.score(candidate.transform), candidate.note
    guard = pair.setup.parameters.guard
    why = "" if candidate.forced else rejection_reason(state.score, score, candidate.folding_percent, guard, candidate.least_gain)
    if why:
        return state.noting(candidate.stage, candidate.started, reason=": ".join(x for x in (note, why) if x))
    taken = replace(state, transform=candidate.transform, score=score)
    return taken.noting(candidate.stage, candidate.started, kept=True, reason=note)
