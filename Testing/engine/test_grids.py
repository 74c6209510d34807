"""Grids: turning axes is a permutation, and nothing is ever off by half a voxel."""

import numpy as np
import pytest
import torch
from engine_helpers import all_axis_directions, flipped, smooth_noise, turned
from scipy import ndimage

from SemiSAMO1Lib.engine.data.grids import (
    SHARED_FROM,
    canonical,
    index_grid,
    inside,
    patient_aligned,
    pooled,
    resample_image,
    resample_labels,
    sample,
    space_points,
    transform_points,
    with_spacing,
)
from SemiSAMO1Lib.engine.data.intensities import data_mask
from SemiSAMO1Lib.engine.propagation.descriptors import Features, _moving_average, pool
from SemiSAMO1Lib.volume import Geometry, Volume, copy_on_lattice

AXES = all_axis_directions()
OBLIQUE = Geometry((9, 11, 13), (2.5, 1.5, 1.0), (-7.0, 12.0, 30.0), turned())


def numbered(geometry):
    """Every voxel has another value."""
    return Volume(np.arange(geometry.voxels, dtype=np.float32).reshape(geometry.shape), geometry)


def centre_of_mass(array, geometry):
    """(x, y, z) in mm."""
    index = ndimage.center_of_mass(array)
    return (geometry.index_to_space @ np.array([*index[::-1], 1.0]))[:3]


def blob(geometry, where, width):
    """A Gaussian blob at a place in mm."""
    points = space_points(geometry).double().numpy()
    away = points - np.reshape(where, (3, 1, 1, 1))
    return Volume(np.exp(-0.5 * (away**2).sum(0) / width**2).astype(np.float32), geometry)


@pytest.mark.parametrize("direction", AXES)
def test_canonical_runs_along_the_patient(direction):
    found = canonical(Geometry((3, 4, 5), (3.0, 2.0, 1.0), (5.0, 6.0, 7.0), direction))
    assert np.allclose(np.reshape(found.direction, (3, 3)), np.eye(3)), f"direction {found.direction}"


@pytest.mark.parametrize("direction", [*AXES[::7], turned(), turned((100, 5, 80))])
def test_canonical_is_a_pure_permutation(direction):
    """Copied there voxel by voxel, no voxel is lost, none is doubled."""
    scan = numbered(Geometry((3, 4, 5), (3.0, 2.0, 1.0), (5.0, 6.0, 7.0), direction))
    copied = copy_on_lattice(scan, canonical(scan.geometry), outside=-1)
    assert copied is not None and sorted(copied.array.ravel()) == sorted(scan.array.ravel())


@pytest.mark.parametrize("direction", [*AXES[::7], turned()])
def test_canonical_keeps_every_voxel_at_its_place(direction):
    scan = numbered(Geometry((3, 4, 5), (3.0, 2.0, 1.0), (5.0, 6.0, 7.0), direction))
    copied = copy_on_lattice(scan, canonical(scan.geometry))

    def places(volume):
        points = space_points(volume.geometry).reshape(3, -1).numpy().T
        return points[np.argsort(volume.array.ravel())]

    assert np.allclose(places(copied), places(scan), atol=1e-4), "a voxel is at another place in mm"


def test_canonical_of_an_oblique_grid_turns_less_than_45_degrees():
    matrix = np.reshape(canonical(Geometry((3, 4, 5), direction=turned((200, 60, 100)))).direction, (3, 3))
    assert (np.diag(matrix) > 0).all(), f"an axis runs against the patient's: {matrix.round(2)}"


def test_canonical_of_canonical_is_itself():
    once = canonical(OBLIQUE)
    assert canonical(once).same_grid(once)


@pytest.mark.parametrize("direction", [*AXES[::7], turned()])
def test_image_there_and_back_is_voxel_exact(direction):
    scan = numbered(Geometry((3, 4, 5), (3.0, 2.0, 1.0), (5.0, 6.0, 7.0), direction))
    there = Volume(resample_image(scan, canonical(scan.geometry)), canonical(scan.geometry))
    assert np.array_equal(resample_image(there, scan.geometry), scan.array), "there and back is not exact"


def test_labels_there_and_back_are_voxel_exact():
    label = Volume(np.random.default_rng(0).integers(0, 5, OBLIQUE.shape).astype(np.uint8), OBLIQUE)
    grid = canonical(OBLIQUE)
    back = resample_labels(Volume(resample_labels(label, grid), grid), OBLIQUE)
    assert np.array_equal(back, label.array)


def test_labels_keep_their_type():
    label = Volume(np.full((4, 4, 4), 300, np.uint16), Geometry((4, 4, 4)))
    found = resample_labels(label, with_spacing(label.geometry, (1.5, 1.5, 1.5)))
    assert found.dtype == np.uint16 and (found == 300).all()


def test_resampled_labels_hold_no_new_value():
    label = np.zeros((12, 12, 12), np.uint8)
    label[3:9, 3:9, 3:9] = 7
    label[5:7] = 2
    found = resample_labels(Volume(label, Geometry(label.shape)), with_spacing(Geometry(label.shape), (1.7, 1.3, 0.8)))
    assert set(np.unique(found)) <= {0, 2, 7}, f"values {np.unique(found)}; labels are not averaged"


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.7, 0.7, 0.7), (3.0, 1.0, 2.0), (1.3, 2.1, 0.9)])
def test_point_keeps_its_place_on_another_spacing(spacing):
    geometry = Geometry((32, 34, 36), (1.0, 1.0, 1.0), (3.0, -4.0, 5.0), turned())
    where = geometry.centre + np.array([2.3, -1.7, 0.9])
    grid = with_spacing(geometry, spacing)
    found = centre_of_mass(resample_image(blob(geometry, where, 2.5), grid), grid)
    assert np.abs(found - where).max() < 0.05, f"the point moved by {found - where} mm"


def test_point_keeps_its_place_on_the_patients_grid():
    geometry = Geometry((32, 34, 36), (1.0, 1.0, 1.0), (3.0, -4.0, 5.0), turned())
    where = geometry.centre + np.array([2.3, -1.7, 0.9])
    grid = patient_aligned(geometry, 1.4)
    found = centre_of_mass(resample_image(blob(geometry, where, 2.5), grid), grid)
    assert np.abs(found - where).max() < 0.05, f"the point moved by {found - where} mm"


def test_point_keeps_its_place_with_anisotropy_of_ten():
    geometry = Geometry((12, 60, 60), (10.0, 1.0, 1.0), (0.0, 0.0, 0.0), turned())
    where = geometry.centre + np.array([2.0, 1.0, -3.0])
    grid = with_spacing(geometry, (10.0, 2.0, 2.0))
    found = centre_of_mass(resample_image(blob(geometry, where, 9.0), grid), grid)
    assert np.abs(found - where).max() < 0.1, f"the point moved by {found - where} mm"


@pytest.mark.parametrize("stride", [2, 3])
def test_point_keeps_its_place_when_pooled(stride):
    geometry = Geometry((30, 31, 32), (1.0, 1.0, 1.0), (3.0, -4.0, 5.0))
    where = geometry.centre + np.array([2.3, -1.7, 0.9])
    scan = torch.from_numpy(blob(geometry, where, 2.5).array)
    found = pool(Features(geometry, torch.stack([scan, torch.ones_like(scan)])), stride)
    place = centre_of_mass((found.values[0] * found.weight).numpy(), found.geometry)
    assert np.abs(place - where).max() < 0.05, f"pooling moved the point by {place - where} mm"


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_point_keeps_its_place_when_averaged(width):
    geometry = Geometry((30, 31, 32), (1.0, 1.0, 1.0), (3.0, -4.0, 5.0))
    where = geometry.centre + np.array([2.3, -1.7, 0.9])
    scan = torch.from_numpy(blob(geometry, where, 2.5).array)
    found = _moving_average(Features(geometry, torch.stack([scan, torch.ones_like(scan)])), width)
    place = centre_of_mass(found.values[0].numpy(), found.geometry)
    assert np.abs(place - where).max() < 0.05, f"averaging moved the point by {place - where} mm"


def test_label_block_keeps_its_place():
    geometry = Geometry((30, 30, 30))
    label = np.zeros(geometry.shape, np.uint8)
    label[8:18, 10:16, 6:22] = 1
    grid = with_spacing(geometry, (0.5, 0.5, 0.5))
    found = resample_labels(Volume(label, geometry), grid)
    far = centre_of_mass(found > 0, grid) - centre_of_mass(label > 0, geometry)
    assert np.abs(far).max() < 0.05, f"the block moved by {far} mm"


def test_flipped_storage_resamples_to_the_same():
    scan = Volume(smooth_noise((14, 15, 16), 0), Geometry((14, 15, 16), (2.0, 1.0, 1.5), direction=turned()))
    grid = patient_aligned(scan.geometry, 1.7)
    assert np.allclose(resample_image(scan, grid), resample_image(flipped(scan, (0, 2)), grid), atol=1e-3)


def test_same_spacing_is_the_same_grid():
    assert with_spacing(OBLIQUE, OBLIQUE.spacing) is OBLIQUE


def test_other_spacing_keeps_the_centre():
    grid = with_spacing(OBLIQUE, (1.1, 1.2, 1.3))
    assert np.allclose(grid.centre, OBLIQUE.centre)


def test_one_slice_stays_one_slice():
    assert with_spacing(Geometry((1, 20, 20), (5.0, 1.0, 1.0)), (9.0, 2.0, 2.0)).shape == (1, 10, 10)


def test_patients_grid_falls_on_the_voxels_of_a_straight_scan():
    geometry = Geometry((6, 7, 8), (1.5, 1.5, 1.5), (0.3, -2.0, 9.0))
    assert patient_aligned(geometry, 1.5).same_grid(geometry)


def test_pooled_grid_covers_the_end():
    assert pooled(Geometry((5, 6, 7)), 2).shape == (3, 3, 4)


def test_space_points_are_the_voxel_centres():
    point = space_points(OBLIQUE)[:, 2, 5, 7].double().numpy()
    assert np.allclose(point, (OBLIQUE.index_to_space @ [7, 5, 2, 1])[:3], atol=1e-4)


def test_sampling_at_voxel_centres_gives_the_voxels():
    scan = numbered(OBLIQUE)
    found = sample(torch.from_numpy(scan.array)[None], OBLIQUE, space_points(OBLIQUE))[0].numpy()
    assert np.allclose(found, scan.array, atol=0.05), "sampling at voxel centres must give the voxels"


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_threads_that_share_the_points_find_what_one_finds(mode, padding):
    generator = torch.Generator().manual_seed(0)
    channels = torch.randn((2, *OBLIQUE.shape), generator=generator)
    points = space_points(with_spacing(OBLIQUE, (1.3, 0.7, 0.52)))[:, :, 1:]  # they cannot be shared evenly
    points = points * 1.2  # some lie outside
    assert points[0].numel() >= SHARED_FROM, "too few points to be shared"
    assert points[0].numel() % 2, "an even number of points"
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(sample(channels, OBLIQUE, points, mode, padding))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]), "two threads"
    assert torch.equal(found[0], found[2]), "three threads"


def test_sampling_half_way_gives_the_mean():
    geometry = Geometry((1, 1, 2))
    point = torch.tensor([0.5, 0.0, 0.0]).reshape(3, 1, 1, 1)
    assert float(sample(torch.tensor([2.0, 4.0]).reshape(1, 1, 1, 2), geometry, point)) == pytest.approx(3.0)


def test_inside_ends_at_the_voxels_edges():
    points = torch.tensor([[-0.51, -0.49, 4.49, 4.51], [0, 0, 0, 0], [0, 0, 0, 0]]).reshape(3, 1, 1, 4).float()
    assert inside(Geometry((3, 4, 5)), points).flatten().tolist() == [False, True, True, False]


def test_points_are_transformed():
    matrix = np.array([[0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1.0]])
    found = transform_points(torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1), matrix)
    assert found.flatten().tolist() == [3, 7, 13]


def test_index_grid_is_x_first():
    assert index_grid(Geometry((3, 4, 5)))[:, 1, 2, 3].tolist() == [3, 2, 1]


# ---------------------------------------------------------------------- padding


def test_constant_border_is_padding():
    array = np.pad(smooth_noise((10, 10, 10), 0), ((4, 0), (0, 0), (0, 0)), constant_values=-5)
    assert np.array_equal(data_mask(array), np.arange(14).reshape(-1, 1, 1) + np.zeros((14, 10, 10)) >= 4)


def test_constant_inside_is_data():
    array = smooth_noise((16, 16, 16), 0)
    array[5:10, 5:10, 5:10] = 3
    assert data_mask(array).all(), "a constant organ that does not touch the border is data"


def test_constant_scan_is_all_data():
    assert data_mask(np.full((6, 6, 6), 7)).all(), "a constant scan has no padding, or there would be no data"
