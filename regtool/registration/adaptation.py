"""Learning on the very pair that shall be registered: from scratch, or to adapt a trained model to it (Ferrante et al. 2018)."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from regtool.config.registration import Metric, Oneshot
from regtool.errors import DivergedError
from regtool.geometry.sampling import warp_voxels
from regtool.methods.base import Engine, total
from regtool.networks.blocks import BatchNorm
from regtool.preprocessing.batch import Batch
from regtool.similarity import SIMILARITIES

log = logging.getLogger("regtool")

SIMILARITY_REPORTS = 50  # at the similarity, for whoever watches


class ProgressCallback(Protocol):
    """Is told where something long stands."""

    def __call__(self, what: str, step: int, steps: int, loss: float, similarity: float | None = None, /) -> None:
        """similarity: where it is known; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """engine: ready to predict, with the weights of the best iterate; losses: before every step, and after the last.

    steps: that led to the kept weights, 0 where the start was never beaten; loss, similarity: of the start and of what is kept, on the network's
    grid; measure: name of the similarity; rate: of Adam; diverged: the loss left the finite numbers.
    """

    engine: Engine
    losses: tuple[float, ...]
    steps: int
    loss: tuple[float, float]
    metric: str
    similarity: tuple[float, float]
    rate: float
    diverged: bool


def learn(engine: Engine, batch: Batch, parameters: Oneshot, metric: Metric, *, trained: bool, progress: ProgressCallback | None = None) -> Learned:
    """Adam on `engine.losses` over the one pair, on a deep copy; of the start and all iterates the one with the lowest loss is kept.

    Ends after `iterations`, or `patience` steps without improvement. The copy learns as it will predict: without dropout, and with batch
    normalisation by the statistics of this pair, which what is kept remembers. Where the loss leaves the finite numbers, the best so far is kept and
    a warning says so; DivergedError where it is not finite at the start, ParameterError where it has no term. trained: the engine is adapted, rather
    than learned from scratch.
    """
    original, engine = engine, copy.deepcopy(engine).eval()
    last, what = engine.phases[-1], "adapting to this pair" if trained else "learning on this pair"
    rate = parameters.learning_rate or (parameters.adapting_learning_rate if trained else parameters.scratch_learning_rate)
    with torch.no_grad():
        start = float(_loss(engine, batch, last))
    if not math.isfinite(start):
        raise DivergedError(f"the loss is {start} before the first step", tip="look at the images; `regtool models verify` checks a model")
    before = alike = _similarity(engine, batch, metric)
    best, best_at, best_state, losses = start, 0, None, list[float]()
    _to_learn(engine)
    optimisers = {phase: torch.optim.Adam(engine.trainable(phase), lr=rate) for phase in engine.phases}
    for step in range(parameters.iterations + 1 if parameters.iterations else 0):
        final = step == parameters.iterations
        for phase in () if final else engine.phases[:-1]:
            _update(optimisers[phase], _loss(engine, batch, phase))
        loss = _loss(engine, batch, last)
        losses.append(float(loss.detach()))
        if losses[-1] < best - parameters.min_gain:  # these are the weights the loss was measured with
            best, best_at = losses[-1], step
            best_state = {k: v.detach().clone() for k, v in engine.state_dict().items()}
        if final or step - best_at >= parameters.patience or not math.isfinite(losses[-1]):
            break
        if progress is not None:
            if step % max(1, parameters.iterations // SIMILARITY_REPORTS) == 0:
                alike = _similarity(engine, batch, metric)
            progress(what, step + 1, parameters.iterations, losses[-1], alike)
        _update(optimisers[last], loss)
    diverged = bool(losses) and not math.isfinite(losses[-1])
    engine.load_state_dict(original.state_dict() if best_state is None else best_state)
    if best_state is not None:
        _remember(engine, batch)
    _say(diverged, len(losses) - 1, best_at, best_state is None)
    after = before if best_state is None else _similarity(engine.eval(), batch, metric)
    return Learned(
        engine=engine.eval(),
        losses=tuple(losses),
        steps=best_at,
        loss=(start, best),
        metric=metric.name,
        similarity=(before, after),
        rate=rate,
        diverged=diverged,
    )


def _say(diverged: bool, steps: int, best_at: int, start_kept: bool) -> None:
    """What did not go as hoped for."""
    kept = "the weights are those from before" if start_kept else f"those after {best_at} steps are kept"
    if diverged:
        log.warning("learning on this pair diverged after %d steps: %s; try a lower oneshot.learning_rate", steps, kept)
    elif start_kept and steps > 0:
        log.warning("none of %d steps on this pair made the weights better: those from before are kept; try a lower oneshot.learning_rate", steps)


def _loss(engine: Engine, batch: Batch, phase: str) -> torch.Tensor:
    return total(engine.losses(batch, phase))


def _update(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def _similarity(engine: Engine, batch: Batch, metric: Metric) -> float:
    """Of the fixed and the warped moving image on this grid; higher is better."""
    with torch.no_grad():
        warped = warp_voxels(batch.moving, engine.displacement(batch.fixed, batch.moving))
        return float(SIMILARITIES[metric.name](batch.fixed, warped, metric, batch.fixed_mask))


def _to_learn(engine: Engine) -> None:
    """What is random while learning on many pairs would only hide which iterate is best."""
    engine.train()
    for module in engine.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def _remember(engine: Engine, batch: Batch) -> None:
    """Batch normalisation predicts with the statistics it learned with, those of this pair, instead of a running mean that lags behind."""

    def note(layer: nn.Module, taken: tuple[torch.Tensor]) -> None:
        assert isinstance(layer, BatchNorm)
        (x,) = taken
        if x.numel() > x.shape[1]:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            layer.mean.copy_(x.mean(axes))
            layer.variance.copy_(x.var(axes, correction=0))

    handles = [module.register_forward_pre_hook(note) for module in engine.modules() if isinstance(module, BatchNorm)]
    if handles:
        with torch.no_grad():
            engine.eval().displacement(batch.fixed, batch.moving)
    for handle in handles:
        handle.remove()
