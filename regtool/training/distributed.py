"""Several processes that train together (torchrun, DistributedDataParallel)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class DistributedContext:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """The one that validates, writes and talks."""
        return self.rank == 0


ALONE = DistributedContext()


@contextlib.contextmanager
def process_group(context: DistributedContext, device: torch.device) -> Iterator[None]:
    """The group of processes that torchrun started; nothing where there is but one. No trainer may be left when it ends: some then hang."""
    if context.world == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()
