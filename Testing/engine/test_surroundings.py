"""Where scans show much more than what is labelled, what lies around it is cut out and segmented by itself."""

import dataclasses

import numpy as np
import pytest
from engine_helpers import Recorder, dice, tiny_config
from near_helpers import CPU, GRID, ball, moved, planted, template_scan

from SemiSAMO1Lib.engine import surroundings
from SemiSAMO1Lib.engine.cases import CaseResult, EngineCase, LabelledCase
from SemiSAMO1Lib.engine.config import BEFORE
from SemiSAMO1Lib.engine.data.boxes import Box, box_around, grown, on_grid
from SemiSAMO1Lib.engine.data.grids import canonical
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.further import FinishedRun
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.engine.surroundings import (
    ALIKE,
    LEAST_MARGIN,
    MARGIN,
    NOT_FOUND,
    Finder,
    Surroundings,
    _box_of_case,
    in_whole,
    margin_of,
)
from SemiSAMO1Lib.tasks.train import what_is_seen
from SemiSAMO1Lib.volume import Geometry, StoredVolume, Volume, copy_on_lattice

#: Axes that run elsewhere than the patient's, in another order, turned by 20°.
C, S = np.cos(np.radians(20)), np.sin(np.radians(20))
OBLIQUE = Geometry((9, 8, 7), (2.0, 1.5, 1.0), (10.0, -20.0, 5.0), (0.0, C, -S, -1.0, 0.0, 0.0, 0.0, S, C))
BOX = Box((2, 1, 3), (6, 8, 5))


# ---------------------------------------------------------------------- boxes


def numbered(grid):
    return Volume(np.arange(grid.voxels, dtype=np.int32).reshape(grid.shape), grid)


def test_a_part_of_a_scan_stays_where_it_is():
    part = BOX.of(numbered(OBLIQUE))
    back = copy_on_lattice(part, OBLIQUE, outside=-1)
    assert back is not None, "the voxels of a part are those of the scan"
    wanted = np.full(OBLIQUE.shape, -1)
    wanted[BOX.slices] = numbered(OBLIQUE).array[BOX.slices]
    assert np.array_equal(back.array, wanted)


def test_a_part_of_a_scan_that_is_read_anew_is_read_anew():
    read = []
    volume = StoredVolume(OBLIQUE, lambda: read.append(1) or numbered(OBLIQUE).array)
    part = BOX.of(volume)
    assert not read, "nobody asked for its voxels yet"
    assert np.array_equal(part.array, numbered(OBLIQUE).array[BOX.slices])


def test_a_part_does_not_hold_the_scan_in_memory():
    assert BOX.of(numbered(OBLIQUE)).array.base is None


def test_the_box_around_a_label_is_the_smallest():
    label = np.zeros((5, 6, 7), np.uint16)
    label[1, 2, 3] = label[3, 2, 6] = 300
    assert box_around(label) == Box((1, 2, 3), (4, 3, 7))


def test_nothing_has_no_box():
    assert box_around(np.zeros((2, 2, 2), np.uint8)) is None


def test_a_box_grows_by_whole_voxels_and_no_further_than_the_scan():
    assert grown(BOX, OBLIQUE, 2.1) == Box((0, 0, 0), (8, 8, 7)), "2.1 mm are 1.05, 1.4 and 2.1 voxels"


@pytest.mark.parametrize("flip", [False, True])
def test_a_box_on_other_axes_has_the_same_voxels(flip):
    """A grid's own axes, and those nearest to the patient's: the same voxels in another order."""
    source, target = (canonical(OBLIQUE), OBLIQUE) if flip else (OBLIQUE, canonical(OBLIQUE))
    label = np.zeros(source.shape, np.uint8)
    label[2:4, 1:6, 3:5] = 1
    there = copy_on_lattice(Volume(label, source), target)
    assert on_grid(box_around(label), source, target) == box_around(there.array)


def test_a_box_on_a_finer_grid_covers_the_same_place():
    fine = dataclasses.replace(OBLIQUE, shape=(18, 16, 14), spacing=(1.0, 0.75, 0.5))
    corner = OBLIQUE.index_to_space @ np.array([-0.25, -0.25, -0.25, 1.0])
    fine = dataclasses.replace(fine, origin=tuple(corner[:3]))
    assert on_grid(BOX, OBLIQUE, fine) == Box((4, 2, 6), (12, 16, 10))


def test_a_box_beside_the_scan_ends_at_its_edge():
    beside = dataclasses.replace(OBLIQUE, origin=tuple(np.array(OBLIQUE.origin) + 1000))
    found = on_grid(BOX, beside, OBLIQUE)
    assert all(0 <= a < b <= n for a, b, n in zip(found.start, found.stop, OBLIQUE.shape, strict=True)), f"{found}"


@pytest.mark.parametrize(
    ("voxel", "cut"),
    [
        ((1, 2, 1), False),
        ((0, 2, 1), True),
        ((3, 2, 1), True),
        ((1, 6, 1), False),
        ((1, 0, 1), True),
        ((1, 2, 2), True),
    ],
    ids=["inside", "first face", "last face", "the scan ends there", "second axis", "third axis"],
)
def test_a_label_at_a_face_behind_which_the_scan_goes_on_is_cut_off(voxel, cut):
    """The box ends where the scan does at the far end of y alone."""
    box = Box((2, 1, 3), (6, 8, 6))
    part = np.zeros(box.grid(OBLIQUE).shape, np.uint8)
    part[voxel] = 1
    assert box.cuts_off(part, OBLIQUE) is cut


@pytest.mark.parametrize(("found", "elsewhere"), [(True, 0), (False, 100)])
def test_a_result_lies_in_the_scan_where_its_part_was_cut_out(found, elsewhere):
    part = BOX.grid(OBLIQUE)
    said, doubt = (Volume(np.full(part.shape, value, np.uint8), part) for value in (2, 7))
    whole = in_whole(CaseResult(1, "a", said, doubt, {"uncertainty": 0.07, "classes": {}}), BOX, OBLIQUE, found)
    inside = np.zeros(OBLIQUE.shape, bool)
    inside[BOX.slices] = True
    assert whole.prediction.geometry == OBLIQUE == whole.uncertainty.geometry
    assert np.array_equal(whole.prediction.array, np.where(inside, 2, 0))
    assert np.array_equal(whole.uncertainty.array, np.where(inside, 7, elsewhere))
    assert whole.scores["uncertainty"] == pytest.approx(whole.uncertainty.array.mean() / 100)


# ---------------------------------------------------------------------- around what was carried

COARSE = Geometry((30, 30, 30), (4.0, 4.0, 4.0))
EXTENT, AROUND = np.array([24.0, 32.0, 40.0]), 12.0


def around(label):
    box, found = _box_of_case(label, COARSE, COARSE, EXTENT, AROUND)
    return [(b - a) * 4.0 for a, b in zip(box.start, box.stop, strict=True)], box, found


def carried(*boxes):
    label = np.zeros(COARSE.shape, np.uint8)
    for box in boxes:
        label[tuple(slice(a, b) for a, b in box)] = 1
    return label


def test_around_a_carried_label_there_is_the_margin_and_a_coarse_voxel():
    _, box, found = around(carried(((10, 16), (12, 20), (8, 18))))
    assert (box, found) == (Box((6, 8, 4), (20, 24, 22)), True), "four coarse voxels on each side"


def test_where_no_label_was_carried_it_is_looked_for_in_the_middle():
    extent, box, found = around(carried())
    assert not found and np.allclose(np.add(box.start, box.stop), 30), f"{box} is not in the middle"
    assert np.allclose(extent, NOT_FOUND * EXTENT + 2 * (AROUND + 4), atol=8)


@pytest.mark.parametrize(
    "label",
    [
        carried(((10, 16), (12, 20), (8, 18)), ((29, 30), (0, 1), (29, 30))),
        carried(((13, 14), (15, 17), (12, 14))),
    ],
    ids=["a voxel far away", "a sliver"],
)
def test_a_carried_label_of_another_size_says_where_it_is_and_no_more(label):
    extent, box, found = around(label)
    assert found and np.allclose(extent, EXTENT + 2 * (AROUND + 4), atol=8), f"a part of {extent} mm"
    assert np.allclose(np.add(box.start, box.stop) / 2, (13, 16, 13), atol=1), f"{box} is not around it"


def test_a_label_that_is_somewhat_larger_is_as_large_as_it_is():
    wide = round(1.2 * ALIKE * 6)  # twelve tenths of the limit along one axis: far below it in size
    extent, _, _ = around(carried(((8, 8 + wide), (12, 20), (8, 18))))
    assert extent[0] == 4.0 * wide + 32


# ---------------------------------------------------------------------- when


CONFIG = tiny_config(
    rounds=0, registration={"use_affine": False, "largest_grid": 60_000}, training_voxels=60_000, edge_weight=0.0
)


def labelled_with(radius, **changes):
    image, _ = template_scan()
    return LabelledCase("t", image, Volume(ball(radius).astype(np.uint8), GRID), **changes)


def two_labels():
    one = labelled_with(30.0)
    return dataclasses.replace(one, label=Volume(one.label.array + ball(15.0).astype(np.uint8), GRID))


def test_a_small_label_has_a_margin():
    box = 2 * 30.0  # a ball of 30 mm in a scan of 112 × 120 × 128
    assert margin_of([labelled_with(30.0)], CONFIG) == pytest.approx(max(LEAST_MARGIN, MARGIN * box), rel=0.1)


@pytest.mark.parametrize(
    ("labelled", "changes"),
    [
        ([labelled_with(55.0)], {}),
        ([labelled_with(-1.0)], {}),
        ([labelled_with(30.0, unknown=(2,))], {}),
        ([labelled_with(30.0), two_labels()], {}),
        ([labelled_with(30.0)], {"surroundings": False}),
        ([labelled_with(30.0)], {"generalist": "mind"}),
    ],
    ids=["fills its scan", "no label", "does not show all", "another shows more", "not wanted", "no registration"],
)
def test_scans_are_used_as_they_are(labelled, changes):
    assert margin_of(labelled, CONFIG.model_copy(update=changes)) is None


def test_where_another_shows_more_whole_scans_are_seen_as_before():
    labelled = [labelled_with(30.0), two_labels()]
    was, now = what_is_seen(False, labelled, CONFIG)
    assert was == now, "a training on whole scans goes on from one on whole scans"
    was, now = what_is_seen(True, labelled, CONFIG)
    assert was != now and "shows what the template does not" in now, now


def test_another_labelled_scan_may_show_less():
    assert margin_of([two_labels(), labelled_with(30.0)], CONFIG) is not None


def test_a_run_of_before_goes_on_with_whole_scans():
    assert BEFORE["surroundings"] is False


# ---------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def template():
    return template_scan()


@pytest.fixture(scope="module")
def scans(template):
    """Bodies in which the label's surroundings lie elsewhere, a little turned, and where they are."""
    places = {"a": (-20.0, -20.0, -20.0), "b": (-40.0, -10.0, -25.0), "c": (-5.0, -35.0, -40.0)}
    return {
        name: planted(*template, moved(place, (0, 0, 8)), seed=30 + n) for n, (name, place) in enumerate(places.items())
    }


def cases_of(scans):
    return [EngineCase(name, scan.geometry, lambda s=scan: s) for name, (scan, _) in scans.items()]


def ran(scans, template, folder, config=CONFIG, labelled=(), observer=None):
    store = Store(folder)
    given = [LabelledCase("t", *template), *labelled]
    return store, list(run(cases_of(scans), given, 2, config, store, observer or Silent()))


@pytest.fixture(scope="module")
def finished(scans, template, tmp_path_factory):
    observer = Recorder()
    return *ran(scans, template, tmp_path_factory.mktemp("run"), observer=observer), observer


@pytest.fixture(scope="module")
def as_they_are(scans, template, tmp_path_factory):
    return ran(scans, template, tmp_path_factory.mktemp("whole"), CONFIG.model_copy(update={"surroundings": False}))


def dices(results, scans):
    return [dice(one.prediction.array, scans[one.case_id][1].array, 1) for one in results]


def test_results_lie_on_the_whole_scans_grids(finished, scans):
    wrong = [one.case_id for one in finished[1] if one.prediction.geometry != scans[one.case_id][0].geometry]
    assert len(finished[1]) == len(scans) and not wrong


def test_each_box_has_the_label_in_it(finished, scans):
    boxes = Surroundings.of(finished[0]).boxes
    left_out = {
        name: int(truth.array.sum() - truth.array[boxes[name].slices].sum()) for name, (_, truth) in scans.items()
    }
    assert not any(left_out.values()), f"voxels of the label outside of the boxes: {left_out}"


def test_each_box_is_a_small_part_of_its_scan(finished, scans):
    boxes = Surroundings.of(finished[0]).boxes
    shares = {name: boxes[name].voxels / scan.geometry.voxels for name, (scan, _) in scans.items()}
    assert max(shares.values()) < 0.25, f"the label's own box with its margins is 0.07: {shares}"


def test_the_same_number_of_voxels_makes_a_finer_grid(finished, as_they_are):
    cut, whole = (Plan.model_validate(store.json("plan.json")) for store in (finished[0], as_they_are[0]))
    assert max(cut.spacing) < 0.7 * min(whole.spacing), f"{cut.spacing} of what was cut out, {whole.spacing} of all"


def test_what_is_cut_out_is_segmented_better(finished, as_they_are, scans):
    cut, whole = dices(finished[1], scans), dices(as_they_are[1], scans)
    assert np.mean(cut) > np.mean(whole) + 0.02 and min(cut) > 0.85, f"{np.round(cut, 3)}, whole {np.round(whole, 3)}"


def test_the_fraction_never_falls(finished):
    fractions = [
        fields["fraction"] for kind, fields in finished[2].events if kind == "progress" and "fraction" in fields
    ]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_a_further_scan_is_cut_as_well(finished, template, scans):
    truth = scans["b"][1]
    further = FinishedRun([LabelledCase("t", *template)], 2, CONFIG, finished[0], Silent(), without=["b"])
    found = further.segment(scans["b"][0]).prediction
    assert further._finder.box(scans["b"][0], CPU) == (Surroundings.of(finished[0]).boxes["b"], True)
    assert found.geometry == truth.geometry
    there = dice(found.array, truth.array, 1)
    assert there > 0.85, f"a Dice of {there:.3f}"


def through_the_label(truth):
    """A box whose faces cut the label."""
    own = box_around(truth.array)
    return Box(tuple(a + 2 for a in own.start), tuple(b - 2 for b in own.stop))


@pytest.mark.parametrize(("found", "said"), [(False, "was not found"), (True, "reach the edge")])
def test_of_a_further_scan_it_is_said_that_another_part_may_be_meant(
    finished, template, scans, monkeypatch, found, said
):
    scan, truth = scans["b"]
    box = through_the_label(truth)
    monkeypatch.setattr(Finder, "box", lambda *_: (box, found))
    result = FinishedRun([LabelledCase("t", *template)], 2, CONFIG, finished[0], Silent()).segment(scan)
    elsewhere = np.ones(GRID.shape, bool)
    elsewhere[box.slices] = False
    assert said in result.scores["warning"]
    assert set(np.unique(result.uncertainty.array[elsewhere])) == {0 if found else 100}


def test_of_a_case_it_is_said_as_well(template, scans, tmp_path, monkeypatch):
    box = through_the_label(scans["a"][1])
    monkeypatch.setattr(surroundings, "_box_of_case", lambda *_: (box, False))
    observer = Recorder()
    _, (result,) = ran({"a": scans["a"]}, template, tmp_path, observer=observer)
    said = [fields["text"] for kind, fields in observer.events if kind == "warning"]
    assert [("not found" in one, "reach the edge" in one) for one in said] == [(True, False), (False, True)], said
    assert result.uncertainty.array[0, 0, 0] == 100, "nobody knows what lies there"


def test_a_finished_run_looks_for_nothing_again(finished, template, scans, monkeypatch):
    monkeypatch.setattr(RegistrationPropagator, "propagate", lambda *_: pytest.fail("registered once more"))
    again = list(run(cases_of(scans), [LabelledCase("t", *template)], 2, CONFIG, finished[0], Silent()))
    same = all(np.array_equal(a.prediction.array, b.prediction.array) for a, b in zip(again, finished[1], strict=True))
    assert same, "a resumed run gives other results"


def test_a_scan_that_shows_nothing_alike_has_a_result_on_its_grid(template, scans, tmp_path):
    nothing = Volume(np.zeros(GRID.shape, np.float32), GRID)
    store, results = ran({"a": scans["a"], "empty": (nothing, None)}, template, tmp_path)
    box = Surroundings.of(store).boxes["empty"]
    assert all(0 <= a < b <= n for a, b, n in zip(box.start, box.stop, GRID.shape, strict=True))
    assert [one.prediction.geometry for one in results] == [GRID, GRID]


def test_a_second_labelled_scan_is_cut_around_its_own_label(template, scans, tmp_path):
    other = LabelledCase("u", *scans["c"], origin="corrected")
    store, _ = ran({"a": scans["a"]}, template, tmp_path, labelled=[other])
    assert Surroundings.of(store).boxes["u"] == grown(
        box_around(other.label.array), GRID, 2 * margin_of([LabelledCase("t", *template)], CONFIG)
    )


def test_where_its_label_is_missing_the_template_says_where_to_look(template, scans, tmp_path):
    scan, truth = scans["c"]
    nothing = LabelledCase("u", scan, Volume(np.zeros_like(truth.array), GRID), origin="corrected", unknown=(1,))
    store, _ = ran({"a": scans["a"]}, template, tmp_path, labelled=[nothing])
    assert truth.array[Surroundings.of(store).boxes["u"].slices].sum() == truth.array.sum(), (
        "the box does not have the organ in it"
    )


def test_scans_that_are_not_registered_are_not_cut(template, scans, tmp_path):
    config = CONFIG.model_copy(update={"generalist": "mind"})
    store, _ = ran({"a": scans["a"]}, template, tmp_path, config)
    assert not Surroundings.of(store).boxes


def test_cutting_a_case_leaves_its_name_and_whether_it_is_learned_from():
    case = EngineCase("x", OBLIQUE, lambda: numbered(OBLIQUE), trainable=False)
    part = Surroundings({"x": BOX}).case(case)
    assert (part.id, part.trainable, part.geometry) == ("x", False, BOX.grid(OBLIQUE))
    assert np.array_equal(part.load().array, numbered(OBLIQUE).array[BOX.slices])


def test_cutting_a_labelled_case_leaves_all_that_is_said_of_its_label():
    case = LabelledCase("x", numbered(OBLIQUE), numbered(OBLIQUE), 2.0, "accepted", (1,))
    part = Surroundings({"x": BOX}).labelled(case)
    assert (part.weight, part.origin, part.unknown) == (2.0, "accepted", (1,))
    assert part.image.geometry == part.label.geometry == BOX.grid(OBLIQUE)


def test_a_ct_stays_one_when_the_air_around_the_body_is_cut_away(template, scans, tmp_path):
    def in_air(scan):
        values = (scan.array - scan.array.min()) / np.ptp(scan.array) * 300
        values[:4] = -1000
        return Volume(values.astype(np.float32), scan.geometry)

    given = in_air(template[0]), template[1]
    store, _ = ran({"a": (in_air(scans["a"][0]), None)}, given, tmp_path)
    assert Surroundings.of(store).boxes["t"].start[0] > 4, "the template's part shows air"
    assert store.json("plan.json")["intensity"]["scheme"] == "fixed"


# ---------------------------------------------------------------------- with networks, corrected scans and other axes


def flipped(volume):
    """The same scan, stored from the other end along two axes."""
    far = volume.geometry.index_to_space @ np.array([0.0, volume.array.shape[1] - 1, volume.array.shape[0] - 1, 1.0])
    direction = (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0)
    geometry = dataclasses.replace(volume.geometry, origin=tuple(far[:3]), direction=direction)
    return Volume(volume.array[::-1, ::-1].copy(), geometry)


LEARNING = CONFIG.model_copy(update={"rounds": 1, "iterations": 4})


@pytest.fixture(scope="module")
def learned(scans, template, tmp_path_factory):
    """One round: a second labelled scan, and a case that is stored from the other end."""
    given = {"a": scans["a"], "b": tuple(map(flipped, scans["b"]))}
    other = LabelledCase("c", *scans["c"], origin="corrected")
    observer = Recorder()
    return (
        given,
        other,
        *ran(given, template, tmp_path_factory.mktemp("learned"), LEARNING, [other], observer),
        observer,
    )


def test_a_scan_that_is_stored_from_the_other_end_is_segmented_as_well(learned):
    given, _, _, results, _ = learned
    there = dices([one for one in results if one.round == 1], given)
    assert min(there) > 0.8, f"{np.round(there, 3)}"


def test_a_corrected_scan_is_looked_at_again_as_it_is(learned):
    (there,) = learned[2].json("labelled.json")["c"]
    assert there > 0.6, f"a Dice of {there:.3f} with what the person drew"


@pytest.mark.parametrize(("share", "known"), [(0.05, False), (0.7, True)], ids=["while it looks", "later"])
def test_stopped_and_resumed_it_ends_the_same(learned, template, tmp_path, share, known):
    given, other, store, results, observer = learned
    with pytest.raises(Stopped):
        ran(given, template, tmp_path, LEARNING, [other], Recorder(stop_after=int(share * observer.asked)))
    assert bool(Surroundings.of(Store(tmp_path)).boxes) is known, "it was stopped elsewhere than meant"
    again, resumed = ran(given, template, tmp_path, LEARNING, [other])
    assert Surroundings.of(again).boxes == Surroundings.of(store).boxes
    last = {one.case_id: one.prediction.array for one in results if one.round == 1}
    assert all(np.array_equal(one.prediction.array, last[one.case_id]) for one in resumed if one.round == 1)


def test_through_labelled_scans_nothing_is_carried_as_if_they_were_not(learned, template, scans, tmp_path):
    """One without its label is looked in like a case; its own prediction is nobody's help."""
    scan, truth = scans["c"]
    vague = LabelledCase("c", scan, Volume(np.zeros_like(truth.array), GRID), origin="corrected", unknown=(1,))
    store, _ = ran(learned[0], template, tmp_path, labelled=[vague])
    assert {row["id"] for row in store.json("whole", "library.json")} <= {"a", "b"}
