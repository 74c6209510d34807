"""Segment a further scan with a finished training: its propagation and its specialists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..volume import Volume
from .cases import CaseResult, EngineCase, LabelledCase, Propagation
from .cohort import Cohort
from .config import TrainingConfig
from .data.store import Store
from .inference.ensemble import predicted_by_all
from .inference.uncertainty import case_scores, to_case_grid
from .memory import or_on_cpu
from .observer import Observer
from .planning import Plan
from .propagation.registry import Request, make_propagator
from .refinement.fusion import fused
from .training import make_fabric


def segment_one(
    volume: Volume,
    labelled: Sequence[LabelledCase],
    classes: int,
    config: TrainingConfig,
    store: Store,
    observer: Observer,
    features: Path | None = None,
) -> CaseResult:
    """Segment a further scan with a finished run's specialists and its propagation.

    Args:
        volume: the scan.
        labelled, classes, config, store: of the finished run; nothing is written to its store.
        observer: gets progress.
        features: folder of kept features.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    plan = Plan.model_validate(store.json("plan.json"))
    fabric = make_fabric(config.device, plan.precision)
    cohort = Cohort([EngineCase("scan", volume.geometry, lambda: volume)], labelled, plan, store)
    grid = cohort.grid(volume.geometry)

    def carry(where: torch.device) -> Propagation:
        propagator = make_propagator(Request(plan, config, where, observer, features))
        return propagator.propagate(propagator.prepare(labelled), volume, grid)

    found = or_on_cpu(carry, fabric.device, observer, "propagation")
    confidence = found.confidence.cpu().numpy()
    probabilities = found.probabilities.cpu().numpy()
    observer.event("progress", stage="propagation", done=1, of=1, fraction=1 / (1 + config.rounds))
    predicted = predicted_by_all(cohort.scaled(volume, grid), plan, config, fabric, store, observer)
    if predicted is not None:
        probabilities = fused(probabilities, confidence, predicted, config.propagation_share)
    prediction, uncertainty = to_case_grid(probabilities, grid, confidence > 0, volume.geometry)
    return CaseResult(config.rounds, "scan", prediction, uncertainty, case_scores(prediction, uncertainty, classes))
