"""The specialists of a finished run that predict, as one: the last, or the mean of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from ..config import TrainingConfig
from ..data.store import Store
from ..learners import learner_named
from ..memory import or_on_cpu
from ..observer import Observer
from ..planning import Plan
from ..refinement.fusion import running_mean
from ..training import load_weights, make_fabric
from .sliding import predict_probabilities


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
    mean = None
    first = 1 if config.ensemble_rounds else config.rounds

    def predict_on(where: torch.device) -> NDArray[np.float16]:
        runner = fabric if where.type == fabric.device.type else make_fabric("cpu", "32-true")
        model = learner.inference_model().to(where)
        return predict_probabilities(model, image, plan, runner, config.test_time_passes, config.seed)

    for count, number in enumerate(range(max(first, 1), config.rounds + 1), start=1):
        learner = learner_named(config.learner)(plan, config)
        learner.setup(fabric)
        load_weights(learner, store, f"round-{number}.pt")
        found = or_on_cpu(predict_on, fabric.device, observer, "prediction")
        mean = found if mean is None else running_mean(mean, found, count)
        done = (1 + number) / (1 + config.rounds)
        observer.event("progress", stage="prediction", done=number, of=config.rounds, fraction=done)
    return mean
