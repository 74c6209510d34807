"""The template carried to other scans as training images whose labels are exact (method, section 4; Zhao et al. 2019).

Image and label go through the same transform, so the label belongs to the image even where the registration is wrong.
The case lends its appearance: the smooth part of the difference between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ...volume import Geometry
from .grids import inside, sample, space_points

#: Width of what counts as appearance, as a share of the case's extent: finer than this is anatomy.
_APPEARANCE = 0.1


def carry_template(
    image: NDArray[Any],
    label: NDArray[Any],
    known: NDArray[np.bool_],
    template: Geometry,
    case: NDArray[Any],
    grid: Geometry,
    to_template: Callable[[Tensor], Tensor],
) -> tuple[NDArray[np.float16], NDArray[Any], NDArray[np.bool_]]:
    """The template as it would look in a case's place.

    Args:
        image, label, known: scaled intensities and class indices of the template, and where its label can be trusted,
            (z, y, x) on its training grid.
        template: that grid.
        case: scaled intensities of the case, (z, y, x) on its training grid.
        grid: that grid.
        to_template: gives the template's points of case points (3, z, y, x), mm; see `Deformation`.

    Returns:
        image, label and where they are known, on the case's grid; elsewhere the image is the case's own.
    """
    there = to_template(space_points(grid))
    seen = (inside(template, there) & _at(known.astype(np.float32), template, there).gt(0.5)).numpy()
    own = np.asarray(case, np.float32)
    carried = _at(np.asarray(image, np.float32), template, there).numpy()
    sigma = _APPEARANCE * float(np.prod(grid.extent)) ** (1 / 3) / np.array(grid.spacing)
    share = ndimage.gaussian_filter(seen.astype(np.float32), sigma)
    difference = ndimage.gaussian_filter(np.where(seen, own - carried, 0), sigma) / np.maximum(share, 1e-3)
    found = np.where(seen, carried + difference, own)
    return found.astype(np.float16), np.where(seen, _label_at(label, template, there), 0).astype(label.dtype), seen


def _at(values: NDArray[np.float32], geometry: Geometry, points: Tensor) -> Tensor:
    return sample(torch.from_numpy(values)[None], geometry, points)[0]


def _label_at(label: NDArray[Any], geometry: Geometry, points: Tensor) -> NDArray[Any]:
    """The class with the largest interpolated share, one class at a time."""
    found = torch.zeros(points.shape[1:], dtype=torch.int32)
    most = _at((label == 0).astype(np.float32), geometry, points)
    for value in np.unique(label[label > 0]).tolist():
        share = _at((label == value).astype(np.float32), geometry, points)
        found[share > most] = value
        most = torch.maximum(most, share)
    return found.numpy()
