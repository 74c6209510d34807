"""Is one way of segmenting better than another? Their differences case by case, with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

#: Resamples behind an interval.
_RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """Mean difference over paired cases.

    Attributes:
        mean: first less second.
        low, high: ends of the 95 % interval of the mean; both are the mean where a single case, or no spread, gives no
            interval.
        cases: number of pairs.
    """

    mean: float
    low: float
    high: float
    cases: int

    @property
    def proven(self) -> bool:
        """The interval does not contain 0."""
        return self.cases > 1 and (self.low > 0 or self.high < 0)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float], seed: int = 0) -> Difference:
    """Compare the cases that both have: percentile bootstrap of the mean difference.

    Args:
        first, second: case -> Dice, or any other score.
        seed: of the resampling.

    Raises:
        ValueError: they have no case in common.
    """
    common = sorted(set(first) & set(second))
    if not common:
        raise ValueError("there is no case that both have")
    differences = np.array([first[case] - second[case] for case in common], np.float64)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return Difference(mean, mean, mean, len(common))
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Difference(mean, float(found.low), float(found.high), len(common))
