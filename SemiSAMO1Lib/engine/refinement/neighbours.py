"""What cases that are alike say about a whole volume: the published vote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
