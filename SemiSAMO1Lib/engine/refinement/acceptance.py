"""A case takes a new pseudo-label only if a check without labels does not get worse."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...volume import Geometry
from ..data.grids import sample, space_points
from ..propagation.deformable import Deformation

#: A check value may fall by this much between rounds without counting as worse.
TOLERANCE = 0.02

#: In the first round a prediction is refused when it lies this many (robust) deviations below the cohort's median.
OUTLIER = 3.0


def mean_dice(a: NDArray[Any], b: NDArray[Any], classes: int, unknown: Collection[int] = ()) -> float:
    """Mean Dice over the foreground classes of two label maps; classes that neither has, and unknown ones, count
    nothing."""
    values = [value for value in range(1, classes) if value not in unknown]
    overlaps = [float(np.count_nonzero((a == value) & (b == value))) for value in values]
    sizes = [float(np.count_nonzero(a == value) + np.count_nonzero(b == value)) for value in values]
    return _mean_of(overlaps, sizes)


def reverse_dice(
    prediction: NDArray[Any],
    grid: Geometry,
    deformation: Deformation,
    template_label: NDArray[Any],
    template: Geometry,
    classes: int,
    unknown: Collection[int] = (),
) -> float:
    """Dice with the template's label of a prediction carried back to the template, where the case's field covers it.

    Args:
        prediction: class indices (z, y, x) on the case's training grid.
        grid: that grid.
        deformation: between the case and the template.
        template_label: class indices (z, y, x) on `template`.
        template: the template's grid.
        classes: number of classes, background included.
        unknown: classes that the template's label says nothing about; they count nothing.
    """
    there = deformation.to_case(space_points(template, deformation.backward.device)).cpu()
    covered = sample(torch.ones(1, *grid.shape), grid, there, padding="zeros")
    overlaps, sizes = [], []
    # one class at a time: memory does not grow with their number; in double: nor do sums depend on the threads
    for value in range(1, classes):
        if value in unknown:
            continue
        carried = sample(torch.from_numpy(prediction == value)[None].float(), grid, there, padding="zeros")
        wanted = torch.from_numpy(template_label == value)[None].float()
        overlaps.append(float((covered * carried * wanted).double().sum()))
        sizes.append(float((covered * (carried + wanted)).double().sum()))
    return _mean_of(overlaps, sizes)


def _mean_of(overlaps: list[float], sizes: list[float]) -> float:
    there = [2 * overlap / size for overlap, size in zip(overlaps, sizes, strict=True) if size > 0]
    return float(np.mean(there)) if there else 1.0


def accepted(now: Mapping[str, float], before: Mapping[str, float | None]) -> dict[str, bool]:
    """Which cases may take their new pseudo-label.

    Args:
        now: case -> check value of this round's answer (mean of reverse Dice and agreement with registration).
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
