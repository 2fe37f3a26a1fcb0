"""Where a training gets its pairs from: a list, or noise; and those it validates with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch

from regtool.config.schema import Parameters
from regtool.io.pairs import Pairs
from regtool.preprocessing.batch import Batch
from regtool.training.augmentation import augmented
from regtool.training.dataset import Dataset, Order
from regtool.training.synthesis import synthetic
from regtool.training.trainer import evenly_spaced

PLANNED_ON = 4  # training pairs whose size is looked at before the first step
LEARNING, VALIDATING = 0, 1  # streams of synthetic pairs that have none in common


class Feed:
    """Pairs in a shuffled order, augmented; each draw has random numbers of its own."""

    def __init__(self, source: Dataset, pairs: Pairs, parameters: Parameters, name: str) -> None:
        self.source, self.pairs, self.augment, self.seed = source, pairs, parameters.augment, parameters.run.seed
        self.order = Order(len(pairs), self.seed)
        self.fingerprint, self.told = fingerprint_of(pairs), {"data": name, "pairs": len(pairs)}

    def some(self) -> Iterator[Batch]:
        """A few, to see how large they are."""
        return (self.source.sample(i) for i in evenly_spaced(len(self.pairs), PLANNED_ON))

    def pair(self, draw: int) -> Batch:
        """That of a draw, from 0 on; the same whenever it is asked for."""
        generator = torch.Generator().manual_seed(hash((self.seed, draw)) % 2**63)
        return augmented(self.source.sample(self.order.index(draw)), self.augment, generator)[0]

    def name(self, draw: int) -> str:
        """What messages call it."""
        return self.pairs[self.order.index(draw)].id


class SyntheticFeed:
    """Pairs made when they are asked for, no two alike."""

    fingerprint = "synthetic"

    def __init__(self, parameters: Parameters, device: torch.device) -> None:
        self.parameters, self.device = parameters, device
        self.told = {"data": "synthetic images, none of a patient"}

    def some(self) -> Iterator[Batch]:
        """One tells how large they all are."""
        yield self.pair(0)

    def pair(self, draw: int) -> Batch:
        """That of a draw, from 0 on; the same whenever it is asked for."""
        return synthetic(self.parameters.synthesis, self.parameters.preprocess, (self.parameters.run.seed, LEARNING, draw), self.device)

    def name(self, draw: int) -> str:
        """What messages call it."""
        return f"synthetic pair {draw}"


class HeldOut:
    """The pairs to validate with, the same ones every time."""

    def __init__(self, pair: Callable[[int], Batch], chosen: Sequence[int], fingerprint: str) -> None:
        self._pair, self._chosen, self.count, self.fingerprint = pair, chosen, len(chosen), fingerprint

    def pairs(self) -> Iterator[Batch]:
        """One after the other."""
        return (self._pair(i) for i in self._chosen)


def fingerprint_of(pairs: Pairs) -> str:
    """Tells lists apart: their length, and a digest of a thousand of their ids."""
    digest = hashlib.sha256("\n".join(pairs[i].id for i in evenly_spaced(len(pairs), 1000)).encode()).hexdigest()
    return f"{len(pairs)} ({digest[:12]})"
