"""Fit the model of likely quality: which signals tell how much, from trainings whose truth is known.

Signals of one prediction say much the same, and which of them says it best differs from anatomy to anatomy. The
coefficients of a regression would be decided by chance among them. So each counts by its own correlation with the
truth, and one scale is fitted for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...quality import DOUBTS, QualityModel, logit, transformed


def fit(
    signals: Sequence[Mapping[str, float | None]],
    dice: Sequence[float],
    groups: Sequence[str],
    names: Sequence[str],
    origin: Mapping[str, Any],
) -> QualityModel:
    """Fit the model, every group counting alike.

    Correlations are those inside the groups: that one anatomy is harder than another must not be mistaken for the
    effect of a signal. No signal counts against its meaning: more agreement is never worse. The intercept is the
    groups' mean.

    Args:
        signals: of each class of each case.
        dice: their true Dice.
        groups: the training that each belongs to.
        names: signals to use.
        origin: what the data are.
    """
    raw = transformed(names, signals)
    known = ~np.isnan(raw)
    means = np.where(known, raw, 0).sum(0) / np.maximum(known.sum(0), 1)
    raw = np.where(known, raw, means)
    target = np.array([logit(value) for value in dice])
    names_of_groups = np.array(groups)
    weight = np.empty(len(target))
    centred, wanted = np.empty_like(raw), np.empty_like(target)
    for group in np.unique(names_of_groups):
        mine = names_of_groups == group
        weight[mine] = len(target) / (len(np.unique(names_of_groups)) * mine.sum())
        centred[mine], wanted[mine] = raw[mine] - raw[mine].mean(0), target[mine] - target[mine].mean()
    scales = np.maximum(np.sqrt(np.average(centred**2, axis=0, weights=weight)), 1e-6)
    signed = np.array([-1.0 if name in DOUBTS else 1.0 for name in names])
    standard = centred / scales
    votes = signed * np.maximum(signed * np.average(standard * wanted[:, None], axis=0, weights=weight), 0)
    together = standard @ votes
    scale = np.average(together * wanted, weights=weight) / max(float(np.average(together**2, weights=weight)), 1e-12)
    slopes = scale * votes
    here = ((raw - means) / scales).clip(-4, 4)
    return QualityModel(
        tuple(names),
        tuple(float(value) for value in means),
        tuple(float(value) for value in scales),
        tuple(float(value) for value in slopes),
        float(np.average(target - here @ slopes, weights=weight)),
        math.nan,
        dict(origin),
    )
