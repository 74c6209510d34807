"""Cases that vote on each other: registered once, weighted by trust and fit, and what a round says with their help."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from engine_helpers import dice, identity_deformation, smooth_noise, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.answers import agreement, answer, behind_of, certainty_of, joined, share_of
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase, Propagation
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.grids import sample, space_points
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.evaluation.signals import cohort_signals
from SemiSAMO1Lib.engine.library import Library, keep_library
from SemiSAMO1Lib.engine.linking import has_links, link
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.progress import Progress
from SemiSAMO1Lib.engine.propagation.links import Link, Linker, carried
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.engine.refinement.check import BELIEVED, Check, believed, check_of, checks_of
from SemiSAMO1Lib.volume import Geometry, Volume

CPU = torch.device("cpu")
GRID = Geometry((10, 12, 14))
TRUTH = np.zeros(GRID.shape, np.uint8)
TRUTH[2:7, 3:9, 3:9] = 1


def probabilities(label, sure=0.9):
    return np.where(label[None] == np.arange(2).reshape(-1, 1, 1, 1), sure, 1 - sure).astype(np.float16)


def a_link(other, trust=1.0, fit=1.0, start=None):
    full = [torch.full(GRID.shape, value, dtype=torch.float16) for value in (trust, fit)]
    return Link(other, np.eye(4) if start is None else start, torch.zeros(3, *GRID.shape).half(), *full, GRID)


def voted(links, labels, known=None):
    def said_by(name, value):
        return Volume(probabilities(labels[name])[value], GRID)

    everywhere = Volume(np.ones(GRID.shape, bool), GRID)
    return carried(links, said_by, known or (lambda _: everywhere), GRID, 2, torch.device("cpu"))


# ---------------------------------------------------------------------- votes


def test_votes_count_by_trust_and_fit():
    """Weights 0.5 · 0.4 and 1 · 0.6 of labels that are 0.9 and 0.1 sure of the organ."""
    said, _ = voted([a_link("x", 0.5, 0.4), a_link("y", 1.0, 0.6)], {"x": TRUTH, "y": 0 * TRUTH})
    inside = float(said[1][4, 5, 5])
    assert inside == pytest.approx((0.2 * 0.9 + 0.6 * 0.1) / 0.8, abs=2e-3)


def test_the_trust_of_a_vote_is_the_mean_of_the_voters():
    _, trust = voted([a_link("x", 0.5, 0.4), a_link("y", 1.0, 0.6)], {"x": TRUTH, "y": TRUTH})
    assert float(trust[4, 5, 5]) == pytest.approx((0.2 * 0.5 + 0.6 * 1.0) / 0.8, abs=2e-3)


def test_what_nobody_is_trusted_in_is_still_guessed():
    said, trust = voted([a_link("x", 0.0)], {"x": TRUTH})
    assert np.array_equal(said.argmax(0), TRUTH) and trust.max() == 0


def test_who_does_not_know_has_no_vote():
    """x saw nothing there: what it shows is a guess, unknown and not background."""
    known = {"x": Volume(np.zeros(GRID.shape, bool), GRID), "y": Volume(np.ones(GRID.shape, bool), GRID)}
    said, trust = voted([a_link("x"), a_link("y", 0.5)], {"x": 0 * TRUTH, "y": TRUTH}, known.get)
    assert float(said[1][4, 5, 5]) == pytest.approx(0.9, abs=2e-3) and float(trust[4, 5, 5]) == pytest.approx(
        0.5, abs=0.01
    )


def test_where_no_voter_fits_they_count_alike():
    """The scan that fits best there may have lost its vote."""
    said, _ = voted([a_link("x", fit=0.0), a_link("y", fit=0.0)], {"x": TRUTH, "y": 0 * TRUTH})
    assert float(said[1][4, 5, 5]) == pytest.approx(0.5, abs=1e-3)


def test_votes_follow_the_transform():
    """The other scan lies 2 mm further along x."""
    start = np.eye(4)
    start[0, 3] = 2.0
    said, _ = voted([a_link("x", start=start)], {"x": np.roll(TRUTH, 2, 2)})
    assert np.array_equal(said.argmax(0)[..., :11], TRUTH[..., :11])


def test_class_probabilities_add_up():
    said, _ = voted([a_link("x", 0.3, 0.4), a_link("y", 0.9, 0.6)], {"x": TRUTH, "y": np.roll(TRUTH, 1, 0)})
    assert np.abs(said.astype(np.float32).sum(0) - 1).max() < 2e-3


def test_a_link_is_the_same_after_its_file(tmp_path):
    store = Store(tmp_path)
    store.save_tensors(a_link("x", 0.25, 0.5).to_file(), "link.pt")
    read = Link.from_file(store.tensors("link.pt"))
    assert (read.other, read.geometry, float(read.trust.max()), float(read.fit.max())) == ("x", GRID, 0.25, 0.5)


# ---------------------------------------------------------------------- registering


SCAN = Geometry((24, 26, 28))


def scan(shift=0):
    """A smooth scan; `shift` moves it by voxels along x."""
    return Volume(np.roll(smooth_noise(SCAN.shape, 5, sigma=2.0), shift, 2), SCAN)


def linked(scans):
    others = [name for name in scans if name != "a"]
    return Linker(1.0, CPU).links("a", others, scans.get, lambda _: np.eye(4))


def test_a_moved_scan_is_found():
    found = linked({"a": scan(), "b": scan(2)})[0]
    middle = tuple(slice(8, -8) for _ in range(3))
    points = space_points(SCAN)[:, *middle]
    moved = sample(found.forward.float(), found.geometry, points)[0]
    assert float(moved.mean()) == pytest.approx(2.0, abs=0.5), "b shows everything two voxels further along x"


def test_the_scan_that_fits_better_has_the_larger_say():
    noise = Volume(smooth_noise(SCAN.shape, 77, sigma=2.0), SCAN)
    like, other = linked({"a": scan(), "like": scan(1), "other": noise})
    assert float(like.fit.float().mean()) > float(other.fit.float().mean()) + 0.1


def test_a_scan_elsewhere_is_no_neighbour():
    """It shows another place: whatever fits there, fits by chance."""
    away = Volume(scan().array, replace(SCAN, origin=(500.0, 0.0, 0.0)))
    scans = {"a": scan(), "b": scan(1), "away": away}
    found = Linker(1.0, CPU).links("a", ["away", "b"], scans.get, lambda _: np.eye(4))
    assert [one.other for one in found] == ["b"]


def test_clipped_grey_values_are_not_taken_for_padding():
    """CT within its window: what lies outside of it is one value, and data."""
    clipped = Volume(np.maximum(scan().array, float(np.median(scan().array))), SCAN)
    read = [Linker(1.0, CPU, padded=given)._ready("a", lambda _: clipped).weight.mean() for given in (True, False)]
    assert float(read[1]) == 1.0 > float(read[0])


def test_scans_used_last_stay_in_memory_and_no_more():
    read = []

    def image(name):
        read.append(name)
        return scan(int(name))

    linker = Linker(1.0, CPU, kept=3)
    linker.links("0", ["1", "2"], image, lambda _: np.eye(4))
    linker.links("1", ["2", "3"], image, lambda _: np.eye(4))
    linker.links("0", ["3"], image, lambda _: np.eye(4))
    assert read == ["0", "1", "2", "3", "0"]


# ---------------------------------------------------------------------- a cohort


NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def cohort(tmp_path):
    """Five cases that look alike and lie voxel on voxel. Propagation missed the organ in case a; networks found it in
    b to d, and in e something else."""
    image = Volume(smooth_noise(GRID.shape, 0), GRID)
    template = LabelledCase("template", image, Volume(TRUTH, GRID))
    cases = [EngineCase(name, GRID, lambda: image) for name in NAMES]
    found = Cohort(cases, [template], tiny_plan(2), Store(tmp_path))
    for number, name in enumerate(NAMES):
        known = torch.from_numpy(probabilities(0 * TRUTH if name == "a" else TRUTH).astype(np.float32))
        signature = (smooth_noise((3, 4, 4), 1) + 0.01 * number).astype(np.float16)
        confidence = torch.full(GRID.shape, 0.5)
        found.save_propagation(name, Propagation(GRID, known, confidence, [identity_deformation(GRID)], {}, signature))
        wrong = {"a": 0 * TRUTH, "e": np.roll(TRUTH, 5, 2)}
        found.store.save_array(probabilities(wrong.get(name, TRUTH)), "probabilities", "1", f"{name}.npy")
    found.store.save_array(smooth_noise((3, 4, 4), 1), "template-signature.npy")
    return found


def answered(cohort, number=1, **changes):
    config, fabric = tiny_config(rounds=1, **changes), make_fabric("cpu", "32-true")
    progress = Progress(Silent(), cohort, config)
    link(cohort, config, fabric, progress)
    for each in range(number + 1):
        answer(cohort, each, config, fabric, progress)
    return {name: np.asarray(cohort.answer(number, name)).argmax(0) for name in NAMES}


def test_like_cases_mend_what_the_propagation_missed(cohort):
    assert dice(answered(cohort, 0)["a"], TRUTH, 1) > 0.95


def test_like_cases_mend_what_the_network_missed(cohort):
    assert dice(answered(cohort, 1)["a"], TRUTH, 1) > 0.95


def test_without_their_share_nobody_is_asked(cohort):
    found = answered(cohort, 1, neighbour_share=0)
    assert not found["a"].any() and not cohort.has_links("a")


def test_a_case_has_no_vote_on_itself(cohort):
    answered(cohort, 0)
    assert all(name not in [one.other for one in cohort.links(name)] for name in NAMES)


def test_as_many_neighbours_as_asked_for(cohort):
    answered(cohort, 0, neighbours=2)
    assert [len(cohort.links(name)) for name in NAMES] == [2] * len(NAMES)


def test_rejected_cases_have_no_vote(cohort):
    cohort.cases = [replace(case, trainable=case.id != "b") for case in cohort.cases]
    answered(cohort, 0)
    assert all("b" not in [one.other for one in cohort.links(name)] for name in NAMES)


def test_where_all_others_are_rejected_a_case_is_answered_alone(cohort):
    cohort.cases = [replace(case, trainable=case.id == "b") for case in cohort.cases]
    assert np.array_equal(answered(cohort, 1)["b"], TRUTH) and cohort.links("b") == []


def test_cases_that_fail_the_check_have_no_vote(cohort):
    answered(cohort, 1)
    checks = {name: cohort.store.json("checks", "1", f"{name}.json") for name in cohort.ids}
    voters = believed(cohort, checks)
    assert "e" not in voters and len(voters) >= BELIEVED * len(NAMES), voters


def test_rejected_cases_do_not_use_up_the_votes_of_others(cohort):
    """Four cases are rejected and agree with everything; of the other ones the best three fifths are believed."""
    checks = dict(zip("abcde", (0.9, 0.9, 0.5, 0.6, 0.7), strict=True))
    cohort.cases = [replace(case, trainable=case.id not in "ab") for case in cohort.cases]
    assert believed(cohort, checks) == ["e", "d"]


def test_links_are_made_once(cohort, monkeypatch):
    answered(cohort, 0)
    monkeypatch.setattr(Linker, "links", lambda *_: pytest.fail("registered again"))
    answered(cohort, 1)


def test_registrations_begin_where_the_template_leads(cohort, monkeypatch):
    """A place of a and the place of b where they begin are one place of the template."""
    quarter = np.array([[0.0, -1.0, 0.0, 3.0], [1.0, 0.0, 0.0, -2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    starts = {"a": np.eye(4), "b": quarter}
    starts["a"][0, 3] = 2.0
    for name, start in starts.items():
        known = torch.from_numpy(probabilities(TRUTH).astype(np.float32))
        found = [identity_deformation(GRID, start=start)]
        signature = np.array(cohort.signature(name))
        cohort.save_propagation(name, Propagation(GRID, known, torch.ones(GRID.shape), found, {}, signature))
    begun = {}
    monkeypatch.setattr(Linker, "links", lambda _, name, others, image, start: begun.update({name: start("b")}) or [])
    answered(cohort, 0)
    place = np.array([1.0, 2.0, 3.0, 1.0])
    assert np.allclose(starts["b"] @ begun["a"] @ place, starts["a"] @ place)


def test_one_case_has_nobody_to_ask(cohort):
    alone = Cohort(cohort.cases[:1], cohort.labelled, cohort.plan, cohort.store)
    assert not has_links(alone, tiny_config())


# ---------------------------------------------------------------------- how far they agree


def test_neighbours_doubt_a_case_that_they_had_to_mend(cohort):
    """The network and the propagation missed the organ in a; in b all say the same."""
    answered(cohort, 1)
    of_a, of_b = (cohort.with_neighbours(1, name)[0] for name in "ab")
    assert of_a["with_neighbours"] < 0.05, of_a
    assert of_b["with_neighbours"] > 0.95, of_b


def test_neighbours_that_are_sure_give_their_probability():
    said = probabilities(TRUTH, 0.8)
    found = agreement(said, said, probabilities(TRUTH))[0]
    assert found["with_neighbours"] == 1 and found["neighbours_inside"] == pytest.approx(0.8, abs=0.001)


def test_neighbours_that_agree_with_half_of_an_answer():
    """Certain votes for the one half: as a soft label a Dice of 2 / 3."""
    half = TRUTH.copy()
    half[:, :6] = 0
    found = agreement(probabilities(half, 1.0), probabilities(TRUTH), probabilities(TRUTH))[0]
    assert found["neighbours_inside"] == pytest.approx(0.5)
    assert found["neighbours_expected"] == pytest.approx(2 / 3) and found["with_neighbours"] == pytest.approx(2 / 3)


def test_an_empty_answer_is_not_expected_by_neighbours_that_see_something():
    nothing = probabilities(0 * TRUTH)
    found = agreement(probabilities(TRUTH, 1.0), nothing, nothing)[0]
    assert found == {"with_neighbours": 0, "neighbours_inside": 0, "neighbours_expected": 0}


def test_the_agreement_is_among_the_signals(cohort):
    answered(cohort, 1)
    signals = cohort_signals(cohort, 1, tiny_config(rounds=1), Silent(), Ranks())
    assert signals["a"][0]["with_neighbours"] == cohort.with_neighbours(1, "a")[0]["with_neighbours"]


def test_where_nobody_was_asked_no_agreement_is_known(cohort):
    answered(cohort, 1, neighbour_share=0)
    signals = cohort_signals(cohort, 1, tiny_config(rounds=1), Silent(), Ranks())
    assert signals["a"][0]["neighbours_inside"] is None


# ---------------------------------------------------------------------- the mean


#: Spacing, mm.
MM = (1.0, 1.0, 1.0)

#: Votes that nobody trusts.
NOT_TRUSTED = probabilities(TRUTH), np.zeros(GRID.shape, np.float16)


def test_a_network_that_does_not_know_leaves_it_to_others():
    unsure, other = probabilities(TRUTH, 0.5), probabilities(TRUTH, 0.9)
    found = joined(unsure, other, np.ones(GRID.shape), NOT_TRUSTED, tiny_config(propagation_share=0.5), MM)
    assert np.abs(found.astype(np.float32) - other).max() < 0.01, "its entropy is 1: it weighs next to nothing"


def a_border(width):
    """A sure network with an unsure layer, so many voxels wide."""
    predicted = np.full((2, 20, 12, 12), 0.001, np.float16)
    predicted[1, :10], predicted[0, 10:] = 0.999, 0.999
    predicted[:, 10 : 10 + width] = 0.5
    return predicted


def test_a_thin_border_is_no_doubt_of_the_network_a_wide_one_is():
    thin, wide = (certainty_of(a_border(width), 1.5, MM) for width in (1, 7))
    assert thin[10].min() > 0.6, "one unsure layer between sure ones"
    assert wide[13].max() < 0.05, "in the middle of seven unsure layers"


def test_around_nothing_a_voxel_is_as_sure_as_its_entropy_says():
    found = certainty_of(a_border(1), 0.0, MM)
    assert found[10].max() < 1e-3 and found[5].min() > 0.98


def test_surroundings_are_as_wide_in_mm_along_thick_slices():
    """An unsure slice five times as thick as voxels are wide is its own surroundings."""
    assert certainty_of(a_border(1), 1.5, (5.0, 1.0, 1.0))[10].max() < 0.05


def test_where_nobody_votes_the_network_counts_in_full():
    """As before there were neighbours: trainings of then, and a single scan."""
    unsure, other = probabilities(TRUTH, 0.6), probabilities(0 * TRUTH, 1.0)
    found = joined(unsure, other, np.ones(GRID.shape), None, tiny_config(propagation_share=0.5), MM)
    assert float(found[1][4, 5, 5]) == pytest.approx(0.6 / 1.5, abs=1e-3)


def test_a_sure_network_weighs_as_its_certainty():
    sure, other = probabilities(TRUTH, 1.0), probabilities(0 * TRUTH, 1.0)
    found = joined(sure, other, np.ones(GRID.shape), None, tiny_config(propagation_share=0.5), MM)
    assert float(found[1][4, 5, 5]) == pytest.approx(1 / 1.5, abs=1e-3)


@pytest.mark.parametrize(("trust", "expected"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.25)])
def test_the_propagation_counts_as_far_as_the_links_are_not_trusted(trust, expected):
    """Votes against the organ, propagation for it, no network: shares 1.5 · trust and 0.5 · (1 - trust)."""
    votes = probabilities(0 * TRUTH, 1.0), np.full(GRID.shape, trust, np.float16)
    found = joined(None, probabilities(TRUTH, 1.0), np.ones(GRID.shape), votes, tiny_config(), MM)
    assert float(found[1][4, 5, 5]) == pytest.approx(expected, abs=0.01)


def test_with_no_share_the_prediction_is_the_answer():
    sure, other = probabilities(TRUTH, 0.8), probabilities(0 * TRUTH, 1.0)
    assert np.array_equal(joined(sure, other, np.ones(GRID.shape), None, tiny_config(propagation_share=0), MM), sure)


def test_where_the_template_saw_nothing_round_0_is_the_nearest_guess():
    guess = probabilities(TRUTH, 0.8)
    found = joined(None, guess, np.zeros(GRID.shape), None, tiny_config(), MM)
    assert np.abs(found.astype(np.float32) - guess).max() < 1e-3


def at_a_voxel(atlases, trust, **changes):
    """The organ's probability where network and links say no (0.1) and the propagation of labels says yes (0.9)."""
    no, yes = probabilities(0 * TRUTH), probabilities(TRUTH)
    votes = no, np.full(GRID.shape, trust, np.float16)
    found = joined(no, yes, np.ones(GRID.shape), votes, tiny_config(**changes), MM, atlases)
    return float(found[1][TRUTH > 0].mean())


def test_what_a_person_labelled_is_not_outvoted_by_guesses():
    """One template may fit badly; three labelled scans weigh as much as a network and trusted links together."""
    one, three = at_a_voxel(1, 0.99), at_a_voxel(3, 0.99)
    assert one < 0.15, one
    assert three > 0.45, three


def test_the_more_are_labelled_the_more_they_count():
    found = [at_a_voxel(count, 0.9) for count in (1, 2, 3)]
    assert found == sorted(found) and len(set(found)) == 3


def test_labelled_cases_mend_what_all_others_missed(cohort):
    """No network found anything; three labelled scans were propagated, surely."""
    template = cohort.labelled[0]
    cohort.labelled = [template, *(replace(template, id=f"corrected {n}") for n in range(2))]
    for name in NAMES:
        cohort.store.save_array(probabilities(0 * TRUTH), "probabilities", "1", f"{name}.npy")
        cohort.store.save_array(np.ones(GRID.shape, np.float16), "confidence", f"{name}.npy")
    assert dice(answered(cohort, 1)["b"], TRUTH, 1) > 0.95


def test_without_registration_many_labels_do_not_make_prototypes_sure(cohort):
    shutil.rmtree(cohort.store.path("transforms"))
    cohort.labelled = cohort.labelled * 3
    config = tiny_config(rounds=1)
    answer(cohort, 1, config, make_fabric("cpu", "32-true"), Progress(Silent(), cohort, config))
    found = np.asarray(cohort.answer(1, "e")).argmax(0)
    assert not np.array_equal(found, TRUTH), "the network of e says otherwise, and counts more"


# ---------------------------------------------------------------------- how much votes weigh beside a network


@pytest.mark.parametrize(
    ("behind", "own", "expected"),
    [(0.0, 0.0, 0.5), (0.045, 0.0, 0.5), (0.06, 0.0, 2.0), (0.3, 0.0, 4.0), (0.0, 0.08, 0.5), (0.0, 0.12, 2.0)],
    ids=[
        "keeps up",
        "just keeps up",
        "the cohort is behind",
        "the cohort is far behind",
        "a case is behind as cases are",
        "a case is behind by more",
    ],
)
def test_votes_weigh_the_more_the_further_networks_are_behind(behind, own, expected):
    assert share_of(behind, own, tiny_config()) == pytest.approx(expected, abs=0.01)


def test_without_gain_votes_weigh_what_they_are_told_to():
    config = tiny_config(neighbour_gain=0, neighbour_share=0.7)
    assert share_of(0.5, 0.5, config) == share_of(0.0, 0.0, config) == 0.7


def test_the_share_scales_what_the_check_finds():
    once, twice = (share_of(0.055, 0.0, tiny_config(neighbour_share=share)) for share in (1, 2))
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize("keeps_up", [True, False])
def test_a_network_goes_its_own_way_where_it_keeps_up_on_the_cohort(cohort, keeps_up):
    """In e it sees the organ elsewhere, with its propagation; the votes see it where the others have it."""
    elsewhere = np.roll(TRUTH, 5, 2)
    cohort.store.save_array(probabilities(elsewhere), "probabilities", "0", "e.npy")
    if not keeps_up:
        for name in "bcd":
            cohort.store.save_array(probabilities(np.roll(TRUTH, 2, 2)), "probabilities", "1", f"{name}.npy")
    found = answered(cohort, 1, edge_weight=0, propagation_share=4)["e"]  # so that votes see it, whatever networks do
    assert (dice(found, elsewhere, 1) > 0.95) == keeps_up


def test_one_network_that_failed_does_not_weigh_on_the_others(cohort):
    """Nothing was found in e; in a the votes alone find the organ. All others keep up."""
    cohort.store.save_array(probabilities(0 * TRUTH), "probabilities", "1", "e.npy")
    answered(cohort, 1)
    assert behind_of(cohort.store, 1) == pytest.approx(0, abs=0.02)


def test_rejected_predictions_do_not_say_how_far_networks_are_behind(cohort):
    cohort.cases = [replace(case, trainable=case.id in "ad") for case in cohort.cases]
    answered(cohort, 1)
    assert sorted(path.stem for path in cohort.store.path("behind-by-case", "1").iterdir()) == ["a", "d"]


def test_where_nobody_votes_no_network_is_behind(cohort):
    cohort.cases = [replace(case, trainable=False) for case in cohort.cases]
    answered(cohort, 1)
    assert behind_of(cohort.store, 1) == 0


def test_of_many_cases_some_tell_how_far_networks_are_behind(cohort, monkeypatch):
    monkeypatch.setattr("SemiSAMO1Lib.engine.answers.TRIED", 2)
    answered(cohort, 1)
    assert sorted(path.stem for path in cohort.store.path("behind-by-case", "1").iterdir()) == ["a", "d"]


def test_what_was_found_out_before_a_stop_is_not_found_out_again(cohort):
    """As if the run had been ended after a and b: what they told stays, whatever it was."""
    for name in "ab":
        cohort.store.save_json(0.9, "behind-by-case", "1", f"{name}.json")
    answered(cohort, 1)
    kept = [cohort.store.json("behind-by-case", "1", f"{name}.json") for name in "ab"]
    assert kept == [0.9, 0.9]


@pytest.mark.parametrize("registered", [True, False])
def test_two_empty_labels_do_not_agree(registered):
    """The template has the organ; neither the judged label nor the propagation found it."""
    template = LabelledCase("template", Volume(smooth_noise(GRID.shape, 0), GRID), Volume(TRUTH, GRID))
    nothing, field = probabilities(0 * TRUTH), identity_deformation(GRID) if registered else None
    assert Check(template, GRID, 2).of(nothing, nothing, GRID, field) == 0


def test_agreement_on_a_class_that_the_template_does_not_know_is_none():
    """Both show nothing but it: what counts is that the organ is missing."""
    template = LabelledCase("template", Volume(smooth_noise(GRID.shape, 0), GRID), Volume(TRUTH, GRID), unknown=(2,))
    other = np.where(TRUTH > 0, 0.05, 0.0)
    shown = np.stack([1 - other - 0.9 * (TRUTH > 0), other, 0.9 * (TRUTH > 0)]).astype(np.float16)
    assert Check(template, GRID, 3).of(shown, shown, GRID, identity_deformation(GRID)) == 0


def test_the_check_of_one_scan_is_that_of_the_cohort(cohort):
    found = checks_of(cohort, 1, "checks", partial(cohort.probabilities, 1), Silent(), Ranks())
    said, carried_there = (cohort.probabilities(number, "e") for number in (1, 0))
    assert check_of(cohort).of(said, carried_there, GRID, cohort.deformation("e")) == found["e"] < 0.9


# ---------------------------------------------------------------------- further scans


@pytest.fixture
def library(cohort):
    answered(cohort, 1)
    keep_library(cohort, 1, tiny_config(), Silent(), Ranks())
    return Library(cohort.store, cohort.plan, tiny_config(), CPU)


def seen(transforms=True):
    known = torch.from_numpy(probabilities(0 * TRUTH).astype(np.float32))
    signature = smooth_noise((3, 4, 4), 1).astype(np.float16)
    found = [identity_deformation(GRID)] if transforms else []
    return Propagation(GRID, known, torch.ones(GRID.shape), found, {}, signature)


def test_kept_cases_vote_on_a_further_scan(library):
    votes = library.votes(Volume(smooth_noise(GRID.shape, 0), GRID), seen())
    assert votes is not None and dice(votes[0].argmax(0), TRUTH, 1) > 0.95


def test_a_second_scan_is_not_taken_for_the_first(library):
    image = smooth_noise(GRID.shape, 0)
    library.votes(Volume(smooth_noise(GRID.shape, 9), GRID), seen())
    again = library.votes(Volume(image, GRID), seen())
    assert dice(again[0].argmax(0), TRUTH, 1) > 0.95


def test_a_scan_that_was_not_registered_is_not_voted_on(library):
    assert library.votes(Volume(smooth_noise(GRID.shape, 0), GRID), seen(transforms=False)) is None


def test_a_run_without_a_library_has_no_votes(cohort):
    votes = Library(cohort.store, cohort.plan, tiny_config(), CPU)
    assert votes.votes(Volume(smooth_noise(GRID.shape, 0), GRID), seen()) is None


def test_of_few_cases_only_those_that_are_believed_are_kept(cohort):
    """In the training the others had no vote either."""
    answered(cohort, 1)
    keep_library(cohort, 1, tiny_config(), Silent(), Ranks())
    checks = checks_of(cohort, 1, "checks-of-answers", partial(cohort.answer, 1), Silent(), Ranks())
    kept = [row["id"] for row in cohort.store.json("library.json")]
    assert kept == believed(cohort, checks) and len(kept) < len(NAMES)


def test_cases_that_a_person_refused_later_have_no_vote(library, cohort):
    kept = [row["id"] for row in cohort.store.json("library.json")]
    left = Library(cohort.store, cohort.plan, tiny_config(), CPU, without=kept)
    assert left.votes(Volume(smooth_noise(GRID.shape, 0), GRID), seen()) is None


def test_a_stop_is_heard_between_the_checks_of_cases(cohort):
    class Asked(Silent):
        def should_stop(self):
            return True

    answered(cohort, 1)
    with pytest.raises(Stopped):
        keep_library(cohort, 1, tiny_config(), Asked(), Ranks())


def test_rejected_cases_are_not_kept(cohort):
    cohort.cases = [replace(case, trainable=case.id != "b") for case in cohort.cases]
    answered(cohort, 1)
    keep_library(cohort, 1, tiny_config(), Silent(), Ranks())
    assert "b" not in [row["id"] for row in cohort.store.json("library.json")]
