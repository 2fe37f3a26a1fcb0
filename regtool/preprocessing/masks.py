"""What networks and similarities see of an image that has a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from regtool.config.schema import Preprocess
from regtool.geometry.images import Image
from regtool.geometry.sampling import mask_on_grid, resize_voxels
from regtool.preprocessing.foreground import foreground


def inpaint_outside_mask(image: Image, mask: Image) -> Image:
    """What lies outside the mask replaced by a smooth continuation of what lies inside, so that windows across its border meet no foreign structure.

    mask: above one half where the image counts, on any grid. Coarser and coarser means of the known voxels fill the unknown ones (push-pull,
    Gortler 1996).
    """
    known = mask_on_grid(mask, image.grid)[None].to(image.data)
    return image if bool(known.all()) or not bool(known.any()) else Image(_filled(image.data[None], known[None])[0], image.grid)


def apply_mask(image: Image, mask: Image, parameters: Preprocess) -> Image:
    """What networks and similarities see of an image with a mask: the image inpainted outside the mask where that leaves out little (max_hole_share)
    of what is shown; else the image as it is, for beside an organ cut out on one side alone the other image looks like another modality.
    """
    shown = foreground(image, parameters)
    left_out = shown & ~mask_on_grid(mask, image.grid).to(shown.device)
    return inpaint_outside_mask(image, mask) if int(left_out.sum()) <= parameters.max_hole_share * int(shown.sum()) else image


def _filled(data: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """(1, C, *shape) with the means of the known voxels of ever larger blocks where known, (1, 1, *shape) in [0, 1], is 0."""
    shape = data.shape[2:]
    if bool((known > 0).all()):
        return data
    half = [-(-n // 2) for n in shape]
    weight = F.interpolate(known, size=half, mode="area")
    coarse = _filled(F.interpolate(data * known, size=half, mode="area") / weight.clamp(min=1e-12), (weight > 0).to(known.dtype))
    return torch.where(known > 0, data, resize_voxels(coarse, shape))
