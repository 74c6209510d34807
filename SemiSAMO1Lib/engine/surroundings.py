"""The part of each scan in which the labelled structures lie, where scans show much more.

The grids of a training have a number of voxels, whatever a scan shows: spread over a whole chest they are too coarse
for an atrium. So where the template's label with a margin fills a small part of its scan, the label is first carried to
every scan as a whole, coarsely; what lies around it there is cut out, and this is all that plan, registration, networks
and answers see (`find_surroundings`). Results lie on the scans' own grids again: elsewhere is background (`in_whole`).
A further scan is cut like the others (`Finder`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from scipy import ndimage

from ..volume import Geometry, Volume
from .carrying import propagate
from .cases import CaseResult, EngineCase, LabelledCase
from .cohort import Cohort
from .config import TrainingConfig, make_config
from .data.boxes import Box, box_around, box_within, grown, on_grid, size_of
from .data.grids import canonical
from .data.store import Store
from .library import INDEX, Library, keep_helpers
from .memory import or_on_cpu
from .observer import Observer
from .planning import Plan, make_plan, plan_to_json
from .propagation.base import Propagator
from .propagation.descriptors import working_spacing
from .propagation.registry import REGISTERING, Request, make_propagator
from .ranks import Ranks

#: Scans are cut where the template's label and its margin fill less than this share of the template's scan.
SMALL = 0.6

#: Margin around a label, as a share of its size (the cube root of its box' volume), and the least one, mm. In the
#: template it is twice as wide: what surrounds a case's label, it should have seen.
MARGIN, LEAST_MARGIN = 0.25, 10.0

#: Scans as a whole are registered on a grid of fewer voxels than what is cut out of them, by this factor, as long as
#: the label's size is at least so many voxels of it.
COARSER, ACROSS = 4, 15

#: A carried label whose size is less or more than that of the template's by this factor says where it is, and no more.
ALIKE = 2.0

#: Where a label was not found, a box in the middle that is longer than the template's label by this factor.
NOT_FOUND = 1.5

#: Said where a box cuts a label off.
CUT_OFF = "the labels reach the edge of the part of the scan that was looked at"

#: Share of a run's time that looking for the label takes, for the fraction that is shown.
SHARE = 0.1

#: Where a run keeps what it found out about scans as a whole; and what it cuts out of them.
FOLDER, FILE = "whole", ("surroundings.json",)


@dataclass(frozen=True)
class Surroundings:
    """What a run cuts out of its scans.

    Attributes:
        boxes: by case, labelled ones too; empty where scans are used as they are.
        not_found: cases in which the label was not found: their middle is looked at.
        margin: around a label, mm.
        looked_at: how large the parts of unlabelled scans are along (z, y, x), axes nearest to the patient's: medians,
            mm.
    """

    boxes: Mapping[str, Box] = field(default_factory=dict)
    not_found: Collection[str] = ()
    margin: float = 0.0
    looked_at: Sequence[float] = ()

    def case(self, case: EngineCase) -> EngineCase:
        """What is used of a case."""
        box = self.boxes.get(case.id)
        return (
            case if box is None else replace(case, geometry=box.grid(case.geometry), load=lambda: box.of(case.load()))
        )

    def labelled(self, case: LabelledCase) -> LabelledCase:
        """What is used of a labelled case."""
        box = self.boxes.get(case.id)
        return case if box is None else replace(case, image=box.of(case.image), label=box.of(case.label))

    def in_whole(self, result: CaseResult, whole: Geometry) -> CaseResult:
        """A case's result on the grid of its whole scan."""
        box = self.boxes.get(result.case_id)
        return result if box is None else in_whole(result, box, whole, result.case_id not in self.not_found)

    def cuts_off(self, result: CaseResult, whole: Geometry) -> bool:
        """Whether what a case's result labels reaches the edge of what is used of its scan."""
        box = self.boxes.get(result.case_id)
        return box is not None and box.cuts_off(result.prediction.array, whole)

    def to_json(self) -> dict[str, Any]:
        boxes = {case: (box.start, box.stop) for case, box in self.boxes.items()}
        return {**vars(self), "boxes": boxes, "not_found": list(self.not_found), "looked_at": list(self.looked_at)}

    @classmethod
    def of(cls, store: Store) -> Surroundings:
        """Those of a run; without boxes where it used scans as they are."""
        if not store.has(*FILE):
            return cls()
        return cls._from_json(store.json(*FILE))

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Surroundings:
        return cls(**{**value, "boxes": {case: Box(tuple(a), tuple(b)) for case, (a, b) in value["boxes"].items()}})


def margin_of(labelled: Sequence[LabelledCase], config: TrainingConfig) -> float | None:
    """The margin around labels, mm, where scans are to be cut; None where they are used as they are.

    They are where the template's label fills much of its scan, where it does not show all that others do (its
    surroundings say nothing of those), and where no registration carries it.
    """
    template = labelled[0]
    box, whole = box_around(template.label.array), template.image.geometry
    if not config.surroundings or config.generalist not in REGISTERING or box is None or template.unknown:
        return None
    if not template_shows_all(labelled):
        return None
    margin = max(LEAST_MARGIN, MARGIN * size_of(box, whole))
    return margin if grown(box, whole, margin).voxels < SMALL * whole.voxels else None


def template_shows_all(labelled: Sequence[LabelledCase]) -> bool:
    """Whether the template's label shows every class that another labelled scan does."""
    shown = np.unique(labelled[0].label.array)
    return all(np.isin(np.unique(one.label.array), shown).all() for one in labelled[1:])


def in_whole(result: CaseResult, box: Box, whole: Geometry, found: bool) -> CaseResult:
    """A result of a part of a scan, on the grid of the whole scan. Elsewhere is background; without a doubt where the
    label was found, and else with every doubt there is."""
    prediction = box.placed(result.prediction, whole)
    uncertainty = box.placed(result.uncertainty, whole, 0 if found else 100)
    scores = {**result.scores, "uncertainty": float(uncertainty.array.mean()) / 100}
    return replace(result, prediction=prediction, uncertainty=uncertainty, scores=scores)


def find_surroundings(
    cases: Sequence[EngineCase],
    labelled: Sequence[LabelledCase],
    classes: int,
    config: TrainingConfig,
    store: Store,
    fabric: Fabric,
    observer: Observer,
) -> Surroundings:
    """Find the part of each scan in which the template's label lies, once, and write it down.

    Args:
        cases: unlabelled scans, as they are.
        labelled: the template first. Where another one does not show all that the template does, its label alone does
            not say where the rest would be: it is looked for there, too.
        classes: number of classes, background included.
        config: of the training.
        store: of the run.
        fabric: device, ranks.
        observer: gets 'progress' events and warnings, and is asked whether to stop.

    Raises:
        Stopped: the observer asked for it.
    """
    ranks, below = Ranks(fabric), Store(store.path(FOLDER))
    margin = margin_of(labelled, config)
    if margin is None:
        return Surroundings()
    if not ranks.as_first(ranks.first and store.has(*FILE)):
        template = labelled[0]
        shown = np.unique(template.label.array)
        vague = [one for one in labelled[1:] if one.unknown or not np.isin(shown, one.label.array).all()]
        looked_in = [*cases, *(_without_label(one) for one in vague)]
        ranks.once(lambda: below.once(lambda: plan_to_json(_plan(looked_in, template, classes, config)), "plan.json"))
        whole = Cohort(looked_in, [template], Plan.model_validate(below.json("plan.json")), below)
        propagate(whole, _for_the_search(config), fabric, _Looking(observer), None)
        keep_helpers(whole, [case.id for case in cases], ranks)
        ranks.once(lambda: store.save_json(_found(whole, cases, labelled, margin, observer).to_json(), *FILE))
    ranks.once(lambda: _tidy(below))
    return Surroundings._from_json(store.json(*FILE))


def _found(
    whole: Cohort, cases: Sequence[EngineCase], labelled: Sequence[LabelledCase], margin: float, observer: Observer
) -> Surroundings:
    """Boxes around what was carried to scans as a whole, and around the labels of labelled ones."""
    template = labelled[0]
    box = _label_of(template)
    boxes = {template.id: grown(box, template.image.geometry, 2 * margin)}
    extent, not_found = _extent(box, template), []
    for case in whole.cases:
        label = np.asarray(whole.probabilities(0, case.id)).argmax(0)
        boxes[case.id], found = _box_of_case(label, whole.grid(case.geometry), case.geometry, extent, margin)
        if not found:
            not_found.append(case.id)
            text = f"{case.id}: the template's label was not found in this scan; its middle is looked at"
            observer.event("warning", text=text)
    for one in labelled[1:]:
        own = box_around(one.label.array)
        if own is not None:
            own = grown(own, one.image.geometry, 2 * margin)
            boxes[one.id] = boxes[one.id].joined(own) if one.id in boxes else own
    extents = [canonical(boxes[case.id].grid(case.geometry)).extent for case in cases]
    return Surroundings(boxes, not_found, margin, np.median(extents, axis=0).round(1).tolist())


class Finder:
    """Finds the part of further scans that a finished run would have cut out of them.

    Args:
        template: as it is.
        config, store: of the run, which has cut its scans.
        observer: gets warnings.
        without: cases whose predictions are not believed any more: nothing is carried through them.
    """

    def __init__(
        self,
        template: LabelledCase,
        config: TrainingConfig,
        store: Store,
        observer: Observer,
        without: Collection[str] = (),
    ) -> None:
        self._template, self._extent = template, _extent(_label_of(template), template)
        self._margin = Surroundings.of(store).margin
        self._config, self._observer = _for_the_search(config), observer
        self._store, self._without = Store(store.path(FOLDER)), without
        self._plan = Plan.model_validate(self._store.json("plan.json"))
        self._on = functools.cache(self._made)

    def box(self, volume: Volume, device: torch.device) -> tuple[Box, bool]:
        """Where the template's label lies in a scan, with its margin, and whether it was found."""
        grid = Cohort([], [self._template], self._plan, self._store).grid(volume.geometry)

        def carry(where: torch.device) -> NDArray[np.intp]:
            propagator, prepared, library = self._on(where)
            found = library.carry(propagator, prepared, volume, grid)
            return np.asarray(found.probabilities.argmax(0).cpu().numpy())

        label = or_on_cpu(carry, device, self._observer, "looking for the label")
        return _box_of_case(label, grid, volume.geometry, self._extent, self._margin)

    def _made(self, where: torch.device) -> tuple[Propagator, Any, Library]:
        propagator = make_propagator(Request(self._plan, self._config, where, self._observer))
        library = Library(self._store, self._plan, self._config, where, self._without)
        return propagator, propagator.prepare([self._template]), library


class _Looking:
    """Progress while the label is looked for."""

    #: The name of each stage here, where it begins, and its length, as shares of the search.
    STAGES: ClassVar = {"propagation": ("finding the label", 0.0, 0.7), "detours": ("finding it again", 0.7, 0.3)}

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def step(self, stage: str, done: int, of: int) -> None:
        name, begin, length = self.STAGES[stage]
        fraction = SHARE * (begin + length * done / max(of, 1))
        self.observer.event("progress", stage=name, done=done, of=of, fraction=fraction)


def _without_label(one: LabelledCase) -> EngineCase:
    return EngineCase(one.id, one.image.geometry, lambda: one.image)


def _for_the_search(config: TrainingConfig) -> TrainingConfig:
    """Registration alone."""
    return config.model_copy(update={"generalist": "registration", "neighbour_share": 0.0})


def _plan(cases: Sequence[EngineCase], template: LabelledCase, classes: int, config: TrainingConfig) -> Plan:
    """A coarse plan for scans as a whole; of it grid and registration are used."""
    geometries = [*(case.geometry for case in cases), template.image.geometry]
    largest = config.registration.largest_grid
    finest = working_spacing(geometries, largest)
    wanted = size_of(_label_of(template), template.image.geometry) / ACROSS
    spacing = max(finest, min(wanted, working_spacing(geometries, largest // COARSER)))
    voxels = max(round(largest * (finest / spacing) ** 3), 10_000)
    own = make_config("quick", training_voxels=voxels, device=config.device)
    return make_plan(geometries, template.image, template.label.array, classes, own, spacing, "cpu", 1 << 30)


def _label_of(template: LabelledCase) -> Box:
    box = box_around(template.label.array)
    assert box is not None, "a template without a label is refused"
    return box


def _extent(box: Box, template: LabelledCase) -> NDArray[np.float64]:
    """How large the template's label is along (z, y, x), axes nearest to the patient's, mm."""
    return np.array(canonical(box.grid(template.image.geometry)).extent)


def _box_of_case(
    label: NDArray[np.integer], grid: Geometry, whole: Geometry, extent: NDArray[np.float64], margin: float
) -> tuple[Box, bool]:
    """Where a carried label lies in a scan, with the margin and a coarse voxel more, and whether it was found.

    Args:
        label: (z, y, x) on `grid`.
        grid: coarse, its axes nearest to the patient's.
        whole: the scan's grid.
        extent: of the template's label along the grid's axes, mm.
        margin: mm.
    """
    found = box_around(label)
    if found is None:
        there = _centred(np.array(grid.shape) / 2, NOT_FOUND * extent, grid)
    else:
        size = size_of(found, grid) / float(np.prod(extent)) ** (1 / 3)
        middle = np.array(ndimage.center_of_mass(label > 0)) + 0.5
        there = found if 1 / ALIKE <= size <= ALIKE else _centred(middle, extent, grid)
    return grown(on_grid(there, grid, whole), whole, margin + max(grid.spacing)), found is not None


def _centred(middle: NDArray[np.float64], extent: NDArray[np.float64], grid: Geometry) -> Box:
    """A box around a place (voxel edges are whole numbers), as large as `extent` (mm)."""
    half = extent / np.array(grid.spacing) / 2
    return box_within(middle - half, middle + half, grid.shape)


def _tidy(below: Store) -> None:
    """Keep of the search what finds the label in further scans."""
    below.keep_what_is_needed()
    helpers = {row["id"] for row in below.json(*INDEX)}
    for path in below.path("transforms").glob("*.pt"):
        if path.stem not in helpers:
            with contextlib.suppress(OSError):
                path.unlink()
