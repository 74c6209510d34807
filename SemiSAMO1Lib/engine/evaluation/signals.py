"""Signals of how good a prediction is that need no reference: what the networks, the registration, the features and the
rest of the cohort say about it.

All are computed on the training grid, for each case and class; `SemiSAMO1Lib/quality.py` turns them into a likely Dice.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ...volume import Geometry
from ..cohort import Cohort
from ..config import TrainingConfig
from ..data.grids import resample_labels, sample, space_points
from ..data.store import Store
from ..generalists.mind import mind_ssc
from ..observer import Observer
from ..ranks import Ranks
from ..similarity import cosine
from .metrics import dice

#: Where a case's field does not reach in the template's space.
_UNSEEN = 65_535

#: Distances from a border, voxels, at which the image's gradient is looked at.
_NEAR = 4
_SHELLS = tuple(at for at in range(-_NEAR, _NEAR + 1) if at)

#: Signals that linked cases give (`answers.agreement`).
NEIGHBOURLY = ("with_neighbours", "neighbours_inside", "neighbours_expected")

#: Signals of a class: name -> value, None where there is nothing to compute it from.
Signals = dict[str, float | None]


@dataclass(frozen=True)
class _Template:
    """The template on its training grid: geometry, class indices, mean descriptors and volumes (mm³) of its classes,
    and the classes that its label says nothing about."""

    grid: Geometry
    label: NDArray[Any]
    prototypes: NDArray[np.float32]
    volumes: NDArray[np.float64]
    unknown: tuple[int, ...]


@dataclass(frozen=True)
class _Typical:
    """What is usual in the cohort: the median volume of each class (mm³); and case -> residual of its registration less
    the median's, as logarithms, 0 where the template fits as usual; None where that says nothing."""

    volumes: NDArray[np.float64]
    residuals: dict[str, float | None]


@dataclass
class _Votes:
    """What all cases show in the template's space.

    Attributes:
        counts: (C, z, y, x): how many cases see a place at all, then for the classes 1 .. C - 1 how many show it.
        carried: what single cases show, packed: it is asked for again, and most of it is the same.
    """

    counts: NDArray[np.uint16]
    carried: dict[str, bytes]

    @classmethod
    def none(cls, classes: int, grid: Geometry) -> _Votes:
        return cls(np.zeros((classes, *grid.shape), np.uint16), {})

    def add(self, case_id: str, carried: NDArray[np.uint16]) -> None:
        self.counts[0] += carried < _UNSEEN
        for value in range(1, len(self.counts)):
            self.counts[value] += carried == value
        self.carried[case_id] = zlib.compress(carried.tobytes(), 1)

    def of(self, case_id: str) -> NDArray[np.uint16]:
        return np.frombuffer(zlib.decompress(self.carried[case_id]), np.uint16).reshape(self.counts.shape[1:])


def cohort_signals(
    cohort: Cohort,
    number: int,
    config: TrainingConfig,
    observer: Observer,
    ranks: Ranks,
    step: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, list[Signals]]:
    """Signals of every case of a round; kept in the store as `signals/<number>/<case>.json`.

    Args:
        cohort: propagation and predictions of every case, on disk.
        number: the round; 0 is that before any network, of which fewer signals exist.
        config: of the training.
        observer: is asked whether to stop.
        ranks: the processes that look at the cases in turn.
        step: is told how many looks of how many are done; every case is looked at twice.

    Returns:
        case id -> signals of the classes 1 .. C - 1.
    """
    template, store, count = _template(cohort), cohort.store, len(cohort.ids)
    votes, volumes = _Votes.none(cohort.plan.classes, template.grid), {}
    registered, at_once = cohort.has_deformations(), cohort.at_once()

    def shown(case_id: str) -> tuple[list[float], NDArray[np.uint16] | None]:
        label = np.asarray(cohort.answer(number, case_id)).argmax(0)
        volume = _volumes(label, cohort.plan.classes, cohort.plan.spacing).tolist()
        return volume, _carried(cohort, case_id, label, template) if registered else None

    for position, (volume, carried) in ranks.each(shown, cohort.ids, observer, at_once):
        case_id = cohort.ids[position]
        volumes[case_id] = volume
        if carried is not None:
            votes.add(case_id, carried)
        step(position + 1, 2 * count)
    votes, volumes = _of_all(store, number, votes, volumes, ranks)
    residuals = {case_id: cohort.deformation(case_id).residual for case_id in cohort.ids} if registered else {}
    typical = _Typical(np.median(np.array(list(volumes.values())), axis=0), _beside_the_usual(residuals))

    def save(case_id: str) -> None:
        found = _case_signals(cohort, number, case_id, config, template, typical, votes if registered else None)
        store.save_json(found, "signals", str(number), f"{case_id}.json")

    for position, _ in ranks.each(save, cohort.ids, observer, at_once):
        step(count + position + 1, 2 * count)
    return {case_id: store.json("signals", str(number), f"{case_id}.json") for case_id in cohort.ids}


def _of_all(
    store: Store, number: int, votes: _Votes, volumes: dict[str, list[float]], ranks: Ranks
) -> tuple[_Votes, dict[str, list[float]]]:
    """The votes and volumes that the processes found, joined in each of them; `carried` stays that of its own."""
    if ranks.count == 1:
        return votes, volumes
    folder = ("votes", str(number))
    store.save_array(votes.counts, *folder, f"{ranks.number}.npy")
    store.save_json(volumes, *folder, f"{ranks.number}.json")
    ranks.wait()
    everywhere = range(ranks.count)
    joined = {case: one for rank in everywhere for case, one in store.json(*folder, f"{rank}.json").items()}
    counts = sum((np.asarray(store.array(*folder, f"{rank}.npy")) for rank in everywhere), np.zeros_like(votes.counts))
    return _Votes(counts, votes.carried), joined


def _template(cohort: Cohort) -> _Template:
    first = cohort.labelled[0]
    grid = cohort.grid(first.image.geometry)
    label = resample_labels(first.label, grid)
    image = cohort.scaled(first.image, grid)
    classes = cohort.plan.classes
    prototypes, volumes = _prototypes(image, label, classes), _volumes(label, classes, cohort.plan.spacing)
    return _Template(grid, label, prototypes, volumes, first.unknown)


def _carried(cohort: Cohort, case_id: str, label: NDArray[Any], template: _Template) -> NDArray[np.uint16]:
    """A case's answer in the template's space: class indices; _UNSEEN where the case's field does not reach."""
    there = cohort.deformation(case_id).to_case(space_points(template.grid))
    grid = cohort.grid(cohort.case(case_id).geometry)
    covered = sample(torch.ones(1, *grid.shape), grid, there, "nearest", padding="zeros")[0].numpy() > 0.5
    values = sample(torch.from_numpy(label)[None].float(), grid, there, "nearest", padding="zeros")[0].numpy()
    return np.where(covered, values, _UNSEEN).astype(np.uint16)


def _case_signals(
    cohort: Cohort,
    number: int,
    case_id: str,
    config: TrainingConfig,
    template: _Template,
    typical: _Typical,
    votes: _Votes | None,
) -> list[Signals]:
    probabilities = np.asarray(cohort.answer(number, case_id))
    label = probabilities.argmax(0)
    propagated = np.asarray(cohort.probabilities(0, case_id)).argmax(0)
    network = np.asarray(cohort.probabilities(number, case_id)).argmax(0)
    own = _single(cohort, number, case_id, config).argmax(0)
    before = _single(cohort, max(number - 1, 0), case_id, config).argmax(0)
    confidence = np.asarray(cohort.confidence(case_id), np.float32)
    prototypes = _prototypes(np.asarray(cohort.image(case_id)), label, cohort.plan.classes)
    volumes = _volumes(label, cohort.plan.classes, cohort.plan.spacing)
    nowhere: dict[str, float | None] = {"reverse": None, "with_cohort": None}
    in_template = [nowhere] * (cohort.plan.classes - 1)
    if votes is not None:
        carried = votes.of(case_id)
        in_template = [_in_template(carried, votes, template, value) for value in range(1, cohort.plan.classes)]
    passes, neighbours = cohort.between_passes(number, case_id), cohort.with_neighbours(number, case_id)
    gradient = ndimage.gaussian_gradient_magnitude(np.asarray(cohort.image(case_id), np.float32), 0.7)
    found: list[Signals] = []
    for value in range(1, cohort.plan.classes):
        mine = label == value
        signals: Signals = {
            **_doubt(probabilities[value].astype(np.float32), mine),
            **{name: neighbours[value - 1].get(name) for name in NEIGHBOURLY},
            "edge": _edge(gradient, mine),
            "residual": typical.residuals.get(case_id),
            "with_propagation": dice(mine, propagated == value),
            "network_with_propagation": dice(network == value, propagated == value),
            "between_rounds": dice(own == value, before == value),
            "between_passes": passes[value - 1],
            "confidence": float(confidence[mine].mean()) if mine.any() else 0.0,
            "prototype": cosine(prototypes[value], template.prototypes[value]),
            "volume_to_template": abs(float(np.log(max(volumes[value], 1) / max(template.volumes[value], 1)))),
            "volume_to_cohort": abs(float(np.log(max(volumes[value], 1) / max(typical.volumes[value], 1)))),
        }
        if number == 0:  # there is nothing yet that could differ from the propagation
            signals |= dict.fromkeys(("with_propagation", "network_with_propagation", "between_rounds"))
        signals |= in_template[value - 1]
        if value in template.unknown:  # there is nothing that the class could be compared with
            signals |= dict.fromkeys(("reverse", "prototype", "volume_to_template"))
        found.append(signals)
    return found


def _beside_the_usual(residuals: dict[str, float]) -> dict[str, float | None]:
    """How badly the template fits each case, beside how it fits the others."""
    usual = float(np.median(list(residuals.values()))) if residuals else 0.0
    says = {case: np.isfinite([one, usual]).all() and min(one, usual) > 0 for case, one in residuals.items()}
    return {case: float(np.log(one / usual)) if says[case] else None for case, one in residuals.items()}


def _doubt(p: NDArray[np.float32], mine: NDArray[np.bool_]) -> dict[str, float]:
    """What a class's probabilities say about its answer `mine`; by volume and surface, so that sizes compare."""
    entropy = _binary_entropy(p)
    band = ndimage.binary_dilation(mine) & ~ndimage.binary_erosion(mine)
    count = max(int(mine.sum()), 1)
    return {
        "inside_entropy": float(entropy[mine].mean()) if mine.any() else 1.0,
        "inside_probability": float(p[mine].mean()) if mine.any() else 0.0,
        "expected_dice": float(2 * p[mine].sum() / max(float(p.sum()) + count, 1e-6)),
        "boundary_entropy": float(entropy[band].mean()) if band.any() else 1.0,
        "entropy_by_volume": float(entropy.sum()) / count,
        "entropy_by_surface": float(entropy.sum()) / max(int(band.sum()), 1),
    }


def _edge(gradient: NDArray[np.float32], mine: NDArray[np.bool_]) -> float | None:
    """How far a class's border lies on an edge of the image: the gradient there over that within four voxels of it."""
    if not mine.any():
        return None
    box = ndimage.find_objects(mine.astype(np.uint8))[0]
    near = tuple(slice(max(0, one.start - _NEAR - 1), one.stop + _NEAR + 1) for one in box)
    inside, slope = mine[near], gradient[near]
    if inside.all():
        return None
    depth = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    shells = [slope[(depth > at - 0.5) & (depth <= at + 0.5)] for at in _SHELLS]
    means = {at: float(shell.mean()) for at, shell in zip(_SHELLS, shells, strict=True) if shell.size}
    border = [means[at] for at in (-1, 1) if at in means]
    around = float(np.mean(list(means.values()))) if means else 0.0
    return float(np.mean(border)) / around if border and around > 0 else None


def _in_template(
    carried: NDArray[np.uint16], votes: _Votes, template: _Template, value: int
) -> dict[str, float | None]:
    """Agreement in the template's space: with its label (reverse classification) and with most of the other cases."""
    mine, seen = carried == value, carried < _UNSEEN
    others, voters = votes.counts[value].astype(np.int32) - mine, votes.counts[0].astype(np.int32) - seen
    most = seen & (2 * others > voters)
    return {
        "reverse": dice(mine, seen & (template.label == value)),
        "with_cohort": dice(mine, most) if voters.any() else None,
    }


def _single(cohort: Cohort, number: int, case_id: str, config: TrainingConfig) -> NDArray[np.float32]:
    """What one round's network alone predicted; round 0 is the propagation."""
    now = np.asarray(cohort.probabilities(number, case_id), np.float32)
    if number < 2 or not config.ensemble_rounds:
        return now
    return np.asarray(number * now - (number - 1) * np.asarray(cohort.probabilities(number - 1, case_id), np.float32))


def _prototypes(image: NDArray[Any], label: NDArray[Any], classes: int) -> NDArray[np.float32]:
    """Mean MIND-SSC descriptors of each class less those of the whole scan, (C, 12); 0 for the background."""
    described = mind_ssc(torch.from_numpy(np.array(image, np.float32))).numpy().reshape(12, -1)
    flat = label.reshape(-1)
    mean = described.mean(1)
    found = np.zeros((classes, 12), np.float32)
    for value in range(1, classes):
        mine = flat == value
        if mine.any():
            found[value] = described[:, mine].mean(1) - mean
    return found


def _binary_entropy(p: NDArray[np.float32]) -> NDArray[np.float32]:
    """Entropy of "this class or not", in bits: free of the number of classes."""
    p = p.clip(1e-6, 1 - 1e-6)
    return np.asarray(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)), np.float32)


def _volumes(label: NDArray[Any], classes: int, spacing: Sequence[float]) -> NDArray[np.float64]:
    """Volume of each class, mm³."""
    return np.asarray(np.bincount(label.reshape(-1), minlength=classes)[:classes] * float(np.prod(spacing)))
