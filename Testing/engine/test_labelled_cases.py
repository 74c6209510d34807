"""Training data of labelled scans: on the training grid, and never all in memory."""

from __future__ import annotations

import numpy as np
import pytest
from engine_helpers import smooth_noise, tiny_plan

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import SavedArray, Store
from SemiSAMO1Lib.volume import Geometry, StoredVolume, Volume

SHAPE = (24, 26, 28)
GRID = Geometry(SHAPE)
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[8:14, 9:16, 10:20] = 1
LABEL[14:17, 9:16, 10:20] = 2


@pytest.fixture
def reads():
    return []


@pytest.fixture
def cohort(tmp_path, reads):
    def read():
        reads.append(1)
        return smooth_noise(SHAPE, 0)

    scan = LabelledCase("t", StoredVolume(GRID, read), Volume(LABEL, GRID))
    return Cohort([], [scan], tiny_plan(classes=3), Store(tmp_path))


def test_they_stay_on_disk(cohort):
    (scan,) = cohort.labelled_cases(0)
    arrays = (scan.image, scan.target, scan.weight)
    assert all(isinstance(array, SavedArray) for array in arrays), "of many labelled scans none is kept in memory"
    assert np.array_equal(scan.target, LABEL) and np.asarray(scan.weight).min() == 1


def test_they_are_made_once(cohort, reads):
    cohort.labelled_cases(0)
    before = len(reads)
    cohort.labelled_cases(0)
    assert before > 0 and len(reads) == before, "the scan was read again"
