"""What propagation and prediction say together, and how much a voxel of it counts; one class at a time in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def fused(
    propagated: NDArray[Any], confidence: NDArray[Any], predicted: NDArray[Any], share: float
) -> NDArray[np.float16]:
    """The confidence-weighted mean of propagation and prediction.

    Args:
        propagated, predicted: class probabilities (C, z, y, x), any float type; may be mapped from disk.
        confidence: of the propagation, (z, y, x) in [0, 1].
        share: weight of a fully confident propagation beside the prediction (measured: docs/benchmarks.md).
    """
    result = np.empty(predicted.shape, np.float16)
    trust = share * np.asarray(confidence, np.float32)
    for value in range(len(predicted)):
        result[value] = (propagated[value] * trust + predicted[value].astype(np.float32)) / (1 + trust)
    return result


def voxel_weights(confidence: NDArray[Any], by_confidence: bool = True) -> NDArray[np.float16]:
    """How much a voxel's pseudo-label counts: ½ to 1 by the confidence, 0 where the template saw nothing; or all 1."""
    trust = np.asarray(confidence, np.float32)
    if not by_confidence:
        return np.ones(trust.shape, np.float16)
    return np.where(trust > 0.01, 0.5 + 0.5 * trust, 0).astype(np.float16)


def running_mean(before: NDArray[Any], new: NDArray[Any], count: int) -> NDArray[np.float16]:
    """The mean of `count` maps when `before` is the mean of all but the last; class by class in float32."""
    mean = np.empty(new.shape, np.float16)
    for value in range(len(new)):
        mean[value] = before[value] + (new[value].astype(np.float32) - before[value]) / count
    return mean
