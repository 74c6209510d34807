"""What the grey values of a scan mean: padding without data, and a scale that networks can learn from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: A constant border region smaller than this share of the scan is not padding.
_SMALLEST_PADDING = 0.002

#: A value that fills less than this share of the scan's surface is not looked at: 8-bit scans repeat each value often.
_SMALLEST_BORDER = 0.03


def data_mask(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    """True where the scan has data; False in constant padding that touches the border (z, y, x).

    Padding is a connected region of exactly one value, touching the border of the volume and larger than 0.2 % of it,
    whose value fills at least 3 % of the surface.
    """
    mask = np.ones(array.shape, bool)
    border = np.ones(array.shape, bool)
    border[1:-1, 1:-1, 1:-1] = False
    values, counts = np.unique(array[border], return_counts=True)
    for value in values[counts > _SMALLEST_BORDER * np.count_nonzero(border)]:
        regions, _ = ndimage.label(array == value)
        touching = np.unique(regions[border])
        sizes = np.bincount(regions.ravel())
        padding = [r for r in touching if r and sizes[r] > _SMALLEST_PADDING * array.size]
        mask[np.isin(regions, padding)] = False
    return mask if mask.mean() > 0.05 else np.ones(array.shape, bool)
