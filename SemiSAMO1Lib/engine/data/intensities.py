"""What the grey values of a scan mean: padding without data, and a scale that networks can learn from."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from ...volume import Volume

#: A constant border region smaller than this share of the scan is not padding.
_SMALLEST_PADDING = 0.002

#: A value that fills less than this share of the scan's surface is not looked at: 8-bit scans repeat each value often.
_SMALLEST_BORDER = 0.03


class IntensityPlan(BaseModel):
    """How grey values are scaled: clip to [low, high], subtract mean, divide by deviation.

    'per_case': percentiles, mean and deviation of each scan's own data (MR and others).
    'fixed': values of the template's foreground, the same for all scans (CT).
    'none': they are used as they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    scheme: Literal["per_case", "fixed", "none"]
    low: float
    high: float
    mean: float = 0.0
    deviation: float = 1.0


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


def scale_intensities(volume: Volume, plan: IntensityPlan) -> NDArray[np.float32]:
    """A scan's grey values as the network sees them; padding without data becomes the lowest value that data has."""
    array = volume.array.astype(np.float32)
    if plan.scheme == "none":
        return array
    if plan.scheme == "fixed":
        return ((array.clip(plan.low, plan.high) - plan.mean) / plan.deviation).astype(np.float32)
    mask = data_mask(volume.array)
    data = array[mask]
    low, high = np.percentile(data, (plan.low, plan.high))
    data = data.clip(low, high)
    mean, deviation = float(data.mean()), float(max(data.std(), 1e-6))
    scaled = (array.clip(low, high) - mean) / deviation
    scaled[~mask] = (low - mean) / deviation
    return scaled.astype(np.float32)
