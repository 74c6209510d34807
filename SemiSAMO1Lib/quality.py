"""How good a prediction probably is, from signals that need no reference: a linear model that learns from reviews.

The signals of a class (`engine/evaluation/signals.py`) are transformed, standardised and added up to the logit of its
Dice. The shipped coefficients were fitted on other cohorts (`quality.json` says which); from `ENOUGH` reviewed cases on
they are fitted again, towards the shipped ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files

#: Reviewed cases from which on the estimate is fitted to a project's own scans.
ENOUGH = 10

#: Likely Dice from which on a prediction is called high or medium.
HIGH, MEDIUM = 0.85, 0.7

#: Dice is kept this far from 0 and 1 before its logit is taken.
_MARGIN = 0.01

#: Signals that are shares or Dice values; their logit is taken. All others are taken as they are.
SHARES = frozenset(
    {
        "expected_dice",
        "inside_probability",
        "with_propagation",
        "network_with_propagation",
        "between_rounds",
        "between_passes",
        "reverse",
        "with_cohort",
        "with_neighbours",
        "neighbours_inside",
        "neighbours_expected",
    }
)

#: Signals of which less is better.
DOUBTS = frozenset(
    {
        "inside_entropy",
        "boundary_entropy",
        "entropy_by_volume",
        "entropy_by_surface",
        "volume_to_template",
        "volume_to_cohort",
        "residual",
    }
)


@dataclass(frozen=True)
class QualityModel:
    """Coefficients of the estimate.

    Attributes:
        names: of the signals.
        means, scales: of the transformed signals where the model was fitted.
        coefficients: of the standardised signals.
        intercept: logit of the Dice where all signals are at their means.
        error: mean absolute error of a case's likely Dice, on scans that took no part in the fit.
        origin: what it was fitted on.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    coefficients: tuple[float, ...]
    intercept: float
    error: float
    origin: dict[str, Any]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> QualityModel:
        lists = {key: tuple(value[key]) for key in ("names", "means", "scales", "coefficients")}
        return cls(**lists, intercept=value["intercept"], error=value["error"], origin=dict(value["origin"]))

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def likely(self, classes: Sequence[Mapping[str, float | None]]) -> list[float]:
        """The likely Dice of each class, 0 to 1, from its signals; a signal that is missing counts as average."""
        if not classes:
            return []
        logit = self.intercept + self.standardised(classes) @ np.array(self.coefficients)
        return [float(value) for value in 1 / (1 + np.exp(-logit))]

    def standardised(self, classes: Sequence[Mapping[str, float | None]]) -> NDArray[np.float64]:
        """(classes, signals): transformed signals, less their means, in units of their scales."""
        values = (transformed(self.names, classes) - np.array(self.means)) / np.array(self.scales)
        return np.asarray(np.nan_to_num(values, nan=0.0).clip(-4, 4))


def transformed(names: Sequence[str], classes: Sequence[Mapping[str, float | None]]) -> NDArray[np.float64]:
    """(classes, names): the logit of a share, any other signal as it is; NaN where it is missing."""
    given = [[math.nan if (value := one.get(name)) is None else value for name in names] for one in classes]
    values = np.array(given, float).reshape(len(classes), len(names))
    shares = [name in SHARES for name in names]
    values[:, shares] = _logits(values[:, shares])
    return values


def logit(dice: float) -> float:
    """Log odds of a Dice value, kept away from 0 and 1."""
    return float(_logits(np.array(dice)))


def _logits(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = shares.clip(_MARGIN, 1 - _MARGIN)
    return np.asarray(np.log(inside / (1 - inside)))


@functools.cache
def shipped() -> QualityModel:
    """The model that comes with the library."""
    return QualityModel.from_json(files.read_json(Path(__file__).with_name("quality.json")))


@dataclass(frozen=True)
class Reviewed:
    """A case that a person decided about: the signals of its classes then, and each one's Dice with the saved label.

    Not `measured`: nobody drew a label; the Dice is what the decision lets one expect.
    """

    signals: tuple[Mapping[str, float | None], ...]
    dice: tuple[float, ...]
    measured: bool = True


def refitted(model: QualityModel, reviewed: Sequence[Reviewed], penalty: float = 20.0) -> QualityModel:
    """The model fitted to a project's own reviews, towards the one it starts from.

    `error` is by leaving each case out whose Dice was measured; the error of the model that it starts from counts as
    `ENOUGH` such cases, unless that would make it smaller. With fewer than `ENOUGH` reviewed cases the model stays as
    it is.
    """
    if len(reviewed) < ENOUGH:
        return model

    standard = model.standardised([one for case in reviewed for one in case.signals])
    ends = np.cumsum([len(case.signals) for case in reviewed])[:-1]
    rows = np.split(np.c_[np.ones(len(standard)), standard], ends)
    wanted = [np.array([logit(value) for value in case.dice]) for case in reviewed]
    start = np.array([model.intercept, *model.coefficients])
    stiff = np.diag([1.0, *[penalty] * len(model.coefficients)])  # the level is learned fast, the slopes slowly
    squares = np.array([x.T @ x for x in rows])
    misses = np.array([x.T @ (y - x @ start) for x, y in zip(rows, wanted, strict=True)])
    all_squares, all_misses = squares.sum(0) + stiff, misses.sum(0)
    measured = [place for place, case in enumerate(reviewed) if case.measured]
    without = np.linalg.solve(all_squares - squares[measured], (all_misses - misses[measured])[..., None])[..., 0]
    errors = [
        abs(float(np.mean(1 / (1 + np.exp(-rows[place] @ (start + other)))) - np.mean(reviewed[place].dice)))
        for place, other in zip(measured, without, strict=True)
    ]
    found = start + np.linalg.solve(all_squares, all_misses)
    origin = {**model.origin, "reviewed": len(reviewed)}
    slopes = tuple(found[1:].tolist())
    mixed = float(np.mean([*errors, *[model.error] * ENOUGH]))
    error = max(mixed, float(np.mean(errors))) if len(errors) >= ENOUGH else mixed
    return replace(model, intercept=float(found[0]), coefficients=slopes, error=error, origin=origin)


def level(likely: float) -> str:
    """A likely Dice in words: low, medium or high."""
    return "high" if likely >= HIGH else "medium" if likely >= MEDIUM else "low"
