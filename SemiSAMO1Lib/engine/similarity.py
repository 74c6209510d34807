"""Which scans are alike: the cosine of what they look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Cosine of two arrays of one shape, -1 to 1; 0 where one is empty of content."""
    return float(_unit(a) @ _unit(b))


class Likeness:
    """How alike some scans are: the cosine of their signatures, clipped at 0 (SemiSAM-O1).

    A signature is the encoder's global features, or with registration the descriptors in the template's space, means
    removed. Each is normalised once: a cohort asks for all pairs.

    Args:
        signatures: scan -> what it looks like, all of one shape.
    """

    def __init__(self, signatures: Mapping[str, ArrayLike]) -> None:
        self._place = {name: place for place, name in enumerate(signatures)}
        self._units = np.stack([_unit(one).astype(np.float32) for one in signatures.values()])

    def nearest(self, name: str, among: Sequence[str], count: int) -> list[tuple[str, float]]:
        """The `count` scans among some that are most like one, itself left out, and how much, the most alike first."""
        alike = self._units @ self._units[self._place[name]]
        scored = [(other, max(0.0, float(alike[self._place[other]]))) for other in among if other != name]
        return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:count]


def _unit(signature: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(signature, np.float64).ravel()
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12))
