"""How far a run is: stages weighted by what they usually cost, so that the fraction grows evenly with time."""

from __future__ import annotations

import math
from typing import Any, Protocol

from ..costs import REFERENCE_STEP_S, TRIED, WITH_TEACHER, Work, stage_seconds, width_of
from .cohort import Cohort
from .config import TrainingConfig
from .observer import Observer
from .propagation.registry import REGISTERING


class Steps(Protocol):
    """Who is told how far a stage is."""

    @property
    def observer(self) -> Observer: ...

    def step(self, stage: str, done: int, of: int) -> None: ...


class Progress:
    """Turns "stage s, n of m" into one fraction of the whole run; `done` of it was done before these stages."""

    def __init__(
        self, observer: Observer, cohort: Cohort, config: TrainingConfig, done: float = 0.0, on_gpu: bool = False
    ) -> None:
        self.observer = observer
        costs = stage_seconds(_work(cohort, config), 0.0 if on_gpu else REFERENCE_STEP_S, on_gpu)
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


def _work(cohort: Cohort, config: TrainingConfig) -> Work:
    """What this run has to do."""
    plan, count = cohort.plan, len(cohort.cases)
    cases_ml = sum(math.prod(case.geometry.extent) for case in cohort.cases) / 1e6
    votes = config.neighbour_share > 0
    return Work(
        cases=count,
        registered=cases_ml / plan.registration_spacing**3,
        trained=cases_ml / math.prod(plan.spacing),
        whole=sum(case.geometry.voxels for case in cohort.cases) / 1e6,
        step=(plan.batch * WITH_TEACHER + plan.labelled) * math.prod(plan.patch) / 1e6,
        rounds=config.rounds,
        iterations=config.iterations,
        passes=config.test_time_passes,
        links=min(config.neighbours, count - 1) if votes else 0,
        tried=TRIED if votes and config.neighbour_gain > 0 else 0,
        looked_at=len(cohort.labelled) - 1,
        detours=config.detours and config.generalist in REGISTERING,
        width=width_of(plan.filters[0]),
    )


def _running_sum(values: list[float]) -> list[float]:
    return [sum(values[:position]) for position in range(len(values))]
