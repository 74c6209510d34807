"""From one round's predictions to the next round's pseudo-labels (method, section 1.4, and its region version).

The new pseudo-label of a case is the argmax of the confidence-weighted mean of registration and prediction. Where the
network is unsure, its neighbours vote too. It is taken only if a check without labels does not get worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cohort import Cohort
from ..config import TrainingConfig
from ..data.grids import resample_labels, space_points
from ..inference.uncertainty import voxel_entropy
from ..observer import Observer, stop_if_asked
from .acceptance import accepted, mean_dice, reverse_dice
from .fusion import fused, voxel_weights
from .neighbours import aligned_vote, nearest, whole_volume_vote

#: A voxel whose normalised entropy exceeds this is uncertain: its neighbours vote.
UNCERTAIN_VOXEL = 0.4


@dataclass(frozen=True)
class Refinement:
    """What the refinement after a round found out: JSON-able."""

    uncertainty: dict[str, float]
    certain: list[str]
    checks: dict[str, float]
    taken: dict[str, bool]
    in_force: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def refine_cohort(cohort: Cohort, number: int, config: TrainingConfig, observer: Observer) -> Refinement:
    """Write the pseudo-labels of round `number` + 1 from the predictions of round `number`."""
    before = _in_force(cohort, number)
    uncertainty = {case: _volume_uncertainty(cohort, number, case) for case in cohort.ids}
    limit = float(np.quantile(list(uncertainty.values()), config.uncertain_quantile))
    certain = [case for case, value in uncertainty.items() if value < limit] or list(uncertainty)
    checks = {case: check(cohort, number, case) for case in cohort.ids}
    taken = accepted(checks, before) if config.refinement != "none" else dict.fromkeys(checks, True)
    signatures = {case: np.asarray(cohort.signature(case), np.float32) for case in cohort.ids}
    neighbours = {case: nearest(case, certain, signatures, config.neighbours) for case in cohort.ids}
    for position, case in enumerate(cohort.ids):
        stop_if_asked(observer)
        if taken[case]:
            chosen = [(other, similarity) for other, similarity in neighbours[case] if similarity > 0]
            _write_new(cohort, number, case, chosen, uncertainty[case] >= limit, config)
        else:
            _keep_old(cohort, number, case)
        observer.event("progress", stage=f"refine {number}", done=position + 1, of=len(cohort.ids))
    in_force = {case: max(checks[case], before[case] or 0.0) if taken[case] else before[case] for case in cohort.ids}
    return Refinement(uncertainty, certain, checks, taken, in_force)


def check(cohort: Cohort, number: int, case_id: str) -> float:
    """Mean of two agreements that need no label: with the template's label after carrying the prediction back, and
    with the registration."""
    template = cohort.labelled[0]
    grid, template_grid = cohort.grid(cohort.case(case_id).geometry), cohort.grid(template.image.geometry)
    prediction, registered = (np.asarray(cohort.probabilities(n, case_id)).argmax(0) for n in (number, 0))
    label = resample_labels(template.label, template_grid)
    back = reverse_dice(prediction, grid, cohort.deformation(case_id), label, template_grid, cohort.plan.classes)
    return 0.5 * (back + mean_dice(prediction, registered, cohort.plan.classes))


def _in_force(cohort: Cohort, number: int) -> dict[str, float | None]:
    """The check values with which the present pseudo-labels were taken; None for those of the registration."""
    if number <= 1:
        return dict.fromkeys(cohort.ids)
    earlier: dict[str, float | None] = cohort.store.json("refinement", f"{number - 1}.json")["in_force"]
    return earlier


def _volume_uncertainty(cohort: Cohort, number: int, case_id: str) -> float:
    """Mean voxel uncertainty of a volume (0-1), where the template had something to say."""
    entropy = voxel_entropy(cohort.probabilities(number, case_id))
    seen = np.asarray(cohort.confidence(case_id)) > 0
    return float(entropy[seen].mean()) if seen.any() else 1.0


def _write_new(
    cohort: Cohort,
    number: int,
    case_id: str,
    chosen: list[tuple[str, float]],
    is_uncertain: bool,
    config: TrainingConfig,
) -> None:
    confidence, predicted = cohort.confidence(case_id), cohort.probabilities(number, case_id)
    mean = np.asarray(predicted)  # 'none': the naive way, for comparison
    if config.refinement != "none":
        mean = fused(cohort.probabilities(0, case_id), confidence, predicted, config.propagation_share)
    if config.refinement == "region":
        _let_vote(cohort, number, case_id, chosen, mean, voxel_entropy(predicted) > UNCERTAIN_VOXEL)
    label = mean.argmax(0)
    if config.refinement == "volume" and is_uncertain:
        label = _volume_vote(cohort, number, chosen, label)
    names = (str(number + 1), f"{case_id}.npy")
    kind = np.uint8 if cohort.plan.classes <= 256 else np.uint16
    cohort.store.save_array(mean if config.soft_pseudo_labels else label.astype(kind), "pseudo", *names)
    cohort.store.save_array(voxel_weights(confidence), "weights-of-voxels", *names)


def _keep_old(cohort: Cohort, number: int, case_id: str) -> None:
    for kind in ("pseudo", "weights-of-voxels"):
        cohort.store.save_array(
            np.asarray(cohort.store.array(kind, str(number), f"{case_id}.npy")), kind, str(number + 1), f"{case_id}.npy"
        )


def _let_vote(
    cohort: Cohort,
    number: int,
    case_id: str,
    chosen: list[tuple[str, float]],
    mean: NDArray[np.float16],
    where: NDArray[np.bool_],
) -> None:
    """Let the aligned neighbours vote in the uncertain voxels, in place; the others stay as they are."""
    if not where.any() or not chosen:
        return
    points = space_points(cohort.grid(cohort.case(case_id).geometry))[:, torch.from_numpy(where)][:, None, None, :]
    votes = []
    for other, similarity in chosen:
        other_grid = cohort.grid(cohort.case(other).geometry)
        votes.append((similarity, cohort.deformation(other), cohort.probabilities(number, other), other_grid))
    for value, vote in enumerate(aligned_vote(points, cohort.deformation(case_id), votes)):
        mean[value][where] = 0.5 * (mean[value][where] + vote[0, 0].numpy())


def _volume_vote(cohort: Cohort, number: int, chosen: list[tuple[str, float]], label: Any) -> Any:
    """The published version: an uncertain volume's pseudo-label is replaced as a whole."""
    template = cohort.labelled[0]
    others = chosen[: max(1, len(chosen) - 1)]  # the template is one of the K
    labels = [(s, np.asarray(cohort.probabilities(number, other)).argmax(0)) for other, s in others]
    labels.append((1.0, np.asarray(resample_labels(template.label, cohort.grid(template.image.geometry)))))
    return whole_volume_vote(label.shape, labels, cohort.plan.classes)
