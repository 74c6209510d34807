"""How far a run is: stages weighted by what they usually cost, so that the fraction grows evenly with time."""

from __future__ import annotations

import math
from typing import Any, Protocol

from .cohort import Cohort
from .config import TrainingConfig
from .observer import Observer
from .propagation.registry import REGISTERING
from .refinement.check import ASKED

#: Usual cost on two CPU cores, seconds per million voxels: registering, linking two cases, letting a case's neighbours
#: vote, one training step, predicting a case, signals of its quality, its check and pseudo-label, its results (of its
#: own grid).
REGISTRATION_COST = 14.0
LINK_COST = 2.2
ANSWER_COST = 1.5
STEP_COST = 3.8
PREDICTION_COST = 6.0
SIGNALS_COST = 0.7
REFINEMENT_COST = 0.5
RESULTS_COST = 0.2

#: Cost of what is carried again, as a share of carrying all.
DETOURS_SHARE = 0.5


class Steps(Protocol):
    """Who is told how far a stage is."""

    @property
    def observer(self) -> Observer: ...

    def step(self, stage: str, done: int, of: int) -> None: ...


class Progress:
    """Turns "stage s, n of m" into one fraction of the whole run; `done` of it was done before these stages."""

    def __init__(self, observer: Observer, cohort: Cohort, config: TrainingConfig, done: float = 0.0) -> None:
        self.observer = observer
        plan = cohort.plan
        count = len(cohort.cases)
        cases_ml = sum(math.prod(case.geometry.extent) for case in cohort.cases) / 1e6
        patch = (plan.batch * 4 / 3 + 1) * math.prod(plan.patch) / 1e6
        training_ml = cases_ml / math.prod(plan.spacing)
        predicted = training_ml * config.test_time_passes
        costs = {"propagation": REGISTRATION_COST * cases_ml / plan.registration_spacing**3 + 0.1 * count}
        registers = config.generalist in REGISTERING
        costs["detours"] = DETOURS_SHARE * costs["propagation"] if registers else 0.0
        links = LINK_COST * min(config.neighbours, count - 1) if config.neighbour_share > 0 else 0.0
        costs["links"] = links * training_ml + 0.01 * count
        answering = ANSWER_COST * training_ml + 0.05 * count
        costs["answer 0"] = answering
        signals = SIGNALS_COST * training_ml + 0.02 * count
        results = RESULTS_COST * sum(case.geometry.voxels for case in cohort.cases) / 1e6 + 0.05 * count
        costs["signals 0"], costs["results 0"] = signals, results
        for number in range(1, config.rounds + 1):
            costs[f"training {number}"] = STEP_COST * patch * config.iterations
            costs[f"prediction {number}"] = PREDICTION_COST * predicted + 0.1 * count
            if config.neighbour_share > 0 and config.neighbour_gain > 0:
                costs[f"votes {number}"] = answering * min(1.0, ASKED / max(count, 1))
            costs[f"answer {number}"] = answering
            costs[f"signals {number}"], costs[f"results {number}"] = signals, results
            if number < config.rounds:
                costs[f"refinement {number}"] = REFINEMENT_COST * training_ml + 0.02 * count
        total = sum(costs.values()) / (1 - done)
        self._share = {stage: cost / total for stage, cost in costs.items()}
        before = _running_sum(list(self._share.values()))
        self._before = {stage: done + one for stage, one in zip(costs, before, strict=True)}

    def step(self, stage: str, done: int, of: int) -> None:
        """Say that `done` of `of` parts of a stage are finished."""
        fraction = self._before[stage] + self._share[stage] * done / max(of, 1)
        self.observer.event("progress", stage=stage, done=done, of=of, fraction=min(fraction, 1.0))

    def finish(self) -> None:
        self.observer.event("progress", stage="finished", done=1, of=1, fraction=1.0)

    def training(self, number: int) -> Observer:
        """The observer of a training round: its losses move the progress too."""
        return _TrainingObserver(self, number)


class _TrainingObserver:
    def __init__(self, progress: Progress, number: int) -> None:
        self._progress = progress
        self._number = number

    def event(self, kind: str, **fields: Any) -> None:
        self._progress.observer.event(kind, **fields)
        if kind == "losses":
            self._progress.step(f"training {self._number}", fields["iteration"], fields["of"])

    def should_stop(self) -> bool:
        return self._progress.observer.should_stop()


def _running_sum(values: list[float]) -> list[float]:
    return [sum(values[:position]) for position in range(len(values))]
