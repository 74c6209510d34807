"""How far a label can be believed that nobody drew: two agreements that need no reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...volume import Geometry
from ..cases import LabelledCase
from ..cohort import Cohort
from ..data.grids import resample_labels
from ..observer import Observer
from ..propagation.deformable import Deformation
from ..ranks import Ranks
from .acceptance import mean_dice, reverse_dice

#: Share of the cases that are believed: those whose check is best.
BELIEVED = 0.6


def believed(cohort: Cohort, checks: Mapping[str, float]) -> list[str]:
    """The cases whose labels others may be told, the one that passes its check best first; rejected ones never."""
    useful = cohort.trainable_ids
    if not useful:
        return []
    limit = float(np.quantile([checks[case_id] for case_id in useful], 1 - BELIEVED))
    return sorted((one for one in useful if checks[one] >= limit), key=lambda one: (-checks[one], one))


class Check:
    """How far a label can be believed that nobody drew, in [0, 1].

    The mean of two agreements: with the template's label after carrying the label back to it, and with the
    propagation; the latter alone where nothing was registered. Classes that the template's label says nothing about do
    not count. That neither a label nor the propagation found anything is no agreement.

    Args:
        template: what a person labelled first.
        grid: its training grid.
        classes: C, background included.
    """

    def __init__(self, template: LabelledCase, grid: Geometry, classes: int) -> None:
        self._label, self._grid = resample_labels(template.label, grid), grid
        self._classes, self._unknown = classes, template.unknown

    def of(
        self, said: NDArray[Any], propagated: NDArray[Any], grid: Geometry, deformation: Deformation | None
    ) -> float:
        """The check value of a scan.

        Args:
            said: the class probabilities (C, z, y, x) that are judged.
            propagated: those of the propagation.
            grid: of both.
            deformation: between the scan and the template; None where it was not registered.
        """
        judged, carried = np.asarray(said).argmax(0), np.asarray(propagated).argmax(0)
        known = [value for value in range(1, self._classes) if value not in self._unknown]
        forth = None
        if np.isin(judged, known).any() or np.isin(carried, known).any():
            forth = mean_dice(judged, carried, self._classes, self._unknown)
        if deformation is None:
            return 0.0 if forth is None else forth
        back = reverse_dice(judged, grid, deformation, self._label, self._grid, self._classes, self._unknown)
        return back if forth is None else 0.5 * (back + forth)


def check_of(cohort: Cohort) -> Check:
    """The check of a cohort: by its template, the first of the labelled cases."""
    template = cohort.labelled[0]
    return Check(template, cohort.grid(template.image.geometry), cohort.plan.classes)


def checks_of(
    cohort: Cohort, number: int, what: str, said: Callable[[str], NDArray[Any]], observer: Observer, ranks: Ranks
) -> dict[str, float]:
    """The check value of every case; found once by all processes together, and read afterwards.

    Args:
        cohort: propagation and transforms of every case, on disk.
        number: the round that is judged.
        what: of it is judged, a name for the files: `checks` of its networks, `checks-of-answers`.
        said: gives the class probabilities (C, z, y, x) of a case that are judged.
        observer: is asked whether to stop.
        ranks: the processes.
    """
    check, registered, store = check_of(cohort), cohort.has_deformations(), cohort.store

    def save(case_id: str) -> None:
        if not store.has(what, str(number), f"{case_id}.json"):
            grid = cohort.grid(cohort.case(case_id).geometry)
            field = cohort.deformation(case_id) if registered else None
            value = check.of(said(case_id), cohort.probabilities(0, case_id), grid, field)
            store.save_json(value, what, str(number), f"{case_id}.json")

    for _ in ranks.each(save, cohort.ids, observer, cohort.at_once()):
        pass
    return {case_id: float(store.json(what, str(number), f"{case_id}.json")) for case_id in cohort.ids}
