"""A fresh Slicer scene for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scene_helpers import GRIDS, write_case
from slicer_harness import application

from SemiSAMO1Lib.scene.case_view import CaseFiles
from SemiSAMO1Lib.volume import Geometry


@pytest.fixture(autouse=True)
def app() -> Iterator[application.Application]:
    yield application.boot()
    application.shutdown()


@pytest.fixture(params=list(GRIDS))
def grid(request: pytest.FixtureRequest) -> Geometry:
    return GRIDS[request.param]


@pytest.fixture
def case_files(tmp_path: Path, grid: Geometry) -> CaseFiles:
    """A case of a training on the grid: scan, prediction of two of three labels, uncertainty."""
    return write_case(tmp_path, grid)
