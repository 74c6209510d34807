"""From one round's predictions to the next round's pseudo-labels (SemiSAM-O1, and its region version).

The new pseudo-label of a case is the round's answer, as classes or as probabilities: network, registration and
registered neighbours, the network weighted by how sure it is at a place. It is taken only if a check without labels
does not get worse. The published ways (`refinement`: volume, none) are here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cohort import Cohort
from ..config import TrainingConfig
from ..data.grids import resample_labels
from ..inference.uncertainty import voxel_entropy
from ..observer import Observer
from ..ranks import Ranks
from ..similarity import Likeness
from .acceptance import accepted
from .check import checks_of
from .fusion import voxel_weights
from .neighbours import whole_volume_vote


@dataclass(frozen=True)
class Refinement:
    """What the refinement after a round found out, as `refinement/<round>.json` keeps it.

    Attributes:
        uncertainty: case -> mean uncertainty of what its network says, 0 to 1.
        certain: cases below the configured quantile of it; rejected ones never.
        checks: case -> check value (`check.py`) of what would become its pseudo-label.
        taken: case -> whether it became that.
        in_force: case -> check value of the pseudo-label that it has now; None for that of round 0.
    """

    uncertainty: dict[str, float]
    certain: list[str]
    checks: dict[str, float]
    taken: dict[str, bool]
    in_force: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Situation:
    """What a refiner knows when it makes the pseudo-labels of round `number` + 1.

    Attributes:
        cohort: predictions, answers and signatures of every case, on disk.
        number: the round that has just been predicted.
        config: of the training.
        uncertain: cases whose mean uncertainty reaches the configured quantile.
        neighbours: case -> its most similar certain cases, the template among them, with their similarities; empty
            for refiners that do not ask for them.
    """

    cohort: Cohort
    number: int
    config: TrainingConfig
    uncertain: frozenset[str]
    neighbours: dict[str, list[tuple[str, float]]]


#: Makes a case's new pseudo-label: class probabilities (C, z, y, x).
Refiner = Callable[[Situation, str], NDArray[Any]]


def region(situation: Situation, case_id: str) -> NDArray[Any]:
    """The answer: in uncertain regions it is that of the registration and of registered neighbours (`answers.py`)."""
    return situation.cohort.answer(situation.number, case_id)


def volume(situation: Situation, case_id: str) -> NDArray[Any]:
    """As published: an uncertain volume is replaced as a whole by the vote of its neighbours (SemiSAM-O1)."""
    answer = situation.cohort.answer(situation.number, case_id)
    chosen = [(other, s) for other, s in situation.neighbours[case_id] if s > 0]
    if case_id not in situation.uncertain or not chosen:
        return answer
    cohort, template = situation.cohort, situation.cohort.labelled[0]
    labels = []
    for other, similarity in chosen:
        if other == template.id:
            label = resample_labels(template.label, cohort.grid(template.image.geometry))
        else:
            label = np.asarray(cohort.probabilities(situation.number, other)).argmax(0)
        labels.append((similarity, label))
    return whole_volume_vote(answer.shape[1:], labels, cohort.plan.classes)


def none(situation: Situation, case_id: str) -> NDArray[Any]:
    """The prediction itself: the naive way, for comparison."""
    return situation.cohort.probabilities(situation.number, case_id)


#: How pseudo-labels are refined, by name. A new way is a function, a line here and its name in `config.py`.
REFINERS: dict[str, Refiner] = {"region": region, "volume": volume, "none": none}


def refine_cohort(
    cohort: Cohort,
    number: int,
    config: TrainingConfig,
    observer: Observer,
    ranks: Ranks,
    step: Callable[[int, int], None] = lambda done, of: None,
) -> Refinement:
    """Write the pseudo-labels of round `number` + 1 from the predictions of round `number`.

    The processes look at the cases, and write, in turn; what follows from all that was seen, each finds out by itself.
    `step` is told how many cases of how many are done.
    """
    name = config.refinement
    if name == "region" and not cohort.has_deformations():
        name = "volume"
        observer.event("note", text="no registration aligns the cases: uncertain volumes are refined as a whole")
    before = _in_force(cohort, number)
    uncertainty = _uncertainty(cohort, number, config, observer, ranks)
    limit = float(np.quantile(list(uncertainty.values()), config.uncertain_quantile))
    # a rejected prediction tells its neighbours nothing
    useful = cohort.trainable_ids
    certain = [case for case in useful if uncertainty[case] < limit] or useful
    what, judged = ("checks", cohort.probabilities) if name == "none" else ("checks-of-answers", cohort.answer)
    checks = checks_of(cohort, number, what, partial(judged, number), observer, ranks)  # of what would be taken
    taken = accepted(checks, before) if config.check_pseudo_labels else dict.fromkeys(checks, True)
    uncertain = frozenset(case for case, value in uncertainty.items() if value >= limit)
    neighbours = _neighbours(cohort, certain, config.neighbours) if name == "volume" else {}
    situation = Situation(cohort, number, config, uncertain, neighbours)

    def write(case: str) -> None:
        if taken[case]:
            write_pseudo_label(cohort, number, case, REFINERS[name](situation, case), config)
        else:
            _keep_old(cohort, number, case)

    for position, _ in ranks.each(write, cohort.ids, observer, cohort.at_once()):
        step(position + 1, len(cohort.ids))
    in_force = {case: max(checks[case], before[case] or 0.0) if taken[case] else before[case] for case in cohort.ids}
    return Refinement(uncertainty, certain, checks, taken, in_force)


def _neighbours(cohort: Cohort, certain: list[str], count: int) -> dict[str, list[tuple[str, float]]]:
    template = cohort.labelled[0].id
    signatures = {case: cohort.signature(case) for case in cohort.ids}
    likeness = Likeness({**signatures, template: cohort.template_signature()})
    return {case: likeness.nearest(case, [*certain, template], count) for case in cohort.ids}


def _in_force(cohort: Cohort, number: int) -> dict[str, float | None]:
    """The check values with which the present pseudo-labels were taken; None for those of the registration."""
    if number <= 1:
        return dict.fromkeys(cohort.ids)
    earlier: dict[str, float | None] = cohort.store.json("refinement", f"{number - 1}.json")["in_force"]
    return earlier


def _uncertainty(
    cohort: Cohort, number: int, config: TrainingConfig, observer: Observer, ranks: Ranks
) -> dict[str, float]:
    """Mean uncertainty of every volume."""
    store, folder = cohort.store, ("uncertainty", str(number))

    def save(case_id: str) -> None:
        if not store.has(*folder, f"{case_id}.json"):
            store.save_json(_volume_uncertainty(cohort, number, case_id, config), *folder, f"{case_id}.json")

    for _ in ranks.each(save, cohort.ids, observer, cohort.at_once()):
        pass
    return {case_id: float(store.json(*folder, f"{case_id}.json")) for case_id in cohort.ids}


def _volume_uncertainty(cohort: Cohort, number: int, case_id: str, config: TrainingConfig) -> float:
    """Mean voxel uncertainty of a volume (0-1), where the template had something to say; without confidence weights, as
    published, of all its voxels."""
    entropy = voxel_entropy(cohort.probabilities(number, case_id))
    if not config.confidence_weights:
        return float(entropy.mean())
    seen = np.asarray(cohort.confidence(case_id)) > 0
    return float(entropy[seen].mean()) if seen.any() else 1.0


def write_pseudo_label(cohort: Cohort, number: int, case_id: str, new: NDArray[Any], config: TrainingConfig) -> None:
    """Keep class probabilities (C, z, y, x) as the pseudo-label that round `number` + 1 learns from."""
    names = (str(number + 1), f"{case_id}.npy")
    kind = np.uint8 if cohort.plan.classes <= 256 else np.uint16
    target = np.asarray(new) if config.soft_pseudo_labels else np.asarray(new).argmax(0).astype(kind)
    cohort.store.save_array(target, "pseudo", *names)
    weights = voxel_weights(cohort.confidence(case_id), config.confidence_weights)
    cohort.store.save_array(weights, "weights-of-voxels", *names)


def _keep_old(cohort: Cohort, number: int, case_id: str) -> None:
    for kind in ("pseudo", "weights-of-voxels"):
        cohort.store.save_array(
            np.asarray(cohort.store.array(kind, str(number), f"{case_id}.npy")), kind, str(number + 1), f"{case_id}.npy"
        )
