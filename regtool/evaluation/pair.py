"""What is measured of a pair of images: before, and through a transform."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from regtool.config.choices import Protocol
from regtool.evaluation.field import field_scores, inverse_consistency
from regtool.evaluation.intensity import intensity_agreement, nmse
from regtool.evaluation.learn2reg import learn2reg_scores
from regtool.evaluation.summary import annotation_metrics
from regtool.geometry.images import Annotations, Image
from regtool.geometry.sampling import displacement_on, mask_on_grid, moving_indices, voxel_grid, warp
from regtool.geometry.transforms import DisplacementField, Transform


@dataclass(frozen=True)
class EvaluatedPair:
    """fixed, moving: of one channel; annotations: the fixed mask says where intensities and the Jacobian count, the moving one is not used."""

    fixed: Image
    moving: Image
    annotations: Annotations
    protocol: Protocol = "regtool"

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """(*shape) bool on the fixed grid, where intensities and the Jacobian count."""
        mask = self.annotations.fixed_mask
        return None if mask is None else mask_on_grid(mask, self.fixed.grid)

    @cached_property
    def span(self) -> tuple[float, float]:
        """Least and largest intensity of the moving image."""
        return self.moving.minimum, float(self.moving.data.max())

    def before(self) -> dict[str, Any]:
        """As the headers say."""
        if self.protocol == "learn2reg":
            return self._learn2reg(torch.zeros(self.fixed.grid.ndim, *self.fixed.grid.shape))
        return self._scores(Transform.identity(self.fixed.grid.ndim))[0]

    def after(self, found: Transform | DisplacementField, inverse: Transform | None = None) -> dict[str, Any]:
        """Through a transform, fixed to moving; inverse: from moving to fixed, for `nmse` and `inverse_consistency_mm`.

        A DisplacementField on the fixed grid is one as Learn2Reg stores it, which takes voxels to voxels.
        """
        if self.protocol == "learn2reg":
            return self._learn2reg(found.to_voxels() if isinstance(found, DisplacementField) else self._voxels(found))
        transform = Transform((found,)) if isinstance(found, DisplacementField) else found
        scores, warped = self._scores(transform)
        scores |= field_scores(displacement_on(transform, self.fixed.grid), self.mask)
        if inverse is not None:
            scores |= self._inverse_scores(transform, inverse, warped)
        return scores

    def _scores(self, transform: Transform) -> tuple[dict[str, Any], Image]:
        warped = warp(self.moving, transform, self.fixed.grid)
        scores, _ = annotation_metrics(self.annotations.labels, self.annotations.landmarks, transform, shapes=True)
        return scores | asdict(intensity_agreement(self.fixed, warped, self.mask, self.span)), warped

    def _inverse_scores(self, forward: Transform, backward: Transform, warped: Image) -> dict[str, Any]:
        grid = self.moving.grid
        known = torch.zeros(grid.voxels, dtype=torch.bool)
        for part, index in moving_indices(self.fixed.grid, backward, grid):
            known[part] = torch.as_tensor(((index >= 0) & (index <= torch.tensor(self.fixed.grid.size) - 1)).all(dim=1))
        missed = inverse_consistency(forward, backward, grid, self.fixed.grid)
        again = warp(warped, backward, grid)
        return {"nmse": nmse(self.moving, again, known.reshape(grid.shape)), "inverse_consistency_mm": asdict(missed)}

    def _learn2reg(self, displacement: torch.Tensor) -> dict[str, Any]:
        return learn2reg_scores(displacement, (self.fixed.grid, self.moving.grid), self.annotations.labels, self.annotations.landmarks, self.mask)

    def _voxels(self, transform: Transform) -> torch.Tensor:
        """(D, *shape) `u` with `warped[v] = moving[v + u[v]]`."""
        grid = self.fixed.grid
        out = torch.empty(grid.ndim, grid.voxels)
        still = voxel_grid(grid.shape, torch.empty(0, dtype=torch.float64)).reshape(-1, grid.ndim)
        for part, index in moving_indices(self.moving.grid, transform, grid):
            out[:, part] = (index - still[part]).T.float()
        return out.reshape(-1, *grid.shape)
