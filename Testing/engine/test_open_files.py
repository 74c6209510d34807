"""A cohort may have more cases than a process may open files: 1,024 on most computers, 256 on a Mac."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import identity_deformation, smooth_noise, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase, Propagation
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.engine.refinement import refine_cohort, write_pseudo_label
from SemiSAMO1Lib.engine.sampling import PatchSource
from SemiSAMO1Lib.engine.similarity import Likeness
from SemiSAMO1Lib.volume import Geometry, Volume

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")

GRID = Geometry((6, 6, 6))

#: Cases of each kind, and files that may be opened beside those that are open already.
MANY, FEW = 40, 20


@pytest.fixture
def few_files() -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(one.name) for one in Path("/dev/fd").iterdir()}
    free = [number for number in range(max(taken) + FEW + 2) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[FEW], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """As many labelled cases as others, after the answers of a first round."""
    image, label = Volume(smooth_noise(GRID.shape, 0), GRID), np.zeros(GRID.shape, np.uint8)
    label[2:4, 2:4, 2:4] = 1
    cases = [EngineCase(f"case_{n}", GRID, lambda: image) for n in range(MANY)]
    labelled = [LabelledCase(f"labelled_{n}", image, Volume(label, GRID)) for n in range(MANY)]
    found = Cohort(cases, labelled, tiny_plan(2), Store(tmp_path))
    said = np.stack([label == 0, label == 1]).astype(np.float16)
    for case in cases:
        signature = smooth_noise((4, 4, 4), 1).astype(np.float16)
        registered = torch.from_numpy(said.astype(np.float32))
        known = Propagation(GRID, registered, torch.ones(GRID.shape), [identity_deformation(GRID)], {}, signature)
        found.save_propagation(case.id, known)
        write_pseudo_label(found, 0, case.id, said, tiny_config())
        found.store.save_array(said, "probabilities", "1", f"{case.id}.npy")
        found.save_answer(1, case.id, said)
    found.store.save_array(smooth_noise((4, 4, 4), 1), "template-signature.npy")
    return found


def test_a_round_learns_from_more_cases(cohort: Cohort, few_files: None) -> None:
    source = PatchSource(cohort.labelled_cases(0, True), cohort.pseudo_cases(1, 0), cohort.plan, tiny_config(), 1)
    for iteration in range(2 * FEW):
        assert torch.isfinite(source(iteration, 0).pseudo.image).all()


def test_more_cases_are_compared(cohort: Cohort, few_files: None) -> None:
    likeness = Likeness({case: cohort.signature(case) for case in cohort.ids})
    assert len(likeness.nearest("case_0", cohort.ids, MANY)) == MANY - 1


def test_more_cases_are_refined(cohort: Cohort, few_files: None) -> None:
    found = refine_cohort(cohort, 1, tiny_config(), Silent(), Ranks())
    assert len(found.taken) == MANY
