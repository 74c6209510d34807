"""The cases of a run and what is known of each, on disk: only one case at a time is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..volume import Geometry, Volume
from .cases import EngineCase, LabelledCase, Propagation
from .data.grids import canonical, resample_image, resample_labels, with_spacing
from .data.intensities import scale_intensities
from .data.patches import TrainingCase, find_centres
from .data.store import SavedArray, Store
from .memory import cases_at_once
from .planning import Plan
from .propagation.deformable import Deformation
from .propagation.links import Link

#: Bytes that looking at a case takes for each voxel of its training grid, and for each voxel and class. Measured once:
#: up to 360 by votes of eight linked cases with two classes, 20 more with twelve.
_BYTES, _BYTES_A_CLASS = 400, 8


class Cohort:
    """Unlabelled cases, labelled cases, the plan, and the store that holds what the stages leave behind."""

    def __init__(self, cases: Sequence[EngineCase], labelled: Sequence[LabelledCase], plan: Plan, store: Store) -> None:
        self.cases = list(cases)
        self.labelled = list(labelled)
        self.plan = plan
        self.store = store

    @property
    def ids(self) -> list[str]:
        return [case.id for case in self.cases]

    @property
    def trainable_ids(self) -> list[str]:
        """Cases whose prediction nobody rejected: they may teach, vote and help."""
        return [case.id for case in self.cases if case.trainable]

    def case(self, case_id: str) -> EngineCase:
        return next(case for case in self.cases if case.id == case_id)

    def grid(self, geometry: Geometry) -> Geometry:
        """The training grid of a scan: its own axes, nearest to the patient's, at the plan's spacing."""
        return with_spacing(canonical(geometry), self.plan.spacing)

    def at_once(self) -> int:
        """How many cases are looked at side by side, once they are propagated or predicted (`Ranks.each`)."""
        voxels = max((self.grid(case.geometry).voxels for case in self.cases), default=1)
        return cases_at_once((_BYTES + _BYTES_A_CLASS * self.plan.classes) * voxels)

    # ------------------------------------------------------------------ images

    def image(self, case_id: str) -> NDArray[Any]:
        """Scaled intensities on the training grid (`scaled`), mapped from disk; made on first use."""
        names = ("images", f"{case_id}.npy")
        if not self.store.has(*names):
            case = self.case(case_id)
            self.store.save_array(self.scaled(case.load(), self.grid(case.geometry)), *names)
        return self.store.array(*names)

    def scaled(self, volume: Volume, grid: Geometry) -> NDArray[np.floating[Any]]:
        """A scan as the network sees it, on a training grid: float16, or float32 where grey values stay as they are."""
        scaled = Volume(scale_intensities(volume, self.plan.intensity), volume.geometry)
        kind = np.float32 if self.plan.intensity.scheme == "none" else np.float16  # that ends at 65,504
        return resample_image(scaled, grid).astype(kind)

    # ------------------------------------------------------------------ propagation

    def save_propagation(self, case_id: str, found: Propagation) -> None:
        """Keep a propagation: probabilities and confidence as float16, the transforms, the signature."""
        best = found.transforms[0] if found.transforms else None
        if best is not None:
            self.store.save_tensors(_deformation_to_file(best), "transforms", f"{case_id}.pt")
        if found.signature is not None:
            self.store.save_array(found.signature, "signatures", f"{case_id}.npy")
        self.store.save_array(found.confidence.cpu().numpy().astype(np.float16), "confidence", f"{case_id}.npy")
        probabilities = found.probabilities.cpu().numpy().astype(np.float16)
        self.store.save_array(probabilities, "probabilities", "0", f"{case_id}.npy")
        self.store.save_json(found.facts, "propagation", f"{case_id}.json")  # last: its presence means finished

    def has_deformations(self) -> bool:
        """True when the cases were registered, and not only carried by features."""
        return all(map(self.is_registered, self.ids))

    def is_registered(self, case_id: str) -> bool:
        """True when a case was registered."""
        return self.store.has("transforms", f"{case_id}.pt")

    def deformation(self, case_id: str) -> Deformation:
        """The best transform between a case and the template."""
        return _deformation_from_file(self.store.tensors("transforms", f"{case_id}.pt"))

    def confidence(self, case_id: str) -> NDArray[Any]:
        return self.store.array("confidence", f"{case_id}.npy")

    def signature(self, case_id: str) -> SavedArray:
        """What a case looks like: see `Propagation.signature`."""
        return self.store.saved("signatures", f"{case_id}.npy")

    def template_signature(self) -> NDArray[Any]:
        return self.store.array("template-signature.npy")

    def probabilities(self, number: int, case_id: str) -> NDArray[Any]:
        """Class probabilities (C, z, y, x) float16 of a round; round 0 is the propagation."""
        return self.store.array("probabilities", str(number), f"{case_id}.npy")

    def save_answer(self, number: int, case_id: str, answer: NDArray[np.float16]) -> None:
        self.store.save_array(answer, "answers", str(number), f"{case_id}.npy")

    def has_answer(self, number: int, case_id: str) -> bool:
        return self.store.has("answers", str(number), f"{case_id}.npy")

    def answer(self, number: int, case_id: str) -> NDArray[Any]:
        """What a round says in the end, (C, z, y, x) float16: see `answers.py`."""
        return self.store.array("answers", str(number), f"{case_id}.npy")

    def save_with_neighbours(self, number: int, case_id: str, found: list[dict[str, float]]) -> None:
        self.store.save_json(found, "neighbours", str(number), f"{case_id}.json")

    def with_neighbours(self, number: int, case_id: str) -> list[dict[str, float]]:
        """How far linked cases agree with a round's answer (`answers.agreement`); no signals where none voted."""
        names = ("neighbours", str(number), f"{case_id}.json")
        if not self.store.has(*names):
            return [{} for _ in range(1, self.plan.classes)]
        found: list[dict[str, float]] = self.store.json(*names)
        return found

    def save_links(self, case_id: str, links: Sequence[Link]) -> None:
        self.store.save_tensors({"links": [one.to_file() for one in links]}, "links", f"{case_id}.pt")

    def has_links(self, case_id: str) -> bool:
        return self.store.has("links", f"{case_id}.pt")

    def links(self, case_id: str) -> list[Link]:
        """The cases that a case was registered with, those that look most like it first."""
        return [Link.from_file(one) for one in self.store.tensors("links", f"{case_id}.pt")["links"]]

    def between_passes(self, number: int, case_id: str) -> list[float | None]:
        """How far a round's test-time passes agree: Dice of the classes 1 .. C - 1, None where there was one pass."""
        names = ("passes", str(number), f"{case_id}.json")
        if not self.store.has(*names):
            return [None] * (self.plan.classes - 1)
        agreed: list[float | None] = self.store.json(*names)
        return agreed

    # ------------------------------------------------------------------ training data

    def _distances(self, case_id: str, label: NDArray[Any]) -> SavedArray:
        names = ("distances", f"{case_id}.npy")
        if not self.store.has(*names):
            self.store.save_array(signed_distances(label, self.plan.classes, self.plan.spacing), *names)
        return self.store.saved(*names)

    def pseudo_label(self, number: int, case_id: str) -> SavedArray:
        """The pseudo-label that round `number` trains on: class indices, or probabilities (soft)."""
        return self.store.saved("pseudo", str(number), f"{case_id}.npy")

    def pseudo_cases(self, number: int, seed: int) -> list[TrainingCase]:
        """Training data of the unlabelled cases for a round."""
        found = []
        for position, case_id in enumerate(self.ids):
            if not self.case(case_id).trainable:
                continue
            self.image(case_id)  # made on first use
            image = self.store.saved("images", f"{case_id}.npy")
            target = self.pseudo_label(number, case_id)
            weight = self.store.saved("weights-of-voxels", str(number), f"{case_id}.npy")
            label = np.asarray(target).argmax(0) if target.ndim == 4 else np.asarray(target)
            generator = np.random.default_rng([seed, number, position])
            centres = find_centres(np.where(np.asarray(weight) > 0, label, 0), self.plan.classes, generator)
            found.append(TrainingCase(image, target, weight, centres))
        return found

    def labelled_cases(self, seed: int, with_distances: bool = False) -> list[TrainingCase]:
        """Training data of the labelled cases; unknown voxels have weight 0.

        Args:
            seed: of the patch centres.
            with_distances: signed distance maps too; they are computed once per case and kept on disk.
        """
        found = []
        for position, case in enumerate(self.labelled):
            image, label, weight = self._labelled(case)
            there = np.asarray(label)
            centres = find_centres(there, self.plan.classes, np.random.default_rng([seed, 0, position]))
            distances = self._distances(case.id, there) if with_distances else None
            found.append(TrainingCase(image, label, weight, centres, case.weight, distances))
        return found

    def _labelled(self, case: LabelledCase) -> list[SavedArray]:
        """Image, label, and 1 where the label is known, on the training grid: made once, left on disk."""
        names = [("labelled", kind, f"{case.id}.npy") for kind in ("image", "label", "weight")]
        if not self.store.has(*names[-1]):
            grid = self.grid(case.image.geometry)
            known = Volume(case.known_voxels().astype(np.uint8), case.label.geometry)
            made = self.scaled(case.image, grid), resample_labels(case.label, grid), resample_labels(known, grid)
            for array, name in zip(made, names, strict=True):
                self.store.save_array(array, *name)
        return [self.store.saved(*name) for name in names]


def signed_distances(label: NDArray[Any], classes: int, spacing: tuple[float, float, float]) -> NDArray[np.float16]:
    """Signed distance maps of the foreground classes (SemiSAM-O1, DTC).

    Distance outside over its maximum minus distance inside over its maximum, zero on the inner boundary.

    Args:
        label: (z, y, x) class indices.
        classes: number of classes, background included.
        spacing: (z, y, x) mm.

    Returns:
        (C - 1, z, y, x) in [-1, 1], positive outside; NaN throughout for a class that the label lacks, or that fills
        it and so has no boundary.
    """
    maps = np.full((classes - 1, *label.shape), np.nan, np.float16)
    for value in range(1, classes):
        mask = label == value
        if not mask.any() or mask.all():
            continue
        outside, within = (ndimage.distance_transform_edt(one, sampling=spacing) for one in (~mask, mask))
        signed = outside / max(float(outside.max()), 1e-6) - within / max(float(within.max()), 1e-6)
        signed[mask & ~ndimage.binary_erosion(mask, border_value=1)] = 0
        maps[value - 1] = signed
    return maps


def _deformation_to_file(deformation: Deformation) -> dict[str, Any]:
    geometry = deformation.geometry.to_json()
    return {
        "geometry": geometry,
        "start": deformation.start.tolist(),
        "forward": deformation.forward.cpu(),
        "backward": deformation.backward.cpu(),
        "round_trip": deformation.round_trip.cpu(),
        "residual": deformation.residual,
        "folded": deformation.folded,
        "overlap": deformation.overlap,
        "name": deformation.name,
    }


def _deformation_from_file(value: dict[str, Any]) -> Deformation:
    fields = {key: one for key, one in value.items() if key not in ("geometry", "start")}
    return Deformation(geometry=Geometry.from_json(value["geometry"]), start=np.array(value["start"]), **fields)
