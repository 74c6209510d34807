"""Registration: known transforms are found, both ways agree, hopeless starts are thrown out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import cropped, dice, flipped, identity_deformation, turned
from scipy import ndimage

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.data.grids import patient_aligned, space_points
from SemiSAMO1Lib.engine.propagation import deformable, near
from SemiSAMO1Lib.engine.propagation import registration as module
from SemiSAMO1Lib.engine.propagation.deformable import Settings, jacobian_determinant, register
from SemiSAMO1Lib.engine.propagation.descriptors import describe, pool, working_spacing
from SemiSAMO1Lib.engine.propagation.registration import (
    RegistrationPropagator,
    RegistrationSettings,
    choose,
    fits_of,
    local_fits,
    score,
)
from SemiSAMO1Lib.engine.propagation.starts import Start, affines, exhaustive_translation, translations
from SemiSAMO1Lib.phantoms import PhantomSettings, make_phantom
from SemiSAMO1Lib.volume import Geometry, StoredVolume, Volume

CPU = torch.device("cpu")
SPACING = 2.5
STRAIGHT = PhantomSettings(spacing_mm=(SPACING,) * 3, spacing_variation=0.0, oblique_degrees=0.0, shift_mm=0.0)


def bend(points):
    """The known displacement (x, y, z) mm at places in mm: smooth, up to about 6 mm."""
    x, y, z = points
    return np.stack(
        [
            4.5 * np.sin(2 * np.pi * y / 90 + 0.3),
            4.0 * np.sin(2 * np.pi * z / 80 + 1.1),
            3.5 * np.cos(2 * np.pi * x / 100),
        ]
    )


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(3, 5, STRAIGHT)


@pytest.fixture(scope="module")
def bent(phantom):
    """The phantom as another scan shows it: case(x) = phantom(x + bend(x)), with another grey scale and noise."""
    geometry = phantom.image.geometry
    points = space_points(geometry).double().numpy()
    there = points + bend(points)
    index = np.tensordot(np.linalg.inv(geometry.index_to_space)[:3, :3], there, 1)
    index += np.linalg.inv(geometry.index_to_space)[:3, 3].reshape(3, 1, 1, 1)
    grey = ndimage.map_coordinates(phantom.image.array, index[::-1], order=1, mode="nearest")
    noise = np.random.default_rng(0).normal(0, 5, grey.shape)
    label = ndimage.map_coordinates(phantom.label.array, index[::-1], order=0, mode="nearest")
    return Volume((0.4 * grey + 70 + noise).astype(np.float32), geometry), Volume(label, geometry)


def propagator(**settings):
    return RegistrationPropagator(SPACING, 4, CPU, RegistrationSettings(**settings))


@pytest.fixture(scope="module")
def template(phantom):
    return LabelledCase("template", phantom.image, phantom.label)


@pytest.fixture(scope="module")
def carried(template, bent):
    one = propagator(use_affine=False)
    return one.propagate(one.prepare([template]), bent[0], bent[0].geometry)


@pytest.fixture(scope="module")
def body(phantom):
    return np.asarray(phantom.label.array) > 0


def test_known_deformation_is_found_within_a_voxel(carried, bent, body):
    points = space_points(bent[0].geometry)
    found = carried.transforms[0].to_template(points) - points
    error = np.linalg.norm(found.numpy() - bend(points.numpy()), axis=0)[body].mean()
    before = np.linalg.norm(bend(points.numpy()), axis=0)[body].mean()
    assert before > 3, f"the test bends too little to show anything: {before:.2f} mm"
    assert error < 1.5, f"mean error {error:.2f} mm inside the organs; expected below 1.5 mm (voxels of 2.5 mm)"


@pytest.mark.parametrize(("value", "bar"), [(1, 0.9), (2, 0.88), (3, 0.75)])
def test_warped_label_meets_the_true_one(carried, bent, phantom, value, bar):
    label = carried.probabilities.argmax(0).numpy()
    after = dice(label, bent[1].array, value)
    before = dice(phantom.label.array, bent[1].array, value)
    assert after > max(bar, before), f"class {value}: Dice {after:.3f}, before {before:.3f}; expected above {bar}"


def test_probabilities_sum_to_one(carried):
    total = carried.probabilities.sum(0)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-4), "class probabilities of a voxel must sum to 1"


def test_confidence_is_a_share(carried):
    low, high = float(carried.confidence.min()), float(carried.confidence.max())
    assert 0 <= low <= high <= 1, f"confidence lies in [{low}, {high}], expected [0, 1]"


def test_forward_and_backward_undo_each_other_inside(carried, bent, body):
    points = space_points(bent[0].geometry)
    deformation = carried.transforms[0]
    trip = (deformation.to_case(deformation.to_template(points)) - points).norm(dim=0).numpy()
    assert trip[body].mean() < 0.5 * SPACING, (
        f"round trip {trip[body].mean():.2f} mm inside, expected under half a voxel"
    )


def test_round_trip_error_is_what_the_transform_reports(carried):
    deformation = carried.transforms[0]
    points = space_points(deformation.geometry)
    trip = (deformation.to_case(deformation.to_template(points)) - points).norm(dim=0)
    far = (trip - deformation.round_trip).abs().max()
    assert far < 0.05, f"reported and real round trip differ by {far:.3f} mm"


def test_smooth_deformation_does_not_fold(carried):
    assert carried.transforms[0].folded == 0, "a smooth bend of 6 mm over 90 mm needs no fold"


def test_jacobian_of_a_stretch():
    geometry = Geometry((6, 6, 6))
    x = torch.arange(6.0).expand(6, 6, 6)
    field = torch.stack([0.5 * x, torch.zeros(geometry.shape), torch.zeros(geometry.shape)])
    inner = jacobian_determinant(field)[1:-1, 1:-1, 1:-1]
    assert torch.allclose(inner, torch.full_like(inner, 1.5)), "stretching x by 1.5 has determinant 1.5"


def test_identical_scans_stay_where_they_are(template, phantom, body):
    one = propagator(use_affine=False)
    found = one.propagate(one.prepare([template]), phantom.image, phantom.image.geometry)
    points = space_points(phantom.image.geometry)
    moved = (found.transforms[0].to_template(points) - points).norm(dim=0).numpy()[body]
    assert moved.max() < 0.1 * SPACING, f"a scan registered to itself moved by {moved.max():.3f} mm"


def test_same_seed_gives_bitwise_the_same(template, bent):
    results = []
    for _ in range(2):
        one = propagator(use_affine=True, seed=0)
        results.append(one.propagate(one.prepare([template]), bent[0], bent[0].geometry))
    assert torch.equal(results[0].probabilities, results[1].probabilities), "two runs with seed 0 differ"


@pytest.mark.parametrize("seed", [0, 7])
def test_affine_step_is_reproducible(template, bent, seed):
    case, other = (describe(v, SPACING, CPU, finest=False) for v in (bent[0], template.image))
    start = Start("centre", np.eye(4))
    first, second = (affines(case, other, [start], seed)[0] for _ in range(2))
    assert np.array_equal(first.matrix, second.matrix), f"the affine step with seed {seed} is not reproducible"


def test_affine_steps_side_by_side_are_those_of_each_alone(template, bent):
    case, other = (describe(v, SPACING, CPU, finest=False) for v in (bent[0], template.image))
    starts = [Start(f"start {n}", Geometry((1, 1, 1), origin=(2.0 * n, 0, -n)).index_to_space) for n in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = affines(case, other, starts, 0)
    finally:
        torch.set_num_threads(before)
    alone = [one for start in starts for one in affines(case, other, [start], 0)]
    assert [one.name for one in together] == [f"start {n}+affine" for n in range(3)]
    assert all(np.array_equal(a.matrix, b.matrix) for a, b in zip(together, alone, strict=True)), "matrices differ"


def test_affine_step_finds_a_known_scale(phantom):
    geometry = phantom.image.geometry
    larger = Geometry(geometry.shape, tuple(1.12 * s for s in geometry.spacing), geometry.origin, geometry.direction)
    case = describe(Volume(phantom.image.array, larger), SPACING, CPU, finest=False)
    other = describe(phantom.image, SPACING, CPU, finest=False)
    (found,) = affines(case, other, translations(case, other)[:1], 1)
    volume = np.linalg.det(found.matrix[:3, :3])
    assert volume == pytest.approx(1.12**-3, rel=0.06), f"the case is 1.12 times larger; volume factor {volume:.3f}"


def test_flipped_storage_gives_the_same_answer(template, bent, carried):
    one = propagator(use_affine=False)
    turned_case = flipped(bent[0], (0, 2))
    turned_template = LabelledCase("t", flipped(template.image, (1,)), flipped(template.label, (1,)))
    found = one.propagate(one.prepare([turned_template]), turned_case, bent[0].geometry)
    apart = (found.probabilities - carried.probabilities).abs().max()
    assert apart < 2e-2, f"storing axes backwards changes probabilities by {apart:.4f}"


def test_oblique_and_flipped_gives_the_same_answer_as_oblique(phantom):
    geometry = phantom.image.geometry
    oblique = Geometry(geometry.shape, geometry.spacing, geometry.origin, turned())
    image, label = Volume(phantom.image.array, oblique), Volume(phantom.label.array, oblique)
    other = make_phantom(4, 5, STRAIGHT).image
    one = propagator(use_affine=False)
    prepared = one.prepare([LabelledCase("t", image, label)])
    mirrored = one.prepare([LabelledCase("t", flipped(image, (0, 1, 2)), flipped(label, (0, 1, 2)))])
    plain = one.propagate(prepared, other, other.geometry).probabilities.argmax(0)
    backwards = one.propagate(mirrored, other, other.geometry).probabilities.argmax(0)
    same = float((plain == backwards).float().mean())
    assert same > 0.999, f"only {same:.4f} of the voxels agree after storing the oblique template backwards"


# ---------------------------------------------------------------------- starts


def shifted(volume, shift):
    geometry = volume.geometry
    origin = tuple(float(o + s) for o, s in zip(geometry.origin, shift, strict=True))
    return Volume(volume.array, Geometry(geometry.shape, geometry.spacing, origin, geometry.direction))


@pytest.mark.parametrize(
    ("low", "high"), [((0, 0, 0), (0, 0, 0)), ((8, 0, 0), (0, 0, 0)), ((0, 6, 3), (4, 0, 6)), ((5, 5, 5), (0, 0, 0))]
)
def test_exhaustive_translation_finds_a_large_shift(phantom, low, high):
    """Also where the fields of view differ: the case is a crop of the template's scan, moved by 100 mm and more."""
    shift = np.array([110.0, -70.0, 45.0])
    end = tuple(n - h for n, h in zip(phantom.image.array.shape, high, strict=True))
    case = describe(shifted(cropped(phantom.image, low, end), shift), SPACING, CPU, finest=False)
    other = describe(phantom.image, SPACING, CPU, finest=False)
    found = exhaustive_translation(case, other)
    stride = max(
        1, round(0.05 * float(np.prod(case.coarse.geometry.extent)) ** (1 / 3) / case.coarse.geometry.spacing[0])
    )
    voxel = pool(case.coarse, stride).geometry.spacing[0]
    assert np.abs(found + shift).max() <= voxel, f"found {found}, expected {-shift} within a coarse voxel ({voxel} mm)"


def test_search_start_recovers_a_case_with_another_field_of_view(phantom):
    """A crop whose centre is far from the template's: the label must land where it belongs."""
    shape = phantom.image.array.shape
    low = (0, 0, shape[2] // 3)
    case, truth = cropped(phantom.image, low, shape), cropped(phantom.label, low, shape)
    moved = shifted(case, (60.0, 60.0, -60.0))
    one = propagator(use_affine=False)
    found = one.propagate(
        one.prepare([LabelledCase("t", phantom.image, phantom.label)]), moved, moved.geometry
    ).probabilities.argmax(0)
    assert dice(found.numpy(), truth.array, 1) > 0.95, "the large organ of a moved crop of the template is not found"


def test_exhaustive_translation_refuses_when_scans_cannot_meet(phantom):
    scan = describe(phantom.image, SPACING, CPU, finest=False)
    empty = describe(phantom.image, SPACING, CPU, finest=False)
    empty.coarse.channels[-1] = 0
    assert exhaustive_translation(empty, scan) is None


def test_translations_are_not_repeated(phantom):
    scan = describe(phantom.image, SPACING, CPU, finest=False)
    starts = translations(scan, scan)
    assert len(starts) == 1, f"a scan to itself has one start, got {[s.name for s in starts]}"


# ---------------------------------------------------------------------- judging


def named(name, residual=1.0, **changes):
    return identity_deformation(Geometry((4, 4, 4)), name=name, residual=residual, **changes)


def test_overlap_below_half_disqualifies():
    assert score(named("centre", overlap=0.49)) == math.inf, "overlap 49 % must disqualify"


def test_overlap_of_half_does_not_disqualify():
    assert math.isfinite(score(named("centre", overlap=0.5))), "overlap 50 % is enough"


def test_infinite_residual_disqualifies():
    assert score(named("centre", residual=math.inf)) == math.inf, "a transform without overlap has no score"


def test_folding_and_round_trip_make_a_score_worse():
    good = score(named("centre"))
    folded, apart = score(named("centre", folded=0.1)), score(named("centre", round_trip=torch.ones(4, 4, 4)))
    assert min(folded, apart) > good, "folds and round-trip errors must raise the score"


def picked(scores, names, **settings):
    settings = RegistrationSettings(**{"affine_margin": 0.1, "tie": 0.0, **settings})
    return choose([named(n) for n in names], scores, settings)


def test_affine_that_wins_by_less_than_the_margin_is_not_taken():
    assert picked([1.0, 0.95], ["centre", "centre+affine"]) == [0], "5 % better is less than the margin of 10 %"


def test_affine_that_wins_by_the_margin_is_taken():
    assert picked([1.0, 0.85], ["centre", "centre+affine"]) == [1], "15 % better is more than the margin of 10 %"


def test_near_ties_are_fused():
    chosen = picked([1.0, 1.02, 1.2], ["centre", "mass", "search"], tie=0.03)
    assert chosen == [0, 1], f"starts within 3 % are used together, the third not; got {chosen}"


def test_best_start_comes_first():
    assert picked([1.02, 1.0], ["centre", "mass"], tie=0.03)[0] == 1, "the best start's transform is kept for later"


def test_all_disqualified_takes_the_largest_overlap():
    results = [named("centre", overlap=0.1), named("mass", overlap=0.4), named("search", overlap=0.2)]
    chosen = choose(results, [math.inf] * 3, RegistrationSettings())
    assert chosen == [1], f"expected only the start with the largest overlap, got {chosen}"


@pytest.fixture
def none_is_sound(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST_OVERLAP", 2.0)
    monkeypatch.setattr(near, "LEAST_SEEN", 2.0)


def test_all_disqualified_still_gives_a_result(template, bent, none_is_sound):
    one = propagator(use_affine=False)
    found = one.propagate(one.prepare([template]), bent[0], bent[0].geometry)
    assert torch.isfinite(found.probabilities).all(), "a case whose starts all fail must still get probabilities"


def test_disqualified_starts_are_reported_as_json(template, bent, none_is_sound):
    one = propagator(use_affine=False)
    facts = one.propagate(one.prepare([template]), bent[0], bent[0].geometry).facts
    assert all(row["score"] is None for row in facts["starts"]), "a disqualified start has no score (JSON has no inf)"


def test_a_labelled_scan_that_fits_much_worse_has_a_third_of_a_vote():
    assert fits_of([0.1, 0.13], 0.3) == pytest.approx([1.0, math.exp(-1)]), "30 % worse than the best of all"


def test_a_labelled_scan_that_was_not_judged_around_its_label_counts_as_the_others_do():
    fits = fits_of([0.1, None, 0.13, 0.13], 0.3)
    assert fits[1] == pytest.approx(math.exp(-1)), f"the median of the others was expected, got {fits[1]:.3f}"


def test_where_no_labelled_scan_was_judged_around_its_label_all_vote_alike():
    assert fits_of([None, None], 0.3) == [1.0, 1.0], "nothing tells them apart"


def test_identical_scans_vote_in_full():
    assert fits_of([0.0, 0.0], 0.3) == [1.0, 1.0], "a perfect fit must not divide by zero"


def test_a_labelled_scan_without_the_organ_does_not_silence_the_template(template, bent):
    """Its label is empty, so it is judged by all that it shows, which is another measure."""
    geometry = bent[0].geometry
    other = make_phantom(9, 5, STRAIGHT).image.array[: geometry.shape[0], : geometry.shape[1], : geometry.shape[2]]
    empty = LabelledCase("empty", Volume(other, geometry), Volume(np.zeros(geometry.shape, np.uint8), geometry))
    one = propagator(use_affine=False)
    found = one.propagate(one.prepare([template, empty]), bent[0], bent[0].geometry)
    most = float(found.probabilities[1].max())
    assert most > 0.3, f"beside a scan that lacks the organ the template's vote comes to {most:.2f} at most"


# ---------------------------------------------------------------------- fields of view, padding, several templates


def test_outside_the_templates_field_confidence_is_zero(phantom):
    half = phantom.image.array.shape[0] // 2
    shape = phantom.image.array.shape
    lower = [cropped(v, (0, 0, 0), (half, *shape[1:])) for v in (phantom.image, phantom.label)]
    one = propagator(use_affine=False)
    found = one.propagate(one.prepare([LabelledCase("t", *lower)]), phantom.image, phantom.image.geometry)
    outside = found.confidence[half + 3 :]
    assert float(outside.max()) == 0, f"beyond the template the confidence reaches {float(outside.max()):.3f}, not 0"


def test_constant_padding_has_no_weight(phantom):
    array = np.pad(phantom.image.array, ((0, 0), (0, 0), (10, 0)), constant_values=-1000)
    geometry = phantom.image.geometry
    where = Geometry(array.shape, geometry.spacing, geometry.origin, geometry.direction)
    weight = describe(Volume(array, where), SPACING, CPU, finest=False).weight
    assert float(weight[:, :, :9].max()) == 0, "constant padding must weigh 0"


def test_constant_padding_does_not_move_the_result(template, bent, body):
    array = np.pad(bent[0].array, ((0, 0), (0, 0), (12, 0)), constant_values=0)
    geometry = bent[0].geometry
    origin = (geometry.origin[0] - 12 * SPACING, *geometry.origin[1:])
    padded = Volume(array, Geometry(array.shape, geometry.spacing, origin, geometry.direction))
    one = propagator(use_affine=False)
    found = one.propagate(one.prepare([template]), padded, geometry).transforms[0]
    points = space_points(geometry)
    error = np.linalg.norm((found.to_template(points) - points).numpy() - bend(points.numpy()), axis=0)[body].mean()
    assert error < 1.5, f"with padding on one side the mean error is {error:.2f} mm, expected below 1.5"


def test_template_weight_zero_point_one_loses_against_one(template, bent):
    """Two templates that contradict each other: the heavier decides."""
    wrong = LabelledCase(
        "wrong", template.image, Volume(np.full_like(template.label.array, 2), template.label.geometry)
    )
    light = LabelledCase(wrong.id, wrong.image, wrong.label, weight=0.1)
    one = propagator(use_affine=False)
    found = one.propagate(one.prepare([template, light]), bent[0], bent[0].geometry).probabilities.argmax(0).numpy()
    assert dice(found, bent[1].array, 1) > 0.9, "a template of weight 0.1 overruled one of weight 1"


def test_background_of_a_template_with_an_unknown_class_has_no_confidence(template, bent):
    partial = LabelledCase("t", template.image, template.label, unknown=(3,))
    one = propagator(use_affine=False)
    found = one.propagate(one.prepare([partial]), bent[0], bent[0].geometry)
    corner = float(found.confidence[:3, :3, :3].max())
    assert corner == 0, f"background of a template with an unknown class has confidence {corner:.3f}, expected 0"


def test_working_spacing_keeps_the_grid_small():
    grids = [Geometry((300, 300, 300), (1.0, 1.0, 1.0))]
    side = working_spacing(grids, 1_000_000)
    voxels = patient_aligned(grids[0], side).voxels
    assert voxels <= 1_000_000, f"spacing {side:.2f} mm gives {voxels} voxels, the limit is 1,000,000"


def test_working_spacing_of_anisotropic_scans_is_the_geometric_mean():
    side = working_spacing([Geometry((20, 200, 200), (8.0, 1.0, 1.0))])
    assert side == pytest.approx(2.0), f"8 × 1 × 1 mm have a geometric mean of 2 mm, got {side}"


def test_small_scans_are_refined_on_every_voxel(phantom):
    assert propagator().describe(phantom.image).fine is not None, "a small scan keeps descriptors of every voxel"


def test_averaged_descriptors_of_a_few_widths_are_kept(phantom):
    scan = describe(phantom.image, SPACING, CPU, finest=False)
    for width in range(2, 12):
        scan.averaged(width)
    assert len(scan._averages) == 6 and scan.averaged(11) is scan.averaged(11), (
        "each width is a copy of all descriptors"
    )


def test_without_fine_descriptors_the_result_is_still_good(phantom, bent, body):
    case, other = (describe(v, SPACING, CPU, finest=False) for v in (bent[0], phantom.image))
    found = register(case, other, np.eye(4), Settings())
    points = space_points(bent[0].geometry)
    error = np.linalg.norm((found.to_template(points) - points).numpy() - bend(points.numpy()), axis=0)[body].mean()
    assert error < 1.6, f"without the finest step the mean error is {error:.2f} mm, expected below 1.6"


def test_a_start_that_leaves_a_quarter_of_the_scans_on_each_other_is_disqualified():
    phantom = make_phantom(0, settings=PhantomSettings(spacing_mm=(4, 4, 4), oblique_degrees=0, spacing_variation=0))
    scan = describe(phantom.image, 4.0, torch.device("cpu"), finest=False)
    start = np.eye(4)
    start[0, 3] = 0.75 * phantom.image.geometry.extent[2]
    found = register(scan, scan, start, Settings(iterations=1))
    assert found.overlap < 0.45 and score(found) == np.inf, f"about a quarter overlaps, {found.overlap:.2f} was counted"


class TestSeveralLabelledScans:
    """Of many labelled scans those vote that look most like the case; alignment stays with the template."""

    SMALL = PhantomSettings(spacing_mm=(4.5, 4.0, 4.0), deformation_mm=5.0)

    @pytest.fixture(scope="class")
    def labelled(self):
        phantoms = [make_phantom(number, 3, self.SMALL) for number in range(4)]
        return [LabelledCase(one.name, one.image, one.label) for one in phantoms]

    def carry(self, labelled, volume, atlases):
        one = propagator(atlases=atlases, use_affine=False)
        return one.propagate(one.prepare(labelled), volume, volume.geometry)

    def test_the_scan_itself_is_among_the_nearest(self, labelled):
        found = self.carry(labelled, labelled[2].image, 1)
        assert found.facts["atlases"] == [labelled[2].id]

    def test_the_nearest_label_is_better_than_the_templates(self, labelled):
        truth = labelled[2].label.array
        first = self.carry(labelled[:1], labelled[2].image, 1).probabilities.argmax(0).numpy()
        nearest = self.carry(labelled, labelled[2].image, 1).probabilities.argmax(0).numpy()
        assert dice(nearest, truth, 1) > max(0.98, dice(first, truth, 1))

    def test_the_first_transform_is_the_templates(self, labelled):
        alone = self.carry(labelled[:1], labelled[2].image, 1)
        many = self.carry(labelled, labelled[2].image, 2)
        assert torch.equal(many.transforms[0].forward, alone.transforms[0].forward)
        assert np.array_equal(many.signature, alone.signature)

    def test_all_vote_where_they_are_few(self, labelled):
        assert self.carry(labelled, labelled[3].image, 4).facts["atlases"] == [one.id for one in labelled]

    def test_one_labelled_scan_needs_no_choice(self, labelled):
        assert propagator(atlases=1).prepare(labelled[:1])[0].signature is None

    def test_few_of_many_are_in_memory_and_the_answer_is_the_same(self, labelled):
        one = propagator(atlases=1, use_affine=False)
        volume = labelled[3].image
        stored = [
            LabelledCase(c.id, StoredVolume(c.image.geometry, c.image.array.copy), c.label, c.weight) for c in labelled
        ]
        found = one.propagate(one.prepare(stored), volume, volume.geometry)
        assert len(one._ready) <= 2, f"{len(one._ready)} of {len(stored)} labelled scans are kept"
        assert torch.equal(found.probabilities, self.carry(labelled, volume, 1).probabilities)

    def test_a_labelled_scan_has_one_vote_however_many_of_its_starts_are_used(self, labelled, monkeypatch):
        one = propagator(atlases=3, use_affine=False)
        prepared = one.prepare(labelled[:2])
        volume = labelled[3].image
        once = one.propagate(prepared, volume, volume.geometry)
        best = one._best

        def repeated(case, other, further=()):
            ways = best(case, other, further)
            return replace(ways, transforms=ways.transforms * (5 if other.labelled.id == labelled[1].id else 1))

        monkeypatch.setattr(one, "_best", repeated)
        many = one.propagate(prepared, volume, volume.geometry)
        assert torch.allclose(once.probabilities.float(), many.probabilities.float(), atol=2e-3)

    def test_scans_that_fit_badly_do_not_spoil_the_vote(self, labelled):
        """Two further scans of another, far more deformed anatomy are as many votes against the template's one."""
        strange = PhantomSettings(spacing_mm=(4.5, 4.0, 4.0), deformation_mm=12.0, noise=60.0)
        others = [make_phantom(number, 8, strange) for number in range(2)]
        others = [LabelledCase(f"strange_{one.name}", one.image, one.label) for one in others]

        def mean(cases):
            said = [self.carry(cases, one.image, 3).probabilities.argmax(0).numpy() for one in labelled[1::2]]
            pairs = zip(said, labelled[1::2], strict=True)
            return np.mean([dice(found, one.label.array, value) for found, one in pairs for value in (1, 2, 3)])

        alone, together = mean(labelled[:1]), mean([labelled[0], *others])
        assert together > alone - 0.02, f"{together:.3f} with scans that fit badly, {alone:.3f} without them"

    def test_where_a_scan_fits_worse_its_vote_is_smaller(self, labelled):
        one = propagator(atlases=2, use_affine=False)
        image = labelled[1].image
        rng = np.random.default_rng(0)
        clean, spoilt = (image.array + rng.normal(0, 15, image.array.shape).astype(np.float32) for _ in range(2))
        half = image.geometry.shape[2] // 2
        spoilt[..., :half] = rng.permuted(spoilt[..., :half])
        case, clean, bad = (one.describe(Volume(array, image.geometry)) for array in (image.array, clean, spoilt))
        same = identity_deformation(case.coarse.geometry)
        good, worse = local_fits(case, [(clean, same), (bad, same)], 0.3)
        quarter = worse.shape[2] // 4
        there, elsewhere = (
            float(worse[..., part].mean() / good[..., part].mean())
            for part in (slice(0, quarter), slice(-quarter, None))
        )
        assert there < 0.3 and elsewhere > 0.6, (
            f"relative votes: {there:.2f} where it is spoilt, {elsewhere:.2f} elsewhere"
        )

    def test_where_no_scan_shows_anything_all_count_alike(self, labelled):
        one = propagator(atlases=2, use_affine=False)
        case = one.describe(labelled[1].image)
        away = identity_deformation(case.coarse.geometry, start=_shifted(1e4))
        fits = local_fits(case, [(case, away), (case, away)], 0.3)
        assert all(torch.equal(fit, torch.ones_like(fit)) for fit in fits)


def _shifted(millimetres):
    matrix = np.eye(4)
    matrix[0, 3] = millimetres
    return matrix


@pytest.mark.parametrize("shape", [(5, 4, 6), (1, 7, 3), (9, 9, 9)], ids=str)
@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_offsets_compared_slice_by_slice_are_those_compared_one_by_one(shape, radius, dtype):
    """The way of GPUs, in the half precision of theirs too, and that of CPUs."""
    generator, side = torch.Generator().manual_seed(0), 2 * radius + 1
    grown = torch.rand(13, *(n + 2 * radius for n in shape), generator=generator).to(dtype)
    rows = (grown.shape[2] * grown.shape[3], grown.shape[3], 1)
    length = sum((n - 1) * row for n, row in zip(shape, rows, strict=True)) + 1
    here = torch.rand(13, length, generator=generator).to(dtype)
    one_by_one, by_slices = (
        compare(here, grown.flatten(1), rows, side) for compare in (deformable._one_by_one, deformable._slice_by_slice)
    )
    assert one_by_one.shape == by_slices.shape == (side**3, 2, length)
    assert torch.allclose(one_by_one, by_slices, atol=1e-5 if dtype == torch.float32 else 4e-3)
