"""Schedules as functions of progress t / t_max, so that short and long runs go through the same phases."""

from __future__ import annotations

import math


def poly(progress: float, power: float = 0.9) -> float:
    """Factor of the learning rate: (1 - t / t_max)^power."""
    return max(0.0, 1 - progress) ** power


def consistency_ramp(progress: float) -> float:
    """exp(-5 (1 - ½ t / t_max)²): the published sigmoid ramp, which ends half-way up (SemiSAM-O1)."""
    return math.exp(-5 * (1 - 0.5 * progress) ** 2)


def sigmoid_ramp(progress: float) -> float:
    """exp(-5 (1 - t / t_max)²): from 0.007 to 1."""
    return math.exp(-5 * (1 - progress) ** 2)


def steep_ramp(progress: float) -> float:
    """exp(-5 (1 - t / t_max)): the consistency ramp of SemiSAM."""
    return math.exp(-5 * (1 - progress))


def ramp_down(progress: float) -> float:
    """exp(-5 t / t_max): the ramp of SemiSAM's masks."""
    return math.exp(-5 * progress)


def pseudo_ramp(progress: float, share: float) -> float:
    """w(t) = min(1, t / (share · t_max))."""
    return min(1.0, progress / share)


def ema_decay(step: int, largest: float) -> float:
    """min(1 - 1 / (t + 1), largest) for the t-th update, t from 0."""
    return min(1 - 1 / (step + 1), largest)
