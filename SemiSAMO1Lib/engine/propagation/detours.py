"""Ways around: from the template to a case through another one, to which the template's label was carried well.

Two scans that are turned against each other may both be brought to a third one. What a detour finds is used twice: the
label that was carried to the other case is carried on from there, and the affine transform that fits the detour near
the label is a further start of the registration with the template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...volume import Volume
from .deformable import Deformation
from .near import Neighbourhood
from .starts import LARGEST_STRETCH, Start

#: A case is carried again where the label's surroundings fit worse than the cohort's median by more than this share.
BADLY = 0.1

#: Detours that are tried: through the cases that fit best.
HELPERS = 3

#: Vote of a label that was carried to another case, beside the least labelled scan's: nobody has looked at it.
VOTE = 0.5


@dataclass(frozen=True, eq=False)
class Helper:
    """A case to which the template's label was carried well.

    Attributes:
        id: its name.
        load: reads the scan.
        label: (z, y, x) class indices, on any grid.
        known: True where the template showed something, on the label's grid.
        to_template: its registration with the template.
        padded: a border of one grey value holds no data; False: all of the scan is data.
    """

    id: str
    load: Callable[[], Volume]
    label: Volume
    known: NDArray[np.bool_]
    to_template: Deformation
    padded: bool = True


@dataclass(frozen=True)
class Detours:
    """Which cases are to be carried again, and through which.

    Attributes:
        again: those that fit worse than the limit, in the cohort's order.
        through: those that help, the best first.
        limit: of how badly a case may fit; None: no case was judged.
    """

    again: list[str]
    through: list[str]
    limit: float | None


def chosen_detours(misfits: Mapping[str, float | None], helpful: Collection[str]) -> Detours:
    """Decide from how well cases fit: who is worse than the cohort's middle goes through those that fit best.

    Args:
        misfits: of each case, how badly its registration fits around the label (`near.misfits`); None: the label's
            surroundings were not brought into it at all.
        helpful: cases that may help others.
    """
    judged = {case: cost for case, cost in misfits.items() if cost is not None}
    if not judged:
        return Detours([], [], None)
    limit = (1 + BADLY) * float(np.median(list(judged.values())))
    again = [case for case in misfits if judged.get(case, math.inf) > limit]
    through = best_fitting({case: cost for case, cost in judged.items() if case in helpful}, limit)
    return Detours(again if through else [], through if again else [], limit)


def best_fitting(costs: Mapping[str, float], limit: float) -> list[str]:
    """The few cases that fit best, the best first, none of them worse than the limit."""
    return [case for cost, case in sorted((cost, case) for case, cost in costs.items()) if cost <= limit][:HELPERS]


def start_through(near: Neighbourhood, there: Deformation, on: Deformation, name: str) -> Start | None:
    """The affine transform from a case to the template that fits a detour best, by least squares over the points near
    the label; None where it stretches too much.

    Args:
        near: the template's.
        there: from the case to the other one.
        on: from the other one to the template.
        name: of the start.
    """
    points = near.points[:, None, None].to(on.backward.device)  # one that was kept is read to main memory
    here = there.to_case(on.to_case(points).to(there.backward.device))[:, 0, 0].double().cpu().numpy().T
    wanted = near.points.double().cpu().numpy().T
    linear = on.start[:3, :3] @ there.start[:3, :3]  # across points that lie in a plane it stays this
    middle, centre = here.mean(0), wanted.mean(0)
    left = wanted - centre - (here - middle) @ linear.T
    linear = linear + np.linalg.lstsq(here - middle, left, rcond=1e-3)[0].T
    volume = float(np.linalg.det(linear))
    if not 1 / LARGEST_STRETCH < volume < LARGEST_STRETCH:
        return None
    matrix = np.eye(4)
    # rounded: the last digits depend on the number of threads
    matrix[:3, :3] = np.round(linear, 6)
    matrix[:3, 3] = np.round(centre - matrix[:3, :3] @ middle, 3)
    return Start(name, matrix)
