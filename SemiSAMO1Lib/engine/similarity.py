"""Which scans are alike: the cosine of what they look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Cosine of two arrays of one shape, -1 to 1; 0 where one is empty of content."""
    return float(_unit(a) @ _unit(b))


def nearest(
    case_id: str, certain: Sequence[str], signatures: Mapping[str, NDArray[Any]], count: int
) -> list[tuple[str, float]]:
    """The `count` most similar certain cases and their similarities in [0, 1], most similar first.

    The similarity of two cases is the cosine of their signatures, clipped at 0 (method, section 1.4): the encoder's
    global features, or with registration the descriptors in the template's space, means removed.
    """
    own = _unit(signatures[case_id])
    scored = [(other, max(0.0, float(own @ _unit(signatures[other])))) for other in certain if other != case_id]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:count]


def _unit(signature: NDArray[Any]) -> NDArray[np.float64]:
    vector = np.asarray(signature, np.float64).ravel()
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12))
