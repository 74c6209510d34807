"""Refinement: who votes, where, and when the old pseudo-label stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import identity_deformation, smooth_noise, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase, Propagation
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.inference.uncertainty import normalised_entropy, voxel_entropy
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.engine.refinement import acceptance
from SemiSAMO1Lib.engine.refinement.acceptance import TOLERANCE, accepted, mean_dice, reverse_dice
from SemiSAMO1Lib.engine.refinement.fusion import voxel_weights, weighted_mean
from SemiSAMO1Lib.engine.refinement.neighbours import whole_volume_vote
from SemiSAMO1Lib.engine.refinement.refine import refine_cohort
from SemiSAMO1Lib.engine.similarity import Likeness
from SemiSAMO1Lib.volume import Geometry, Volume

GRID = Geometry((8, 9, 10))
TRUTH = np.zeros(GRID.shape, np.uint8)
TRUTH[2:6, 2:7, 2:7] = 1
CASES = ("a", "b", "c", "d")


def probabilities(label, sure=0.95):
    """Class probabilities (2, z, y, x) of a label map, each voxel equally sure."""
    p = np.where(label[None] == np.arange(2).reshape(-1, 1, 1, 1), sure, 1 - sure)
    return p.astype(np.float16)


def moved(by):
    return np.roll(TRUTH, by, 2)


@pytest.fixture
def cohort(tmp_path, monkeypatch):
    """Four cases on one grid, registered and predicted perfectly; no prediction is refused as an outlier.

    The old pseudo-labels are all foreground, so that one that was kept is told from a new one.
    """
    monkeypatch.setattr(acceptance, "OUTLIER", 1_000.0)
    image = Volume(smooth_noise(GRID.shape, 0), GRID)
    template = LabelledCase("template", image, Volume(TRUTH, GRID))
    cases = [EngineCase(name, GRID, lambda: image) for name in CASES]
    found = Cohort(cases, [template], tiny_plan(2), Store(tmp_path))
    base = smooth_noise((3, 4, 4, 4)[1:], 1)
    for number, name in enumerate(CASES):
        confidence = torch.full(GRID.shape, 0.5)
        confidence[:, :, -1] = 0
        registered = torch.from_numpy(probabilities(TRUTH).astype(np.float32))
        signature = (base + 0.1 * number * smooth_noise((4, 4, 4), 2 + number)).astype(np.float16)
        propagation = Propagation(GRID, registered, confidence, [identity_deformation(GRID)], {}, signature)
        found.save_propagation(name, propagation)
        found.store.save_array(np.ones_like(TRUTH), "pseudo", "1", f"{name}.npy")
        weights = voxel_weights(confidence.numpy())
        found.store.save_array(weights, "weights-of-voxels", "1", f"{name}.npy")
        predict(found, name, probabilities(TRUTH))
    found.store.save_array(base, "template-signature.npy")
    return found


def predict(cohort, name, p, number=1):
    """The network says so, and the round's answer is the same."""
    cohort.store.save_array(p, "probabilities", str(number), f"{name}.npy")
    cohort.save_answer(number, name, p)


def refine(cohort, number=1, **changes):
    return refine_cohort(cohort, number, tiny_config(**changes), Silent(), Ranks())


def unsure_in_a_slab(cohort):
    """Case a hesitates, and leans the wrong way, in one slab of the organ; elsewhere it is sure."""
    p = probabilities(TRUTH).astype(np.float32)
    p[:, 3] = np.array([0.72, 0.28]).reshape(2, 1, 1)
    predict(cohort, "a", p.astype(np.float16))


def labels(cohort, name="a", number=2):
    return np.asarray(cohort.pseudo_label(number, name))


def test_the_answer_becomes_the_pseudo_label(cohort):
    predict(cohort, "a", probabilities(moved(3)))
    cohort.save_answer(1, "a", probabilities(moved(1)))
    refine(cohort, check_pseudo_labels=False)
    assert np.array_equal(labels(cohort), moved(1)), "not the network alone: what all say together"


def test_rejected_predictions_are_not_certain(cohort):
    refused = ("b", "c", "d")
    cohort.cases = [replace(case, trainable=case.id not in refused) for case in cohort.cases]
    assert not set(refine(cohort).certain) & set(refused), "a person called them useless"


def test_without_refinement_the_prediction_is_the_pseudo_label(cohort):
    predict(cohort, "a", probabilities(moved(3), 0.99))
    refine(cohort, refinement="none")
    assert np.array_equal(labels(cohort), moved(3)), "refinement 'none' takes the prediction as it is"


def test_volume_mode_replaces_the_uncertain_volume(cohort):
    """Case a is unsure everywhere: its neighbours and the template agree on the truth."""
    predict(cohort, "a", probabilities(moved(2), 0.7))
    refine(cohort, refinement="volume", uncertain_quantile=0.9)
    assert np.array_equal(labels(cohort), TRUTH), "the uncertain volume was not replaced by its neighbours' vote"


def test_volume_mode_keeps_the_certain_volumes(cohort):
    predict(cohort, "a", probabilities(moved(2), 0.7))
    predict(cohort, "b", probabilities(moved(1), 0.999))
    refine(cohort, refinement="volume", uncertain_quantile=0.9)
    assert np.array_equal(labels(cohort, "b")[..., -1], moved(1)[..., -1]), "a certain volume was voted over"


def worse_in_round_two(cohort):
    """Round 1 is good; in round 2 case a falls apart, the others stay."""
    refine(cohort)
    cohort.store.save_json(refine(cohort).to_json(), "refinement", "1.json")
    cohort.store.save_array(np.full(GRID.shape, 1, np.uint8), "pseudo", "2", "a.npy")  # a mark of the old one
    for name in CASES:
        predict(cohort, name, probabilities(TRUTH), 2)
    predict(cohort, "a", probabilities(moved(3)), 2)
    return refine(cohort, 2)


def test_a_worse_check_keeps_the_old_pseudo_label(cohort):
    worse_in_round_two(cohort)
    assert (labels(cohort, "a", 3) == 1).all(), "the prediction got worse; the old pseudo-label must stay"


def test_a_worse_check_is_reported(cohort):
    assert worse_in_round_two(cohort).taken == {"a": False, "b": True, "c": True, "d": True}


def test_an_outlier_of_the_first_round_keeps_the_registrations_label(cohort, monkeypatch):
    monkeypatch.setattr(acceptance, "OUTLIER", 3.0)
    predict(cohort, "a", probabilities(moved(3)))
    refine(cohort)
    assert (labels(cohort) == 1).all(), "a prediction far worse than the cohort's was taken"


def test_a_worse_check_keeps_the_weights(cohort):
    worse_in_round_two(cohort)
    weights = [np.asarray(cohort.store.array("weights-of-voxels", n, "a.npy")) for n in "23"]
    assert np.array_equal(*weights)


def test_the_value_in_force_stays_that_of_the_old_pseudo_label(cohort):
    first = refine(cohort)
    second = worse_in_round_two(cohort)
    assert second.in_force["a"] == pytest.approx(first.checks["a"]), "a refused check must not become the new bar"


def test_voxels_that_the_template_did_not_see_weigh_nothing(cohort):
    refine(cohort)
    assert np.asarray(cohort.store.array("weights-of-voxels", "2", "a.npy"))[:, :, -1].max() == 0


def test_refining_twice_gives_the_same(cohort):
    unsure_in_a_slab(cohort)
    refine(cohort)
    first = labels(cohort).copy()
    refine(cohort)
    assert np.array_equal(first, labels(cohort))


def test_the_most_uncertain_volume_is_not_certain(cohort):
    unsure_in_a_slab(cohort)
    assert refine(cohort).certain == ["b", "c", "d"]


def test_asked_to_stop(cohort):
    class Impatient(Silent):
        def should_stop(self):
            return True

    with pytest.raises(Stopped):
        refine_cohort(cohort, 1, tiny_config(), Impatient(), Ranks())


def test_more_neighbours_than_cases(cohort):
    unsure_in_a_slab(cohort)
    refine(cohort, neighbours=50)
    assert labels(cohort).shape == GRID.shape


def test_a_single_case(tmp_path, cohort):
    alone = Cohort(cohort.cases[:1], cohort.labelled, cohort.plan, cohort.store)
    unsure_in_a_slab(alone)
    assert refine(alone).taken == {"a": True}, "a cohort of one has no neighbours and no outliers"


# ---------------------------------------------------------------------- neighbours


def signatures():
    base = np.random.default_rng(0).normal(size=(3, 4, 4))
    noise = np.random.default_rng(1).normal(size=(5, 3, 4, 4))
    return {"own": base} | {f"n{k}": base + 0.4 * k * noise[k] for k in range(5)}


def test_nearest_are_sorted():
    found = Likeness(signatures()).nearest("own", [f"n{k}" for k in range(5)], 5)
    values = [similarity for _, similarity in found]
    assert values == sorted(values, reverse=True), f"similarities {values}"


def test_nearest_are_the_most_alike():
    assert [name for name, _ in Likeness(signatures()).nearest("own", [f"n{k}" for k in (4, 2, 0, 1, 3)], 2)] == [
        "n0",
        "n1",
    ]


def test_nearest_leave_the_case_itself_out():
    assert "own" not in [name for name, _ in Likeness(signatures()).nearest("own", ["own", "n1"], 5)]


def test_similarity_of_equal_signatures_is_one():
    assert Likeness(signatures()).nearest("own", ["n0"], 1)[0][1] == pytest.approx(1)


def test_opposite_signatures_have_similarity_zero():
    found = Likeness({"own": np.arange(8.0), "other": -np.arange(8.0)}).nearest("own", ["other"], 1)
    assert found == [("other", 0.0)], "similarities are clipped at 0"


def test_ties_are_broken_by_name():
    same = {name: np.arange(8.0) for name in ("own", "z", "b", "m")}
    assert [name for name, _ in Likeness(same).nearest("own", ["z", "b", "m"], 3)] == ["b", "m", "z"]


def test_whole_volume_vote_by_hand():
    """Weights 0.5, 0.3, 0.3: two weaker ones that agree win over a stronger one."""
    labels_ = [np.array([[[1, 1, 0]]]), np.array([[[2, 1, 0]]]), np.array([[[2, 0, 1]]])]
    found = whole_volume_vote((1, 1, 3), list(zip((0.5, 0.3, 0.3), labels_, strict=True)), 3).argmax(0)
    assert found.tolist() == [[[2, 1, 0]]]


def test_whole_volume_vote_resizes_to_the_nearest_voxel():
    found = whole_volume_vote((1, 1, 4), [(1.0, np.array([[[1, 2]]]))], 3).argmax(0)
    assert found.tolist() == [[[1, 1, 2, 2]]]


def test_whole_volume_vote_on_its_own_shape_changes_nothing():
    assert np.array_equal(whole_volume_vote(GRID.shape, [(0.7, TRUTH)], 2).argmax(0), TRUTH)


# ---------------------------------------------------------------------- the check


def test_a_fall_within_the_tolerance_is_accepted():
    assert accepted({"a": 0.80, "b": 0.8}, {"a": 0.80 + 0.9 * TOLERANCE, "b": None})["a"]


def test_a_fall_beyond_the_tolerance_is_refused():
    assert not accepted({"a": 0.80, "b": 0.8}, {"a": 0.80 + 1.1 * TOLERANCE, "b": None})["a"]


def test_an_outlier_of_the_first_round_is_refused():
    now = {"a": 0.9, "b": 0.91, "c": 0.89, "d": 0.9, "e": 0.3}
    assert [c for c, taken in accepted(now, dict.fromkeys(now)).items() if not taken] == ["e"]


def test_equal_cases_are_all_accepted():
    now = dict.fromkeys("abcd", 0.9)
    assert all(accepted(now, dict.fromkeys(now)).values())


def test_mean_dice_by_hand():
    """Class 1: 2 of 3 + 2 voxels in common: 4/5; class 2: none of 0 + 1."""
    assert mean_dice(np.array([1, 1, 1, 0]), np.array([1, 1, 2, 0]), 3) == pytest.approx((4 / 5 + 0) / 2)


def test_mean_dice_leaves_out_what_nobody_has():
    assert mean_dice(TRUTH, TRUTH, 5) == pytest.approx(1)


def test_a_class_that_the_template_says_nothing_about_does_not_count():
    """Drawn in the case, not in the template: no sign of a bad label."""
    both = np.array([1, 1, 2, 2])
    assert mean_dice(both, np.array([1, 1, 0, 0]), 3, unknown=(2,)) == 1
    more = np.where(moved(5) > 0, 2, TRUTH)
    more[TRUTH > 0] = 1
    found = reverse_dice(more, GRID, identity_deformation(GRID), TRUTH, GRID, 3, unknown=(2,))
    assert found == pytest.approx(1, abs=1e-4)


def test_reverse_dice_of_the_truth_is_one():
    assert reverse_dice(TRUTH, GRID, identity_deformation(GRID), TRUTH, GRID, 2) == pytest.approx(1, abs=1e-4)


def test_reverse_dice_falls_with_an_error():
    assert reverse_dice(moved(2), GRID, identity_deformation(GRID), TRUTH, GRID, 2) < 0.8


def test_reverse_dice_looks_only_where_the_case_was_seen():
    """The case's field ends in the middle of the organ: what lies outside of it cannot be wrong."""
    half = Geometry((8, 9, 5))
    found = reverse_dice(TRUTH[:, :, :5], half, identity_deformation(GRID), TRUTH, GRID, 2)
    assert found == pytest.approx(1, abs=0.02)


# ---------------------------------------------------------------------- fusion


def test_weighted_mean_by_hand():
    """(0.2 · 0.9 + 1 · 0.3) / 1.2."""
    parts = [(np.full((1, 1, 1, 1), p), np.full((1, 1, 1), w, np.float32)) for p, w in ((0.9, 0.2), (0.3, 1.0))]
    assert float(weighted_mean(parts)[0, 0, 0, 0]) == pytest.approx((0.2 * 0.9 + 0.3) / 1.2, abs=1e-3)


def test_weights_are_each_voxels_own():
    weights = np.array([[[1.0, 0.0]]], np.float32)
    parts = [(np.full((1, 1, 1, 2), 0.9), weights), (np.full((1, 1, 1, 2), 0.25), 1 - weights)]
    assert weighted_mean(parts)[0, 0, 0].tolist() == pytest.approx([0.9, 0.25], abs=1e-3)


def test_entropy_class_by_class_is_that_of_all_classes_at_once():
    p = np.stack([np.full((2, 2, 2), v, np.float16) for v in (0.7, 0.2, 0.1)])
    assert np.abs(voxel_entropy(p) - normalised_entropy(torch.from_numpy(p).float()).numpy()).max() < 1e-5


@pytest.mark.parametrize(("confidence", "expected"), [(0.0, 0.0), (0.005, 0.0), (0.5, 0.75), (1.0, 1.0)])
def test_weights_of_voxels(confidence, expected):
    assert float(voxel_weights(np.array(confidence))) == pytest.approx(expected)
