"""From one round's predictions to the next round's pseudo-labels (method, section 1.4, and its region version).

The new pseudo-label of a case is the argmax of the confidence-weighted mean of registration and prediction. Where the
network is unsure, its neighbours vote too. It is taken only if a check without labels does not get worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cohort import Cohort, as_tensor
from ..config import TrainingConfig
from ..data.grids import resample_labels, space_points
from ..inference.uncertainty import normalised_entropy
from ..observer import Observer, stop_if_asked
from .acceptance import accepted, one_hot, reverse_dice, soft_dice
from .neighbours import aligned_vote, nearest, whole_volume_vote

#: Weight of a fully confident registration beside a prediction (measured: docs/benchmarks.md).
REGISTRATION_SHARE = 0.5

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
    grid = cohort.grid(cohort.case(case_id).geometry)
    classes = cohort.plan.classes
    prediction = one_hot(np.asarray(cohort.probabilities(number, case_id)).argmax(0), classes)
    template_grid = cohort.grid(template.image.geometry)
    label = one_hot(resample_labels(template.label, template_grid), classes)
    back = reverse_dice(prediction, grid, cohort.deformation(case_id), label, template_grid)
    registered = one_hot(np.asarray(cohort.probabilities(0, case_id)).argmax(0), classes)
    return 0.5 * (back + soft_dice(prediction, registered, torch.ones(1)))


def _in_force(cohort: Cohort, number: int) -> dict[str, float | None]:
    """The check values with which the present pseudo-labels were taken; None for those of the registration."""
    if number <= 1:
        return dict.fromkeys(cohort.ids)
    earlier: dict[str, float | None] = cohort.store.json("refinement", f"{number - 1}.json")["in_force"]
    return earlier


def _volume_uncertainty(cohort: Cohort, number: int, case_id: str) -> float:
    """Mean voxel uncertainty of a volume (0-1), where the template had something to say."""
    entropy = normalised_entropy(as_tensor(cohort.probabilities(number, case_id)))
    seen = torch.from_numpy(np.asarray(cohort.confidence(case_id)) > 0)
    return float(entropy[seen].mean()) if bool(seen.any()) else 1.0


def _write_new(
    cohort: Cohort,
    number: int,
    case_id: str,
    chosen: list[tuple[str, float]],
    is_uncertain: bool,
    config: TrainingConfig,
) -> None:
    confidence = as_tensor(cohort.confidence(case_id))
    predicted = as_tensor(cohort.probabilities(number, case_id))
    mean = predicted  # 'none': the naive way, for comparison
    if config.refinement != "none":
        mean = combined(as_tensor(cohort.probabilities(0, case_id)), confidence, predicted)
    if config.refinement == "region":
        mean = _with_votes(cohort, number, case_id, chosen, mean, normalised_entropy(predicted))
    label = mean.argmax(0).numpy()
    if config.refinement == "volume" and is_uncertain:
        label = _volume_vote(cohort, number, chosen, label)
    names = (str(number + 1), f"{case_id}.npy")
    kind = np.uint8 if cohort.plan.classes <= 256 else np.uint16
    if config.soft_pseudo_labels:
        cohort.store.save_array(mean.numpy().astype(np.float16), "pseudo", *names)
    else:
        cohort.store.save_array(label.astype(kind), "pseudo", *names)
    cohort.store.save_array(voxel_weights(confidence).numpy().astype(np.float16), "weights-of-voxels", *names)


def _keep_old(cohort: Cohort, number: int, case_id: str) -> None:
    for kind in ("pseudo", "weights-of-voxels"):
        cohort.store.save_array(
            np.asarray(cohort.store.array(kind, str(number), f"{case_id}.npy")), kind, str(number + 1), f"{case_id}.npy"
        )


def combined(registered: Tensor, confidence: Tensor, predicted: Tensor) -> Tensor:
    """Confidence-weighted mean of registration and prediction, (C, z, y, x)."""
    share = REGISTRATION_SHARE * confidence
    return (registered * share + predicted) / (1 + share)


def voxel_weights(confidence: Tensor) -> Tensor:
    """How much a voxel's pseudo-label counts: ½ to 1 with the confidence; 0 where the template saw nothing."""
    return torch.where(confidence > 0.01, 0.5 + 0.5 * confidence, torch.zeros(()))


def _with_votes(
    cohort: Cohort,
    number: int,
    case_id: str,
    chosen: list[tuple[str, float]],
    mean: Tensor,
    entropy: Tensor,
) -> Tensor:
    """Let the aligned neighbours vote in voxels above the uncertainty threshold; the others stay as they are."""
    where = entropy > UNCERTAIN_VOXEL
    if not bool(where.any()) or not chosen:
        return mean
    grid = cohort.grid(cohort.case(case_id).geometry)
    points = space_points(grid)[:, where][:, None, None, :]
    votes = []
    for other, similarity in chosen:
        other_grid = cohort.grid(cohort.case(other).geometry)
        votes.append((similarity, cohort.deformation(other), cohort.probabilities(number, other), other_grid))
    own = cohort.deformation(case_id)
    vote = aligned_vote(points, own, votes)[:, 0, 0]
    changed = mean.clone()
    changed[:, where] = 0.5 * (mean[:, where] + vote)
    return changed


def _volume_vote(cohort: Cohort, number: int, chosen: list[tuple[str, float]], label: Any) -> Any:
    """The published version: an uncertain volume's pseudo-label is replaced as a whole."""
    template = cohort.labelled[0]
    others = chosen[: max(1, len(chosen) - 1)]  # the template is one of the K
    labels = [(s, np.asarray(cohort.probabilities(number, other)).argmax(0)) for other, s in others]
    labels.append((1.0, np.asarray(resample_labels(template.label, cohort.grid(template.image.geometry)))))
    return whole_volume_vote(label.shape, labels, cohort.plan.classes)
