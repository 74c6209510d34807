"""Grids in space: labels keep their place under offset, flip and permutation, and are never off by half a voxel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from scans import OBLIQUE, left_handed, places, two_labels

from SemiSAMO1Lib.image_io import from_sitk, to_sitk
from SemiSAMO1Lib.project.label_reader import to_grid
from SemiSAMO1Lib.volume import Geometry, Volume, copy_on_lattice, grid_of_both, lattice_indices

ORDERS = [
    (order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)
]


def rearranged(
    geometry: Geometry, order: tuple[int, ...], flips: tuple[bool, ...], offset: tuple[int, ...]
) -> Geometry:
    """The same lattice with axes permuted, flipped, and beginning at another voxel; by SimpleITK, not by us."""
    x, y, z = (int(n) for n in geometry.shape[::-1])
    image = sitk.Image([x, y, z], sitk.sitkUInt8)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetDirection(geometry.direction)
    image.SetOrigin((geometry.index_to_space @ np.array([*offset, 1.0]))[:3].tolist())
    return from_sitk(sitk.Flip(sitk.PermuteAxes(image, order), [bool(f) for f in flips])).geometry


def shifted(geometry: Geometry, voxels: tuple[float, ...]) -> Geometry:
    origin = (geometry.index_to_space @ np.array([*voxels, 1.0]))[:3]
    return Geometry(geometry.shape, geometry.spacing, tuple(origin.tolist()), geometry.direction)


def labelled_places(labels: Volume) -> dict[tuple[float, ...], int]:
    where = places(labels.geometry)[labels.array > 0]
    return dict(zip(map(tuple, where.round(3).tolist()), labels.array[labels.array > 0].tolist(), strict=True))


def test_index_to_space_agrees_with_simpleitk() -> None:
    image = to_sitk(two_labels(OBLIQUE))
    expected = image.TransformIndexToPhysicalPoint((3, 5, 7))
    ours = (OBLIQUE.index_to_space @ np.array([3, 5, 7, 1]))[:3]
    assert np.allclose(ours, expected, atol=1e-9), f"voxel (3, 5, 7) should lie at {expected}, not {ours}"


def test_geometry_survives_json() -> None:
    assert Geometry.from_json(OBLIQUE.to_json()) == OBLIQUE, "a geometry read back from JSON should be the same"


def test_an_array_that_does_not_fit_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit the grid"):
        Volume(np.zeros(OBLIQUE.shape[::-1]), OBLIQUE)


def test_same_grid_allows_rounding_only() -> None:
    near, far = shifted(OBLIQUE, (0.003, 0, 0)), shifted(OBLIQUE, (0.05, 0, 0))
    assert (OBLIQUE.same_grid(near), OBLIQUE.same_grid(far)) == (True, False), (
        "3/1000 voxel is the same grid, 5/100 not"
    )


@pytest.mark.parametrize(("order", "flips"), ORDERS)
def test_every_flip_and_permutation_with_an_offset_keeps_labels_at_their_place(
    order: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    labels = two_labels(OBLIQUE)
    target = rearranged(OBLIQUE, order, flips, (1, 1, 1))
    copied = copy_on_lattice(labels, target)
    assert copied is not None, f"axes {order}, flips {flips}: one lattice was not recognized"
    assert labelled_places(copied) == labelled_places(labels), f"axes {order}, flips {flips}: labels moved"


def test_a_part_of_the_grid_gets_the_labels_inside_it() -> None:
    labels = two_labels(OBLIQUE)
    part = Geometry((4, 5, 6), OBLIQUE.spacing, shifted(OBLIQUE, (3, 2, 2)).origin, OBLIQUE.direction)
    copied = copy_on_lattice(labels, part)
    assert copied is not None, "a sub-grid is on the same lattice"
    assert np.array_equal(copied.array, labels.array[2:6, 2:7, 3:9]), "the sub-grid should hold exactly that block"


@pytest.mark.parametrize(("order", "flips"), ORDERS[::5])
def test_a_grid_of_both_holds_every_voxel_of_both(order: tuple[int, ...], flips: tuple[bool, ...]) -> None:
    other = rearranged(OBLIQUE, order, flips, (2, -3, 1))
    both = grid_of_both(OBLIQUE, other)
    assert both is not None and both.spacing == OBLIQUE.spacing
    for one in (OBLIQUE, other):
        labels = Volume(np.ones(one.shape, np.uint8), one)
        copied = copy_on_lattice(labels, both)
        assert copied is not None and labelled_places(copied) == labelled_places(labels)


def test_a_grid_of_both_is_no_larger_than_needed() -> None:
    part = Geometry((2, 3, 4), OBLIQUE.spacing, OBLIQUE.origin, OBLIQUE.direction)
    assert grid_of_both(OBLIQUE, part) == OBLIQUE == grid_of_both(part, OBLIQUE)


def test_grids_between_each_others_voxels_have_none_of_both() -> None:
    assert grid_of_both(OBLIQUE, shifted(OBLIQUE, (0.5, 0, 0))) is None


def test_a_left_handed_grid_is_the_same_lattice() -> None:
    labels = two_labels(left_handed(OBLIQUE))
    turned = rearranged(labels.geometry, (0, 1, 2), (False, False, True), (0, 0, 0))
    assert np.linalg.det(np.reshape(turned.direction, (3, 3))) > 0, "the test needs a right-handed target"
    copied = copy_on_lattice(labels, turned)
    assert copied is not None, "flipping one axis keeps the lattice"
    assert labelled_places(copied) == labelled_places(labels), "labels moved between left- and right-handed grids"


@pytest.mark.parametrize("shift", [(0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5), (0.02, 0, 0)])
def test_a_shift_by_part_of_a_voxel_is_another_lattice(shift: tuple[float, ...]) -> None:
    assert lattice_indices(OBLIQUE, shifted(OBLIQUE, shift)) is None, f"a shift of {shift} voxels is no index copy"


def test_another_spacing_is_another_lattice() -> None:
    finer = Geometry(OBLIQUE.shape, (2.5, 1.5, 1.002), OBLIQUE.origin, OBLIQUE.direction)
    assert lattice_indices(OBLIQUE, finer) is None, "0.2 % of spacing is 0.03 voxel at the far corner: not one lattice"


def test_a_half_voxel_shift_is_resampled_and_said() -> None:
    _, exact, notes = to_grid(two_labels(OBLIQUE), shifted(OBLIQUE, (0.5, 0.5, 0.5)))
    assert (exact, "resampled" in " ".join(notes)) == (False, True), f"resampling must be said: {exact}, {notes}"


def test_an_exact_copy_says_nothing() -> None:
    _, exact, notes = to_grid(two_labels(OBLIQUE), rearranged(OBLIQUE, (2, 0, 1), (True, False, True), (0, 0, 0)))
    assert (exact, notes) == (True, []), f"an exact copy needs no note: {exact}, {notes}"


@pytest.mark.parametrize("shift", [(0.3, -0.3, 0.2), (0.5, 0.5, 0.5), (1.4, 0.4, -0.4)])
def test_resampled_labels_lie_within_half_a_voxel(shift: tuple[float, ...]) -> None:
    labels = two_labels(OBLIQUE)
    moved, _, _ = to_grid(labels, shifted(OBLIQUE, shift))
    index = np.argwhere(moved.array == 2)[:, ::-1] + np.array(shift)
    before = np.argwhere(labels.array == 2)[:, ::-1]
    apart = np.abs(index[:, None] - before[None]).max(-1).min(1).max()
    assert apart <= 0.5 + 1e-6, f"a resampled voxel lies {apart:.2f} voxels from the nearest labelled one"


def test_resampling_to_a_finer_grid_keeps_volume_and_centre() -> None:
    labels = two_labels(OBLIQUE)
    z, y, x = OBLIQUE.shape
    corner = (OBLIQUE.index_to_space @ np.array([-1 / 3, -1 / 3, -1 / 3, 1.0]))[:3]  # three fine voxels in a coarse one
    spacing = tuple(s / 3 for s in OBLIQUE.spacing)
    fine = Geometry((3 * z, 3 * y, 3 * x), spacing, tuple(corner.tolist()), OBLIQUE.direction)
    resampled, _, _ = to_grid(labels, fine)
    expected = labels.array.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    assert np.array_equal(resampled.array, expected), "each voxel should become exactly 3 x 3 x 3 voxels"
