"""What was carried badly is carried again, through cases to which the label was carried well."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import dice, identity_deformation, tiny_config
from near_helpers import CENTRE, CPU, GRID, SPACING, described, moved, planted, template_scan
from scipy.spatial.transform import Rotation

from SemiSAMO1Lib.engine import carrying
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase, Propagation
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.grids import space_points, transform_points
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.further import FinishedRun
from SemiSAMO1Lib.engine.library import Library, keep_library
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.propagation.detours import Detours, Helper, chosen_detours, start_through
from SemiSAMO1Lib.engine.propagation.near import neighbourhood
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator, RegistrationSettings
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.volume import Volume

#: Turns: as far as a registration comes, and further than that.
HALF_WAY, FAR = (0, 0, 24), (0, 0, 48)
PLACE = (-40.0, -30.0, -30.0)


# ---------------------------------------------------------------------- which cases


def test_cases_that_fit_a_tenth_worse_than_the_median_are_carried_again():
    found = chosen_detours({"a": 1.0, "b": 1.09, "c": 1.11, "d": 0.5, "e": 1.0}, "abcde")
    assert found.again == ["c"] and found.limit == pytest.approx(1.1), "the median is 1"


def test_they_go_through_the_three_that_fit_best():
    found = chosen_detours({"a": 0.9, "b": 0.6, "c": 2.0, "d": 0.8, "e": 0.7, "f": 0.9}, "abcdef")
    assert found.through == ["b", "e", "d"]


def test_nobody_goes_through_a_case_that_may_not_help():
    found = chosen_detours({"a": 0.9, "b": 0.6, "c": 2.0, "d": 0.8}, "acd")
    assert found.through == ["d", "a"]


def test_cases_that_were_not_judged_have_no_part_in_the_median():
    found = chosen_detours({"a": None, "b": None, "c": 1.0}, "abc")
    assert (found.again, found.through) == (["a", "b"], ["c"])


def test_a_case_that_shows_nothing_of_the_labels_surroundings_is_carried_again():
    found = chosen_detours({"a": 1.0, "b": None, "c": 1.0}, "abc")
    assert (found.again, found.through) == (["b"], ["a", "c"])


@pytest.mark.parametrize(
    ("misfits", "helpful"),
    [
        ({}, ""),
        ({"a": 1.0}, "a"),
        ({"a": 1.0, "b": 1.05, "c": 1.0}, "abc"),
        ({"a": None, "b": None}, "ab"),
        ({"a": 1.0, "b": 1.0, "c": 5.0}, "c"),
    ],
)
def test_nothing_is_carried_again_where_nothing_is_worse_or_nobody_helps(misfits, helpful):
    found = chosen_detours(misfits, helpful)
    assert (found.again, found.through) == ([], [])


# ---------------------------------------------------------------------- where they lead


@pytest.fixture(scope="module")
def template():
    return template_scan()


@pytest.fixture(scope="module")
def near(template):
    return neighbourhood(described(template[0]), template[1])


def bent(geometry, linear, centre):
    """Fields of a deformation whose start is the identity: from x to centre + linear (x - centre), and back."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, centre - linear @ centre
    points = space_points(geometry).double()
    forward, backward = (transform_points(points, one) - points for one in (matrix, np.linalg.inv(matrix)))
    return identity_deformation(geometry, forward=forward.float(), backward=backward.float()), matrix


def test_two_starts_after_each_other_are_one(near):
    there, on = moved((8.0, 3.0, -5.0), (10, 0, 20)), moved((-3.0, 4.0, 1.0), (0, 15, 0), 1.1)
    found = start_through(near, identity_deformation(GRID, start=there), identity_deformation(GRID, start=on), "x")
    assert np.allclose(found.matrix, on @ there, atol=0.01)


def test_what_the_fields_turn_is_a_part_of_it(near):
    linear = Rotation.from_rotvec(np.radians((0, 0, 8))).as_matrix() * 1.05
    first, matrix = bent(GRID, linear, CENTRE)
    found = start_through(near, first, identity_deformation(GRID), "x")
    assert np.allclose(found.matrix[:3, :3], matrix[:3, :3], atol=0.01), f"a turn of 8° became\n{found.matrix.round(3)}"


def test_across_points_in_a_plane_it_does_as_the_starts_do(near):
    flat = replace(near, points=torch.cat([near.points[:2], torch.full_like(near.points[2:], float(CENTRE[2]))]))
    there = moved((8.0, 3.0, -5.0), (10, 0, 20))
    found = start_through(flat, identity_deformation(GRID, start=there), identity_deformation(GRID), "x")
    assert np.allclose(found.matrix, there, atol=0.01)


def test_what_stretches_too_much_is_no_start(near):
    wide = moved((0, 0, 0), scale=1.7)
    assert start_through(near, identity_deformation(GRID, start=wide), identity_deformation(GRID), "x") is None


# ---------------------------------------------------------------------- in the propagator


def propagator():
    return RegistrationPropagator(SPACING, 2, CPU, RegistrationSettings(use_affine=False))


@pytest.fixture(scope="module")
def scans(template):
    """Cases in which the label's surroundings are turned, and where they are."""
    return {
        "half way": planted(*template, moved((-20.0, -20.0, -20.0), HALF_WAY), seed=11),
        "far": planted(*template, moved(PLACE, FAR), seed=12),
    }


def helper(one, prepared, scan):
    found = one.propagate(prepared, scan, scan.geometry)
    label = found.probabilities.argmax(0).numpy().astype(np.uint8)
    known = found.confidence.numpy() > 0
    return Helper("half way", lambda: scan, Volume(label, scan.geometry), known, found.transforms[0])


@pytest.fixture(scope="module")
def carried(template, scans):
    """The far scan by the template alone, and by a detour."""
    one = propagator()
    prepared = one.prepare([LabelledCase("t", *template)])
    case, by = scans["far"][0], helper(one, prepared, scans["half way"][0])
    return [one.propagate(prepared, case, case.geometry, through) for through in ((), (by,))]


def test_a_detour_finds_what_the_template_alone_does_not(carried, scans):
    found = [dice(one.probabilities.argmax(0).numpy(), scans["far"][1].array, 1) for one in carried]
    assert found[0] < 0.7 and found[1] > 0.85, f"Dice alone and by a detour: {found}"


def test_the_templates_own_registration_begins_there(carried):
    first = carried[1].transforms[0]
    place = np.linalg.inv(moved(PLACE, FAR)) @ np.array([*CENTRE, 1.0])
    wrong = np.linalg.norm((first.start @ place)[:3] - CENTRE)
    assert first.name == "through half way" and wrong < 2 * SPACING, f"{first.name}, {wrong:.1f} mm beside it"


def test_a_carried_label_that_is_empty_says_nothing(template):
    one, scan = propagator(), template[0]
    prepared = one.prepare([LabelledCase("t", *template)])
    alone = one.propagate(prepared, scan, scan.geometry)
    nothing, all_known = np.zeros(GRID.shape, np.uint8), np.ones(GRID.shape, bool)
    empty = Helper("empty", lambda: scan, Volume(nothing, GRID), all_known, alone.transforms[0])
    led = one.propagate(prepared, scan, scan.geometry, [empty])
    assert torch.equal(led.probabilities, alone.probabilities)


# ---------------------------------------------------------------------- in a run


# scans as they are: cut, their detours would be those of the search for the label
CONFIG = tiny_config(rounds=0, registration={"use_affine": False}, edge_weight=0.0, surroundings=False)


@pytest.fixture(scope="module")
def cohort(template, scans):
    """Two scans that are turned half as far as the last one."""
    return {"another": planted(*template, moved((-9.0, 0, 0), HALF_WAY), seed=20), **scans}


def cases_of(cohort, rejected=()):
    scans = {name: scan for name, (scan, _) in cohort.items()}
    return [EngineCase(name, scan.geometry, lambda s=scan: s, name not in rejected) for name, scan in scans.items()]


@pytest.fixture(scope="module")
def finished(template, cohort, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("run"))
    return store, list(run(cases_of(cohort), [LabelledCase("t", *template)], 2, CONFIG, store, Silent()))


def test_a_run_carries_the_badly_carried_case_again(finished):
    chosen = finished[0].json("detours.json")
    assert "far" in chosen["again"] and chosen["through"], f"{chosen}"


def test_its_label_is_where_its_surroundings_lie(finished, cohort):
    (result,) = [one for one in finished[1] if one.case_id == "far"]
    there = dice(result.prediction.array, cohort["far"][1].array, 1)
    assert there > 0.85, f"a Dice of {there:.3f}"


def known_to(store, template, cohort):
    plan = Plan.model_validate(store.json("plan.json"))
    return Cohort(cases_of(cohort), [LabelledCase("t", *template)], plan, store)


def test_without_detours_nothing_is_carried_again(finished, template, cohort):
    config = CONFIG.model_copy(update={"detours": False})
    assert carrying._chosen(known_to(finished[0], template, cohort), config) == Detours([], [], None)


def test_cases_that_do_not_vote_help_further_scans_all_the_same(finished, template, cohort, tmp_path):
    store = Store(shutil.copytree(finished[0].folder, tmp_path / "store"))
    config = CONFIG.model_copy(update={"neighbour_share": 0.0})
    store.remove("library.json")
    keep_library(known_to(store, template, cohort), 0, config, Silent(), Ranks())
    library = Library(store, Plan.model_validate(store.json("plan.json")), config, CPU)
    far = Propagation(GRID, torch.zeros(0), torch.zeros(0), [], {"misfit": 100.0})
    assert [one.id for one in library.detours(far)] == store.json("detours.json")["through"]
    assert library.votes(cohort["far"][0], replace(far, transforms=["one"], signature=np.zeros(1))) is None


def test_a_resumed_run_carries_nothing_once_more(finished, template, cohort, monkeypatch):
    monkeypatch.setattr(RegistrationPropagator, "propagate", lambda *_: pytest.fail("carried once more"))
    list(run(cases_of(cohort), [LabelledCase("t", *template)], 2, CONFIG, finished[0], Silent()))


def stopped_between(finished, tmp_path, monkeypatch):
    """A store as it is when the far case is yet to be carried again; then it is written down through whom, no more."""
    shutil.copytree(finished[0].folder, tmp_path / "store")
    store, seen = Store(tmp_path / "store"), []
    facts = store.json("propagation", "far.json")
    store.save_json({**facts, "through": []}, "propagation", "far.json")

    def watched(self, prepared, volume, grid, through=()):
        seen.append([one.id for one in through])
        raise Stopped

    monkeypatch.setattr(RegistrationPropagator, "propagate", watched)
    return store, seen


def test_a_run_that_was_stopped_between_carries_what_is_left(template, cohort, finished, tmp_path, monkeypatch):
    store, seen = stopped_between(finished, tmp_path, monkeypatch)
    with pytest.raises(Stopped):
        list(run(cases_of(cohort), [LabelledCase("t", *template)], 2, CONFIG, store, Silent()))
    assert seen == [finished[0].json("detours.json")["through"]], "one case is left, by the detours chosen before"


def test_rejected_cases_help_nobody(template, cohort, finished, tmp_path, monkeypatch):
    store, seen = stopped_between(finished, tmp_path, monkeypatch)
    store.remove("detours.json")
    with pytest.raises(Stopped):
        list(run(cases_of(cohort, ("half way",)), [LabelledCase("t", *template)], 2, CONFIG, store, Silent()))
    assert seen == [["another"]], f"carried through {seen}"


def test_a_further_scan_that_fits_badly_goes_through_the_runs_cases(template, cohort, finished, monkeypatch):
    """The far scan once more, as one that the run does not know."""
    seen, plain = [], RegistrationPropagator.propagate

    def watched(self, prepared, volume, grid, through=()):
        seen.append([one.id for one in through])
        return plain(self, prepared, volume, grid, through)

    monkeypatch.setattr(RegistrationPropagator, "propagate", watched)
    labelled, (scan, truth) = [LabelledCase("t", *template)], cohort["far"]
    further = FinishedRun(labelled, 2, CONFIG, finished[0], Silent(), without=["far"])
    there = dice(further.segment(scan).prediction.array, truth.array, 1)
    assert there > 0.85, f"a Dice of {there:.3f}"
    # the vote of linked cases would mend the label as well: that it went through them is another thing
    assert len(seen) == 2 and not seen[0] and seen[1], f"carried through {seen}"
