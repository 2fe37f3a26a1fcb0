"""What an engine learns from in one step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields

import torch

Points = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Batch:
    """N pairs on one voxel grid.

    fixed, moving: (N, C, *shape) as the network sees them; masks: (N, 1, *shape) >= 0, where similarity counts; labels: (N, 1, *shape) int64, of
    both images or of neither; points: for each pair the (P, D) voxel indices of its landmarks, x first, or None; displacement: the
    (N, D, *shape) voxels that are the answer, NaN where it is not known.
    """

    fixed: torch.Tensor
    moving: torch.Tensor
    _: KW_ONLY
    fixed_mask: torch.Tensor | None = None
    moving_mask: torch.Tensor | None = None
    fixed_labels: torch.Tensor | None = None
    moving_labels: torch.Tensor | None = None
    fixed_points: Points = ()
    moving_points: Points = ()
    displacement: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""

        def moved(value: torch.Tensor | Points | None) -> torch.Tensor | Points | None:
            if isinstance(value, tuple):
                return tuple(None if p is None else p.to(device) for p in value)
            return None if value is None else value.to(device)

        return Batch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def swapped(self) -> Batch:
        """The same pairs registered the other way; a known displacement is not, so it is left out."""
        return Batch(
            self.moving,
            self.fixed,
            fixed_mask=self.moving_mask,
            moving_mask=self.fixed_mask,
            fixed_labels=self.moving_labels,
            moving_labels=self.fixed_labels,
            fixed_points=self.moving_points,
            moving_points=self.fixed_points,
        )
