"""Random changes of grey values, by MONAI's transforms, seeded per patch."""

from __future__ import annotations

import threading

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandBiasField,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
)
from torch import Tensor


class _OfThread(threading.local):
    """The transforms of one thread: they are seeded anew for each patch, and several threads draw patches."""

    def __init__(self) -> None:
        self.changes = _changes()


def _changes() -> Compose:
    return Compose(
        [
            RandGaussianNoise(prob=0.3, std=0.15),
            RandGaussianSmooth((0.3, 1.0), (0.3, 1.0), (0.3, 1.0), prob=0.2),
            RandScaleIntensity(factors=0.3, prob=0.5),
            RandShiftIntensity(offsets=0.2, prob=0.5),
            RandAdjustContrast(prob=0.3, gamma=(0.7, 1.5)),
            RandBiasField(degree=2, coeff_range=(-0.3, 0.3), prob=0.2),
        ]
    )


_MINE = _OfThread()


def change_intensities(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Change a patch (1, z, y, x) of scaled intensities; the generator decides everything."""
    changes = _MINE.changes
    changes.set_random_state(seed=int(generator.integers(2**31)))
    changed = changes(image)
    return torch.as_tensor(np.asarray(changed), dtype=torch.float32)
