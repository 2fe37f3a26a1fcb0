"""The training loop of any engine: phases, accumulation, schedule, running means, several processes, validation. No files.

Everything random is a function of the seed and of a number that counts the pairs drawn, so a resumed training needs no state of a generator.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from regtool.config.registration import SimilarityMetric
from regtool.config.schema import Parameters
from regtool.errors import DivergedError
from regtool.geometry.grid import Grid
from regtool.geometry.jacobian import jacobian_determinant, jacobian_statistics
from regtool.geometry.sampling import warp_voxels
from regtool.geometry.transforms import DisplacementField
from regtool.methods.base import Engine, total
from regtool.preprocessing.batch import Batch
from regtool.runtime import seeded
from regtool.similarity import SIMILARITIES
from regtool.similarity.supervision import displacement_error, landmark_distance, soft_dice
from regtool.training.dataset import collate
from regtool.training.distributed import ALONE, DistributedContext

LOWEST_RATE = 0.01  # of the cosine schedule, as a part of the highest


class Feed(Protocol):
    """An endless stream of single pairs, augmented; the same draw is always the same pair."""

    def pair(self, draw: int) -> Batch:
        """One pair, N = 1, on any device."""

    def name(self, draw: int) -> str:
        """The id of that pair."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Means over the validation pairs, on the network's grid.

    similarity: as `[metric]` says, for auto as `[training_similarity]`; objective: the sum of the terms a network lowers, without supervision; dice:
    soft, of
    linearly warped labels; tre_voxels: of landmarks; epe_voxels: of a known displacement; these None where no pair has any.
    """

    similarity: float
    objective: float
    folding_percent: float
    dice: float | None
    tre_voxels: float | None
    epe_voxels: float | None = None

    @property
    def score(self) -> float:
        """What the best weights have the most of: Dice where there are labels, else minus the landmark error, else minus the objective."""
        if self.dice is not None:
            return self.dice
        return -self.objective if self.tre_voxels is None else -self.tre_voxels


class Trainer:
    """An engine, its optimisers (one a phase) and the running mean of its weights."""

    def __init__(self, engine: Engine, parameters: Parameters, feed: Feed, device: torch.device, ranks: DistributedContext = ALONE) -> None:
        self.engine, self.feed, self.device, self.ranks = engine.to(device), feed, device, ranks
        self.section = parameters.train
        self.metric = parameters.training_similarity if parameters.metric.name == "auto" else parameters.metric
        self.seed = parameters.run.seed
        self.phases = {phase: list(engine.trainable(phase)) for phase in engine.phases}
        section = self.section
        self.optimisers = {
            phase: torch.optim.AdamW(weights, lr=section.learning_rate, betas=section.betas, weight_decay=section.weight_decay)
            for phase, weights in self.phases.items()
        }
        self.losses: dict[str, nn.Module] = {phase: self._distributed(_Losses(engine, phase)) for phase in engine.phases}
        self.mean = {name: tensor.clone() for name, tensor in engine.state_dict().items()} if section.ema > 0 else None

    def check(self) -> None:
        """ParameterError where the loss of a phase has no term, told by the first pair."""
        with torch.no_grad():
            for phase in self.engine.phases:
                total(self.engine.eval().losses(self.feed.pair(0).to(self.device), phase))

    def update(self, step: int) -> dict[str, float]:
        """One update of every phase; step counts from 0. Returns the weighted terms, by `phase.term` where there are several phases.

        Raises DivergedError with the step, the pairs and the term where one is not finite; the weights are then those before the phase.
        """
        self.engine.train()
        found: dict[str, float] = {}
        for number, phase in enumerate(self.engine.phases):
            self._only(phase)
            self.engine.zero_grad(set_to_none=True)
            for part in range(self.section.accumulate):
                for name, value in self._backward(step, number, phase, part).items():
                    key = f"{phase}.{name}" if len(self.engine.phases) > 1 else name
                    found[key] = found.get(key, 0.0) + value / self.section.accumulate
            self._apply(step, phase)
        if self.mean is not None:
            for name, tensor in self.engine.state_dict().items():
                if tensor.is_floating_point():
                    self.mean[name].lerp_(tensor, 1 - self.section.ema)
                else:
                    self.mean[name].copy_(tensor)
        return found

    def rate(self, step: int) -> float:
        """The learning rate of an update, a function of the step alone."""
        section, rate = self.section, self.section.learning_rate
        if section.schedule == "cosine":
            rate *= LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * min(1.0, step / section.steps))) / 2
        return rate * min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else rate

    @contextlib.contextmanager
    def kept_weights(self) -> Iterator[Engine]:
        """The engine for prediction, with the running mean of the weights where there is one."""
        own = {name: tensor.clone() for name, tensor in self.engine.state_dict().items()} if self.mean is not None else None
        if self.mean is not None:
            self.engine.load_state_dict(self.mean)
        try:
            yield self.engine.eval()
        finally:
            if own is not None:
                self.engine.load_state_dict(own)

    def validate(self, pairs: Iterable[Batch]) -> Validation | None:
        """pairs: N = 1 each, on the CPU; None where there are none."""
        with self.kept_weights() as engine, torch.no_grad():
            found = [validate_pair(engine, pair.to(self.device), self.metric, self._precision()) for pair in pairs]
        return mean_of(found) if found else None

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a resumed training needs besides the number of the step."""
        tensors = {f"engine/{name}": tensor for name, tensor in self.engine.state_dict().items()}
        for phase, optimiser in self.optimisers.items():
            for index, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{phase}/{index}/{name}": tensor for name, tensor in moments.items()}
        return tensors | {f"mean/{name}": tensor for name, tensor in (self.mean or {}).items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`. Raises KeyError or RuntimeError where the tensors are those of another engine."""
        self.engine.load_state_dict(_below(tensors, "engine/"))
        for phase, optimiser in self.optimisers.items():
            moments: dict[int, dict[str, Any]] = {}
            for name, tensor in _below(tensors, f"optimiser/{phase}/").items():
                index, key = name.split("/")
                moments.setdefault(int(index), {})[key] = tensor.clone()
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        if self.mean is not None:
            found = _below(tensors, "mean/")
            for name, tensor in self.mean.items():
                tensor.copy_(found[name])

    def _backward(self, step: int, number: int, phase: str, part: int) -> dict[str, float]:
        """Adds the gradient of one batch; its terms."""
        section, ranks = self.section, self.ranks
        block = ((step * len(self.engine.phases) + number) * section.accumulate + part) * ranks.world + ranks.rank
        draws = range(block * section.batch_size, (block + 1) * section.batch_size)
        batch = collate([self.feed.pair(draw) for draw in draws]).to(self.device)
        losses, last = self.losses[phase], part == section.accumulate - 1
        in_step = losses.no_sync() if isinstance(losses, DistributedDataParallel) and not last else contextlib.nullcontext()
        with in_step, seeded(hash((self.seed, block)) % 2**63):  # of dropout
            with self._precision():
                terms = losses(batch)
            values = {name: float(term.detach()) for name, term in terms.items()}
            for name, value in values.items():
                if not math.isfinite(value):
                    pairs = ", ".join(self.feed.name(draw) for draw in draws)
                    raise DivergedError(
                        f"step {step + 1}: {name} is {value} on {pairs}", tip="look at those images; lower train.learning_rate or set train.clip_norm"
                    )
            (total(terms) / section.accumulate).backward()
        return values

    def _apply(self, step: int, phase: str) -> None:
        """One step of the phase's optimiser."""
        gradients = [p.grad for p in self.phases[phase] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            raise DivergedError(f"step {step + 1}: the gradient of {phase} is {float(norm)}", tip="lower train.learning_rate or set train.clip_norm")
        if self.section.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.phases[phase], self.section.clip_norm, norm)
        for group in self.optimisers[phase].param_groups:
            group["lr"] = self.rate(step)
        self.optimisers[phase].step()

    def _only(self, phase: str) -> None:
        """Gradients for the phase's own weights alone."""
        wanted = {id(p) for p in self.phases[phase]}
        for p in self.engine.parameters():
            p.requires_grad_(id(p) in wanted)

    def _distributed(self, losses: _Losses) -> nn.Module:
        """With several processes, the phase's gradients averaged over them."""
        if self.ranks.world == 1:
            return losses
        self._only(losses.phase)  # it looks after the weights that want a gradient when it is made
        return DistributedDataParallel(losses)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.section.precision == "bf16")


class _Losses(nn.Module):
    """`engine.losses` of one phase as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, engine: Engine, phase: str) -> None:
        super().__init__()
        self.engine, self.phase = engine, phase

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The weighted terms by name."""
        return self.engine.losses(batch, self.phase)


def validate_pair(engine: Engine, pair: Batch, metric: SimilarityMetric, precision: torch.autocast) -> Validation:
    """One pair, N = 1, with the engine as it is."""
    with precision:
        u = engine.displacement(pair.fixed, pair.moving).float()
    warped = warp_voxels(pair.moving, u)
    alike = float(SIMILARITIES[metric.name](pair.fixed, warped, metric, pair.fixed_mask))
    objective = sum(float(term) for name, term in engine.registration_losses(pair, u).items() if name not in dict(engine.supervision))
    field = DisplacementField.from_voxels(u.cpu(), Grid.regular(tuple(u.shape[2:])))
    dice = tre = epe = None
    if pair.fixed_labels is not None and pair.moving_labels is not None and bool((pair.fixed_labels != 0).any()):
        dice = float(soft_dice(pair.fixed_labels, pair.moving_labels, u))
    if any(p is not None for p in pair.fixed_points):
        tre = float(landmark_distance(pair.fixed_points, pair.moving_points, u))
    if pair.displacement is not None:
        epe = float(displacement_error(pair.displacement, u))
    return Validation(
        similarity=alike,
        objective=objective,
        folding_percent=jacobian_statistics(jacobian_determinant(field)).folding_percent,
        dice=dice,
        tre_voxels=tre,
        epe_voxels=epe,
    )


def mean_of(found: Sequence[Validation]) -> Validation:
    """Of each number over the pairs that have it."""

    def mean(values: Sequence[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return sum(there) / len(there) if there else None

    means = {name: mean([getattr(v, name) for v in found]) for name in Validation.__dataclass_fields__}
    return Validation(**means)  # type: ignore[arg-type]  # the first three are there in every one


def evenly_spaced(n: int, wanted: int) -> list[int]:
    """At most `wanted` of range(n), evenly spread."""
    return list(range(n)) if n <= wanted else [i * n // wanted for i in range(wanted)]


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
