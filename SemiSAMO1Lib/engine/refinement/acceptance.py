"""A case takes a new pseudo-label only if a check without labels does not get worse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...volume import Geometry
from ..data.grids import sample, space_points
from ..propagation.deformable import Deformation

#: A check value may fall by this much between rounds without counting as worse.
TOLERANCE = 0.02

#: In the first round a prediction is refused when it lies this many (robust) deviations below the cohort's median.
OUTLIER = 3.0


def soft_dice(a: Tensor, b: Tensor, weight: Tensor) -> float:
    """Mean Dice over the foreground classes of two (C, z, y, x) maps; classes that neither has count nothing."""
    axes = (1, 2, 3)
    overlap, size = (weight * a * b).sum(axes)[1:], (weight * (a + b)).sum(axes)[1:]
    there = size > 0
    return float((2 * overlap[there] / size[there]).mean()) if bool(there.any()) else 1.0


def reverse_dice(
    prediction: Tensor, grid: Geometry, deformation: Deformation, template_label: Tensor, template: Geometry
) -> float:
    """Dice with the template's label of a prediction carried back to the template.

    Args:
        prediction: (C, z, y, x) one-hot or probabilities on the case's training grid.
        grid: that grid.
        deformation: between the case and the template.
        template_label: (C, z, y, x) one-hot on `template`.
        template: the template's grid.
    """
    there = deformation.to_case(space_points(template))
    carried = sample(prediction, grid, there, padding="zeros")
    covered = carried.sum(0, keepdim=True)
    return soft_dice(carried, template_label, covered)


def one_hot(label: NDArray[np.generic], classes: int) -> Tensor:
    """(C, z, y, x) float32."""
    values = torch.arange(classes).reshape(-1, 1, 1, 1)
    return (torch.from_numpy(np.asarray(label).astype(np.int64))[None] == values).float()


def accepted(now: Mapping[str, float], before: Mapping[str, float | None]) -> dict[str, bool]:
    """Which cases may take their new pseudo-label.

    Args:
        now: case -> check value of this round's prediction (mean of reverse Dice and agreement with registration).
        before: case -> check value with which the pseudo-label in force was taken; None: it is the registration's.

    Returns:
        case -> True when the value did not fall by more than TOLERANCE since then; in the first round, when it is no
        outlier of the cohort.
    """
    values = np.array(list(now.values()))
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))
    floor = median - OUTLIER * max(spread, TOLERANCE)
    verdict = {}
    for case, value in now.items():
        earlier = before.get(case)
        verdict[case] = value >= floor and (earlier is None or value >= earlier - TOLERANCE)
    return verdict
