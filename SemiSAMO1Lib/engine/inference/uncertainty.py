"""From class probabilities to a label map and an uncertainty map on the case's own grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...volume import UNSEEN, Geometry, Volume, copy_on_lattice, lattice_indices
from ..data.grids import index_grid, sample, transform_points

#: Voxels of the case's grid that are resampled at once, times the number of classes.
_AT_ONCE = 24_000_000


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """-Σ p ln p / ln C over the first axis: 0 (sure) to 1 (all classes alike); SemiSAM-O1."""
    p = probabilities.clamp(min=1e-7)
    return (-(p * p.log()).sum(0) / math.log(max(len(p), 2))).clamp(0, 1)


def voxel_entropy(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """The same of a map (C, z, y, x) of any float type, possibly mapped from disk; one class at a time in memory."""
    entropy = np.zeros(probabilities.shape[1:], np.float32)
    for channel in probabilities:
        p = channel.astype(np.float32).clip(1e-7)
        entropy -= p * np.log(p)
    return (entropy / math.log(max(len(probabilities), 2))).clip(0, 1)


def to_case_grid(
    probabilities: NDArray[Any], grid: Geometry, seen: NDArray[np.bool_], target: Geometry
) -> tuple[Volume, Volume]:
    """Label map and uncertainty on a case's own grid.

    Probabilities are resampled (trilinear), then the most probable class is taken; where both grids share a lattice,
    voxels are copied exactly. Voxels outside the field that was seen are 100 % uncertain, and no others: where all
    classes are alike it is 99 %.

    Args:
        probabilities: (C, z, y, x) on `grid`, any float type; may be mapped from disk.
        grid: the training grid.
        seen: (z, y, x) on `grid`: True where a template had something to say.
        target: the case's own grid.

    Returns:
        prediction (class indices, uint8, or uint16 for more than 256 classes) and uncertainty (uint8, 0-100 %).
    """
    classes = len(probabilities)
    kind = np.uint8 if classes <= 256 else np.uint16
    if lattice_indices(grid, target) is not None:
        return _copied(probabilities, grid, seen, target, kind)
    prediction, uncertainty = np.empty(target.shape, kind), np.empty(target.shape, np.uint8)
    depth = max(1, _AT_ONCE // (classes * target.shape[1] * target.shape[2]))
    source = torch.from_numpy(np.array(probabilities))
    known = torch.from_numpy(seen.astype(np.float32))[None]
    for start in range(0, target.shape[0], depth):
        stop = min(start + depth, target.shape[0])
        points = _slab_points(target, start, stop)
        best = torch.full(points.shape[1:], -1.0)
        label = torch.zeros(points.shape[1:], dtype=torch.int32)
        entropy = torch.zeros(points.shape[1:])
        for value in range(classes):  # one class at a time: memory does not grow with their number
            p = sample(source[value : value + 1].float(), grid, points)[0]
            label[p > best] = value
            best = torch.maximum(best, p)
            entropy -= p * p.clamp(min=1e-7).log()
        entropy = (entropy / math.log(max(classes, 2))).clamp(0, 1)
        percent = _percent(entropy)
        percent[sample(known, grid, points, "nearest")[0] < 0.5] = UNSEEN
        prediction[start:stop] = label.numpy()
        uncertainty[start:stop] = percent.numpy()
    return Volume(prediction, target), Volume(uncertainty, target)


def _copied(
    probabilities: NDArray[Any], grid: Geometry, seen: NDArray[np.bool_], target: Geometry, kind: Any
) -> tuple[Volume, Volume]:
    label = np.empty(grid.shape, kind)
    entropy = np.empty(grid.shape, np.uint8)
    for z in range(grid.shape[0]):
        p = torch.from_numpy(np.asarray(probabilities[:, z], np.float32))
        label[z] = p.argmax(0).numpy()
        entropy[z] = _percent(normalised_entropy(p)).numpy()
    entropy[~seen] = UNSEEN
    prediction = copy_on_lattice(Volume(label, grid), target)
    uncertainty = copy_on_lattice(Volume(entropy, grid), target, outside=UNSEEN)
    assert prediction is not None and uncertainty is not None, "checked by the caller"
    return prediction, uncertainty


def _percent(entropy: Tensor) -> Tensor:
    """0 to 1 as whole percent, of voxels that were seen."""
    return torch.round(100 * entropy).clamp(max=UNSEEN - 1)


def _slab_points(geometry: Geometry, start: int, stop: int) -> Tensor:
    slab = Geometry((stop - start, *geometry.shape[1:]), geometry.spacing, geometry.origin, geometry.direction)
    index = index_grid(slab)
    index[2] += start
    return transform_points(index, geometry.index_to_space)


def case_scores(prediction: Volume, uncertainty: Volume, classes: int) -> dict[str, Any]:
    """Figures of a case: mean uncertainty (0-1) of the scan, near the labels, and of every class, and volumes in ml."""
    voxel_ml = float(np.prod(prediction.geometry.spacing)) / 1000
    share = uncertainty.array.astype(np.float32) / 100
    labelled = prediction.array > 0
    by_label = {}
    for value in range(1, classes):
        mine = prediction.array == value
        count = int(np.count_nonzero(mine))
        by_label[str(value)] = {
            "voxels": count,
            "volume_ml": count * voxel_ml,
            "uncertainty": float(share[mine].mean()) if count else None,
        }
    return {
        "uncertainty": float(share.mean()),
        "label_uncertainty": float(share[labelled].mean()) if labelled.any() else None,
        "classes": by_label,
    }
