"""Segment further scans with a finished training: its propagation, its specialists, and cases like them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from ..volume import Volume
from .answers import Said, atlases_of, combined
from .cases import CaseResult, EngineCase, LabelledCase, Propagation
from .cohort import Cohort
from .config import TrainingConfig
from .data.store import Store
from .devices import make_fabric
from .inference.ensemble import predicted_by_all
from .inference.uncertainty import case_scores, to_case_grid
from .library import Library
from .memory import or_on_cpu
from .observer import Observer
from .planning import Plan
from .propagation.base import Propagator
from .propagation.registry import Request, make_propagator
from .refinement.check import Check, check_of
from .surroundings import CUT_OFF, Finder, Surroundings, in_whole


class FinishedRun:
    """A finished run that segments further scans; what depends on the labelled scans is computed once.

    Args:
        labelled, classes, config, store: of the finished run; nothing is written to its store.
        observer: gets progress.
        features: folder of kept features.
        without: cases whose predictions of this run are not believed any more: they have no vote.

    Raises:
        FileNotFoundError: the run is not finished.
    """

    def __init__(
        self,
        labelled: Sequence[LabelledCase],
        classes: int,
        config: TrainingConfig,
        store: Store,
        observer: Observer,
        features: Path | None = None,
        without: Collection[str] = (),
    ) -> None:
        self.without = without
        parts = Surroundings.of(store)
        self.labelled = [parts.labelled(case) for case in labelled]
        self._finder = Finder(labelled[0], config, store, observer, without) if parts.boxes else None
        self.classes, self.config = classes, config
        self.store, self.observer, self.features = store, observer, features
        self.plan = Plan.model_validate(store.json("plan.json"))
        self._ready: dict[str, tuple[Propagator, Any]] = {}
        self._libraries: dict[str, Library] = {}

    def segment(self, volume: Volume) -> CaseResult:
        """Segment a scan. Its scores have a `warning` where the part of it that was looked at may be the wrong one."""
        fabric = make_fabric(self.config.device, self.plan.precision)
        if self._finder is None:
            return self._segment(volume, fabric)
        box, found = self._finder.box(volume, fabric.device)
        part = self._segment(box.of(volume), fabric)
        result, warning = in_whole(part, box, volume.geometry, found), ""
        if not found:
            warning = "the template's label was not found in this scan; its middle was looked at"
        elif box.cuts_off(part.prediction.array, volume.geometry):
            warning = CUT_OFF
        return replace(result, scores={**result.scores, "warning": warning}) if warning else result

    def _segment(self, volume: Volume, fabric: Fabric) -> CaseResult:
        config = self.config
        cohort = Cohort([EngineCase("scan", volume.geometry, lambda: volume)], self.labelled, self.plan, self.store)
        grid = cohort.grid(volume.geometry)

        def carry(where: torch.device) -> Propagation:
            return self._library(where).carry(*self._on(where), volume, grid)

        found = or_on_cpu(carry, fabric.device, self.observer, "propagation")
        confidence = found.confidence.cpu().numpy()
        probabilities = found.probabilities.cpu().numpy()
        self.observer.event("progress", stage="propagation", done=1, of=1, fraction=1 / (1 + config.rounds))
        image = cohort.scaled(volume, grid)
        votes = or_on_cpu(
            lambda where: self._library(where).votes(Volume(image.astype(np.float32), grid), found),
            fabric.device,
            self.observer,
            "the vote of like cases",
        )
        predicted = predicted_by_all(image, self.plan, config, fabric, self.store, self.observer)
        atlases = atlases_of(self.labelled, config, bool(found.transforms))
        behind = None
        if votes is not None and predicted is not None and config.neighbour_gain > 0:
            checks = [self._check.of(one, probabilities, grid, found.transforms[0]) for one in (votes[0], predicted)]
            behind = checks[0] - checks[1]
        said = Said(predicted, probabilities, confidence, votes, atlases, behind)
        probabilities = combined(said, image, config.rounds, config, self.plan.spacing, self.store)
        prediction, uncertainty = to_case_grid(probabilities, grid, confidence > 0, volume.geometry)
        scores = case_scores(prediction, uncertainty, self.classes)
        return CaseResult(config.rounds, "scan", prediction, uncertainty, scores)

    @functools.cached_property
    def _check(self) -> Check:
        return check_of(Cohort([], self.labelled, self.plan, self.store))

    def _on(self, where: torch.device) -> tuple[Propagator, Any]:
        if where.type not in self._ready:
            propagator = make_propagator(Request(self.plan, self.config, where, self.observer, self.features))
            self._ready[where.type] = (propagator, propagator.prepare(self.labelled))
        return self._ready[where.type]

    def _library(self, where: torch.device) -> Library:
        return self._libraries.setdefault(where.type, Library(self.store, self.plan, self.config, where, self.without))
