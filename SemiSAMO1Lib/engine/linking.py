"""Cases are registered with those that look most like them, once, before the first round (`propagation/links.py`)."""

from __future__ import annotations

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from ..volume import Volume
from .cohort import Cohort
from .config import TrainingConfig
from .data.grids import patient_aligned
from .memory import or_on_cpu, usable_memory
from .planning import Plan
from .progress import Progress
from .propagation.links import DESCRIBED, Link, Linker
from .ranks import Ranks
from .similarity import Likeness

#: Most of what a described scan takes, bytes per voxel of its grid for registration.
_DESCRIBED_BYTES = 60


def link(cohort: Cohort, config: TrainingConfig, fabric: Fabric, progress: Progress) -> None:
    """Register every case with the cases that look most like it; once, for all rounds.

    Registrations begin where those with the template lead: from the case to the template, and on to the other.
    """
    ranks = Ranks(fabric)
    if not ranks.as_first(has_links(cohort, config)):
        return
    likeness = Likeness({case: cohort.signature(case) for case in cohort.ids})
    # a rejected prediction tells its neighbours nothing
    useful = cohort.trainable_ids
    linkers: dict[str, Linker] = {}

    def image(case_id: str) -> Volume:
        grid = cohort.grid(cohort.case(case_id).geometry)
        return Volume(np.asarray(cohort.image(case_id), np.float32), grid)

    def links_on(where: torch.device) -> list[Link]:
        if where.type not in linkers:
            linkers[where.type] = linker_for(cohort.plan, where, described_at_once(cohort, where))
        linker = linkers[where.type]
        own = cohort.deformation(case_id).start

        def start(other: str) -> NDArray[np.float64]:
            return np.asarray(np.linalg.inv(cohort.deformation(other).start) @ own)

        return linker.links(case_id, chosen, image, start)

    for _, case_id in ranks.share(cohort.ids, progress.observer):
        cohort.image(case_id)  # made by one process, before others need it
    for position, case_id in ranks.share(cohort.ids, progress.observer):
        if not cohort.has_links(case_id):
            chosen = [other for other, _ in likeness.nearest(case_id, useful, config.neighbours)]
            cohort.save_links(case_id, or_on_cpu(links_on, fabric.device, progress.observer, f"links of {case_id}"))
        progress.step("links", position + 1, len(cohort.ids))


def described_at_once(cohort: Cohort, device: torch.device) -> int:
    """Scans that stay described: a dozen; on a GPU, where describing takes as long as registering, what a quarter of
    its memory holds."""
    if device.type == "cpu":
        return DESCRIBED
    grids = [cohort.grid(case.geometry) for case in cohort.cases]
    voxels = max(patient_aligned(grid, min(grid.spacing)).voxels for grid in grids)
    return max(DESCRIBED, usable_memory(device) // 4 // (_DESCRIBED_BYTES * voxels))


def linker_for(plan: Plan, device: torch.device, kept: int = DESCRIBED) -> Linker:
    """Registers cases with each other by their images on the training grid, no finer than these are; `kept` of them
    stay described."""
    spacing = max(plan.registration_spacing, float(np.prod(plan.spacing)) ** (1 / 3))
    return Linker(spacing, device, kept=kept, padded=plan.intensity.scheme != "fixed")


def has_links(cohort: Cohort, config: TrainingConfig) -> bool:
    """Whether cases vote on each other: where they were registered, and are more than one."""
    return config.neighbour_share > 0 and len(cohort.ids) > 1 and cohort.has_deformations()
