"""Review: which steps are possible from which state, what lands on disk, what undo brings back, the queue."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from review_lines import write_line
from scans import OBLIQUE, two_labels, write_scan
from scipy import ndimage

from SemiSAMO1Lib import files
from SemiSAMO1Lib.image_io import read_volume, to_sitk, write_volume
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.lock import identity
from SemiSAMO1Lib.project import LabelError, Project, ProjectError, Role, Skipped
from SemiSAMO1Lib.project import reviews as review
from SemiSAMO1Lib.project.began import Began
from SemiSAMO1Lib.project.cases import Review
from SemiSAMO1Lib.project.drafts import by_whom, drafts_put_aside, find_draft, save_draft
from SemiSAMO1Lib.project.history import decisions, unreadable_lines
from SemiSAMO1Lib.project.importing import candidates, look
from SemiSAMO1Lib.project.label_reader import DoubtfulLabel, read_labels
from SemiSAMO1Lib.project.label_table import Label, LabelTable
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.project.queue import queue
from SemiSAMO1Lib.project.results import Change, changes, past_trainings, predictions, quality
from SemiSAMO1Lib.project.reviews import TRANSITIONS
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.tasks.inputs import read_labelled
from SemiSAMO1Lib.tasks.train import beside_what_was_rejected
from SemiSAMO1Lib.volume import Geometry, Volume

#: Case -> mean uncertainty of its labels.
DOUBTS: dict[str, float | None] = {"b": 0.2, "c": 0.5, "d": 0.5, "e": None}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """a is the template; b to e are predicted by a finished training."""
    project = Project.create(tmp_path / "project")
    for seed, name in enumerate("abcde"):
        write_scan(tmp_path / "scans" / f"{name}.nrrd", seed=seed)
    for candidate in candidates(tmp_path / "scans", project.folder):
        assert not isinstance(candidate, Skipped)
        found = look(candidate)
        assert not isinstance(found, Skipped)
        project.add(found)
    write_volume(tmp_path / "label.nrrd", two_labels(OBLIQUE))
    project.add_label("a", tmp_path / "label.nrrd")
    train(project)
    return project


def train(project: Project) -> None:
    """A finished training of all unlabelled cases."""
    job = JobFolder.create(project.jobs, JobKind.TRAIN, {}, project.state.labels.to_json())
    rows = []
    for case in project.refresh().with_role(Role.UNLABELLED):
        path = job.results / "1" / case.id / "prediction.seg.nrrd"
        write_segmentation(path, two_labels(OBLIQUE), project.state.labels)
        scores = {"label_uncertainty": DOUBTS[case.id]}
        name = f"1/{case.id}/prediction.seg.nrrd"
        rows.append({"case": case.id, "scores": scores, "prediction": name, "sha256": files.sha256(path)})
    files.write_json(job.index, {"round": 1, "cases": rows, "skipped": []})
    review.finish_training(project, job.id)


def predict(project: Project, array: NDArray[Any]) -> None:
    """The training found this in case b."""
    index = JobFolder(project.jobs / str(project.state.current_training)).index
    value = files.read_json(index)
    row = next(one for one in value["cases"] if one["case"] == "b")
    path = index.parent / row["prediction"]
    write_segmentation(path, Volume(array.astype(np.uint8), OBLIQUE), project.state.labels)
    row["sha256"] = files.sha256(path)
    files.write_json(index, value)


def bring(project: Project, state: Review) -> None:
    """Put case b into a state."""
    project.restore("b", state, Role.UNLABELLED, None)


@pytest.fixture
def mended(tmp_path: Path) -> Path:
    """Corrected labels: the prediction without one slice."""
    label = two_labels(OBLIQUE)
    array = label.array.copy()
    array[2] = 0
    write_volume(tmp_path / "mended.nrrd", Volume(array, OBLIQUE))
    return tmp_path / "mended.nrrd"


@pytest.fixture
def actions(project: Project, mended: Path) -> dict[Review, Callable[[], Any]]:
    """State -> the action that brings case b there."""
    return {
        Review.ACCEPTED: lambda: review.accept(project, "b"),
        Review.CORRECTED: lambda: review.correct(project, "b", mended),
        Review.REJECTED: lambda: review.reject(project, "b"),
        Review.SKIPPED: lambda: review.skip(project, "b"),
    }


STEPS = [(now, to) for now in Review for to in (Review.ACCEPTED, Review.CORRECTED, Review.REJECTED, Review.SKIPPED)]

#: The steps that are one action.
POSSIBLE = {
    *((now, to) for now in (Review.NOT_SEEN, Review.SKIPPED) for to in TRANSITIONS[now] if to is not Review.DRAFT),
    (Review.DRAFT, Review.CORRECTED),
}


@pytest.mark.parametrize(("now", "to"), STEPS, ids=[f"{a} to {b}" for a, b in STEPS])
def test_the_table_of_steps(project: Project, actions: Any, now: Review, to: Review) -> None:
    bring(project, now)
    if (now, to) in POSSIBLE:
        assert actions[to]().review == to
        return
    way_on = (
        "save what was painted as a correction, or discard it" if now is Review.DRAFT else "Take that decision back"
    )
    with pytest.raises(ProjectError, match=way_on):
        actions[to]()
    assert project.refresh().case("b").review == now, "a refused step changed something"


class TestAccepting:
    def test_the_prediction_is_copied_as_a_label(self, project: Project) -> None:
        case = review.accept(project, "b", reviewer="ann")
        record = project.label_record(case)
        assert (case.role, record["origin"], record["reviewer"]) == (Role.LABELLED, "accepted", "ann")

    def test_the_label_outlives_the_job(self, project: Project) -> None:
        case = review.accept(project, "b")
        assert project.jobs not in project.label_path(case).parents

    def test_it_counts_in_the_next_training(self, project: Project) -> None:
        review.accept(project, "b")
        rows = files.read_json(request_training(project, {}).inputs / "cases.json")["labelled"]
        weights = {row["id"]: row["weight"] for row in rows}
        assert weights["b"] < weights["a"], "an accepted prediction counts less than the template"

    def test_a_label_that_was_not_found_blocks_it(self, project: Project) -> None:
        predict(project, np.where(two_labels(OBLIQUE).array == 1, 1, 0))
        with pytest.raises(LabelError, match="absent"):
            review.accept(project, "b")
        assert project.refresh().case("b").review == "not_seen"

    def test_unless_it_is_declared_absent(self, project: Project) -> None:
        predict(project, np.where(two_labels(OBLIQUE).array == 1, 1, 0))
        assert project.label_record(review.accept(project, "b", absent=[2]))["absent"] == [2]


class TestCorrecting:
    def test_the_label_is_the_persons(self, project: Project, mended: Path) -> None:
        record = project.label_record(review.correct(project, "b", mended))
        assert record["origin"] == "corrected"

    def test_it_is_noted_how_much_was_changed(self, project: Project, mended: Path) -> None:
        review.correct(project, "b", mended)
        seen, saved = two_labels(OBLIQUE).array, two_labels(OBLIQUE).array.copy()
        saved[2] = 0
        wanted = {v: 2 * int((saved == v).sum()) / int((saved == v).sum() + (seen == v).sum()) for v in (1, 2)}
        assert decisions(project)["b"][-1].dice == pytest.approx(wanted, abs=1e-4)

    def test_it_counts_more_than_an_accepted_one(self, project: Project, mended: Path) -> None:
        review.accept(project, "b")
        review.correct(project, "c", mended)
        rows = files.read_json(request_training(project, {}).inputs / "cases.json")["labelled"]
        weights = {row["id"]: row["weight"] for row in rows}
        assert weights["b"] < weights["c"] < weights["a"]


class TestRejecting:
    def test_no_pseudo_label_is_taken_from_it(self, project: Project) -> None:
        review.reject(project, "b")
        rows = files.read_json(request_training(project, {}).inputs / "cases.json")["cases"]
        assert {row["id"]: row["review"] for row in rows}["b"] == "rejected"

    def test_after_the_next_training_it_waits_again(self, project: Project) -> None:
        review.reject(project, "b")
        train(project)
        assert project.refresh().case("b").review == "not_seen"

    def test_one_that_came_while_a_training_ran_is_asked_about_again(self, project: Project) -> None:
        """Nobody has seen what that training then says; and the next one heeds the rejection all the same."""
        job = self.while_a_training_runs(project)
        assert project.refresh().case("b").review == "not_seen"
        rows = files.read_json(request_training(project, {}).inputs / "cases.json")["cases"]
        assert {row["id"]: row["review"] for row in rows}["b"] == "rejected", job.id

    def test_a_decision_about_what_that_one_says_replaces_it(self, project: Project) -> None:
        self.while_a_training_runs(project)
        review.skip(project, "b")
        rows = files.read_json(request_training(project, {}).inputs / "cases.json")["cases"]
        assert {row["id"]: row["review"] for row in rows}["b"] == "skipped"

    def while_a_training_runs(self, project: Project) -> JobFolder:
        job = request_training(project, {})
        review.reject(project, "b")
        rows = []
        for case in project.refresh().with_role(Role.UNLABELLED):
            path = job.results / "1" / case.id / "prediction.seg.nrrd"
            write_segmentation(path, two_labels(OBLIQUE), project.state.labels)
            scores = {"label_uncertainty": 0.1}
            name = f"1/{case.id}/prediction.seg.nrrd"
            rows.append({"case": case.id, "scores": scores, "prediction": name, "sha256": files.sha256(path)})
        files.write_json(job.index, {"round": 1, "cases": rows, "skipped": []})
        review.finish_training(project, job.id)
        return job


class TestAnOlderTrainingThatIsResumed:
    def test_it_does_not_replace_a_newer_one(self, project: Project) -> None:
        first = str(project.state.current_training)
        train(project)
        newer = project.state.current_training
        assert not review.finish_training(project, first)
        assert project.refresh().current_training == newer

    def test_where_a_person_chose_it_it_counts(self, project: Project) -> None:
        first = str(project.state.current_training)
        train(project)
        review.use_training(project, first)
        assert review.finish_training(project, first)
        assert project.refresh().current_training == first


class TestUnchangedPrediction:
    """A file that was not saved after it was mended is the machine's word, not a person's."""

    def test_it_is_asked_about(self, project: Project) -> None:
        path = predictions(project)["b"]["prediction"]
        with pytest.raises(DoubtfulLabel, match="is the prediction of b itself, voxel for voxel"):
            review.correct(project, "b", path)

    def test_who_is_sure_may_take_it(self, project: Project) -> None:
        path = predictions(project)["b"]["prediction"]
        assert review.correct(project, "b", path, sure=True).review == Review.CORRECTED


class TestUndo:
    @pytest.mark.parametrize("to", [Review.ACCEPTED, Review.CORRECTED, Review.REJECTED, Review.SKIPPED])
    def test_it_brings_back_state_role_and_label(self, project: Project, actions: Any, to: Review) -> None:
        before = project.refresh().case("b")
        actions[to]()
        assert review.undo(project, "b") == before

    def test_two_decisions_are_taken_back_one_after_the_other(self, project: Project) -> None:
        review.skip(project, "b")
        review.reject(project, "b")
        assert [review.undo(project, "b").review for _ in range(2)] == ["skipped", "not_seen"]

    def test_label_files_stay(self, project: Project) -> None:
        path = project.label_path(review.accept(project, "b"))
        review.undo(project, "b")
        assert path.is_file()

    def test_without_a_decision_there_is_nothing_to_undo(self, project: Project) -> None:
        with pytest.raises(ProjectError, match="nothing was decided"):
            review.undo(project, "b")

    @pytest.mark.parametrize("before", [(), (review.skip,)])
    def test_what_was_decided_about_an_earlier_prediction_stays(self, project: Project, before: Any) -> None:
        first = str(project.state.current_training)
        for decide in (*before, review.reject):
            decide(project, "b")
        train(project)
        assert project.refresh().case("b").review == Review.NOT_SEEN
        with pytest.raises(ProjectError, match=f"about that of {first} stays"):
            review.undo(project, "b")
        assert decisions(project)["b"][-1].after == Review.REJECTED

    def test_every_decision_and_undo_is_a_line(self, project: Project) -> None:
        review.reject(project, "b", reviewer="ann")
        review.undo(project, "b")
        lines = files.read_lines(project.folder / "reviews.jsonl")[0]
        steps = [(line["before"], line["after"], line.get("undo", False)) for line in lines]
        assert steps == [("not_seen", "rejected", False), ("rejected", "not_seen", True)]
        assert lines[0]["reviewer"] == "ann" and lines[0]["time"]


class TestRefusals:
    @pytest.mark.parametrize("action", [review.accept, review.reject, review.skip])
    def test_the_template_is_not_reviewed(self, project: Project, action: Any) -> None:
        with pytest.raises(ProjectError, match="is template"):
            action(project, "a")

    @pytest.mark.parametrize("action", [review.accept, review.reject, review.skip])
    def test_a_case_without_a_prediction_is_not_reviewed(self, project: Project, action: Any) -> None:
        project.change(lambda state: replace(state, current_training=None))
        with pytest.raises(ProjectError, match="no prediction"):
            action(project, "b")

    def test_an_unknown_case_is_named(self, project: Project) -> None:
        with pytest.raises(ProjectError, match="no case 'z'"):
            review.reject(project, "z")

    def test_labels_of_another_case(self, project: Project, mended: Path) -> None:
        named = mended.with_name("c.nrrd")
        mended.rename(named)
        with pytest.raises(DoubtfulLabel, match="called like case c"):
            review.correct(project, "b", named)
        assert review.correct(project, "b", named, sure=True).review == "corrected"

    def test_labels_that_are_empty(self, project: Project, mended: Path) -> None:
        write_volume(mended, Volume(np.zeros_like(two_labels(OBLIQUE).array), OBLIQUE))
        with pytest.raises(LabelError, match="no labelled voxel"):
            review.correct(project, "b", mended)

    def test_a_missing_label_that_is_not_declared_absent(self, project: Project, mended: Path) -> None:
        only = np.where(two_labels(OBLIQUE).array == 1, 1, 0).astype(np.uint8)
        write_volume(mended, Volume(only, OBLIQUE))
        with pytest.raises(LabelError, match="declare that it is absent"):
            review.correct(project, "b", mended)

    def test_segments_that_the_project_lacks(self, project: Project, mended: Path) -> None:
        more = two_labels(OBLIQUE).array.copy()
        more[0, 0, 0] = 7
        write_volume(mended, Volume(more, OBLIQUE))
        with pytest.raises(LabelError, match=r"label values \[7\]"):
            review.correct(project, "b", mended)
        assert review.correct(project, "b", mended, add_labels=True).review == "corrected"
        assert project.refresh().labels.values == [1, 2, 7]

    def test_labels_on_a_grid_that_misses_the_scan(self, project: Project, mended: Path) -> None:
        away = Geometry(OBLIQUE.shape, OBLIQUE.spacing, (900.0, 0.0, 0.0), OBLIQUE.direction)
        write_volume(mended, Volume(two_labels(OBLIQUE).array, away))
        with pytest.raises(LabelError, match="no labelled voxel lies inside the image"):
            review.correct(project, "b", mended)

    def test_a_finer_grid_is_resampled_and_said(self, project: Project, mended: Path) -> None:
        fine = OBLIQUE.spacing[0], OBLIQUE.spacing[1] / 2, OBLIQUE.spacing[2] / 2
        z, y, x = OBLIQUE.shape
        grid = Geometry((z, 2 * y, 2 * x), fine, OBLIQUE.origin, OBLIQUE.direction)
        doubled = two_labels(OBLIQUE).array.repeat(2, 1).repeat(2, 2)
        doubled[2] = 0
        write_volume(mended, Volume(doubled, grid))
        case = review.correct(project, "b", mended)
        assert any("resampled by nearest" in note for note in project.label_record(case)["notes"])

    @pytest.mark.parametrize("second", [review.accept, review.reject, review.skip])
    def test_of_two_reviewers_the_second_is_told(
        self, project: Project, second: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other one decides between this one's look at the state and the write."""
        look = review._predicted

        def meanwhile(mine: Project, case: Any, action: str, training: str | None = None) -> Any:
            row = look(mine, case, action, training)
            monkeypatch.setattr(review, "_predicted", look)
            other = Project(project.folder)
            other.restore("b", Review.REJECTED if second is review.skip else Review.SKIPPED, Role.UNLABELLED, None)
            return row

        monkeypatch.setattr(review, "_predicted", meanwhile)
        with pytest.raises(ProjectError, match="changed meanwhile by somebody else"):
            second(project, "b")
        assert project.refresh().case("b").label_version is None, "the first decision was overruled"


class TestDoubts:
    """Labels that may be another scan's: taken only when a person says that they are right."""

    def at(self, mended: Path, geometry: Geometry) -> Path:
        write_volume(mended, Volume(two_labels(OBLIQUE).array, geometry))
        return mended

    @pytest.mark.parametrize("shift", [0.4, 3.5])
    def test_a_grid_of_the_scans_size_that_lies_elsewhere(self, project: Project, mended: Path, shift: float) -> None:
        origin = (OBLIQUE.origin[0] + shift, *OBLIQUE.origin[1:])
        moved = self.at(mended, replace(OBLIQUE, origin=origin))
        with pytest.raises(DoubtfulLabel, match=rf"corners are {shift} mm apart"):
            review.correct(project, "b", moved)
        assert project.refresh().case("b").label_version is None, "a refused label changed something"

    def test_a_grid_of_other_voxel_sizes(self, project: Project, mended: Path) -> None:
        z, y, x = OBLIQUE.spacing
        with pytest.raises(DoubtfulLabel, match="another part of space"):
            review.correct(project, "b", self.at(mended, replace(OBLIQUE, spacing=(1.4 * z, y, x))))

    def cropped(self, mended: Path, degrees: float = 0.0, voxels: float = 0.0) -> Path:
        """A segmentation cropped by a voxel on each side, turned about z, or moved along x."""
        inner = two_labels(OBLIQUE).array[1:-1, 1:-1, 1:-1]
        a, b = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = np.array([[a, -b, 0], [b, a, 0], [0, 0, 1]]) @ np.reshape(OBLIQUE.direction, (3, 3))
        origin = (OBLIQUE.index_to_space @ np.array([1 + voxels, 1, 1, 1.0]))[:3]
        grid = Geometry(inner.shape, OBLIQUE.spacing, tuple(origin), tuple(turn.ravel()))
        path = mended.with_name("mended.seg.nrrd")
        write_segmentation(path, Volume(inner, grid), LabelTable((Label(1, "one"), Label(2, "two"))))
        return path

    def test_a_cropped_segmentation_on_the_scans_voxels_is_taken(self, project: Project, mended: Path) -> None:
        assert project.add_label("b", self.cropped(mended), refuse_doubts=True).exact

    @pytest.mark.parametrize(("degrees", "said"), [(10, 10), (31, 31), (45, 45), (59, 31)])
    def test_a_cropped_segmentation_that_is_turned(
        self, project: Project, mended: Path, degrees: float, said: float
    ) -> None:
        with pytest.raises(DoubtfulLabel, match=r"is turned against the scan by") as doubt:
            project.add_label("b", self.cropped(mended, degrees=degrees), refuse_doubts=True)
        assert float(str(doubt.value).split(" by ")[1].split("°")[0]) == pytest.approx(said, rel=0.2)

    def test_a_cropped_segmentation_between_the_scans_voxels(self, project: Project, mended: Path) -> None:
        with pytest.raises(DoubtfulLabel, match=r"lies 0\.5 voxels beside the scan's voxels"):
            review.correct(project, "b", self.cropped(mended, voxels=0.5))

    @pytest.mark.parametrize("name", ["c_label", "c-seg", "label of c", "c"])
    def test_a_file_that_is_called_after_another_case(self, project: Project, mended: Path, name: str) -> None:
        named = mended.rename(mended.with_name(f"{name}.nrrd"))
        with pytest.raises(DoubtfulLabel, match="called like case c"):
            review.correct(project, "b", named)

    @pytest.mark.parametrize("name", ["b_label", "checked", "b after c", "abc"])
    def test_a_file_that_is_not(self, project: Project, mended: Path, name: str) -> None:
        named = mended.rename(mended.with_name(f"{name}.nrrd"))
        assert review.correct(project, "b", named).review == "corrected"

    def test_labels_that_are_rather_another_cases_on_the_same_grid(self, project: Project, mended: Path) -> None:
        """Where all scans have one grid, only what was predicted of them tells them apart."""
        grown = ndimage.binary_dilation(two_labels(OBLIQUE).array > 0, iterations=3).astype(np.uint8)
        predict(project, np.where(two_labels(OBLIQUE).array > 0, two_labels(OBLIQUE).array, grown))
        with pytest.raises(DoubtfulLabel, match=r"overlaps the prediction of [cde] by a Dice of .*that of b by"):
            review.correct(project, "b", mended)
        assert review.correct(project, "b", mended, sure=True).review == "corrected"

    def test_also_where_segments_overlap(self, project: Project, tmp_path: Path) -> None:
        """With a priority they are read like any other."""
        mirrored = np.roll(two_labels(OBLIQUE).array > 0, OBLIQUE.shape[2] // 2, axis=2).astype(np.uint8)
        layers = sitk.Compose([to_sitk(Volume(mirrored, OBLIQUE))] * 2)
        for number, value in enumerate((1, 2)):
            for key, text in (("ID", f"s{value}"), ("Name", f"s{value}"), ("LabelValue", "1"), ("Layer", str(number))):
                layers.SetMetaData(f"Segment{number}_{key}", text)
        sitk.WriteImage(layers, str(tmp_path / "mended.seg.nrrd"))
        with pytest.raises(DoubtfulLabel, match="overlaps the prediction of b by a Dice of"):
            review.correct(project, "b", tmp_path / "mended.seg.nrrd", [2], priority=[1, 2])

    def test_labels_that_hardly_overlap_the_prediction(self, project: Project, mended: Path) -> None:
        mirrored = np.roll(two_labels(OBLIQUE).array, OBLIQUE.shape[2] // 2, axis=2)
        write_volume(mended, Volume(mirrored, OBLIQUE))
        with pytest.raises(DoubtfulLabel, match="overlaps the prediction of b by a Dice of"):
            review.correct(project, "b", mended)
        assert review.correct(project, "b", mended, sure=True).review == "corrected"

    def test_a_template_is_asked_about_too(self, project: Project, mended: Path) -> None:
        with pytest.raises(DoubtfulLabel, match="called like case c"):
            project.add_label("b", mended.rename(mended.with_name("c.nrrd")), refuse_doubts=True)


class TestNothingThere:
    """A scan that shows none of the labels: said by a person, it is a label like any other."""

    def test_it_can_be_accepted(self, project: Project) -> None:
        predict(project, np.zeros_like(two_labels(OBLIQUE).array))
        assert project.label_record(review.accept(project, "b", absent=[1, 2]))["absent"] == [1, 2]

    def test_it_can_be_corrected_to_it(self, project: Project, mended: Path) -> None:
        write_volume(mended, Volume(np.zeros_like(two_labels(OBLIQUE).array), OBLIQUE))
        assert review.correct(project, "b", mended, absent=[1, 2]).review == "corrected"

    def test_a_training_can_use_it(self, project: Project, mended: Path) -> None:
        write_volume(mended, Volume(np.zeros_like(two_labels(OBLIQUE).array), OBLIQUE))
        review.correct(project, "b", mended, absent=[1, 2])
        _, labelled = read_labelled(request_training(project, {}))
        assert not labelled[1].label.array.any()

    def test_a_template_needs_a_voxel(self, project: Project, mended: Path) -> None:
        write_volume(mended, Volume(np.zeros_like(two_labels(OBLIQUE).array), OBLIQUE))
        with pytest.raises(LabelError, match="no labelled voxel"):
            project.add_label("a", mended, absent=[1, 2])


class TestLabelsThatWereAdded:
    def add(self, project: Project, mended: Path) -> None:
        more = two_labels(OBLIQUE).array.copy()
        more[0, 0, 0] = 7
        write_volume(mended, Volume(more, OBLIQUE))
        review.correct(project, "b", mended, add_labels=True)

    def test_undo_takes_them_out_of_the_table(self, project: Project, mended: Path) -> None:
        self.add(project, mended)
        review.undo(project, "b")
        assert project.refresh().labels.values == [1, 2]
        assert review.accept(project, "c").review == "accepted", "a label that nobody has blocks others"

    def test_their_values_are_not_given_again(self, project: Project, mended: Path) -> None:
        self.add(project, mended)
        review.undo(project, "b")
        assert Project(project.folder).state.labels.next_value == 8

    def test_they_stay_where_a_training_has_learned_them(self, project: Project, mended: Path) -> None:
        self.add(project, mended)
        train(project)
        review.undo(project, "b")
        assert project.refresh().labels.values == [1, 2, 7], "its predictions have that label"

    def test_a_value_that_is_given_again_by_hand_is_not_retired(self, project: Project, mended: Path) -> None:
        self.add(project, mended)
        review.undo(project, "b")
        review.discard_draft(project, "b")
        self.add(project, mended)
        assert (project.state.labels.values, project.state.labels.retired) == ([1, 2, 7], ())

    def test_they_stay_where_another_case_has_them(self, project: Project, mended: Path) -> None:
        self.add(project, mended)
        review.correct(project, "c", mended)
        review.undo(project, "b")
        assert project.refresh().labels.values == [1, 2, 7]


class TestLabelsThatTheTrainingDidNotKnow:
    """A label that was added after a training is unknown in its predictions, until it is painted."""

    @pytest.fixture
    def later(self, project: Project) -> Project:
        project.update_labels([Label(3, "late", (1, 2, 3))])
        return project

    def declared(self, project: Project, case: str) -> tuple[list[int], list[int]]:
        record = project.label_record(project.state.case(case))
        return record["declared"], record["absent"]

    def test_accepting_says_nothing_about_it(self, later: Project) -> None:
        review.accept(later, "b")
        assert self.declared(later, "b") == ([1, 2], [])

    def test_nor_does_a_correction_without_it(self, later: Project, mended: Path) -> None:
        review.correct(later, "b", mended)
        assert self.declared(later, "b") == ([1, 2], [])

    def test_the_next_training_does_not_take_it_for_background(self, later: Project) -> None:
        review.accept(later, "b")
        rows = files.read_json(request_training(later, {}).inputs / "cases.json")["labelled"]
        assert {row["id"]: row["unknown"] for row in rows} == {"a": [3], "b": [3]}

    def test_a_person_may_say_that_it_is_absent(self, later: Project) -> None:
        review.accept(later, "b", absent=[3])
        assert self.declared(later, "b") == ([1, 2, 3], [3])

    def test_an_empty_segment_of_it_is_asked_about(self, later: Project, tmp_path: Path) -> None:
        drawn = tmp_path / "drawn.seg.nrrd"
        write_segmentation(drawn, two_labels(OBLIQUE), later.state.labels)
        with pytest.raises(LabelError, match=r"no voxel of label 3 \(late\)"):
            review.correct(later, "b", drawn)

    def test_of_labels_that_it_knew_none_may_be_missing(self, later: Project, tmp_path: Path) -> None:
        only = Volume(two_labels(OBLIQUE).array * (two_labels(OBLIQUE).array == 1), OBLIQUE)
        write_volume(tmp_path / "only.nrrd", only)
        with pytest.raises(LabelError, match="no voxel of label 2"):
            review.correct(later, "b", tmp_path / "only.nrrd")

    def test_after_a_training_that_knows_it_it_is_asked_about(self, later: Project, mended: Path) -> None:
        train(later)
        with pytest.raises(LabelError, match="no voxel of label 3"):
            review.correct(later, "c", mended)


class TestNamesThatContradict:
    """Values count. A file that calls one label as another is called has probably mixed them up."""

    @pytest.fixture
    def swapped(self, project: Project, tmp_path: Path) -> Path:
        one, two = project.state.labels.labels
        path = tmp_path / "swapped.seg.nrrd"
        write_segmentation(
            path, two_labels(OBLIQUE), LabelTable((replace(one, name=two.name), replace(two, name=one.name)))
        )
        return path

    def test_it_is_asked_about(self, project: Project, swapped: Path) -> None:
        with pytest.raises(DoubtfulLabel, match="names its labels otherwise"):
            review.correct(project, "b", swapped)
        assert project.refresh().case("b").label_version is None

    def test_who_is_sure_may_take_it_and_finds_it_noted(self, project: Project, swapped: Path) -> None:
        case = review.correct(project, "b", swapped, sure=True)
        assert any("names its labels otherwise" in note for note in project.label_record(case)["notes"])

    def test_other_names_are_no_contradiction(self, project: Project, tmp_path: Path) -> None:
        labels = [replace(one, name=f"Segment_{one.value}") for one in project.state.labels]
        array = two_labels(OBLIQUE).array.copy()
        array[2] = 0
        write_segmentation(tmp_path / "own.seg.nrrd", Volume(array, OBLIQUE), LabelTable(tuple(labels)))
        assert review.correct(project, "b", tmp_path / "own.seg.nrrd").review == "corrected"


class TestSegmentsOfAnotherProgram:
    """Ours carry the value of the label table as a tag; one that was added elsewhere has the number of its voxels."""

    @pytest.fixture
    def added(self, project: Project, tmp_path: Path) -> Path:
        """The second label was deleted and "tumour" added: Slicer gives it the voxel value that became free."""
        one, two = project.state.labels.labels
        path = tmp_path / "added.seg.nrrd"
        write_segmentation(path, two_labels(OBLIQUE), LabelTable((one, replace(two, name="tumour"))), new=[2])
        return path

    def test_it_is_asked_about(self, project: Project, added: Path) -> None:
        with pytest.raises(
            DoubtfulLabel, match=f"'tumour' was taken as 2, which is '{project.state.labels.name_of(2)}'"
        ):
            review.correct(project, "b", added)
        assert project.refresh().case("b").label_version is None

    def test_who_is_sure_may_take_it_and_finds_it_noted(self, project: Project, added: Path) -> None:
        case = review.correct(project, "b", added, sure=True)
        assert any("another program" in note for note in project.label_record(case)["notes"])


class TestGridsThatAreNearlyTheScans:
    def shifted(self, tmp_path: Path, name: str) -> Path:
        """Labels of the scan's very size, half a voxel off."""
        half = OBLIQUE.index_to_space @ np.array([0.5, 0.5, 0.5, 1.0])
        grid = Geometry(OBLIQUE.shape, OBLIQUE.spacing, tuple(float(v) for v in half[:3]), OBLIQUE.direction)
        labels = Volume(two_labels(OBLIQUE).array, grid)
        path = tmp_path / name
        if name.endswith(".seg.nrrd"):
            write_segmentation(path, labels, LabelTable((Label(1, "a", (1, 2, 3)), Label(2, "b", (1, 2, 3)))))
        else:
            write_volume(path, labels)
        return path

    @pytest.mark.parametrize("name", ["shifted.nrrd", "shifted.seg.nrrd"])
    def test_half_a_voxel_off_is_asked_about(self, project: Project, tmp_path: Path, name: str) -> None:
        with pytest.raises(DoubtfulLabel, match="covers another part of space"):
            review.correct(project, "b", self.shifted(tmp_path, name))

    def test_what_was_lost_by_resampling_is_counted(self, tmp_path: Path) -> None:
        """A block of 4 × 4 × 4 voxels of half the spacing, of which three layers lie outside of the scan."""
        whole = Geometry((6, 6, 6), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0))
        fine = Geometry((4, 4, 4), (1.0, 1.0, 1.0), (2.5, 2.5, -3.2))
        write_volume(tmp_path / "fine.nrrd", Volume(np.ones((4, 4, 4), np.uint8), fine))
        reading = read_labels(tmp_path / "fine.nrrd", whole)
        assert "48 of 64 labelled voxels lie outside the image" in " ".join(reading.notes), reading.notes


class TestWhatWasLearned:
    """Which reviewed cases a training changed, and by how much."""

    def look_again(self, project: Project, dice: dict[str, float]) -> None:
        """A training that learned from the labels in force, and what it makes of them."""
        train(project)
        training = str(project.state.current_training)
        labelled = [one for one in project.state.cases if one.label_version is not None]
        rows = [{"id": one.id, "version": one.label_version} for one in labelled]
        files.write_json(project.jobs / training / "inputs" / "cases.json", {"labelled": rows})
        mean = {case: {"1": one, "2": one} for case, one in dice.items()}
        files.write_json(project.jobs / training / "results" / "labelled.json", mean)

    def test_what_changed_comes_before_what_is_not_known(self, project: Project, mended: Path) -> None:
        for case in "bcd":
            review.accept(project, case)
        seen = review.correct(project, "e", mended)
        before = decisions(project)[seen.id][-1].mean_dice
        self.look_again(project, {"b": 0.99, "c": 0.99, "d": 0.99, "e": 0.97})
        found = changes(project)
        assert [one.case for one in found] == ["e", "b", "c", "d"]
        assert (found[0].before, found[0].now) == (before, pytest.approx(0.97))

    def test_later_trainings_are_compared_with_the_one_before(self, project: Project) -> None:
        review.accept(project, "b")
        self.look_again(project, {"b": 0.90})
        self.look_again(project, {"b": 0.95})
        assert [(one.before, one.now) for one in changes(project)] == [(pytest.approx(0.90), pytest.approx(0.95))]

    def test_but_not_where_the_label_was_drawn_anew(self, project: Project, mended: Path) -> None:
        review.accept(project, "b")
        self.look_again(project, {"b": 0.90})
        review.begin_draft(project, "b")
        review.correct(project, "b", mended)
        self.look_again(project, {"b": 0.95})
        assert [one.before for one in changes(project)] == [None]


class TestBesideWhatWasRejected:
    @pytest.fixture
    def rejected(self, project: Project) -> Path:
        """The prediction of b that was rejected."""
        path: Path = predictions(project)["b"]["prediction"]
        review.reject(project, "b")
        return path

    def beside(self, project: Project) -> dict[str, float]:
        train(project)
        return beside_what_was_rejected(JobFolder(project.jobs / str(project.state.current_training)), project, ["b"])

    def test_the_same_again_has_a_dice_of_one(self, project: Project, rejected: Path) -> None:
        assert self.beside(project) == {"b": 1.0}

    def test_a_label_that_was_added_since_does_not_count(self, project: Project, rejected: Path) -> None:
        project.update_labels([Label(3, "added")])
        assert self.beside(project) == {"b": 1.0}

    def test_a_prediction_that_is_gone_is_not_compared(self, project: Project, rejected: Path) -> None:
        rejected.unlink()
        assert self.beside(project) == {}

    def test_nor_is_one_that_was_changed_since(self, project: Project, rejected: Path) -> None:
        rejected.write_bytes(rejected.read_bytes()[:100])
        assert self.beside(project) == {}

    def test_damaged_results_of_before_end_nothing(self, project: Project, rejected: Path) -> None:
        (rejected.parents[2] / "index.json").write_text("{nonsense")
        assert self.beside(project) == {}


def test_without_a_folder_of_trainings_nothing_was_learned(project: Project) -> None:
    shutil.rmtree(project.jobs)
    assert changes(project) == []


def test_what_the_current_training_did_not_predict_is_said_so(project: Project) -> None:
    """Not that it was predicted anew."""
    review.accept(project, "b")
    train(project)
    review.undo(project, "b")
    with pytest.raises(ProjectError, match="has no prediction of the current training"):
        review.accept(project, "b", training="")


class TestTwoReviewers:
    """What somebody decides counts from the moment at which the other opened the case."""

    @pytest.mark.parametrize("second", [review.accept, review.reject, review.skip, review.begin_draft])
    def test_the_second_is_told(self, project: Project, second: Any) -> None:
        opened = project.refresh().case("b")
        review.accept(Project(project.folder), "b", reviewer="ann")
        with pytest.raises(ProjectError, match="changed meanwhile by somebody else: it is accepted now"):
            second(project, "b", seen=opened)

    def test_a_correction_does_not_replace_another_ones(self, project: Project, mended: Path) -> None:
        opened = project.refresh().case("b")
        review.correct(Project(project.folder), "b", mended, reviewer="ann")
        with pytest.raises(ProjectError, match="changed meanwhile"):
            review.correct(project, "b", mended, reviewer="bob", seen=opened)
        assert project.label_record(project.refresh().case("b"))["reviewer"] == "ann"

    def test_anothers_draft_is_put_aside_not_overwritten(self, project: Project) -> None:
        theirs = save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began())
        files.write_json(theirs.with_name("draft.json"), {"training": "", "user": "ann", "host": "lab", "time": "noon"})
        before = theirs.read_bytes()
        assert by_whom(project, "b") == " by ann on lab, noon"
        save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began())
        assert [one.read_bytes() for one in drafts_put_aside(project, "b")] == [before]

    def test_another_name_on_the_same_account_is_another_person(self, project: Project) -> None:
        theirs = save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began(), reviewer="ann")
        before = theirs.read_bytes()
        with pytest.raises(ProjectError, match="unfinished painting of case b by ann on"):
            review.accept(project, "b", reviewer="bob")
        save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began(), reviewer="bob")
        assert [one.read_bytes() for one in drafts_put_aside(project, "b")] == [before]

    @pytest.mark.parametrize("names", [("ann", "ann"), ("ann", None), (None, "ann")])
    def test_who_gives_no_name_is_whoever_has_the_account(self, project: Project, names: tuple[Any, Any]) -> None:
        save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began(), reviewer=names[0])
        assert by_whom(project, "b", names[1]) == ""

    def test_anothers_draft_is_put_aside_when_one_corrects(self, project: Project, mended: Path) -> None:
        theirs = save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began())
        files.write_json(theirs.with_name("draft.json"), {"training": "", "user": "ann", "host": "lab", "time": "noon"})
        review.correct(project, "b", mended)
        assert find_draft(project, "b") is None and len(drafts_put_aside(project, "b")) == 1

    def test_undo_does_not_take_back_what_was_decided_since(self, project: Project, mended: Path) -> None:
        opened = review.skip(project, "b")
        review.correct(Project(project.folder), "b", mended, reviewer="ann")
        with pytest.raises(ProjectError, match="changed meanwhile"):
            review.undo(project, "b", seen=opened)

    def test_ones_own_draft_has_no_name(self, project: Project) -> None:
        save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began())
        assert by_whom(project, "b") == ""


class TestLabelsGivenInAnotherWay:
    def test_undo_leaves_them_in_force(self, project: Project, mended: Path) -> None:
        review.reject(project, "b")
        project.add_label("b", mended, role=Role.LABELLED)
        undone = review.undo(project, "b")
        assert (undone.review, undone.role, undone.label_version) == ("not_seen", Role.LABELLED, 1)

    def test_taking_a_label_out_of_force_opens_the_case_again(self, project: Project) -> None:
        review.accept(project, "b")
        taken = project.remove_label("b")
        assert (taken.review, taken.role) == ("not_seen", Role.UNLABELLED)

    def test_its_decision_does_not_count_any_more(self, project: Project) -> None:
        review.accept(project, "b")
        project.remove_label("b")
        assert not decisions(project)["b"]

    @pytest.mark.parametrize("action", [review.accept, review.reject, review.skip])
    def test_a_prediction_behind_a_persons_label_is_not_reviewed(
        self, project: Project, mended: Path, action: Any
    ) -> None:
        project.add_label("b", mended, role=Role.LABELLED)
        with pytest.raises(ProjectError, match="was labelled by a person"):
            action(project, "b")

    def test_the_record_names_the_training_that_was_mended(self, project: Project, mended: Path) -> None:
        first = project.state.current_training
        train(project)
        record = project.label_record(review.correct(project, "b", mended, began=Began(str(first))))
        assert record["training"] == first


class TestLeavingOut:
    def test_an_excluded_case_comes_back_as_it_was(self, project: Project) -> None:
        before = review.accept(project, "b")
        assert project.exclude("b").role is Role.EXCLUDED
        assert project.include("b") == before

    def test_a_template_comes_back_as_the_template(self, project: Project) -> None:
        before = project.refresh().case("a")
        project.exclude("a")
        assert project.include("a") == before

    def test_it_is_neither_trained_on_nor_predicted(self, project: Project) -> None:
        project.exclude("b")
        listing = files.read_json(request_training(project, {}).inputs / "cases.json")
        assert "b" not in {row["id"] for row in (*listing["labelled"], *listing["cases"])}

    def test_a_label_does_not_take_it_in_again(self, project: Project, mended: Path) -> None:
        project.exclude("b")
        with pytest.raises(ProjectError, match="b is excluded; include it first"):
            project.add_label("b", mended, role=Role.LABELLED)
        with pytest.raises(ProjectError, match="b is excluded; include it first"):
            project.remove_label("b")
        case = project.refresh().case("b")
        assert (case.role, case.label_version) == (Role.EXCLUDED, None)

    def test_it_is_not_reviewed(self, project: Project) -> None:
        project.exclude("b")
        with pytest.raises(ProjectError, match="excluded"):
            review.accept(project, "b")

    def test_a_case_that_takes_part_is_not_changed_by_including_it(self, project: Project) -> None:
        before = project.refresh().case("b")
        assert project.include("b") == before


class TestEarlierTraining:
    def test_its_predictions_count_again(self, project: Project) -> None:
        first = project.state.current_training
        train(project)
        review.use_training(project, str(first))
        assert predictions(project)["b"]["training"] == first

    def test_what_of_it_was_rejected_is_rejected_again(self, project: Project) -> None:
        first = str(project.state.current_training)
        review.reject(project, "b")
        train(project)
        assert project.refresh().case("b").review == "not_seen", "a further training predicts it anew"
        review.use_training(project, first)
        assert project.refresh().case("b").review == "rejected"
        assert "b" not in [one.case for one in queue(project, quality(project, predictions(project)))]

    def test_what_of_another_one_was_rejected_waits(self, project: Project) -> None:
        first = str(project.state.current_training)
        train(project)
        second = str(project.state.current_training)
        review.reject(project, "b")
        review.use_training(project, first)
        assert project.refresh().case("b").review == "not_seen", "of this training nobody said anything"
        review.use_training(project, second)
        assert project.refresh().case("b").review == "rejected"

    def test_what_both_rejected_is_rejected_in_both(self, project: Project) -> None:
        first = str(project.state.current_training)
        review.reject(project, "b")
        train(project)
        review.reject(project, "b")
        review.use_training(project, first)
        assert project.refresh().case("b").review == "rejected"

    def test_what_was_skipped_since_is_rejected_again(self, project: Project) -> None:
        first = str(project.state.current_training)
        review.reject(project, "b")
        train(project)
        review.skip(project, "b")
        review.use_training(project, first)
        assert project.refresh().case("b").review == "rejected"

    def test_one_under_way_replaces_its_predictions_and_is_not_used(self, project: Project) -> None:
        train(project)
        running = JobFolder(project.jobs / str(project.state.current_training))
        files.write_json(running.status, {**identity(), "state": "running", "heartbeat": time.time(), "fraction": 0.5})
        assert [one.name for one in past_trainings(project)] == ["0001-train"]
        with pytest.raises(ProjectError, match="is under way"):
            review.use_training(project, running.id)

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_a_damaged_one_hides_no_other(self, project: Project, text: str) -> None:
        train(project)
        JobFolder(project.jobs / "0001-train").index.write_text(text, encoding="utf-8")
        assert [one.name for one in past_trainings(project)] == ["0002-train"]

    def test_a_rejection_that_was_taken_back_stays_taken_back(self, project: Project) -> None:
        first = str(project.state.current_training)
        review.reject(project, "b")
        review.undo(project, "b")
        train(project)
        review.use_training(project, first)
        assert project.refresh().case("b").review == "not_seen"

    @pytest.mark.parametrize("name", ["0009-train", "../jobs/0001-train", ""])
    def test_one_that_is_not_there_is_refused(self, project: Project, name: str) -> None:
        with pytest.raises(ProjectError, match="is not a training"):
            review.use_training(project, name)


class TestMendedInPlace:
    """A person mends the very file that the training wrote and saves over it."""

    @pytest.fixture(autouse=True)
    def changed(self, project: Project, mended: Path) -> Path:
        path: Path = predictions(project)["b"]["prediction"]
        labels = read_labels(mended, OBLIQUE).volume
        write_segmentation(path, labels, project.state.labels)
        return path

    def test_it_is_not_accepted_as_the_machines_word(self, project: Project) -> None:
        with pytest.raises(ProjectError, match=r"not as 0001-train made it.*save it as a correction"):
            review.accept(project, "b")

    def test_as_a_correction_it_says_nothing_about_the_prediction(self, project: Project, changed: Path) -> None:
        assert review.correct(project, "b", changed).review == "corrected"
        assert not decisions(project)["b"][-1].dice, "what was predicted is not known any more"

    def test_others_are_what_they_were(self, project: Project) -> None:
        assert review.accept(project, "c").review == "accepted"


class TestOlderAndDamaged:
    """What an older program or a crash left behind."""

    @pytest.mark.parametrize("state", [Review.ACCEPTED, Review.CORRECTED, Review.REJECTED, Review.SKIPPED])
    def test_a_decision_whose_line_is_lost_can_be_taken_back(
        self, project: Project, actions: Any, state: Review
    ) -> None:
        actions[state]()
        project.reviews.unlink()
        case = review.undo(project, "b")
        assert (case.review, case.role, case.label_version) == ("not_seen", Role.UNLABELLED, None)
        if state is Review.CORRECTED:
            assert find_draft(project, "b") is not None, "what was painted is a draft again"
            review.discard_draft(project, "b")
        assert review.accept(project, "b").review == "accepted", "it can be decided about again"

    def test_an_older_decision_is_not_taken_back_in_place_of_a_lost_one(self, project: Project) -> None:
        review.skip(project, "b")
        kept = project.reviews.read_bytes()
        review.reject(project, "b")
        project.reviews.write_bytes(kept)
        assert review.undo(project, "b").review == "not_seen"
        assert decisions(project)["b"][-1].after == "skipped"

    @pytest.mark.parametrize("labelled_before", [False, True])
    def test_a_decision_is_one_step_for_others(
        self, project: Project, mended: Path, monkeypatch: pytest.MonkeyPatch, labelled_before: bool
    ) -> None:
        """Somebody takes a correction back while its line is being written: they wait, and find it."""
        if labelled_before:
            review.correct(project, "b", mended)
            review.begin_draft(project, "b")
        before, real, others = project.refresh().case("b"), files.append_line, []

        def slow(path: Path, line: Any) -> None:
            if line["after"] == "corrected":
                others.append(threading.Thread(target=review.undo, args=(Project(project.folder), "b")))
                others[0].start()
                time.sleep(0.3)
            real(path, line)

        monkeypatch.setattr(files, "append_line", slow)
        review.correct(project, "b", mended)
        others[0].join(20)
        after = project.refresh().case("b")
        assert (after.review, after.role, after.label_version) == (before.review, before.role, before.label_version)
        assert [one.after for one in decisions(project).get("b", [])] == ["corrected", "draft"] * labelled_before

    def test_a_newer_prediction_than_the_one_that_was_seen_is_not_accepted(self, project: Project) -> None:
        seen = project.state.current_training
        train(project)
        with pytest.raises(ProjectError, match="predicted anew by 0002-train since you opened it"):
            review.accept(project, "b", training=seen)
        assert project.refresh().case("b").label_version is None

    def test_a_correction_is_compared_with_what_was_seen(self, project: Project, mended: Path) -> None:
        seen = project.state.current_training
        train(project)
        review.correct(project, "b", mended, began=Began(str(seen)))
        assert decisions(project)["b"][-1].training == seen

    def test_a_line_that_cannot_be_written_is_no_decision(self, project: Project) -> None:
        project.reviews.mkdir()
        with pytest.raises((OSError, ProjectError)):
            review.skip(project, "b")
        assert Project(project.folder).state.case("b").review == "not_seen" == project.state.case("b").review

    def test_a_torn_line_hides_no_decision(self, project: Project) -> None:
        review.reject(project, "b")
        with open(project.reviews, "a", encoding="utf-8") as stream:
            stream.write('{"case": "c", "befo')
        looked = decisions(project)["b"][-1].after, unreadable_lines(project)
        review.skip(project, "d")
        made = {case: [one.after for one in rows] for case, rows in decisions(project).items() if rows}
        assert looked == ("rejected", 1) and made == {"b": ["rejected"], "d": ["skipped"]}

    def test_lines_that_cannot_be_read_are_counted(self, project: Project) -> None:
        review.reject(project, "b")
        before = unreadable_lines(project)
        with open(project.reviews, "a", encoding="utf-8") as stream:
            stream.write('{"case": "c"}\nnot JSON\n')
        assert (before, unreadable_lines(project)) == (0, 2)

    def test_a_correction_is_saved_also_when_the_prediction_is_gone(self, project: Project, mended: Path) -> None:
        predictions(project)["b"]["prediction"].unlink()
        assert review.correct(project, "b", mended).review == "corrected"
        assert decisions(project)["b"][-1].dice == {}, "nothing can be said of a prediction that is gone"
        assert review.undo(project, "b").review == "not_seen"

    def test_a_label_added_after_the_training_is_no_fault_of_the_prediction(
        self, project: Project, mended: Path
    ) -> None:
        index = project.jobs / str(project.state.current_training) / "results" / "index.json"
        value = files.read_json(index)
        for row in value["cases"]:
            row["scores"]["labels"] = {"1": {}, "2": {}}
        files.write_json(index, value)
        more = read_volume(mended).array.copy()
        more[0, 0, 0] = 7
        write_volume(mended, Volume(more, OBLIQUE))
        review.correct(project, "b", mended, add_labels=True)
        assert sorted(decisions(project)["b"][-1].dice) == [1, 2]

    def test_decisions_of_an_older_program_are_read(self, project: Project) -> None:
        old = {"label": 1, "training": "0001-train"}
        write_line(project, "b", "not_seen", "accepted", **old)
        write_line(project, "c", "not_seen", "corrected", **old, dice_seen_to_saved=0.8)
        made = decisions(project)
        assert [made["b"][-1].mean_dice, made["c"][-1].mean_dice] == [1.0, 0.8]


class TestDrafts:
    def paint(self, project: Project, case: str = "b") -> None:
        save_draft(project, case, two_labels(OBLIQUE), project.state.labels, Began())
        review.begin_draft(project, case, reviewer="ann")

    def test_painting_makes_a_draft(self, project: Project) -> None:
        self.paint(project)
        assert project.refresh().case("b").review == "draft"
        assert decisions(project)["b"][-1].reviewer == "ann"

    def test_painting_on_is_no_further_step(self, project: Project) -> None:
        self.paint(project)
        self.paint(project)
        assert len(decisions(project)["b"]) == 1

    def test_a_template_is_never_a_draft(self, project: Project) -> None:
        self.paint(project, "a")
        assert project.refresh().case("a").review == "not_seen"

    def test_an_accepted_label_stays_in_force(self, project: Project) -> None:
        version = review.accept(project, "b").label_version
        self.paint(project)
        case = project.refresh().case("b")
        assert (case.review, case.label_version, case.role) == ("draft", version, Role.LABELLED)

    @pytest.mark.parametrize("before", ["not_seen", "accepted"])
    def test_discarding_brings_back_what_was(self, project: Project, before: str) -> None:
        if before == "accepted":
            review.accept(project, "b")
        self.paint(project)
        assert review.discard_draft(project, "b").review == before
        assert find_draft(project, "b") is None

    def test_correcting_ends_it(self, project: Project, mended: Path) -> None:
        self.paint(project)
        review.correct(project, "b", mended)
        assert find_draft(project, "b") is None

    def test_a_correction_that_is_taken_back_is_a_draft_again(self, project: Project, mended: Path) -> None:
        self.paint(project)
        case = review.correct(project, "b", mended)
        saved = project.label_path(case).read_bytes()
        assert review.undo(project, "b").review == "draft"
        draft = find_draft(project, "b")
        assert draft is not None and draft.read_bytes() == saved, "what was painted is lost"

    def test_the_painting_of_a_correction_comes_back_also_without_a_draft(self, project: Project, mended: Path) -> None:
        """Painted and saved at once: undo must not leave the painting in a file that nobody can reach."""
        saved = project.label_path(review.correct(project, "b", mended)).read_bytes()
        review.undo(project, "b")
        draft = find_draft(project, "b")
        assert draft is not None and draft.read_bytes() == saved

    def test_undo_does_not_overwrite_a_newer_draft(self, project: Project, mended: Path) -> None:
        review.correct(project, "b", mended)
        save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began())
        newer = find_draft(project, "b")
        assert newer is not None
        before = newer.read_bytes()
        review.undo(project, "b")
        assert newer.read_bytes() == before

    @pytest.mark.parametrize("action", [review.accept, review.reject, review.skip])
    def test_no_other_decision_leaves_painting_behind(self, project: Project, mended: Path, action: Any) -> None:
        review.correct(project, "b", mended)
        review.undo(project, "b")
        with pytest.raises(ProjectError, match="unfinished painting of case b"):
            action(project, "b")

    def test_a_draft_is_not_undone_by_the_way(self, project: Project) -> None:
        self.paint(project)
        with pytest.raises(ProjectError, match="save what was painted as a correction, or discard it"):
            review.undo(project, "b")

    @pytest.mark.parametrize("before", [Review.ACCEPTED, Review.CORRECTED])
    def test_a_reopened_draft_whose_line_is_lost_is_what_its_label_says(
        self, project: Project, actions: Any, before: Review
    ) -> None:
        case = actions[before]()
        project.restore("b", Review.DRAFT, case.role, case.label_version)
        assert review.discard_draft(project, "b").review == before

    def test_a_draft_without_its_painting_can_be_discarded(self, project: Project) -> None:
        """Slicer ended between the note and the file; or the line of the review is lost."""
        project.restore("b", Review.DRAFT, Role.UNLABELLED, None)
        assert review.discard_draft(project, "b").review == "not_seen"

    def test_discarding_takes_no_other_decision_back(self, project: Project, mended: Path) -> None:
        review.correct(project, "b", mended)
        save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, Began())
        assert review.discard_draft(project, "b").review == "corrected"

    def test_a_rejected_case_is_not_reopened_by_painting(self, project: Project) -> None:
        review.reject(project, "b")
        self.paint(project)
        assert project.refresh().case("b").review == "rejected"


def test_a_change_is_that_of_the_numbers_beside_it() -> None:
    assert Change("a", 0.9676, 0.9604).in_words == "a Dice 0.968 to 0.960 (-0.008)"
