"""How far a label can be believed that nobody drew: two agreements that need no reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cohort import Cohort
from ..data.grids import resample_labels
from ..observer import Observer, stop_if_asked
from .acceptance import mean_dice, reverse_dice

#: Share of the cases that are believed: those whose check is best.
BELIEVED = 0.6


def believed(cohort: Cohort, checks: Mapping[str, float]) -> list[str]:
    """The cases whose labels others may be told, the one that passes its check best first; rejected ones never."""
    useful = [case_id for case_id in cohort.ids if cohort.case(case_id).trainable]
    if not useful:
        return []
    limit = float(np.quantile([checks[case_id] for case_id in useful], 1 - BELIEVED))
    return sorted((one for one in useful if checks[one] >= limit), key=lambda one: (-checks[one], one))


def checks_of(cohort: Cohort, said: Callable[[str], NDArray[Any]], observer: Observer) -> dict[str, float]:
    """The check value of every case, in [0, 1].

    The mean of two agreements: with the template's label after carrying the label back to it, and with the
    propagation; the latter alone where nothing was registered. Classes that the template's label says nothing about do
    not count.

    Args:
        cohort: propagation and transforms of every case, on disk.
        said: gives the class probabilities (C, z, y, x) of a case that are judged.
        observer: is asked whether to stop.
    """
    template = cohort.labelled[0]
    template_grid = cohort.grid(template.image.geometry)
    label = resample_labels(template.label, template_grid)
    classes, registered = cohort.plan.classes, cohort.has_deformations()
    found = {}
    for case_id in cohort.ids:
        stop_if_asked(observer)
        judged, propagated = (np.asarray(one).argmax(0) for one in (said(case_id), cohort.probabilities(0, case_id)))
        found[case_id] = mean_dice(judged, propagated, classes, template.unknown)
        if registered:
            grid = cohort.grid(cohort.case(case_id).geometry)
            field = cohort.deformation(case_id)
            back = reverse_dice(judged, grid, field, label, template_grid, classes, template.unknown)
            found[case_id] = 0.5 * (back + found[case_id])
    return found
