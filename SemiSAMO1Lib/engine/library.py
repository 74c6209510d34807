"""Cases of a finished run that vote on further scans: those whose answers can best be believed, with their images."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..volume import Geometry, Volume
from .carrying import DETOURS_FILE
from .cases import Propagation
from .cohort import Cohort
from .config import TrainingConfig
from .data.store import Store
from .linking import has_links, linker_for
from .observer import Observer
from .planning import Plan
from .propagation.base import Propagator
from .propagation.detours import Detours, Helper, best_fitting
from .propagation.links import carried
from .ranks import Ranks
from .refinement.check import believed, checks_of
from .similarity import Likeness

#: Cases that are kept.
SIZE = 16

#: Who they are.
INDEX = ("library.json",)


def keep_library(cohort: Cohort, number: int, config: TrainingConfig, observer: Observer, ranks: Ranks) -> None:
    """Keep image, label and signature of the cases whose answer of a round can best be believed; where cases do not
    vote, of those that help others by detours."""
    if ranks.as_first(ranks.first and cohort.store.has(*INDEX)):
        return
    if not ranks.as_first(has_links(cohort, config)):
        keep_helpers(cohort, cohort.ids, ranks)
        return
    judged = partial(cohort.answer, number)
    chosen = believed(cohort, checks_of(cohort, number, "checks-of-answers", judged, observer, ranks))[:SIZE]
    ranks.once(
        lambda: cohort.store.save_json([_kept(cohort, one, cohort.answer(number, one)) for one in chosen], *INDEX)
    )


def keep_helpers(cohort: Cohort, cases: Collection[str], ranks: Ranks) -> None:
    """Keep the cases that help others by detours, or would: further scans may be carried through them, as they were
    carried themselves without any."""

    def kept() -> list[dict[str, object]]:
        detours = Detours(**cohort.store.json(*DETOURS_FILE))
        helpers = detours.through
        if not helpers and detours.limit is not None:
            misfits = {one: cohort.store.json("propagation", f"{one}.json").get("misfit") for one in cohort.ids}
            known = {one: cost for one, cost in misfits.items() if cost is not None and cohort.case(one).trainable}
            helpers = best_fitting(known, detours.limit)
        return [_kept(cohort, one, cohort.probabilities(0, one)) for one in helpers if one in cases]

    ranks.once(lambda: cohort.store.once(kept, *INDEX))


def _kept(cohort: Cohort, case_id: str, probabilities: NDArray[Any]) -> dict[str, object]:
    """Keep a case with what is said of it; returns its line in the index."""
    label = np.asarray(probabilities).argmax(0)
    kind = np.uint8 if cohort.plan.classes <= 256 else np.uint16
    cohort.store.save_array(np.asarray(cohort.image(case_id)), "library", f"{case_id}-image.npy")
    cohort.store.save_array(label.astype(kind), "library", f"{case_id}-label.npy")
    known = np.asarray(cohort.confidence(case_id)) > 0
    cohort.store.save_array(known, "library", f"{case_id}-known.npy")
    cohort.store.save_array(np.asarray(cohort.signature(case_id)), "library", f"{case_id}-signature.npy")
    geometry = cohort.grid(cohort.case(case_id).geometry).to_json()
    misfit = cohort.store.json("propagation", f"{case_id}.json").get("misfit")
    start = cohort.deformation(case_id).start.tolist()
    return {"id": case_id, "geometry": geometry, "to_template": start, "misfit": misfit}


class Library:
    """The kept cases of a finished run, less some; those that were looked at last stay in memory."""

    def __init__(
        self, store: Store, plan: Plan, config: TrainingConfig, device: torch.device, without: Collection[str] = ()
    ) -> None:
        kept = store.json(*INDEX) if store.has(*INDEX) else []
        rows = [row for row in kept if row["id"] not in without]
        self._store, self._plan, self._config = store, plan, config
        self._misfits = {row["id"]: row["misfit"] for row in rows if row.get("misfit") is not None}
        self._grids = {row["id"]: Geometry.from_json(row["geometry"]) for row in rows}
        self._starts = {row["id"]: np.array(row["to_template"]) for row in rows}
        self._linker, self._device = linker_for(plan, device), device

    def votes(self, image: Volume, propagated: Propagation) -> tuple[NDArray[np.float16], NDArray[np.float16]] | None:
        """What the kept cases that look most like a scan show there: see `carried`. None where nobody votes.

        Args:
            image: the scan's intensities on its training grid.
            propagated: of the scan.
        """
        asked = self._config.neighbour_share > 0 and self._grids
        if not asked or not propagated.transforms or propagated.signature is None:
            return None
        signatures = {one: np.asarray(self._store.array("library", f"{one}-signature.npy")) for one in self._grids}
        signatures[""] = propagated.signature
        chosen = [one for one, _ in Likeness(signatures).nearest("", list(self._grids), self._config.neighbours)]
        own = propagated.transforms[0].start
        self._linker.forget("")
        links = self._linker.links(
            "",
            chosen,
            lambda one: self._kept(one, "image") if one else image,
            lambda one: np.asarray(np.linalg.inv(self._starts[one]) @ own),
        )

        def said_by(one: str, value: int) -> Volume:
            label = self._kept(one, "label")
            return Volume(label.array == value, label.geometry)

        known_by, classes = partial(self._kept, what="known"), self._plan.classes
        return carried(links, said_by, known_by, image.geometry, classes, self._device)

    def carry(self, propagator: Propagator, prepared: Any, volume: Volume, grid: Geometry) -> Propagation:
        """Carry the label to a further scan; where it fits badly, once more through kept cases that it fits well."""
        first = propagator.propagate(prepared, volume, grid)
        through = self.detours(first)
        return propagator.propagate(prepared, volume, grid, through) if through else first

    def detours(self, propagated: Propagation) -> list[Helper]:
        """Cases through which a further scan is carried again: the kept ones that fit best, where it fits worse than
        the limit of the run; else none."""
        limit = Detours(**self._store.json(*DETOURS_FILE)).limit if self._store.has(*DETOURS_FILE) else None
        if limit is None or "misfit" not in propagated.facts:
            return []
        misfit = propagated.facts["misfit"]
        if misfit is not None and misfit <= limit:
            return []
        return [self._helper(one) for one in best_fitting(self._misfits, limit)]

    def _helper(self, name: str) -> Helper:
        known = np.asarray(self._kept(name, "known").array) > 0
        deformation = Cohort([], [], self._plan, self._store).deformation(name)
        padded = self._plan.intensity.scheme != "fixed"
        return Helper(name, lambda: self._kept(name, "image"), self._kept(name, "label"), known, deformation, padded)

    def _kept(self, name: str, what: str) -> Volume:
        return Volume(self._store.array("library", f"{name}-{what}.npy"), self._grids[name])
