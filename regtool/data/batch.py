"""What an engine learns from in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Pairs on one voxel grid. fixed, moving: (N, C, *shape) as the network sees them; fixed_mask: (N, 1, *shape), where similarity counts."""

    fixed: torch.Tensor
    moving: torch.Tensor
    fixed_mask: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.fixed.to(device), self.moving.to(device), None if self.fixed_mask is None else self.fixed_mask.to(device))
