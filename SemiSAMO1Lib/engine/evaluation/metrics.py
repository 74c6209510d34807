"""Dice, Jaccard, 95 % Hausdorff distance and average surface distance, in mm, with a stated convention for empty masks.

Both masks empty: Dice and Jaccard 1, distances 0. One of them empty: Dice and Jaccard 0, distances undefined (None),
left out of means. Surface distances follow medpy (a surface voxel touches the outside by a face, distances of both
directions together); without medpy, scipy's distance transforms give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Distance measures need a mask with voxels; the surface is found with face neighbours.
_FACES = ndimage.generate_binary_structure(3, 1)


def dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """2 |A ∩ B| / (|A| + |B|); 1 when both are empty."""
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 1.0 if total == 0 else 2 * int(np.count_nonzero(prediction & reference)) / total


def jaccard(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """|A ∩ B| / |A ∪ B|; 1 when both are empty."""
    union = int(np.count_nonzero(prediction | reference))
    return 1.0 if union == 0 else int(np.count_nonzero(prediction & reference)) / union


def surface_distances(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: tuple[float, float, float]
) -> tuple[float | None, float | None]:
    """(95 % Hausdorff, average surface distance) in mm; spacing (z, y, x).

    The Hausdorff value is the 95th percentile of all distances of both directions; the average surface distance is
    that of the prediction's surface to the reference's (medpy's `hd95` and `asd`).
    """
    if not prediction.any() and not reference.any():
        return 0.0, 0.0
    if not prediction.any() or not reference.any():
        return None, None
    try:
        from medpy.metric.binary import asd, hd95
    except ImportError:
        return surface_distances_scipy(prediction, reference, spacing)
    return (
        float(hd95(prediction, reference, voxelspacing=spacing)),
        float(asd(prediction, reference, voxelspacing=spacing)),
    )


def surface_distances_scipy(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: tuple[float, float, float]
) -> tuple[float, float]:
    """The same by distance transforms; both masks have voxels."""
    there = _distances(prediction, reference, spacing)
    back = _distances(reference, prediction, spacing)
    return float(np.percentile(np.concatenate([there, back]), 95)), float(there.mean())


def _distances(a: NDArray[np.bool_], b: NDArray[np.bool_], spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    """Distance of each surface voxel of `a` to the surface of `b`, mm."""
    surface_a = a ^ ndimage.binary_erosion(a, _FACES)
    surface_b = b ^ ndimage.binary_erosion(b, _FACES)
    to_b = ndimage.distance_transform_edt(~surface_b, sampling=spacing)
    return np.asarray(to_b)[surface_a]


def case_metrics(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    values: Iterable[int],
    spacing: tuple[float, float, float],
    distances: bool = True,
) -> dict[str, Any]:
    """All measures of one case per label value, and their means over the labels.

    Args:
        prediction, reference: label maps (z, y, x) on one grid.
        values: foreground label values to compare.
        spacing: (z, y, x), mm.
        distances: compute surface distances too.

    Returns:
        {'labels': {value: {dice, jaccard, hd95_mm, asd_mm}}, 'mean_dice', 'mean_jaccard', ...}
    """
    rows: dict[str, dict[str, float | None]] = {}
    for value in values:
        mine, true = prediction == value, reference == value
        row: dict[str, float | None] = {"dice": dice(mine, true), "jaccard": jaccard(mine, true)}
        if distances:
            row["hd95_mm"], row["asd_mm"] = surface_distances(mine, true, spacing)
        rows[str(value)] = row
    names = ("dice", "jaccard", "hd95_mm", "asd_mm") if distances else ("dice", "jaccard")
    means = {f"mean_{name}": mean_of(row[name] for row in rows.values()) for name in names}
    return {"labels": rows, **means}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of what is defined; None when nothing is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
