"""The label's neighbourhood: found anywhere in another scan, turned or not, and what judges registrations there."""

import math

import numpy as np
import pytest
import torch
from engine_helpers import cropped, dice, identity_deformation, smooth_noise, turned
from scipy import ndimage
from scipy.spatial.transform import Rotation

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.data.grids import space_points, transform_points
from SemiSAMO1Lib.engine.propagation import near as module
from SemiSAMO1Lib.engine.propagation.deformable import Settings
from SemiSAMO1Lib.engine.propagation.descriptors import describe
from SemiSAMO1Lib.engine.propagation.near import apart, misfits, neighbourhood, places, settled, starts_near
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator, RegistrationSettings
from SemiSAMO1Lib.engine.propagation.starts import Start, translations
from SemiSAMO1Lib.volume import Geometry, Volume

CPU = torch.device("cpu")
SPACING = 2.0
GRID = Geometry((56, 60, 64), (SPACING,) * 3, (-40.0, 25.0, 10.0))
CENTRE = (GRID.index_to_space @ np.array([20.0, 22.0, 24.0, 1.0]))[:3]
RADIUS, AROUND = 12.0, 24.0


def ball(radius, grid=GRID, centre=CENTRE):
    points = space_points(grid).numpy()
    return np.linalg.norm(points - centre.reshape(3, 1, 1, 1), axis=0) <= radius


def template_scan():
    """An organ with a texture of its own, in a body of noise, and its label."""
    image = Volume(100 * smooth_noise(GRID.shape, 1, 2.0), GRID)
    return image, Volume(ball(RADIUS).astype(np.uint8), GRID)


def planted(image, label, matrix, seed=7):
    """Another body in which the label's surroundings lie elsewhere: case(x) = template(matrix x) near the label."""
    there = transform_points(space_points(GRID).double(), matrix).numpy()
    index = np.tensordot(np.linalg.inv(GRID.index_to_space)[:3, :3], there, 1)
    index += np.linalg.inv(GRID.index_to_space)[:3, 3].reshape(3, 1, 1, 1)
    near = np.linalg.norm(there - CENTRE.reshape(3, 1, 1, 1), axis=0) <= AROUND
    carried = ndimage.map_coordinates(image.array, index[::-1], order=1, mode="nearest")
    other = 100 * smooth_noise(GRID.shape, seed, 2.0)
    truth = ndimage.map_coordinates(label.array, index[::-1], order=0, mode="constant")
    return Volume(np.where(near, carried, other).astype(np.float32), GRID), Volume(truth, GRID)


def moved(shift, rotation=(0, 0, 0), scale=1.0):
    """From the case to the template: a turn (vector, degrees) and a scale about the label, after a shift in mm."""
    matrix, back = np.eye(4), np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(rotation)).as_matrix() * scale
    matrix[:3, 3] = CENTRE - matrix[:3, :3] @ CENTRE
    back[:3, 3] = shift
    return matrix @ back


def described(volume):
    return describe(volume, SPACING, CPU, finest=False)


def error_of(near, start, truth):
    """Mean distance (mm) of where a start and the truth bring the neighbourhood's points."""
    here, there = (transform_points(near.points, np.linalg.inv(matrix)) for matrix in (start.matrix, truth))
    return float((here - there).norm(dim=0).mean())


def as_it_is(case, **changes):
    """A case registered by the identity."""
    return case, identity_deformation(case.coarse.geometry, **changes)


@pytest.fixture(scope="module")
def template():
    return template_scan()


@pytest.fixture(scope="module")
def near(template):
    return neighbourhood(described(template[0]), template[1])


# ---------------------------------------------------------------------- the neighbourhood


def test_neighbourhood_reaches_a_quarter_of_the_labels_size_beyond_it(near):
    distance = np.linalg.norm(near.points.numpy() - CENTRE[:, None], axis=0).max()
    reach = RADIUS + 0.25 * (4 / 3 * math.pi * RADIUS**3) ** (1 / 3)
    assert distance == pytest.approx(reach, abs=2 * SPACING), (
        f"the farthest point lies {distance:.1f} mm from the middle"
    )


def test_points_are_a_few_thousand_at_most(template, monkeypatch):
    monkeypatch.setattr(module, "POINTS", 50)
    found = neighbourhood(described(template[0]), template[1])
    assert 25 <= found.points.shape[1] <= 50, f"{found.points.shape[1]} points are kept, at most 50 were wanted"


def test_a_single_voxel_has_a_neighbourhood(template):
    label = np.zeros(GRID.shape, np.uint8)
    label[24, 22, 20] = 1
    found = neighbourhood(described(template[0]), Volume(label, GRID))
    assert found is not None and found.points.shape[1] > 0, "one labelled voxel has surroundings too"


def test_an_empty_label_has_none(template):
    empty = Volume(np.zeros(GRID.shape, np.uint8), GRID)
    assert neighbourhood(described(template[0]), empty) is None, (
        "where nothing is labelled there is nothing to look for"
    )


def test_a_label_in_padding_has_none(template):
    padded = np.asarray(template[0].array).copy()
    padded[:, :, :40] = -1000.0
    found = neighbourhood(described(Volume(padded, GRID)), template[1])
    assert found is None, "a label where the scan has no data says nothing about what surrounds it"


# ---------------------------------------------------------------------- finding it


@pytest.mark.parametrize("shift", [(0, 0, 0), (-26.0, -20.0, -14.0), (-40.0, -30.0, -30.0)])
def test_its_place_is_found_although_all_else_differs(template, near, shift):
    truth = moved(shift)
    case = described(planted(*template, truth)[0])
    best = places(case, near)[0]
    assert error_of(near, best, truth) < 2 * 2 * SPACING, "the best place is more than two coarse voxels off"


@pytest.mark.parametrize("rotation", [(20, 0, 0), (0, 0, -25), (-20, 20, 20), (18, -22, -15)])
def test_a_turned_place_is_found(template, near, rotation):
    truth = moved((-20.0, -16.0, -12.0), rotation)
    case = described(planted(*template, truth)[0])
    best = settled(case, near, [])[0]
    assert error_of(near, best, truth) < 2 * SPACING, "a turned neighbourhood is found within a coarse voxel"


@pytest.mark.parametrize(
    ("rotation", "scale"), [((8, 0, 0), 1.0), ((0, -6, 5), 1.0), ((0, 0, 0), 1.1), ((4, 4, 4), 0.92)]
)
def test_similarity_step_finds_a_known_transform(template, near, rotation, scale):
    truth = moved((-4.0, 2.0, 3.0), rotation, scale)
    case = described(planted(*template, truth)[0])
    best = settled(case, near, [Start("as it is", np.eye(4))])[0]
    assert error_of(near, best, truth) < SPACING, "a small similarity transform is found within a voxel"


def test_starts_that_bring_it_to_one_place_are_one(near):
    starts = [Start(name, moved(shift)) for name, shift in (("a", (0, 0, 0)), ("b", (2.0, 0, 0)), ("c", (30.0, 0, 0)))]
    kept = [start.name for start in apart(near, starts)]
    assert kept == ["a", "c"], f"of two starts 2 mm apart the first is kept, one 30 mm away too; got {kept}"


def test_starts_to_where_others_lead_are_left_out(near):
    starts = [Start("b", moved((2.0, 0, 0))), Start("c", moved((30.0, 0, 0)))]
    kept = [start.name for start in apart(near, starts, [Start("a", np.eye(4))])]
    assert kept == ["c"], f"a start that leads 2 mm from another one tells nothing new; got {kept}"


def test_the_number_of_threads_changes_nothing(template, near):
    """Processes with other numbers of threads must reach the same first pseudo-labels bit for bit."""
    case_scan = planted(*template, moved((-12.0, 6.0, 4.0), (10, -8, 5)))[0]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            case = described(case_scan)
            starts = starts_near(case, near, translations(case, near.described), Settings())
            found.append([start.matrix for start in starts])
    finally:
        torch.set_num_threads(threads)
    same = all(np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert same, "with another number of threads other starts are found"


# ---------------------------------------------------------------------- judging


def test_a_scan_fits_itself(near):
    (wrong,) = misfits(near, [as_it_is(near.described)])
    assert wrong == pytest.approx(0, abs=1e-9), "identical scans differ around the label"


def test_what_lies_far_from_the_label_does_not_count(template, near):
    case = described(planted(*template, np.eye(4))[0])
    (wrong,) = misfits(near, [as_it_is(case)])
    apart_by = float((case.coarse.values - near.described.coarse.values).square().mean())
    assert wrong < 0.1 * apart_by, f"around the label the scans are alike ({wrong:.4f}), elsewhere not ({apart_by:.4f})"


def test_what_the_case_does_not_show_costs_what_others_do(template, near):
    """One scan ends in the middle of the label and fits, the other shows all of it and does not."""
    half = described(cropped(template[0], (0, 0, 20), GRID.shape))
    unrelated = described(Volume(100 * smooth_noise(GRID.shape, 99, 2.0), GRID))
    (chance,) = misfits(near, [as_it_is(unrelated)])
    cut, _ = misfits(near, [as_it_is(half), as_it_is(unrelated)])
    assert cut == pytest.approx(0.25 * chance, rel=0.3), (
        f"half of half of chance ({chance:.3f}) was expected, got {cut:.3f}"
    )


def test_hardly_anything_seen_is_no_fit(template, near):
    beside = described(cropped(template[0], (0, 0, 33), GRID.shape))
    (wrong,) = misfits(near, [as_it_is(beside)])
    assert wrong == math.inf, "a case that shows nothing of the label's surroundings cannot be judged by them"


def test_folding_makes_it_worse(template, near):
    case = described(planted(*template, moved((2.0, 2.0, 0)))[0])
    plain, folded = as_it_is(case), as_it_is(case, folded=0.2)
    costs = misfits(near, [plain, folded])
    assert costs[1] > costs[0], "a registration that folds is worse than one that does not"


# ---------------------------------------------------------------------- in the propagator


def carried(template, case, **settings):
    one = RegistrationPropagator(SPACING, 2, CPU, RegistrationSettings(use_affine=False, **settings))
    return one.propagate(one.prepare([LabelledCase("t", *template)]), case, case.geometry)


@pytest.mark.parametrize("rotation", [(0, 0, 0), (-18, 15, 20)])
def test_a_label_is_carried_to_where_its_surroundings_lie(template, rotation):
    """All else of the case is another body, so no translation of the whole scan finds the organ."""
    case, truth = planted(*template, moved((-30.0, -24.0, -18.0), rotation))
    found = carried(template, case).probabilities.argmax(0).numpy()
    assert dice(found, truth.array, 1) > 0.9, "the organ lies elsewhere and turned, in another body, and is not found"


def test_an_oblique_template_finds_it_too(template):
    direction = turned()
    grid = Geometry(GRID.shape, GRID.spacing, GRID.origin, direction)
    image, label = Volume(template[0].array, grid), Volume(template[1].array, grid)
    found = carried((image, label), image).probabilities.argmax(0).numpy()
    assert dice(found, label.array, 1) > 0.97, "an oblique scan does not find its own label again"


def test_a_case_that_shows_half_of_the_label_still_gets_one(template):
    case = cropped(template[0], (0, 0, 21), GRID.shape)
    truth = cropped(template[1], (0, 0, 21), GRID.shape)
    found = carried(template, case)
    assert all(row["score"] is not None for row in found.facts["starts"] if row["used"]), (
        "the start that is used has a score"
    )
    assert dice(found.probabilities.argmax(0).numpy(), truth.array, 1) > 0.8, "the visible part of the label is lost"


def test_a_template_without_label_still_registers(template):
    empty = Volume(np.zeros(GRID.shape, np.uint8), GRID)
    found = carried((template[0], empty), template[0])
    assert float(found.probabilities[1].max()) == 0, "nothing is labelled, so nothing is carried"
