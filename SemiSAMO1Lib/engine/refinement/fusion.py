"""What propagation and prediction say together, and how much a voxel of it counts; one class at a time in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A confidence up to which a voxel's pseudo-label does not count: the template did not see it, or nobody comes back
#: from there to where one began.
_NEXT_TO_NOTHING = 0.01


def weighted_mean(parts: Sequence[tuple[NDArray[Any], NDArray[np.float32]]]) -> NDArray[np.float16]:
    """Voxel by voxel.

    Args:
        parts: class probabilities (C, z, y, x), any float type, may be mapped from disk, each with its weights
            (z, y, x); somebody has a weight everywhere.
    """
    total = sum(weight for _, weight in parts)
    result = np.empty(parts[0][0].shape, np.float16)
    for value in range(len(result)):
        result[value] = sum(probabilities[value] * weight for probabilities, weight in parts) / total
    return result


def voxel_weights(confidence: NDArray[Any], by_confidence: bool = True) -> NDArray[np.float16]:
    """How much a voxel's pseudo-label counts: ½ to 1 by the confidence, 0 where that is next to nothing; or all 1."""
    trust = np.asarray(confidence, np.float32)
    if not by_confidence:
        return np.ones(trust.shape, np.float16)
    return np.where(trust > _NEXT_TO_NOTHING, 0.5 + 0.5 * trust, 0).astype(np.float16)


def running_mean(before: NDArray[Any], new: NDArray[Any], count: int) -> NDArray[np.float16]:
    """The mean of `count` maps when `before` is the mean of all but the last; class by class in float32."""
    mean = np.empty(new.shape, np.float16)
    for value in range(len(new)):
        mean[value] = before[value] + (new[value].astype(np.float32) - before[value]) / count
    return mean
