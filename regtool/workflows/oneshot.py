"""Learning a method on the very pair it shall register: one-shot learning from scratch (Ferrante et al. 2018)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from regtool.data.batch import Batch
from regtool.engines._engine import Engine
from regtool.errors import DivergedError
from regtool.parameters import Oneshot

Progress = Callable[[str, int, int, float], None]  # what, step, steps, loss


@dataclass(frozen=True)
class Learned:
    """engine: with the weights of the best iterate; losses: one a step."""

    engine: Engine
    losses: tuple[float, ...]


def learn(engine: Engine, batch: Batch, parameters: Oneshot, progress: Progress | None = None) -> Learned:
    """Adam on `engine.losses` over the one pair, on a deep copy; the best iterate is kept, not the last.

    Ends after `iterations`, or `patience` steps without improvement. Raises DivergedError where the loss is NaN from the start.
    """
    engine = copy.deepcopy(engine).train()
    optimisers = {phase: torch.optim.Adam(engine.trainable(phase), lr=parameters.learning_rate) for phase in engine.phases}
    best, best_state, since, losses = math.inf, engine.state_dict(), 0, []
    for step in range(parameters.iterations):
        total = 0.0
        for phase in engine.phases:
            optimisers[phase].zero_grad(set_to_none=True)
            loss = torch.stack(list(engine.losses(batch, phase).values())).sum()
            if phase == engine.phases[-1]:
                total = float(loss.detach())
                if total < best - 1e-6:  # these are the weights the loss was measured with
                    best, since = total, 0
                    best_state = {k: v.detach().clone() for k, v in engine.state_dict().items()}
                else:
                    since += 1
            if not math.isfinite(total):
                break
            loss.backward()
            optimisers[phase].step()
        losses.append(total)
        if progress is not None:
            progress("learning on this pair", step + 1, parameters.iterations, total)
        if since >= parameters.patience or not math.isfinite(total):
            break
    if losses and not math.isfinite(best):
        raise DivergedError(f"the loss is {losses[0]} from the first step", tip="check the images' intensities, or lower oneshot.learning_rate")
    engine.load_state_dict(best_state)
    return Learned(engine.eval(), tuple(losses))
