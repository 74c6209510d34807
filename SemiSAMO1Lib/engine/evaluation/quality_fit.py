"""Fit the model of likely quality: which signals tell how much, from trainings whose truth is known.

Signals of one prediction say much the same, and which of them says it best differs from anatomy to anatomy. The
coefficients of a regression would be decided by chance among them. So each counts by its own correlation with the
truth, where that is smallest: what does not carry over from one cohort to another counts nothing. One scale is fitted
for all.
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
        least: correlation with the truth that a signal must have in every cohort.
    """
    raw = transformed(names, signals)
    known = ~np.isnan(raw)
    means = np.where(known, raw, 0).sum(0) / np.maximum(known.sum(0), 1)
    raw = np.where(known, raw, means)
    target = np.array([logit(value) for value in dice])
    weight = _alike(np.array(trainings))
    kinds = np.array(cohorts)
    centred, wanted = np.empty_like(raw), np.empty_like(target)
    for kind in np.unique(kinds):
        mine = kinds == kind
        centred[mine] = raw[mine] - np.average(raw[mine], axis=0, weights=weight[mine])
        wanted[mine] = target[mine] - np.average(target[mine], weights=weight[mine])
    scales = np.maximum(np.sqrt(np.average(centred**2, axis=0, weights=weight)), 1e-6)
    standard = centred / scales
    signed = np.array([-1.0 if name in DOUBTS else 1.0 for name in names])
    inside = [kinds == kind for kind in np.unique(kinds)]
    smallest = np.min([_correlations(signed * standard[one], wanted[one], weight[one]) for one in inside], axis=0)
    votes = signed * np.where(smallest >= least, smallest, 0).clip(0)
    together = standard @ votes
    scale = np.average(together * wanted, weights=weight) / max(float(np.average(together**2, weights=weight)), 1e-12)
    slopes = scale * votes
    here = ((raw - means) / scales).clip(-4, 4)
    used = [position for position, slope in enumerate(slopes) if slope != 0]
    return QualityModel(
        tuple(names[position] for position in used),
        tuple(float(means[position]) for position in used),
        tuple(float(scales[position]) for position in used),
        tuple(float(slopes[position]) for position in used),
        float(np.average(target - here @ slopes, weights=weight)),
        math.nan,
        dict(origin),
    )


def _alike(trainings: NDArray[np.str_]) -> NDArray[np.float64]:
    """(rows,): weights with which every training counts as much as any other; their mean is 1."""
    _, which, counts = np.unique(trainings, return_inverse=True, return_counts=True)
    return np.asarray(len(trainings) / (len(counts) * counts[which]), np.float64)


def _correlations(
    values: NDArray[np.float64], wanted: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(signals,): correlation of each column, whose mean is 0, with what is wanted; 0 for one that does not vary."""
    spread = np.sqrt(np.average(values**2, axis=0, weights=weight) * np.average(wanted**2, weights=weight))
    return np.asarray(np.average(values * wanted[:, None], axis=0, weights=weight) / np.maximum(spread, 1e-12))
