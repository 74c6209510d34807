"""Grey values near a border: they move it to where it is seen, and change nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from SemiSAMO1Lib.engine.edges import LEAST_KEPT, by_edges
from SemiSAMO1Lib.engine.evaluation.metrics import dice

SHAPE = (24, 28, 32)
SPACING = (1.5, 1.5, 1.5)


def ball(radius: float = 8.0, shift: tuple[float, float, float] = (0, 0, 0)) -> NDArray[np.bool_]:
    """A ball in the middle of the scan, `shift` voxels off."""
    centre = [(n - 1) / 2 + s for n, s in zip(SHAPE, shift, strict=True)]
    z, y, x = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    return np.asarray((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 <= radius**2)


def scan_of(structure: NDArray[np.bool_], contrast: float = 100.0, seed: int = 0) -> NDArray[np.float32]:
    """A structure that is brighter than what is round it, with noise."""
    noise = np.random.default_rng(seed).normal(0, 15, SHAPE)
    return np.asarray(100 + contrast * structure + noise, np.float32)


def unsure(structure: NDArray[np.bool_]) -> NDArray[np.float16]:
    """Probabilities (2, z, y, x) of a prediction whose border is blurred."""
    inside = ndimage.gaussian_filter(structure.astype(float), 1.5)
    return np.stack([1 - inside, inside]).astype(np.float16)


def label_of(probabilities: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(probabilities.argmax(0) == 1)


def test_a_border_that_is_off_goes_to_where_it_is_seen() -> None:
    before = unsure(ball(shift=(0, 1, 1.5)))
    after = by_edges(before, scan_of(ball()), SPACING, 1.0)
    was, now = (dice(label_of(one), ball()) for one in (before, after))
    assert was < 0.88 and now > was + 0.04, f"Dice {was:.3f}, then {now:.3f}"


def test_dark_structures_are_seen_too() -> None:
    before = unsure(ball(shift=(0, 1, 1.5)))
    after = by_edges(before, scan_of(ball(), contrast=-60), SPACING, 1.0)
    assert dice(label_of(after), ball()) > dice(label_of(before), ball()) + 0.04


@pytest.mark.parametrize("radius", [2.5, 4.0, 7.0, 8.0, 9.0])
def test_a_class_keeps_its_volume(radius: float) -> None:
    """Volumes are not judged by grey values: too small stays too small, too large too large."""
    before = unsure(ball(radius))
    after = by_edges(before, scan_of(ball(min(radius, 8.0))), SPACING, 1.0)
    assert label_of(after).sum() == pytest.approx(label_of(before).sum(), rel=0.05)


def test_it_does_not_run_into_tissue_that_looks_alike() -> None:
    """A vein of the same brightness leaves the ball; the label ends where it did."""
    vein = np.zeros(SHAPE, bool)
    vein[10:14, 12:16, 15:] = True
    before = unsure(ball())
    after = by_edges(before, scan_of(ball() | vein), SPACING, 1.0)
    grown = label_of(after) & ~label_of(before) & vein
    assert grown.sum() <= 0.02 * label_of(before).sum(), f"{grown.sum()} voxels of the vein were taken in"


def test_where_nothing_is_seen_nothing_moves() -> None:
    before = unsure(ball())
    after = by_edges(before, scan_of(ball(), contrast=0), SPACING, 1.0)
    assert dice(label_of(after), label_of(before)) > 0.97


def test_the_unit_of_the_grey_values_does_not_matter() -> None:
    before, scan = unsure(ball(shift=(0, 1, 1))), scan_of(ball())
    here, there = (by_edges(before, one, SPACING, 1.0) for one in (scan, 1e-3 * scan - 7))
    assert np.array_equal(here.argmax(0), there.argmax(0))


def test_only_the_neighbourhood_of_borders_changes() -> None:
    before = unsure(ball(shift=(0, 1, 1.5)))
    after = by_edges(before, scan_of(ball()), SPACING, 1.0)
    inside = label_of(before)
    far = ndimage.binary_erosion(inside, iterations=5) | ~ndimage.binary_dilation(inside, iterations=5)
    assert np.array_equal(after[:, far], before[:, far]) and not np.array_equal(after, before)


def test_they_are_probabilities_still() -> None:
    after = by_edges(unsure(ball()), scan_of(ball()), SPACING, 1.0)
    assert after.dtype == np.float16 and np.allclose(after.astype(float).sum(0), 1, atol=2e-3)


def test_a_voxel_that_changes_its_class_is_as_unsure_as_before() -> None:
    """Grey values say where the border is, not that the answer was surer than it was."""
    before = unsure(ball(shift=(0, 1, 1.5)))
    after = by_edges(before, scan_of(ball()), SPACING, 1.0)
    assert np.abs(np.sort(after.astype(float), 0) - np.sort(before.astype(float), 0)).max() < 2e-3


def test_a_class_that_the_answer_lacks_does_not_appear() -> None:
    """It is everywhere the second best; it must not take what the first loses."""
    first = 0.55 * ndimage.gaussian_filter(ball(shift=(0, 2, 2)).astype(float), 1.5)
    before = np.stack([0.5 * (1 - first) - 0.02, first, 0.5 * (1 - first) + 0.02 - 0.05])
    before = (before / before.sum(0)).astype(np.float16)
    assert not (before.argmax(0) == 2).any(), "the class must not be in the answer for this test to say something"
    after = by_edges(before, scan_of(ball()), SPACING, 1.0)
    assert not (after.argmax(0) == 2).any() and not np.array_equal(after, before)


def test_a_class_does_not_appear_far_from_itself() -> None:
    """What one class loses goes to what is there, not to another one somewhere else that it is confused with."""
    one, other = ball(5.0, (0, 0, 9)), ball(4.0, (0, 0, -9))
    p1, p2 = (ndimage.gaussian_filter(each.astype(float), 1.2) for each in (ball(5.0, (0, 1.5, 10)), other))
    before = np.stack([1 - p1 - p2, 0.55 * p1 + 0.2 * p2, 0.7 * p2 + 0.45 * p1])
    before = (before / before.sum(0)).astype(np.float16)
    after = by_edges(before, scan_of(one | other), SPACING, 1.0)
    near_other = ndimage.binary_dilation(before.argmax(0) == 2, iterations=3)
    assert not ((after.argmax(0) == 2) & ~near_other).any()


def test_without_weight_nothing_is_changed() -> None:
    before = unsure(ball())
    assert np.array_equal(by_edges(before, scan_of(ball()), SPACING, 0.0), before)


def test_thick_slices_are_compared_with_their_neighbours_in_the_slice() -> None:
    """Slices five voxels' width apart: what lies in the next one is no neighbour of a border."""
    before = unsure(ball(shift=(0, 1, 1.5)))
    after = by_edges(before, scan_of(ball()), (5.0, 1.0, 1.0), 1.0)
    assert dice(label_of(after), ball()) > dice(label_of(before), ball()) + 0.04


@pytest.mark.parametrize(
    "label",
    [np.zeros(SHAPE, int), np.ones(SHAPE, int), np.pad(np.ones((1, 1, 1), int), [(3, 20), (4, 23), (5, 26)])],
    ids=["nothing", "everything", "a single voxel"],
)
def test_odd_answers_stay_finite(label: NDArray[np.int_]) -> None:
    before = np.stack([label == 0, label == 1, label == 2]).astype(np.float16)
    after = by_edges(before, scan_of(ball()), SPACING, 1.0)
    assert np.isfinite(after).all() and after.argmax(0).max() <= 1, "a class that is not there appeared"


def test_a_class_at_the_border_of_the_scan_is_treated_as_the_others() -> None:
    cut = ball(shift=(-9, 0, 0))
    moved = unsure(ball(shift=(-9, 1, 1.5)))
    after = by_edges(moved, scan_of(cut), SPACING, 1.0)
    assert dice(label_of(after), cut) > dice(label_of(moved), cut) + 0.02


def test_an_answer_that_is_unsure_everywhere_is_left_as_it_is() -> None:
    """Of a network that has learned next to nothing: its labels hang on hundredths, grey values would decide all."""
    noise = np.random.default_rng(0).normal(0, 0.01, SHAPE)
    inside = 0.5 + 0.02 * (unsure(ball())[1].astype(float) - 0.5) + noise
    before = np.stack([1 - inside, inside]).astype(np.float16)
    after = by_edges(before, scan_of(ball(shift=(6, 6, 6))), SPACING, 1.0)
    assert dice(label_of(after), label_of(before)) > 0.75


def test_one_class_that_is_unsure_does_not_keep_the_others_from_it() -> None:
    """A structure whose border is off beside one of which nothing is known but noise."""
    clear, unclear = ball(5.0, (0, 0, 8)), ball(4.0, (0, 0, -8))
    moved = ndimage.gaussian_filter(ball(5.0, (0, 1, 9)).astype(float), 1.0)
    vague = unclear * (0.5 + np.random.default_rng(1).normal(0, 0.02, SHAPE))
    before = np.stack([1 - moved - vague, moved, vague]).astype(np.float16)
    after = by_edges(before, scan_of(clear), SPACING, 1.0)
    was, now = (dice(one.argmax(0) == 1, clear) for one in (before, after))
    assert now > was + 0.03, f"Dice {was:.3f}, then {now:.3f}"
    assert dice(after.argmax(0) == 2, before.argmax(0) == 2) >= 0.8


def blobs(seed: int) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """Two or three classes scattered at random, beside grey values that know nothing of them."""
    chance = np.random.default_rng(seed)
    shape, classes, size = (12, 16, 16), int(chance.integers(3, 5)), chance.uniform(0.6, 2)
    logs = np.stack([ndimage.gaussian_filter(chance.normal(size=shape), size) for _ in range(classes)])
    odds = np.exp(logs / logs.std() * chance.uniform(0.5, 3))
    grey = ndimage.gaussian_filter(chance.normal(size=shape), chance.uniform(0.3, 2))
    return odds / odds.sum(0), grey / grey.std()


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 323])
def test_of_every_class_most_is_left_whatever_the_grey_values_say(seed: int) -> None:
    """323: a class that was well after the first try is not after the second, without the odd ones' evidence."""
    given, grey = blobs(seed)
    before, after = given.astype(np.float16).argmax(0), by_edges(given, grey, (1.0, 1.0, 1.0), 1.0).argmax(0)
    left = {value: dice(before == value, after == value) for value in range(1, len(given)) if (before == value).any()}
    assert min(left.values()) >= LEAST_KEPT - 1e-6, left
