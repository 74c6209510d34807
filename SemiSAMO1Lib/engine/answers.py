"""What a round says in the end: the network, what was propagated, and the scans that look alike, together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from ..volume import Volume
from .cohort import Cohort
from .config import TrainingConfig
from .inference.uncertainty import voxel_entropy
from .memory import or_on_cpu
from .planning import Plan
from .progress import Progress
from .propagation.links import Link, Linker, carried
from .ranks import Ranks
from .refinement.check import checks_of
from .refinement.fusion import weighted_mean
from .similarity import nearest

#: Share of the cases that vote on others after a round: those whose check is best.
VOTERS = 0.6

#: Least weight of what is there in any case.
_LEAST = 1e-2


def link(cohort: Cohort, config: TrainingConfig, fabric: Fabric, progress: Progress) -> None:
    """Register every case with the cases that look most like it; once, for all rounds.

    Registrations begin where those with the template lead: from the case to the template, and on to the other.
    """
    if not has_links(cohort, config):
        return
    signatures = {case: np.asarray(cohort.signature(case), np.float32) for case in cohort.ids}
    # a rejected prediction tells its neighbours nothing
    useful = [case for case in cohort.ids if cohort.case(case).trainable]
    linkers: dict[str, Linker] = {}

    def image(case_id: str) -> Volume:
        grid = cohort.grid(cohort.case(case_id).geometry)
        return Volume(np.asarray(cohort.image(case_id), np.float32), grid)

    def links_on(where: torch.device) -> list[Link]:
        linker = linkers.setdefault(where.type, linker_for(cohort.plan, where))
        own = cohort.deformation(case_id).start

        def start(other: str) -> NDArray[np.float64]:
            return np.asarray(np.linalg.inv(cohort.deformation(other).start) @ own)

        return linker.links(case_id, chosen, image, start)

    for _, case_id in Ranks(fabric).share(cohort.ids, progress.observer):
        cohort.image(case_id)  # made by one process, before others need it
    for position, case_id in Ranks(fabric).share(cohort.ids, progress.observer):
        if not cohort.has_links(case_id):
            chosen = [other for other, _ in nearest(case_id, useful, signatures, config.neighbours)]
            cohort.save_links(case_id, or_on_cpu(links_on, fabric.device, progress.observer, f"links of {case_id}"))
        progress.step("links", position + 1, len(cohort.ids))


def linker_for(plan: Plan, device: torch.device) -> Linker:
    """Registers cases with each other by their images on the training grid, no finer than these are."""
    spacing = max(plan.registration_spacing, float(np.prod(plan.spacing)) ** (1 / 3))
    return Linker(spacing, device, padded=plan.intensity.scheme != "fixed")


def has_links(cohort: Cohort, config: TrainingConfig) -> bool:
    """Whether cases vote on each other: where they were registered, and are more than one."""
    return config.neighbour_share > 0 and len(cohort.ids) > 1 and cohort.has_deformations()


def answer(cohort: Cohort, number: int, config: TrainingConfig, fabric: Fabric, progress: Progress) -> None:
    """Class probabilities that a round gives for every case: a weighted mean, voxel by voxel, of

    - the networks' prediction, where others vote by its certainty (1 less its entropy), else by 1; not in round 0;
    - what linked cases show there (prediction and propagation), by `neighbour_share` times the trust in the links;
    - the propagation, by `propagation_share` times its confidence, as far as the links are not to be trusted.
    """
    ranks, linked = Ranks(fabric), has_links(cohort, config)
    if linked and number > 0:
        ranks.once(lambda: cohort.store.once(lambda: _voters(cohort, number), "voters", f"{number}.json"))
    for position, case_id in ranks.share(cohort.ids, progress.observer):
        if not cohort.has_answer(number, case_id):
            links = _voting(cohort, number, case_id) if linked else []
            cohort.save_answer(number, case_id, _answer(cohort, number, case_id, links, config))
        progress.step(f"answer {number}", position + 1, len(cohort.ids))


def _voting(cohort: Cohort, number: int, case_id: str) -> list[Link]:
    """The links of a case that have a vote in a round; all where none has."""
    links = cohort.links(case_id)
    if number == 0:
        return links
    voters = set(cohort.store.json("voters", f"{number}.json"))
    return [one for one in links if one.other in voters] or links


def _answer(
    cohort: Cohort, number: int, case_id: str, links: list[Link], config: TrainingConfig
) -> NDArray[np.float16]:
    grid, classes = cohort.grid(cohort.case(case_id).geometry), cohort.plan.classes

    def said_by(other: str, value: int) -> Volume:
        return _own(cohort, number, config, other, value)

    return joined(
        cohort.probabilities(number, case_id) if number > 0 else None,
        cohort.probabilities(0, case_id),
        cohort.confidence(case_id),
        carried(links, said_by, lambda other: _known(cohort, other), grid, classes) if links else None,
        config,
    )


def joined(
    predicted: NDArray[Any] | None,
    propagated: NDArray[Any],
    confidence: NDArray[Any],
    votes: tuple[NDArray[np.float16], NDArray[np.float16]] | None,
    config: TrainingConfig,
) -> NDArray[np.float16]:
    """The weighted mean that `answer` describes, (C, z, y, x).

    Args:
        predicted, propagated: class probabilities (C, z, y, x); `predicted` is None where no network was trained.
        confidence: of the propagation, (z, y, x).
        votes: from `carried`; None where nobody votes.
        config: the shares.
    """
    by_propagation = config.propagation_share * np.asarray(confidence, np.float32)
    parts: list[tuple[NDArray[Any], NDArray[np.float32]]] = []
    if votes is not None:
        said, trust = votes[0], votes[1].astype(np.float32)
        parts.append((said, config.neighbour_share * trust))
        by_propagation = by_propagation * (1 - trust)
    if predicted is None:
        return weighted_mean([*parts, (propagated, np.maximum(by_propagation, _LEAST))])
    certainty = 1 - voxel_entropy(predicted) if votes is not None else np.ones_like(by_propagation)
    return weighted_mean([*parts, (predicted, np.maximum(certainty, _LEAST)), (propagated, by_propagation)])


def _own(cohort: Cohort, number: int, config: TrainingConfig, case_id: str, value: int) -> Volume:
    """What a round says of a case without asking others: the probability of a class by network and propagation."""
    own: NDArray[Any] = cohort.probabilities(number, case_id)[value]
    if number > 0:
        share = config.propagation_share * np.asarray(cohort.confidence(case_id), np.float32)
        own = (own + share * cohort.probabilities(0, case_id)[value]) / (1 + share)
    return Volume(own, cohort.grid(cohort.case(case_id).geometry))


def _known(cohort: Cohort, case_id: str) -> Volume:
    """Where the propagation to a case had something to say: elsewhere its label is unknown, not background."""
    return Volume(np.asarray(cohort.confidence(case_id)) > 0, cohort.grid(cohort.case(case_id).geometry))


def _voters(cohort: Cohort, number: int) -> list[str]:
    """The cases whose predictions of a round can best be believed; rejected ones have no vote in any case."""
    checks = checks_of(cohort, lambda case_id: cohort.probabilities(number, case_id))
    limit = float(np.quantile(list(checks.values()), 1 - VOTERS))
    return [case_id for case_id, value in checks.items() if value >= limit]
