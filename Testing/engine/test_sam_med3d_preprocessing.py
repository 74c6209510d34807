"""How scans reach SAM-Med3D: the official grid, normalisation, windows, and that features lie where the scan is."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from engine_helpers import all_axis_directions, smooth_noise, turned
from torch import nn
from torch.nn import functional as F

from SemiSAMO1Lib.engine.data.grids import pooled
from SemiSAMO1Lib.engine.generalists.sam_med3d.architecture import SMALL
from SemiSAMO1Lib.engine.generalists.sam_med3d.generalist import Loaded, SamMed3DFeatures, load_encoder
from SemiSAMO1Lib.engine.generalists.sam_med3d.preprocessing import normalised, official_grid, prepare, windows
from SemiSAMO1Lib.volume import Geometry, Volume, copy_on_lattice

CPU = torch.device("cpu")
#: Windows of 32 voxels in patches of 8: quick.
TINY = replace(SMALL, size=32, patch=8, out_channels=4)
#: Its extent is a multiple of 1.5 mm along every axis, so that the grid does not depend on which corner comes first.
OBLIQUE = Geometry((9, 15, 12), (4.0, 1.0, 1.25), (12.0, -30.0, 55.0), turned())


class Eye(nn.Module):
    """In place of the encoder: the mean of every patch, and its second less its first half along the three axes."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, volume):
        self.seen.append(volume[0, 0].clone())
        patch = TINY.patch
        found = [F.avg_pool3d(volume, patch)]
        for axis in (2, 3, 4):
            shape = [1] * 5
            shape[axis] = -1
            sign = torch.where(torch.arange(volume.shape[axis]) % patch < patch // 2, -1.0, 1.0)
            found.append(F.avg_pool3d(volume * sign.reshape(shape), patch))
        return torch.cat(found, 1)


def with_eye(how="official", coverage="full"):
    return SamMed3DFeatures(Loaded(Eye(), TINY, "eye"), CPU, how, coverage)


def scan_on(geometry, seed=0):
    """Smooth grey values above 0."""
    return Volume(300 + 60 * smooth_noise(geometry.shape, seed), geometry)


def places(geometry):
    """(x, y, z) mm of all voxels, (n, 3)."""
    index = np.indices(geometry.shape).reshape(3, -1)[::-1]
    return (geometry.index_to_space[:3, :3] @ index).T + geometry.index_to_space[:3, 3]


def index_of(geometry, places_in_mm):
    """Nearest (z, y, x) indices of places (n, 3) in mm."""
    inverse = np.linalg.inv(geometry.index_to_space)
    return np.rint(places_in_mm @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)[:, ::-1]


def outer_corners(geometry):
    ends = itertools.product(*((-0.5, n - 0.5) for n in geometry.shape[::-1]))
    return np.array([(geometry.index_to_space @ [*end, 1.0])[:3] for end in ends])


def stored_otherwise(volume):
    """The same scan stored along its axes in all 48 ways: every voxel keeps its place in mm."""
    geometry = volume.geometry
    direction = np.reshape(geometry.direction, (3, 3))
    for order in itertools.permutations(range(3)):  # array axes z, y, x come from these
        for flips in itertools.product((False, True), repeat=3):
            columns, first = [], [0.0, 0.0, 0.0]
            for axis, flip in zip(order, flips, strict=True):
                columns.append(direction[:, 2 - axis] * (-1 if flip else 1))
                first[2 - axis] = float(geometry.shape[axis] - 1) if flip else 0.0
            array = np.flip(volume.array.transpose(order), [axis for axis in range(3) if flips[axis]])
            where = Geometry(
                array.shape,
                tuple(geometry.spacing[axis] for axis in order),
                tuple(float(v) for v in (geometry.index_to_space @ [*first, 1.0])[:3]),
                tuple(float(v) for v in np.stack(columns[::-1], 1).ravel()),
            )
            yield Volume(np.ascontiguousarray(array), where)


def official_by_simpleitk(volume):
    """Specification 5.1, steps 2 and 3, word by word."""
    image = sitk.GetImageFromArray(volume.array)
    geometry = volume.geometry
    image.SetSpacing(geometry.spacing[::-1])
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    spacing = np.array(image.GetSpacing())
    size = [int(np.ceil(n)) for n in np.array(image.GetSize()) * spacing / 1.5]
    origin = image.TransformContinuousIndexToPhysicalPoint([float(v) for v in 0.5 * (1.5 / spacing - 1)])
    fine = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, origin, (1.5,) * 3, image.GetDirection(), 0.0, sitk.sitkFloat32
    )
    turned_image = sitk.DICOMOrient(fine, "RAS")
    where = Geometry(
        turned_image.GetSize()[::-1],
        turned_image.GetSpacing()[::-1],
        turned_image.GetOrigin(),
        turned_image.GetDirection(),
    )
    return Volume(sitk.GetArrayFromImage(turned_image), where)


# ---------------------------------------------------------------------- the official grid


def test_official_voxels_are_one_and_a_half_millimetres():
    assert official_grid(OBLIQUE).spacing == (1.5, 1.5, 1.5)


@pytest.mark.parametrize("direction", all_axis_directions())
def test_official_axes_run_to_right_anterior_superior(direction):
    """In LPS coordinates right is -x and anterior -y."""
    found = official_grid(Geometry((4, 5, 6), (3.0, 2.0, 1.0), (1.0, 2.0, 3.0), direction)).direction
    assert np.allclose(np.reshape(found, (3, 3)), np.diag([-1, -1, 1])), f"axes {found}, expected R, A, S"


def test_sizes_are_rounded_up():
    found = official_grid(Geometry((7, 11, 10), (2.0, 1.0, 0.7)))
    assert found.shape == (10, 8, 5), "14, 11 and 7 mm in voxels of 1.5 mm are 9.3, 7.3 and 4.7, rounded up"


def test_whole_numbers_of_voxels_are_not_rounded_up():
    """49.5 mm are 33 voxels, though 45 * 1.1 / 1.5 is a little more in floating point."""
    assert official_grid(Geometry((45, 90, 105), (1.1, 1.1, 1.1))).shape == (33, 66, 77)


@pytest.mark.parametrize("direction", [*all_axis_directions()[::5], turned(), turned((170.0, 80.0, -40.0))])
def test_outer_corner_of_the_first_voxel_stays(direction):
    geometry = Geometry((7, 11, 10), (2.0, 1.0, 0.7), (5.0, -6.0, 7.0), direction)
    first = (geometry.index_to_space @ [-0.5, -0.5, -0.5, 1.0])[:3]
    apart = np.linalg.norm(outer_corners(official_grid(geometry)) - first, axis=1).min()
    assert apart < 1e-4, f"no outer corner of the grid lies on the scan's first one; the nearest is {apart:.3f} mm off"


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (20.0, -15.0, 10.0), (170.0, 80.0, -30.0)])
def test_official_grid_is_that_of_simpleitk(angles):
    scan = scan_on(Geometry((7, 11, 10), (2.0, 1.0, 0.7), (5.0, -6.0, 7.0), turned(angles)))
    expected, found = official_by_simpleitk(scan).geometry, official_grid(scan.geometry)
    assert found.same_grid(expected), f"{found}; by SimpleITK {expected}"


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (20.0, -15.0, 10.0), (170.0, 80.0, -30.0)])
def test_official_voxels_are_those_of_simpleitk(angles):
    scan = scan_on(Geometry((7, 11, 10), (2.0, 1.0, 0.7), (5.0, -6.0, 7.0), turned(angles)))
    expected = official_by_simpleitk(scan)
    found = copy_on_lattice(prepare(scan, "official", "full", 16, 8).volume, expected.geometry)
    apart = np.abs(found.array - expected.array).max()
    assert apart < 0.05, f"grey values around 300 differ by up to {apart}"


def test_every_way_of_storing_a_scan_gives_the_same_grid():
    expected = official_grid(OBLIQUE)
    other = [
        v.geometry for v in stored_otherwise(scan_on(OBLIQUE)) if not official_grid(v.geometry).same_grid(expected)
    ]
    assert not other, f"{len(other)} of 48 ways to store one scan give another grid, e.g. {other[:1]}"


def test_every_way_of_storing_a_scan_gives_the_same_features():
    scan = scan_on(OBLIQUE)
    expected = with_eye().features(scan).channels.astype(float)
    apart = [np.abs(with_eye().features(v).channels - expected).max() for v in stored_otherwise(scan)]
    assert max(apart) < 0.01, f"features of about 1 differ by up to {max(apart)} between ways to store one scan"


# ---------------------------------------------------------------------- padding and intensities


@pytest.mark.parametrize("how", ["official", "released"])
def test_padding_is_zero(how):
    prepared = prepare(scan_on(OBLIQUE), how, "full", 32, 8)
    outside = prepared.volume.array[~prepared.seen]
    assert outside.size and not outside.any(), "padded voxels hold 0"


@pytest.mark.parametrize("how", ["official", "released"])
def test_voxels_that_were_seen_lie_in_the_scan(how):
    prepared = prepare(scan_on(OBLIQUE), how, "full", 32, 8)
    inside = places(prepared.volume.geometry)[prepared.seen.ravel()]
    index = index_of(OBLIQUE, inside)
    assert ((index >= 0) & (index < OBLIQUE.shape)).all(), "a voxel outside the scan counts as seen"


def test_every_voxel_of_a_released_scan_is_seen():
    assert prepare(scan_on(OBLIQUE), "released", "full", 32, 8).seen.sum() == OBLIQUE.voxels


def test_official_scan_is_normalised_later():
    prepared = prepare(scan_on(OBLIQUE), "official", "full", 32, 8)
    assert prepared.per_window and prepared.volume.array.max() > 300, "official: raw values until a window is cut out"


def test_released_scan_is_normalised_as_a_whole():
    prepared = prepare(scan_on(OBLIQUE), "released", "full", 32, 8)
    values = prepared.volume.array[prepared.seen]
    assert not prepared.per_window and abs(values.mean()) < 1e-4 and values.std() == pytest.approx(1, abs=1e-4)


def test_normalisation_by_hand():
    """Voxels above 0 are 1, 2, 3: mean 2, unbiased deviation 1; all voxels get them."""
    window = np.array([0, -5, 1, 2, 3, 0], np.float32).reshape(1, 2, 3)
    assert np.allclose(normalised(window).ravel(), [-2, -7, -1, 0, 1, -2])


@pytest.mark.parametrize("values", [[0, 0, 0, 0], [-1, -2, -3, -4], [0, 0, 0, 7], [5, 5, 5, 5], [0, 5, 5, 0]], ids=str)
def test_window_with_nothing_to_see(values):
    assert normalised(np.array(values, np.float32).reshape(1, 2, 2)) is None, "no deviation: nothing to normalise by"


def test_every_official_window_is_normalised_by_itself():
    scan = scan_on(Geometry((40, 20, 45), (1.5,) * 3, (0.0, 0.0, 0.0), turned()))
    scan.array[:20] *= 5  # as a whole the scan would have another mean and deviation
    eye = with_eye()
    eye.features(scan)
    prepared = prepare(scan, "official", "full", TINY.size, TINY.patch)
    cut = list(windows(prepared.volume.array.shape, TINY.size, TINY.patch))
    moments = []
    for window, seen in zip(cut, eye.encoder.seen, strict=True):
        positive = seen.numpy().T[prepared.volume.array[window] > 0].astype(float)
        moments.append((positive.mean(), positive.std(ddof=1)))
    assert np.allclose(moments, (0, 1), atol=1e-3), f"mean and deviation of the voxels above 0, by window: {moments}"


# ---------------------------------------------------------------------- windows


SIZES = [(64, 16, n) for n in (64, 80, 96, 112, 144, 208)] + [(128, 16, n) for n in (128, 144, 256, 400)]


@pytest.mark.parametrize(("size", "patch", "n"), SIZES)
def test_windows_cover_every_voxel(size, patch, n):
    count = np.zeros((n, size, size), np.int16)
    for window in windows(count.shape, size, patch):
        count[window] += 1
    assert count.all(), f"{(count == 0).sum()} voxels are in no window"


@pytest.mark.parametrize(("size", "patch", "n"), SIZES)
def test_windows_begin_at_whole_patches(size, patch, n):
    starts = {s.start for window in windows((size, n, size), size, patch) for s in window}
    assert not [start for start in starts if start % patch], f"windows begin at {sorted(starts)}, patches are {patch}"


@pytest.mark.parametrize(("size", "patch", "n"), SIZES)
def test_windows_have_the_models_size(size, patch, n):
    sides = {s.stop - s.start for window in windows((size, size, n), size, patch) for s in window}
    assert sides == {size} and max(w[2].stop for w in windows((size, size, n), size, patch)) == n


@pytest.mark.parametrize(("size", "patch", "n"), SIZES)
def test_neighbouring_windows_overlap_by_half_or_more(size, patch, n):
    starts = sorted({window[0].start for window in windows((n, size, size), size, patch)})
    assert np.diff(starts).max(initial=0) <= size // 2


@pytest.mark.parametrize("shape", [(5, 6, 7), (32, 32, 32), (33, 64, 31), (70, 33, 90)])
def test_full_coverage_pads_to_whole_patches_and_a_window(shape):
    found = prepare(scan_on(Geometry(shape)), "released", "full", 32, 8).volume.array.shape
    assert found == tuple(max(32, 8 * -(-n // 8)) for n in shape)


@pytest.mark.parametrize("how", ["official", "released"])
@pytest.mark.parametrize("shape", [(5, 40, 90), (70, 33, 1)])
def test_centre_coverage_is_one_window(how, shape):
    prepared = prepare(scan_on(Geometry(shape)), how, "centre", 32, 8)
    assert len(list(windows(prepared.volume.array.shape, 32, 8))) == 1


@pytest.mark.parametrize(("n", "first"), [(67, 1), (68, 2), (64, 0), (63, 0), (61, -1), (60, -2), (1, -31)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_centre_window_lies_where_the_released_code_cuts(n, first, axis):
    """It crops from (n - 64) // 2 on, and pads (64 - n) // 2 voxels before the scan: floor before, the rest behind."""
    shape = [64, 64, 64]
    shape[axis] = n
    scan = Volume(np.zeros(shape, np.float32), Geometry(tuple(shape), OBLIQUE.spacing, OBLIQUE.origin, turned()))
    found = prepare(scan, "released", "centre", 64, 16).volume.geometry
    index = (np.linalg.inv(scan.geometry.index_to_space) @ [*found.origin, 1.0])[2 - axis]
    assert index == pytest.approx(first, abs=1e-4), f"the window begins at voxel {index:.2f} of {n}, expected {first}"


@pytest.mark.parametrize("how", ["official", "released"])
@pytest.mark.parametrize("coverage", ["full", "centre"])
def test_voxels_and_grid_of_a_prepared_scan_agree(how, coverage):
    """Grey values are a plane in space: each voxel must hold what the plane has at its place."""
    geometry = Geometry((7, 50, 21), (4.0, 1.0, 1.25), (12.0, -30.0, 55.0), turned())
    plane = (places(geometry) @ [1.0, 2.0, 3.0]).reshape(geometry.shape)
    prepared = prepare(Volume((plane + 1000).astype(np.float32), geometry), how, coverage, 32, 8)
    inner = prepared.seen.ravel() & (np.abs(index_of(geometry, places(prepared.volume.geometry)) - 3)[:, 0] < 3)
    expected = (places(prepared.volume.geometry) @ [1.0, 2.0, 3.0])[inner]
    found = prepared.volume.array.ravel()[inner]
    correlation = np.corrcoef(expected, found)[0, 1]
    assert correlation > 0.9995, f"grey values and places correlate with {correlation:.4f}, expected 1"


# ---------------------------------------------------------------------- scans of any size


SHAPES = [(5, 6, 7), (1, 40, 40), (40, 1, 3), (1, 9, 1), (70, 33, 90)]


@pytest.mark.parametrize("how", ["official", "released"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_voxel_lies_in_a_cell_that_was_seen(how, shape):
    geometry = Geometry(shape, (5.0, 1.0, 1.2) if shape[0] < 70 else (1.5,) * 3, (9.0, 8.0, 7.0), turned())
    scan = Volume(np.random.default_rng(0).uniform(1, 2, shape), geometry)
    found = with_eye(how).features(scan)
    cells = index_of(found.geometry, places(geometry))
    assert (found.weight[tuple(cells.T)] > 0).all(), "a voxel of the scan lies in a cell of weight 0"


@pytest.mark.parametrize("how", ["official", "released"])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_features_are_finite(how, shape):
    scan = Volume(np.random.default_rng(0).uniform(1, 2, shape), Geometry(shape, (5.0, 1.0, 1.2)))
    assert np.isfinite(with_eye(how).features(scan).channels).all()


@pytest.mark.parametrize("how", ["official", "released"])
def test_weight_is_the_share_of_a_cell_that_holds_data(how):
    scan = scan_on(Geometry((4, 32, 32), (1.5,) * 3))
    found = with_eye(how).features(scan).weight
    assert np.unique(found).tolist() == [0, 0.25] and found.sum() == 4 * 32 * 32 / 8**3, (
        "4 slices in the middle of 32 fill a quarter of two layers of cells"
    )


def test_windows_are_blended_at_their_place():
    """An encoder that looks at single cells must give the same from every window: the mean of each cell."""
    scan = scan_on(Geometry((70, 33, 90)))
    prepared = prepare(scan, "released", "full", TINY.size, TINY.patch)
    expected = F.avg_pool3d(torch.from_numpy(prepared.volume.array)[None], TINY.patch)[0].numpy()
    apart = np.abs(with_eye("released").features(scan).channels[0] - expected).max()
    assert apart < 2e-3, f"cells differ from the plain mean of their voxels by up to {apart}"


def test_cells_lie_on_the_pooled_grid():
    scan = scan_on(OBLIQUE)
    expected = pooled(prepare(scan, "official", "full", TINY.size, TINY.patch).volume.geometry, TINY.patch)
    assert with_eye().features(scan).geometry.same_grid(expected)


def test_dark_part_of_a_scan_has_weight_zero():
    scan = scan_on(Geometry((96, 32, 32), (1.5,) * 3))
    scan.array[24:] = 0
    weight = with_eye().features(scan).weight.max((1, 2))
    assert weight[:3].all() and not weight[6:].any(), f"slices above 48 lie in windows without grey: weights {weight}"


@pytest.mark.parametrize("value", [0.0, -50.0, 7.0])
def test_scan_in_which_there_is_nothing_to_see(value):
    scan = Volume(np.full((20, 20, 20), value, np.float32), Geometry((20, 20, 20), (1.5,) * 3))
    with pytest.raises(ValueError, match=r"no voxel is above 0.*--preprocessing released"):
        with_eye().features(scan)


def test_negative_scan_is_described_as_released():
    scan = scan_on(OBLIQUE)
    found = with_eye("released").features(Volume(scan.array - 5000, OBLIQUE))
    assert (found.weight > 0).any() and np.isfinite(found.channels).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float64])
def test_number_type_of_a_scan_does_not_matter(dtype):
    values = (smooth_noise(OBLIQUE.shape, 0) * 20 + 120).astype(np.uint8)
    expected = with_eye().features(Volume(values.astype(np.float32), OBLIQUE)).channels
    assert np.array_equal(with_eye().features(Volume(values.astype(dtype), OBLIQUE)).channels, expected)


def test_scan_is_left_alone():
    scan = scan_on(OBLIQUE)
    before = scan.array.copy()
    with_eye("released").features(scan), with_eye().features(scan)
    assert np.array_equal(scan.array, before), "describing a scan changed it"


# ---------------------------------------------------------------------- where in space


ANISOTROPIC = Geometry((24, 90, 70), (5.0, 1.1, 1.3), (-40.0, 25.0, 300.0), turned((35.0, -20.0, 15.0)))


def with_blob(scan, place, width_mm):
    distance = np.linalg.norm(places(scan.geometry) - place, axis=1).reshape(scan.geometry.shape)
    return Volume(scan.array + 400 * np.exp(-0.5 * (distance / width_mm) ** 2).astype(np.float32), scan.geometry)


def cell_near(found, place):
    return tuple(int(v) for v in index_of(found.geometry, np.array([place]))[0])


def centre_of(found, cell):
    return (found.geometry.index_to_space @ [*cell[::-1], 1.0])[:3]


@pytest.mark.parametrize("how", ["official", "released"])
@pytest.mark.parametrize("index", [(5, 20, 50), (19, 70, 15), (12, 30, 20)], ids=str)
def test_blob_changes_the_cell_at_its_place(how, index):
    scan = scan_on(ANISOTROPIC)
    eye = with_eye(how)
    before = eye.features(scan)
    place = centre_of(before, cell_near(before, (ANISOTROPIC.index_to_space @ [*index[::-1], 1.0])[:3]))
    change = np.abs(eye.features(with_blob(scan, place, 3.0)).channels[0].astype(float) - before.channels[0])
    most = np.unravel_index(change.argmax(), change.shape)
    assert most == cell_near(before, place), "the blob's cell is not the one that changed most"


@pytest.mark.parametrize("how", ["official", "released"])
@pytest.mark.parametrize("index", [(5, 20, 50), (19, 70, 15)], ids=str)
def test_blob_changes_the_models_features_at_its_place(how, index):
    """The small model with random weights, its last convolution kept to a cell: all cells change, the blob's most."""
    scan = scan_on(ANISOTROPIC)
    loaded = load_encoder("random", "small")
    middle = torch.zeros(3, 3, 3)
    middle[1, 1, 1] = 1
    loaded.model.neck[2].weight.data *= middle
    model = SamMed3DFeatures(loaded, CPU, how, "full")
    before = model.features(scan)
    place = centre_of(before, cell_near(before, (ANISOTROPIC.index_to_space @ [*index[::-1], 1.0])[:3]))
    after = model.features(with_blob(scan, place, 5.0))
    change = np.linalg.norm(after.channels.astype(float) - before.channels, axis=0)
    most = np.unravel_index(change.argmax(), change.shape)
    assert most == cell_near(before, place), "the blob's cell is not the one that changed most"


@pytest.mark.parametrize(("channel", "way"), [(1, (-1, 0, 0)), (2, (0, -1, 0)), (3, (0, 0, 1))], ids="RAS")
def test_models_axes_are_right_anterior_superior(channel, way):
    """A blob in a cell's half to the right lies in the second half of the model's first axis, and so on."""
    geometry = Geometry((24, 90, 70), (5.0, 1.1, 1.3), (-40.0, 25.0, 300.0), turned((12.0, -9.0, 7.0)))
    scan, eye = scan_on(geometry), with_eye()
    before = eye.features(scan)
    cell = cell_near(before, geometry.centre)
    place = centre_of(before, cell) + 3.0 * np.array(way)
    change = (eye.features(with_blob(scan, place, 1.5)).channels.astype(float) - before.channels)[:, *cell]
    assert change[channel] > 0.5 * change[0] > 0, f"mean and second less first half along x, y, z changed by {change}"


@pytest.mark.parametrize(("channel", "axis"), [(1, 2), (2, 1), (3, 0)], ids="xyz")
def test_released_model_gets_the_stored_axes_as_x_y_z(channel, axis):
    """Arrays here are (z, y, x), the model's axes (x, y, z), as the published files have them."""
    scan, eye = scan_on(Geometry((32, 32, 32))), with_eye("released")
    before = eye.features(scan)
    index = np.array([10.0, 10.0, 10.0])
    index[2 - axis] = 14
    place = (scan.geometry.index_to_space @ [*index, 1.0])[:3]
    change = (eye.features(with_blob(scan, place, 1.0)).channels.astype(float) - before.channels)[:, 1, 1, 1]
    assert change[1:].argmax() == channel - 1, f"second less first half along x, y, z changed by {change[1:]}"


# ---------------------------------------------------------------------- the key


def test_key_tells_settings_apart():
    keys = {with_eye(how, coverage).key for how in ("official", "released") for coverage in ("full", "centre")}
    assert len(keys) == 4, f"features of other settings must not share a key: {keys}"
