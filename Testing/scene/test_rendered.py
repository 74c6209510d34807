"""What a person sees: slice views drawn by Slicer's own code, judged by their pixels at places of the phantom."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scene_helpers import GRIDS, TABLE, labels_on, uncertainty_on
from slicer_harness.views import SliceView

from SemiSAMO1Lib.scene.case_view import CaseFiles, CaseView
from SemiSAMO1Lib.scene.overlay import jump
from SemiSAMO1Lib.volume import Geometry

BACKGROUND_ONLY = 12  # how far apart the channels of a grey pixel may be


@pytest.fixture(params=["straight", "oblique", "left-handed oblique"])
def grid(request: pytest.FixtureRequest) -> Geometry:
    return GRIDS[request.param]


@pytest.fixture
def red(case_files: CaseFiles) -> Iterator[tuple[CaseView, SliceView]]:
    """The case in a drawn view, which lies in the plane of its voxels' rows and columns."""
    view, window = CaseView(case_files, TABLE), SliceView("Red")
    window.fit()
    yield view, window
    window.close()


def ras(grid: Geometry, z: int, y: int, x: int) -> tuple[float, float, float]:
    left, posterior, superior, _ = grid.index_to_space @ [x, y, z, 1]
    return -left, -posterior, superior


def pixel(red: tuple[CaseView, SliceView], grid: Geometry, at: tuple[int, int, int]) -> np.ndarray:
    """The colour at a voxel, once the view has gone to its slice."""
    place = ras(grid, *at)
    jump(place)
    image = red[1].image()
    row, column = red[1].pixel_of(place)
    return image[row, column].astype(int)


def is_grey(color: np.ndarray) -> bool:
    return int(color.max() - color.min()) <= BACKGROUND_ONLY


def test_inside_a_label_its_colour_is_seen(red, grid: Geometry) -> None:
    liver, tumour = pixel(red, grid, (4, 5, 4)), pixel(red, grid, (4, 6, 11))
    assert labels_on(grid, 2, 7).array[4, 5, 4] == 2
    assert liver[0] > liver[2] and not is_grey(liver), f"liver is reddish, seen {liver}"
    assert tumour[1] > tumour[0] and not is_grey(tumour), f"tumour is green, seen {tumour}"


def test_outside_of_the_labels_the_scan_alone_is_seen(red, grid: Geometry) -> None:
    assert is_grey(pixel(red, grid, (4, 15, 20)))


def test_the_overlay_is_seen_where_the_prediction_is_uncertain(red, grid: Geometry) -> None:
    red[0].segmentation.GetDisplayNode().SetVisibility(False)
    assert uncertainty_on(grid).array[9, 12, 20] == 97
    before = pixel(red, grid, (9, 12, 20))
    red[0].show_uncertainty(True, 1.0, 20)
    after = pixel(red, grid, (9, 12, 20))
    assert is_grey(before) and after[0] > 200 and after[1] > 200 and after[2] < 190, f"light yellow, seen {after}"


def test_the_overlay_hides_nothing_below_the_threshold(red, grid: Geometry) -> None:
    red[0].segmentation.GetDisplayNode().SetVisibility(False)
    red[0].show_uncertainty(True, 1.0, 20)
    assert is_grey(pixel(red, grid, (9, 4, 4)))


def test_half_the_opacity_lets_the_scan_through(red, grid: Geometry) -> None:
    red[0].segmentation.GetDisplayNode().SetVisibility(False)
    scan = pixel(red, grid, (9, 12, 20))
    red[0].show_uncertainty(True, 1.0, 20)
    full = pixel(red, grid, (9, 12, 20))
    red[0].show_uncertainty(True, 0.5, 20)
    half = pixel(red, grid, (9, 12, 20))
    assert half == pytest.approx((scan + full) / 2, abs=6)
