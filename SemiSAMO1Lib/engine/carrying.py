"""The generalist carries the template's label to every case; what it carried badly it carries again, by detours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from ..volume import Volume
from .cases import EngineCase, Propagation
from .cohort import Cohort
from .config import TrainingConfig
from .memory import or_on_cpu
from .progress import Steps
from .propagation.base import Propagator
from .propagation.detours import Detours, Helper, chosen_detours
from .propagation.registry import Request, make_propagator
from .ranks import Ranks

#: The file that says which cases are carried again, and through which.
DETOURS_FILE = ("detours.json",)


def propagate(cohort: Cohort, config: TrainingConfig, fabric: Fabric, progress: Steps, cache: Path | None) -> None:
    """Carry the labels of the labelled cases to every case."""
    observer, ranks = progress.observer, Ranks(fabric)
    ready: dict[str, tuple[Propagator, Any]] = {}

    def on(where: torch.device) -> tuple[Propagator, Any]:
        if where.type not in ready:
            propagator = make_propagator(Request(cohort.plan, config, where, observer, cache))
            ready[where.type] = (propagator, propagator.prepare(cohort.labelled))
        return ready[where.type]

    def carried(case: EngineCase, through: Sequence[Helper] = ()) -> Propagation:
        def carry(where: torch.device) -> Propagation:
            propagator, prepared = on(where)
            return propagator.propagate(prepared, case.load(), cohort.grid(case.geometry), through)

        return or_on_cpu(carry, fabric.device, observer, f"propagation to {case.id}")

    for position, case in ranks.share(cohort.cases, observer):
        if not cohort.store.has("propagation", f"{case.id}.json"):
            cohort.save_propagation(case.id, carried(case))
        progress.step("propagation", position + 1, len(cohort.cases))
    ranks.once(lambda: cohort.store.once(lambda: asdict(_chosen(cohort, config)), *DETOURS_FILE))
    detours = Detours(**cohort.store.json(*DETOURS_FILE))
    through = functools.cache(lambda: [_helper(cohort, one) for one in detours.through])  # often nobody needs them
    again = [case for case in cohort.cases if case.id in detours.again]
    for position, case in ranks.share(again, observer):  # dealt out anew: they are few, and one process had most
        if not cohort.store.json("propagation", f"{case.id}.json").get("through"):
            cohort.save_propagation(case.id, carried(case, through()))
        progress.step("detours", position + 1, len(again))
    if ranks.first and not cohort.store.has("template-signature.npy"):
        propagator, prepared = or_on_cpu(on, fabric.device, observer, "the template")
        cohort.store.save_array(propagator.template_signature(prepared), "template-signature.npy")
    ranks.wait()


def _chosen(cohort: Cohort, config: TrainingConfig) -> Detours:
    """Which cases are carried again, and through which; a rejected prediction helps nobody."""
    if not config.detours:
        return Detours([], [], None)
    facts = {case: cohort.store.json("propagation", f"{case}.json") for case in cohort.ids}
    judged = {case: one["misfit"] for case, one in facts.items() if "misfit" in one}
    return chosen_detours(judged, [case for case in judged if cohort.case(case).trainable])


def _helper(cohort: Cohort, case_id: str) -> Helper:
    case = cohort.case(case_id)
    label = np.asarray(cohort.probabilities(0, case_id)).argmax(0)
    return Helper(
        case_id,
        case.load,
        Volume(label.astype(np.uint16), cohort.grid(case.geometry)),
        np.asarray(cohort.confidence(case_id)) > 0,
        cohort.deformation(case_id),
    )
