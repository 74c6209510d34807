"""The label's neighbourhood: found anywhere in another scan, turned or not, and what judges registrations there."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import cropped, dice, identity_deformation, smooth_noise, turned
from near_helpers import CENTRE, CPU, GRID, RADIUS, SPACING, ball, described, moved, planted, template_scan

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.data.grids import resample_image, resample_labels, transform_points
from SemiSAMO1Lib.engine.propagation import near as module
from SemiSAMO1Lib.engine.propagation.deformable import Settings, register
from SemiSAMO1Lib.engine.propagation.descriptors import Features
from SemiSAMO1Lib.engine.propagation.near import (
    apart,
    at_one_place,
    misfits,
    neighbourhood,
    places,
    settled,
    starts_near,
    unrelated,
)
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator, RegistrationSettings
from SemiSAMO1Lib.engine.propagation.starts import Start, translations
from SemiSAMO1Lib.volume import Geometry, Volume


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


def test_a_label_in_the_last_corner_has_one():
    grid = Geometry((41, 41, 41), (SPACING,) * 3)
    label = np.zeros(grid.shape, np.uint8)
    label[-1, -1, -1] = 1
    found = neighbourhood(described(Volume(100 * smooth_noise(grid.shape, 4, 2.0), grid)), Volume(label, grid))
    far = float((found.points - 80.0).abs().max())
    assert far < 4 * SPACING, f"the label lies at (80, 80, 80) mm, a point of its neighbourhood {far:.0f} mm away"


@pytest.mark.parametrize("direction", [turned(), tuple(np.diag([1.0, -1.0, -1.0]).ravel())])
def test_an_oblique_anisotropic_label_has_it_where_it_lies(direction):
    grid = Geometry((20, 60, 64), (5.0, SPACING, SPACING), (7.0, -30.0, 12.0), direction)
    middle = (grid.index_to_space @ np.array([40.0, 22.0, 9.0, 1.0]))[:3]
    label = Volume(ball(RADIUS, grid, middle).astype(np.uint8), grid)
    found = neighbourhood(described(Volume(100 * smooth_noise(grid.shape, 5, 1.5), grid)), label)
    off = np.linalg.norm(found.points.numpy().mean(1) - middle)
    assert off < 2 * SPACING, f"the middle of the neighbourhood lies {off:.1f} mm from the label's"


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


@pytest.mark.parametrize("number", [1, 4, 8, 14])
def test_of_all_turns_the_true_one_fits_best(template, near, number):
    truth = near.turned[number].matrix @ moved((-20.0, -16.0, -12.0))
    case = described(planted(*template, truth)[0])
    best = places(case, near)[0]
    assert best.name == f"near, turn {number}", f"planted by turn {number}, found by {best.name}"
    assert error_of(near, best, truth) < 2 * SPACING, "the turned neighbourhood is more than a coarse voxel off"


def test_turns_that_take_too_much_memory_are_left_out(template, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_TURNED", 10)
    found = neighbourhood(described(template[0]), template[1])
    assert len(found.turned) == 1, "a neighbourhood too large to be described anew is still looked for as it is"


def test_a_place_between_the_turns_is_found(template, near):
    truth = moved((-20.0, -16.0, -12.0), (-30, 25, 12))
    case = described(planted(*template, truth)[0])
    best = starts_near(case, near, [], Settings())[0]
    assert error_of(near, best, truth) < 2 * SPACING, "a neighbourhood turned by 41° is found within a coarse voxel"


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


def test_the_number_of_threads_changes_nothing():
    """Processes with other numbers of threads must reach the same first pseudo-labels bit for bit: scans so large that
    threads share the sums over coarse voxels."""
    grid = Geometry((66, 66, 66), (SPACING,) * 3)
    image, other = (Volume(100 * smooth_noise(grid.shape, seed, 2.0), grid) for seed in (1, 2))
    label = np.zeros(grid.shape, np.uint8)
    label[8:56, 8:56, 8:56] = 1
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            case, around = described(other), neighbourhood(described(image), Volume(label, grid))
            ordinary = translations(case, around.described)
            starts = starts_near(case, around, ordinary, Settings())
            registered = [(case, register(case, around.described, start.matrix, Settings())) for start in ordinary[:1]]
            found.append(([start.matrix for start in starts], misfits(around, registered)))
    finally:
        torch.set_num_threads(threads)
    (first, costs), (second, again) = found
    assert len(first) > 0 and math.isfinite(costs[0]), "nothing was found that could be compared"
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)), "other starts with other threads"
    assert costs == pytest.approx(again, rel=1e-12), f"scores {costs} and {again} with other threads"


def test_a_start_that_leads_out_of_the_case_is_left_out(template, near):
    case = described(planted(*template, moved((0, 0, 0)))[0])
    away = Start("away", moved((500.0, 0, 0)))
    assert all("away" not in start.name for start in starts_near(case, near, [away], Settings()))


@pytest.mark.parametrize("slices", [1, 3])
def test_thin_scans_have_a_neighbourhood_that_is_found(slices):
    grid = Geometry((slices, 60, 64), (SPACING,) * 3)
    image = Volume(100 * smooth_noise(grid.shape, 3, 2.0), grid)
    label = np.zeros(grid.shape, np.uint8)
    label[:, 20:32, 24:36] = 1
    scan = described(image)
    around = neighbourhood(scan, Volume(label, grid))
    best = places(scan, around)[0]
    assert error_of(around, best, np.eye(4)) < 2 * SPACING, f"a scan of {slices} slices does not find itself"


# ---------------------------------------------------------------------- judging


def test_a_scan_fits_itself(near):
    (wrong,) = misfits(near, [as_it_is(near.described)])
    assert wrong == pytest.approx(0, abs=1e-9), "identical scans differ around the label"


def test_unrelated_places_differ_by_the_mean_over_all_pairs(near):
    """All points of the neighbourhood beside every third coarse voxel, one by one."""
    other = described(Volume(100 * smooth_noise(GRID.shape, 99, 2.0), GRID))
    scan = replace(other, coarse=Features(other.coarse.geometry, other.coarse.channels.clone()))
    wanted = module._at(near.described.coarse.values, near.described.coarse.geometry, near.points)
    anywhere = scan.coarse.values.flatten(1)[:, ::3]
    weights = scan.coarse.weight.flatten()[::3].double()
    pairs = torch.cdist(wanted.T.double(), anywhere.T.double()).square() / len(wanted)
    expected = float((pairs * weights).sum() / weights.sum() / len(pairs))
    assert unrelated(scan, near) == pytest.approx(expected, rel=0.01)


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


@pytest.mark.parametrize(("share", "together"), [(0.33, True), (0.37, False)])
def test_one_place_is_less_than_a_third_of_its_size_away(near, share, together):
    shift = torch.zeros(3, *near.described.coarse.geometry.shape)
    shift[1] = share * near.size
    first, other = (identity_deformation(near.described.coarse.geometry, backward=one) for one in (0 * shift, shift))
    assert at_one_place(near, [first, other]) == [True, together], f"moved by {share} of its size"


# ---------------------------------------------------------------------- in the propagator


def carried(template, case, **settings):
    one = RegistrationPropagator(SPACING, 2, CPU, RegistrationSettings(use_affine=False, **settings))
    return one.propagate(one.prepare([LabelledCase("t", *template)]), case, case.geometry)


def used(propagation):
    return [row["start"] for row in propagation.facts["starts"] if row["used"]]


@pytest.mark.parametrize("rotation", [(0, 0, 0), (-18, 15, 20)])
def test_a_label_is_carried_to_where_its_surroundings_lie(template, rotation):
    """All else of the case is another body: none of the ordinary starts leads there."""
    case, truth = planted(*template, moved((-40.0, -30.0, -30.0), rotation))
    found = carried(template, case)
    assert all("settled" in name for name in used(found)), f"ordinary starts were used: {used(found)}"
    assert dice(found.probabilities.argmax(0).numpy(), truth.array, 1) > 0.9, (
        "the organ lies elsewhere, and is not found"
    )


def test_an_oblique_template_finds_it_too(template):
    centre, direction = GRID.centre, np.reshape(turned(), (3, 3))
    origin = centre - direction @ (np.array(GRID.extent[::-1]) - SPACING) / 2
    oblique = Geometry(GRID.shape, GRID.spacing, tuple(float(v) for v in origin), turned())
    image = Volume(resample_image(template[0], oblique), oblique)
    label = Volume(resample_labels(template[1], oblique), oblique)
    case, truth = planted(*template, moved((-40.0, -30.0, -30.0)))
    found = carried((image, label), case)
    assert all("settled" in name for name in used(found)), f"ordinary starts were used: {used(found)}"
    assert dice(found.probabilities.argmax(0).numpy(), truth.array, 1) > 0.9, "an oblique template does not find it"


def test_where_an_ordinary_start_fits_no_other_is_looked_for(template):
    found = carried(template, template[0])
    assert not any("settled" in row["start"] for row in found.facts["starts"]), "a scan fits itself well enough"


def test_starts_that_lead_elsewhere_are_not_fused(template):
    case, truth = planted(*template, moved((-40.0, -30.0, -30.0)))
    found = carried(template, case, tie=1000.0)  # all starts tie
    there = dice(found.probabilities.argmax(0).numpy(), truth.array, 1)
    assert there > 0.97, f"the best start's place alone was expected, got {there:.3f}"


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
