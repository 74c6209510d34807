"""The specialists of a finished run that predict, as one: the last, or the mean of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn

from ..config import TrainingConfig
from ..data.store import Store
from ..devices import make_fabric
from ..learners import Learner, learner_named
from ..memory import or_on_cpu
from ..observer import Observer
from ..planning import Plan
from ..refinement.fusion import running_mean
from ..training import load_weights
from .sliding import Agreement, predict_probabilities


def predicted_by_all(
    image: NDArray[Any], plan: Plan, config: TrainingConfig, fabric: Fabric, store: Store, observer: Observer
) -> NDArray[np.float16] | None:
    """Mean prediction of the specialists that the last round used; None when no round trained one.

    Args:
        image: (z, y, x) scaled intensities on the training grid.
        plan, config, store: of the run; its weights are read.
        fabric: device and precision.
        observer: gets progress.

    Returns:
        (C, z, y, x) float16.
    """
    mean, of = None, config.rounds if config.ensemble_rounds else 1
    for count, learner in enumerate(predicting(plan, config, fabric, store), start=1):
        model, passes = learner.inference_model(), config.test_time_passes
        found, _ = predicted_where_it_fits(model, image, plan, fabric, passes, config.seed, observer, "prediction")
        mean = found if mean is None else running_mean(mean, found, count)
        done = (1 + config.rounds * count / of) / (1 + config.rounds)
        observer.event("progress", stage="prediction", done=count, of=of, fraction=done)
    return mean


def predicting(plan: Plan, config: TrainingConfig, fabric: Fabric, store: Store) -> Iterator[Learner]:
    """The learners of a finished run whose networks predict: that of the last round, or (`ensemble_rounds`) of all."""
    first = 1 if config.ensemble_rounds else config.rounds
    for number in range(max(first, 1), config.rounds + 1):
        learner = learner_named(config.learner)(plan, config)
        learner.setup(fabric)
        load_weights(learner, store, f"round-{number}.pt")
        yield learner


def predicted_where_it_fits(
    model: nn.Module,
    image: NDArray[Any],
    plan: Plan,
    fabric: Fabric,
    passes: int,
    seed: int,
    observer: Observer,
    what: str,
) -> tuple[NDArray[np.float16], Agreement]:
    """`predict_probabilities` on the fabric's device, or on the CPU where its memory does not suffice.

    Args:
        model, image, plan, fabric, passes, seed: as there.
        observer, what: who is told that the CPU does it, and of what.

    Returns:
        class probabilities (C, z, y, x), and how far the passes agree.
    """

    def predict_on(where: torch.device) -> tuple[NDArray[np.float16], Agreement]:
        runner, agreement = fabric, Agreement(plan.classes)
        if where.type != fabric.device.type:
            runner = make_fabric("cpu", "32-true")
        found = predict_probabilities(model.to(where), image, plan, runner, passes, seed, agreement=agreement)
        return found, agreement

    return or_on_cpu(predict_on, fabric.device, observer, what)
