"""A network draws about as much of each class as it learned from.

A short training ends unsure of the edges of small structures, and the Dice loss prefers too large there to too small;
the next round would learn the larger volume. So after a round each class's logit is shifted by one number, the same for
all scans, which belongs to the network from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray

from .config import TrainingConfig
from .data.patches import TrainingCase
from .evaluation.metrics import dice
from .inference.ensemble import predicted_where_it_fits
from .learners import Learner
from .learners.generators import hash_key
from .observer import Observer, stop_if_asked
from .out_of_memory import is_out_of_memory
from .planning import Plan
from .volume_shift import volume_shift

#: Scans that are predicted to measure it: of the labelled ones at most half.
SCANS = 8

#: Voxels of a scan that are looked at, drawn at random; fewer where all scans' logits would be more than `MOST_LOGITS`.
MOST_VOXELS = 500_000
MOST_LOGITS = 40_000_000

#: A network that agrees less than this (Dice) with what it learned from has learned next to nothing and is left alone:
#: where each voxel is as likely as the next a shift moves nearly all of them or none.
LEARNED = 0.5

#: Less probable is as good as impossible.
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

    Zeros where the network, shifted, agrees less with what it learned from, or less than `LEARNED`, and where no scan
    says what is background: one that knows nothing of some label knows no background.

    Args:
        learner: after round `number`, not shifted.
        labelled, pseudo: what the round learned from, on the training grid.
        plan, config: of the training.
        number: of the round.
        fabric: device and precision.
        observer: asked whether to stop; gets 'progress' events.

    Raises:
        Stopped: the observer asked for it.
    """
    generator = np.random.default_rng(hash_key(config.seed, number, len(labelled), len(pseudo)))
    whole = [case for case in labelled if _knows_background(case)]
    some = [whole[n] for n in generator.permutation(len(whole))[: SCANS // 2 if pseudo else SCANS]]
    some += [pseudo[n] for n in generator.permutation(len(pseudo))[: SCANS - len(some)]]
    model = learner.inference_model()
    most = min(MOST_VOXELS, MOST_LOGITS // (plan.classes * max(len(some), 1)))
    logits, targets = [], []
    try:
        for position, case in enumerate(some):
            stop_if_asked(observer)
            image = np.asarray(case.image, np.float32)
            said, _ = predicted_where_it_fits(model, image, plan, fabric, 1, config.seed, observer, "prediction")
            found = said.reshape(plan.classes, -1)
            target = np.asarray(case.target)
            target = (target.argmax(0) if target.ndim == 4 else target).reshape(-1)
            known = np.flatnonzero(np.asarray(case.weight).reshape(-1) > 0)
            if len(known) > most:
                known = np.sort(generator.choice(known, most, replace=False))
            logits.append(np.log(np.maximum(found[:, known].astype(np.float32), _SMALLEST)))
            targets.append(target[known])
            observer.event("progress", stage=f"volumes {number}", done=position + 1, of=len(some))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        observer.event(
            "warning", text=f"volumes of round {number}: the memory does not suffice; classes stay as they are"
        )
        logits = []
    if not logits:
        return np.zeros(plan.classes, np.float32)
    said, target = np.concatenate(logits, 1), np.concatenate(targets)
    del logits
    shift = volume_shift(said, target)
    needed = max(_agreement(said, target), LEARNED)
    said += shift[:, None]
    return shift if _agreement(said, target) > needed else np.zeros_like(shift)


def _knows_background(case: TrainingCase) -> bool:
    target, weight = np.asarray(case.target), np.asarray(case.weight)
    return bool(((target == 0) & (weight > 0)).any())


def _agreement(logits: NDArray[np.floating], target: NDArray[np.integer]) -> float:
    """Mean Dice of the foreground classes that the target has; 1 where it has none."""
    found, there = logits.argmax(0), [value for value in range(1, len(logits)) if (target == value).any()]
    return float(np.mean([dice(found == value, target == value) for value in there])) if there else 1.0
