"""A round's training: what it learns from, the weights it begins with, and a smaller batch where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from ..volume import Geometry, Volume
from .class_volumes import measured_shift
from .cohort import Cohort
from .config import TrainingConfig
from .data.intensities import scale_intensities
from .data.patches import TrainingCase
from .devices import make_fabric
from .inference.sliding import predict_probabilities
from .learners import Learner, learner_named
from .observer import Observer
from .out_of_memory import is_out_of_memory
from .planning import plan_to_json, smaller
from .progress import Progress
from .ranks import Ranks
from .sampling import PatchSource
from .training import Judge, train_round

#: Weights below `weights` of an earlier run that the first round (without `warm_start`: every one) begins with;
#: absent: from scratch.
EARLIER = "round-0.pt"

#: Gives a value, larger is better, to a function that gives the class probabilities (C, z, y, x) of an image.
CohortJudge = Callable[[Callable[[NDArray[Any]], NDArray[np.float16]], int], float]


def train_specialist(
    cohort: Cohort,
    number: int,
    config: TrainingConfig,
    fabric: Fabric,
    progress: Progress,
    judge: CohortJudge | None = None,
) -> tuple[Learner, Fabric]:
    """Train a specialist on the template's label and the pseudo-labels of this round, or on labels alone; where memory
    does not suffice, with a smaller batch or patch. Also returns the fabric to go on with: a smaller patch may have
    another precision."""
    ranks, store, observer = Ranks(fabric), cohort.store, progress.training(number)
    goes_on = ranks.as_first(ranks.first and store.has("weights", EARLIER))
    labelled, pseudo = _training_cases(cohort, number, config, ranks, progress.observer, goes_on)
    start_from = _weights_to_begin_with(number, config, goes_on)

    def match_volumes(learner: Learner) -> None:
        names = ("shifts", f"{number}.json")
        shown = pseudo if learner.reads_pseudo_labels and config.pseudo_weight > 0 else []

        def shift() -> object:
            return measured_shift(learner, labelled, shown, cohort.plan, config, number, fabric, observer).tolist()

        ranks.once(lambda: store.save_json(shift(), *names))
        learner.shift_logits(store.json(*names))

    while True:
        source = PatchSource(labelled, pseudo, cohort.plan, config, number, fabric.world_size)
        judged, matched = _judge_of(cohort, fabric, judge), match_volumes if config.match_volumes else None
        try:
            learner = train_round(
                number, source, cohort.plan, config, store, fabric, observer, start_from, judged, matched
            )
            break
        except (RuntimeError, MemoryError) as error:
            plan = smaller(cohort.plan, config, fabric.device.type)
            if plan is None or not is_out_of_memory(error) or fabric.world_size > 1:
                raise
            less = f"batch {plan.batch}, {plan.labelled} labelled, patch {plan.patch}"
            text = f"out of memory ({error}); going on with {less}"
        observer.event("warning", text=text)
        torch.cuda.empty_cache()  # only now: while an error is handled, its traceback holds what did not fit
        if plan.precision != cohort.plan.precision:
            fabric = make_fabric(str(fabric.device), plan.precision)
        cohort.plan = plan
        store.save_json(plan_to_json(plan), "plan.json")
    if judge is not None:
        learner.load_state_dict(store.tensors("judged", f"{number}.pt")["learner"])
    return learner, fabric


def _training_cases(
    cohort: Cohort, number: int, config: TrainingConfig, ranks: Ranks, observer: Observer, goes_on: bool
) -> tuple[list[TrainingCase], list[TrainingCase]]:
    """What a round learns from: labelled cases, and pseudo-labelled ones, none where it learns from labels alone."""
    distances = learner_named(config.learner).with_distance
    if ranks.count > 1:  # what all read is made once
        for _, case_id in ranks.share(cohort.ids, observer):
            cohort.image(case_id)
        ranks.once(lambda: cohort.labelled_cases(config.seed, distances))
    alone = learns_from_labels_alone(number, config, goes_on)
    pseudo = [] if alone else cohort.pseudo_cases(number, config.seed)
    return cohort.labelled_cases(config.seed, distances), pseudo


def _judge_of(cohort: Cohort, fabric: Fabric, judge: CohortJudge | None) -> Judge | None:
    """The judge, who knows images, as one who is given a learner."""
    if judge is None:
        return None

    def value_of(learner: Learner) -> float:
        model = learner.inference_model()

        def predicted(image: NDArray[Any]) -> NDArray[np.float16]:
            scaled = scale_intensities(Volume(image, Geometry(image.shape)), cohort.plan.intensity)
            return predict_probabilities(model, scaled, cohort.plan, fabric, 1, 0)

        value = judge(predicted, cohort.plan.classes)
        model.train()  # predicting switched the dropout off
        return value

    return value_of


def learns_from_labels_alone(number: int, config: TrainingConfig, goes_on: bool) -> bool:
    """Whether a round draws all its patches from labelled scans (`labels_first`): the first, where others follow, of
    learners that hear of the unlabelled ones by pseudo-labels alone. Not where the training goes on from earlier
    weights, which have learned more than registration says."""
    kind = learner_named(config.learner)
    by_pseudo_labels = kind.reads_pseudo_labels and config.pseudo_weight > 0 and not kind.asks_generalists
    return config.labels_first and by_pseudo_labels and number == 1 < config.rounds and not goes_on


def _weights_to_begin_with(number: int, config: TrainingConfig, goes_on: bool) -> str | None:
    """The round before, if it is to go on; else an earlier run's weights, where they were put there (`goes_on`)."""
    if config.warm_start and number > 1:
        return f"round-{number - 1}.pt"
    return EARLIER if goes_on else None
