"""Metrics worked out by hand, against medpy, and what empty masks mean."""

import numpy as np
import pytest
from engine_helpers import smooth_noise

from SemiSAMO1Lib.engine.evaluation.metrics import (
    case_metrics,
    dice,
    jaccard,
    mean_of,
    surface_distances,
    surface_distances_scipy,
)

SPACING = (3.0, 1.0, 0.5)
EMPTY = np.zeros((4, 5, 6), bool)


def points(*places):
    mask = EMPTY.copy()
    for place in places:
        mask[place] = True
    return mask


A, B = points((0, 0, 0), (0, 0, 1), (0, 0, 2)), points((0, 0, 2), (0, 0, 3))


def test_dice_by_hand():
    assert dice(A, B) == pytest.approx(2 * 1 / 5)


def test_jaccard_by_hand():
    assert jaccard(A, B) == pytest.approx(1 / 4)


@pytest.mark.parametrize(("place", "expected"), [((2, 1, 1), 6.0), ((0, 4, 1), 3.0), ((0, 1, 5), 2.0)])
def test_distance_of_two_voxels_is_in_mm(place, expected):
    found = surface_distances(points((0, 1, 1)), points(place), SPACING)
    assert found == pytest.approx((expected, expected))


def test_hausdorff_is_the_95th_percentile_of_both_directions():
    """From A: 1, .5, 0 mm; from B: 0, .5 mm."""
    found, _ = surface_distances_scipy(A, B, SPACING)
    assert found == pytest.approx(np.percentile([1.0, 0.5, 0.0, 0.0, 0.5], 95))


def test_average_distance_is_that_of_the_predictions_surface():
    _, found = surface_distances_scipy(A, B, SPACING)
    assert found == pytest.approx(0.5), "mean of 1, 0.5 and 0 mm"


def test_inner_voxels_are_no_surface():
    solid = np.zeros((7, 7, 7), bool)
    solid[1:6, 1:6, 1:6] = True
    hollow = solid.copy()
    hollow[3, 3, 3] = False
    _, found = surface_distances_scipy(solid, solid, (1.0, 1.0, 1.0))
    assert found == 0 and surface_distances_scipy(solid, hollow, (1.0, 1.0, 1.0))[1] == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [0, 1], ids=["hd95", "asd"])
def test_medpy_and_scipy_agree(seed, number):
    binary = pytest.importorskip("medpy.metric.binary")
    a, b = smooth_noise((12, 20, 24), 2 * seed) > 0.6, smooth_noise((12, 20, 24), 2 * seed + 1) > 0.6
    theirs = (binary.hd95, binary.asd)[number](a, b, voxelspacing=SPACING)
    assert surface_distances_scipy(a, b, SPACING)[number] == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_medpy_and_we_agree_on_overlap(seed):
    binary = pytest.importorskip("medpy.metric.binary")
    a, b = smooth_noise((12, 20, 24), 2 * seed) > 0.3, smooth_noise((12, 20, 24), 2 * seed + 1) > 0.3
    assert (dice(a, b), jaccard(a, b)) == (pytest.approx(binary.dc(a, b)), pytest.approx(binary.jc(a, b)))


def test_without_medpy_the_numbers_are_the_same(monkeypatch):
    a, b = smooth_noise((12, 20, 24), 1) > 0.6, smooth_noise((12, 20, 24), 2) > 0.6
    with_medpy = surface_distances(a, b, SPACING)
    monkeypatch.setitem(__import__("sys").modules, "medpy.metric.binary", None)
    assert surface_distances(a, b, SPACING) == pytest.approx(with_medpy, abs=1e-9)


def test_both_empty():
    assert (dice(EMPTY, EMPTY), jaccard(EMPTY, EMPTY), surface_distances(EMPTY, EMPTY, SPACING)) == (1, 1, (0, 0))


@pytest.mark.parametrize("masks", [(A, EMPTY), (EMPTY, A)])
def test_one_empty(masks):
    assert (dice(*masks), jaccard(*masks), surface_distances(*masks, SPACING)) == (0, 0, (None, None))


def label_maps():
    return A * 1 + points((3, 4, 5)) * 2, B * 1 + points((3, 4, 4)) * 3


def test_case_has_a_row_for_every_label():
    assert set(case_metrics(*label_maps(), (1, 2, 3), SPACING)["labels"]) == {"1", "2", "3"}


def test_mean_dice_is_the_mean_over_labels():
    assert case_metrics(*label_maps(), (1, 2, 3), SPACING)["mean_dice"] == pytest.approx((0.4 + 0 + 0) / 3)


def test_undefined_distances_are_left_out_of_the_mean():
    found = case_metrics(*label_maps(), (1, 2, 3), SPACING)
    assert found["mean_asd_mm"] == pytest.approx(0.5), "labels 2 and 3 have no distance; label 1 has 0.5 mm"


def test_distances_on_request_only():
    assert "mean_hd95_mm" not in case_metrics(*label_maps(), (1,), SPACING, distances=False)


@pytest.mark.parametrize(("values", "expected"), [([1.0, None, 3.0], 2.0), ([None], None), ([], None)])
def test_mean_of_what_is_defined(values, expected):
    assert mean_of(values) == expected


def test_masks_at_the_border_of_the_scan():
    full = np.ones((4, 5, 6), bool)
    assert surface_distances_scipy(full, full, SPACING) == (0, 0), "the scan's border is a surface"
