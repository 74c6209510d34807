"""A network draws about as much of each class as it learned from.

A short training ends unsure of the edges of small structures, and the Dice loss prefers too large there to too small;
the next round would learn the larger volume. So after a round each class's logit is shifted by one number, the same for
all scans, which belongs to the network from then on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray

from .config import TrainingConfig
from .data.patches import TrainingCase
from .inference.sliding import predict_probabilities
from .learners import Learner
from .learners.generators import hash_key
from .observer import Observer, stop_if_asked
from .planning import Plan

#: Scans that are predicted to measure it: of the labelled ones at most half.
SCANS = 8

#: Voxels of a scan that are looked at, drawn at random.
MOST_VOXELS = 500_000

#: No class is shifted further: its odds change by e⁴ at most.
FURTHEST = 4.0

#: A class that is larger or smaller by less than this share is left; others are brought to that edge.
TOLERANCE = 0.05

#: Steps of the fixed point, and the share of the way that each goes.
_STEPS, _SHARE = 60, 0.7

#: Probabilities below do not count: float16 has nothing there.
_SMALLEST = 1e-6


def measured_shift(
    learner: Learner,
    labelled: Sequence[TrainingCase],
    pseudo: Sequence[TrainingCase],
    plan: Plan,
    config: TrainingConfig,
    number: int,
    fabric: Fabric,
    observer: Observer,
) -> NDArray[np.float32]:
    """What to add to each class's logit (C,) so that the network draws what it learned from, by eight of its scans.

    Zeros where the network, shifted, agrees less with what it learned from: one that has learned next to nothing.

    Args:
        learner: after round `number`; its network is in training mode again afterwards.
        labelled, pseudo: what the round learned from, on the training grid.
        plan, config: of the training.
        number: of the round.
        fabric: device and precision.
        observer: asked whether to stop.

    Raises:
        Stopped: the observer asked for it.
    """
    generator = np.random.default_rng(hash_key(config.seed, number, len(labelled), len(pseudo)))
    some = [labelled[n] for n in generator.permutation(len(labelled))[: SCANS // 2 if pseudo else SCANS]]
    some += [pseudo[n] for n in generator.permutation(len(pseudo))[: SCANS - len(some)]]
    model = learner.inference_model()
    logits, targets = [], []
    for case in some:
        stop_if_asked(observer)
        image = np.asarray(case.image, np.float32)
        found = predict_probabilities(model, image, plan, fabric, 1, config.seed).reshape(plan.classes, -1)
        target = np.asarray(case.target)
        target = (target.argmax(0) if target.ndim == 4 else target).reshape(-1)
        known = np.flatnonzero(np.asarray(case.weight).reshape(-1) > 0)
        if len(known) > MOST_VOXELS:
            known = np.sort(generator.choice(known, MOST_VOXELS, replace=False))
        logits.append(np.log(np.maximum(found[:, known].astype(np.float32), _SMALLEST)))
        targets.append(target[known])
    model.train()  # predicting switched the dropout off
    said, target = np.concatenate(logits, 1), np.concatenate(targets)
    shift = volume_shift(said, target)
    better = _agreement(said + shift[:, None], target) > _agreement(said, target)
    return shift if better else np.zeros_like(shift)


def volume_shift(logits: NDArray[Any], target: NDArray[Any]) -> NDArray[np.float32]:
    """Shifts (C,) with which as many voxels fall to each foreground class as the target has, give or take `TOLERANCE`.

    The background is not shifted, nor a class that the target lacks, and none further than `FURTHEST`.

    Args:
        logits: (C, n) of n voxels; what all classes of a voxel share does not matter.
        target: (n,) class indices.
    """
    classes = len(logits)
    wanted = np.bincount(target, minlength=classes).astype(float)
    there, edge = wanted[1:] > 0, math.log1p(TOLERANCE)
    shift = np.zeros(classes, np.float32)
    for _ in range(_STEPS):
        drawn = np.bincount((logits + shift[:, None]).argmax(0), minlength=classes)
        off = np.log(np.maximum(drawn[1:], 1) / np.maximum(wanted[1:], 1)) * there
        step = _SHARE * (off - np.clip(off, -edge, edge))
        if not step.any():
            break
        shift[1:] = np.clip(shift[1:] - step, -FURTHEST, FURTHEST)
    return shift


def _agreement(logits: NDArray[Any], target: NDArray[Any]) -> float:
    """Mean Dice of the foreground classes that the target has; 1 where it has none."""
    found, dice = logits.argmax(0), []
    for value in range(1, len(logits)):
        drawn, wanted = found == value, target == value
        if wanted.any():
            dice.append(2 * np.sum(drawn & wanted) / (drawn.sum() + wanted.sum()))
    return float(np.mean(dice)) if dice else 1.0
