"""How classes are brought to the volumes that they should have: one number added to each class's logit. numpy alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: No class is shifted further: its odds change by e⁴ at most.
FURTHEST = 4.0

#: A class that is larger or smaller by less than this share is left; others are brought to that edge.
TOLERANCE = 0.05

#: Steps of the fixed point, the share of the way that each goes, and the change below which it has arrived.
_STEPS, _SHARE, _ARRIVED = 60, 0.7, 1e-3


def volume_shift(
    logits: NDArray[np.floating], target: NDArray[np.integer], tolerance: float = TOLERANCE
) -> NDArray[np.float32]:
    """Shifts (C,) with which as many voxels fall to each foreground class as the target has, give or take a share.

    The background is not shifted, nor a class that the target lacks, and none further than `FURTHEST`.

    Args:
        logits: (C, n) of n voxels; what all classes of a voxel share does not matter.
        target: (n,) class indices.
        tolerance: the share.
    """
    classes = len(logits)
    wanted = np.bincount(target, minlength=classes).astype(float)
    there, edge = wanted[1:] > 0, math.log1p(tolerance)
    shift = np.zeros(classes, np.float32)
    for _ in range(_STEPS):
        drawn = np.bincount((logits + shift[:, None]).argmax(0), minlength=classes)
        off = np.log(np.maximum(drawn[1:], 1) / np.maximum(wanted[1:], 1)) * there
        step = _SHARE * (off - np.clip(off, -edge, edge))
        moved = np.clip(shift[1:] - step, -FURTHEST, FURTHEST)
        arrived = np.abs(moved - shift[1:]).max() < _ARRIVED
        shift[1:] = moved
        if arrived:
            break
    return shift
