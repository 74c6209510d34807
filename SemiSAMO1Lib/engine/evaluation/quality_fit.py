"""Fit the model of likely quality: which signals tell how much, from trainings whose truth is known.

Signals of one prediction say much the same, and which of them says it best differs from anatomy to anatomy. The
coefficients of a regression would be decided by chance among them. So each counts by its own correlation with the
truth, where that is smallest: what does not carry over from one cohort to another counts nothing. One scale is fitted
for all.

Most signals are agreements, and everything agrees with a template that is drawn badly. So half of the estimate is what
the network itself is unsure of, fitted alone (measured: docs/benchmarks.md, *Likely quality*).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...quality import DOUBTS, QualityModel, logit, transformed

#: A signal whose correlation with the truth is smaller than this in one of the cohorts is not used.
LEAST = 0.2

#: The signal that is half of the estimate, where it may be used.
ALONE = "inside_entropy"


def fit(
    signals: Sequence[Mapping[str, float | None]],
    dice: Sequence[float],
    trainings: Sequence[str],
    cohorts: Sequence[str],
    names: Sequence[str],
    origin: Mapping[str, Any],
    least: float = LEAST,
) -> QualityModel:
    """Fit the model, every training counting alike.

    Correlations are those inside the cohorts: that one anatomy is harder than another must not be mistaken for the
    effect of a signal; that one template is worse than another of the same anatomy should show. No signal counts
    against its meaning: more agreement is never worse. The intercept is the trainings' mean.

    Args:
        signals: of each class of each case.
        dice: their true Dice.
        trainings: that each belongs to.
        cohorts: that each belongs to: scans of one kind, with one or several trainings.
        names: signals to choose from; those that are used are the model's.
        origin: what the data are.
        least: correlation with the truth that a signal must have in every cohort in which both vary.

    Raises:
        ValueError: there is nothing to fit to, or no signal that tells enough in every cohort.
    """
    if not signals:
        raise ValueError("there are no predictions to fit the estimate to")
    raw, target = transformed(names, signals), np.array([logit(value) for value in dice])
    weight, kinds = _alike(np.array(trainings)), np.array(cohorts)
    inside = [kinds == kind for kind in np.unique(kinds)]
    means = _means(raw, weight)
    centred, wanted = np.empty_like(raw), np.empty_like(target)
    for mine in inside:
        centred[mine] = raw[mine] - _means(raw[mine], weight[mine])
        wanted[mine] = target[mine] - np.average(target[mine], weights=weight[mine])
    scales = np.maximum(np.sqrt(_means(centred**2, weight)), 1e-6)
    standard = centred / scales
    signed = np.array([-1.0 if name in DOUBTS else 1.0 for name in names])
    told = np.array([_correlations(signed * standard[mine], wanted[mine], weight[mine]) for mine in inside])
    smallest = np.where(np.isnan(told), np.inf, told).min(0)
    used = np.flatnonzero(np.isfinite(smallest) & (smallest >= least) & (smallest > 0))
    if not used.size:
        raise ValueError(f"none of the {len(names)} signals has a correlation of {least} with the Dice in every cohort")
    shown = np.nan_to_num(standard[:, used])

    def slopes_of(votes: NDArray[np.float64]) -> NDArray[np.float64]:
        together = shown @ votes
        found = votes * np.average(together * wanted, weights=weight) / np.average(together**2, weights=weight)
        return np.asarray(found)

    votes = (signed * smallest)[used]
    alone = np.where([names[position] == ALONE for position in used.tolist()], votes, 0.0)
    slopes = (slopes_of(votes) + slopes_of(alone)) / 2 if alone.any() else slopes_of(votes)
    here = np.nan_to_num((raw - means)[:, used] / scales[used]).clip(-4, 4)
    return QualityModel(
        tuple(names[position] for position in used.tolist()),
        tuple(means[used].tolist()),
        tuple(scales[used].tolist()),
        tuple(slopes.tolist()),
        float(np.average(target - here @ slopes, weights=weight)),
        math.nan,
        dict(origin),
    )


def _alike(trainings: NDArray[np.str_]) -> NDArray[np.float64]:
    """(rows,): weights with which every training counts as much as any other; their mean is 1."""
    _, which, counts = np.unique(trainings, return_inverse=True, return_counts=True)
    return np.asarray(len(trainings) / (len(counts) * counts[which]), np.float64)


def _means(values: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """(signals,): weighted mean of what is known of each column; 0 where nothing is."""
    heavy = weight[:, None] * ~np.isnan(values)
    return np.asarray((heavy * np.nan_to_num(values)).sum(0) / np.maximum(heavy.sum(0), 1e-12))


def _correlations(
    values: NDArray[np.float64], wanted: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(signals,): correlation of each column, where it is known, with what is wanted, both of mean 0; NaN where one of
    them does not vary."""
    heavy, known = weight[:, None] * ~np.isnan(values), np.nan_to_num(values)
    spread = np.sqrt((heavy * known**2).sum(0) * (heavy * wanted[:, None] ** 2).sum(0))
    return np.where(spread > 1e-9, (heavy * known * wanted[:, None]).sum(0) / np.maximum(spread, 1e-9), math.nan)
