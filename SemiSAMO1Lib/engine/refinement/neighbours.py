"""What cases that are alike say about each other's uncertain places.

Cases are compared after registration: their descriptors, carried to the template, lie voxel on voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...volume import Geometry
from ..data.grids import sample
from ..propagation.deformable import Deformation


def aligned_vote(
    points: Tensor,
    own: Deformation,
    neighbours: Sequence[tuple[float, Deformation, NDArray[Any], Geometry]],
) -> Tensor:
    """Class probabilities at points of a case, voted by neighbours through the template.

    Args:
        points: (3, Z, Y, X) places in the case, mm.
        own: the case's transform to the template.
        neighbours: similarity, transform of the neighbour, its class probabilities (C, z, y, x) and their grid.

    Returns:
        (C, Z, Y, X), sum 1; weights are the similarities.
    """
    in_template = own.to_template(points)
    votes = torch.zeros(len(neighbours[0][2]), *points.shape[1:])
    total = sum(similarity for similarity, *_ in neighbours)
    for similarity, deformation, probabilities, grid in neighbours:
        there = deformation.to_case(in_template)
        for value in range(len(votes)):  # one class at a time: memory does not grow with their number
            channel = torch.from_numpy(probabilities[value : value + 1].astype(np.float32))
            votes[value] += sample(channel, grid, there)[0] * (similarity / total)
    return votes


def whole_volume_vote(
    shape: tuple[int, ...], neighbours: Sequence[tuple[float, NDArray[Any]]], classes: int
) -> NDArray[np.float16]:
    """The published volume vote: neighbours' label maps resized (nearest) to `shape`, weighted by similarity.

    Returns:
        (C, z, y, x) shares of the votes, sum 1.
    """
    total = sum(similarity for similarity, _ in neighbours)
    votes = np.zeros((classes, *shape), np.float16)
    for similarity, label in neighbours:
        index = [
            np.minimum((np.arange(n) + 0.5) * m / n, m - 1).astype(int) for n, m in zip(shape, label.shape, strict=True)
        ]
        resized = np.asarray(label)[np.ix_(*index)]
        for value in range(classes):
            votes[value] += np.float16(similarity / total) * (resized == value)
    return votes
