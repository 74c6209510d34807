"""Which prediction a decision is about: one that nobody saw is not measured, nor one that was replaced since."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from scans import OBLIQUE, two_labels
from test_reviews import mended, project, train  # noqa: F401

from SemiSAMO1Lib import files
from SemiSAMO1Lib import volume as volumes
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.project import Label, Project, ProjectError, Review, Role, Skipped
from SemiSAMO1Lib.project import reviews as review
from SemiSAMO1Lib.project.began import Began
from SemiSAMO1Lib.project.drafts import began_from, save_draft
from SemiSAMO1Lib.project.history import decisions
from SemiSAMO1Lib.project.importing import candidates, look
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.project.queue import queue
from SemiSAMO1Lib.project.rescue import find_rescued, rescue
from SemiSAMO1Lib.project.results import changes, prediction_seen, predictions
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.tasks.train import beside_what_was_rejected

# ruff: noqa: F811


def look_again(project: Project, dice: dict[str, float]) -> None:
    """A further training, which has learned from the labels in force, and what its networks then say of them."""
    train(project)
    training = project.jobs / str(project.state.current_training)
    labelled = [one for one in project.state.cases if one.label_version is not None]
    rows = [{"id": one.id, "version": one.label_version} for one in labelled]
    files.write_json(training / "inputs" / "cases.json", {"labelled": rows})
    files.write_json(training / "results" / "labelled.json", {case: {"1": one} for case, one in dice.items()})


def go_on(project: Project) -> str:
    """The training in force, which was stopped, is resumed and completes another round, with other voxels."""
    name = str(project.state.current_training)
    index = JobFolder(project.jobs / name).index
    value = files.read_json(index)
    for row in value["cases"]:
        new = row["prediction"].replace("1/", "2/", 1)
        array = two_labels(OBLIQUE).array.copy()
        array[2] = 0
        write_segmentation(index.parent / new, volumes.Volume(array, OBLIQUE), project.state.labels)
        row |= {"prediction": new, "sha256": files.sha256(index.parent / new)}
    files.write_json(index, {**value, "round": 2})
    return name


class TestAResumedTraining:
    def test_a_prediction_rejected_before_it_went_on_waits_again(self, project: Project) -> None:
        review.reject(project, "c")
        name = go_on(project)
        review.finish_training(project, name)
        assert project.state.case("c").review == Review.NOT_SEEN
        assert "c" in [one.case for one in queue(project)]

    def test_one_rejected_after_that_does_not(self, project: Project) -> None:
        name = go_on(project)
        review.reject(project, "c")
        review.finish_training(project, name)
        assert project.refresh().case("c").review == Review.REJECTED

    def test_what_was_painted_before_is_not_measured_with_the_new_one(self, project: Project, mended: Path) -> None:
        seen = Began.of_row(predictions(project)["b"])
        go_on(project)
        assert prediction_seen(project, "b", seen) is None
        review.correct(project, "b", mended, began=seen)
        assert decisions(project)["b"][-1].dice == {}

    def test_nor_are_decisions_about_it_counted(self, project: Project) -> None:
        for case in "bcd":
            review.accept(project, case)
        offered = [one.case for one in queue(project)]
        go_on(project)
        assert decisions(project)["b"][-1].began.is_that_of(predictions(project)["b"]) is False
        assert [one.case for one in queue(project)] == offered, "a label in force is not asked for again"

    @pytest.mark.parametrize("action", [review.accept, review.reject, review.skip])
    def test_nothing_is_decided_while_it_goes_on(
        self, project: Project, action: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(review, "goes_on_predicting", lambda job: job.id == project.state.current_training)
        with pytest.raises(ProjectError, match="goes on and predicts b anew with each round"):
            action(project, "b")  # type: ignore[operator]

    def test_the_next_training_heeds_a_rejection_before_it_went_on(self, project: Project) -> None:
        listing = [{"id": case, "review": "not_seen"} for case in "bcde"]
        job = project.jobs / str(project.state.current_training)
        files.write_json(job / "inputs" / "cases.json", {"labelled": [], "cases": listing})
        review.reject(project, "c")
        review.finish_training(project, go_on(project))
        assert self.given(project)["c"] == "rejected"

    def test_and_only_the_next_one(self, project: Project) -> None:
        review.reject(project, "c")
        listed = []
        for _ in range(3):
            listed.append(self.given(project)["c"])
            train(project)
        assert listed == ["rejected", "not_seen", "not_seen"]

    def given(self, project: Project) -> dict[str, str]:
        job = request_training(project, {})
        rows = files.read_json(job.inputs / "cases.json")["cases"]
        return {row["id"]: row["review"] for row in rows}

    def test_a_rejection_of_what_it_said_before_is_not_taken_back_by_the_way(self, project: Project) -> None:
        review.reject(project, "c")
        review.finish_training(project, go_on(project))
        with pytest.raises(ProjectError, match="nothing was decided about the current prediction"):
            review.undo(project, "c")

    def test_its_new_prediction_is_not_compared_with_itself(self, project: Project) -> None:
        review.reject(project, "c")
        job = JobFolder(project.jobs / go_on(project))
        assert beside_what_was_rejected(job, project, {"c"}) == {}


class TestDeletedFolders:
    """Who deletes job folders by hand may go on."""

    def test_the_next_training_counts_though_its_number_is_lower(self, project: Project) -> None:
        for _ in range(2):
            train(project)
        for number in (2, 3):
            shutil.rmtree(project.jobs / f"000{number}-train")
        train(project)
        assert project.refresh().current_training == "0002-train"

    def test_what_was_rejected_there_is_not_compared(self, project: Project) -> None:
        review.reject(project, "c")
        first = project.jobs / str(project.state.current_training)
        job = JobFolder.create(project.jobs, JobKind.TRAIN, {}, project.state.labels.to_json())
        shutil.copytree(first / "results", job.results)
        shutil.rmtree(first)
        assert beside_what_was_rejected(job, project, {"c"}) == {}


def test_painting_kept_on_this_computer_is_not_another_projects(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same scans, while its own is away."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    other = Project.create(tmp_path / "kidneys")
    for candidate in candidates(tmp_path / "scans", other.folder):
        assert not isinstance(candidate, Skipped)
        found = look(candidate)
        assert not isinstance(found, Skipped)
        other.add(found)
    rescue(project, project.state.case("b"), two_labels(OBLIQUE), project.state.labels, Began())
    project.folder.rename(tmp_path / "away")
    assert find_rescued(other, other.state.case("b")) is None
    (tmp_path / "away").rename(project.folder)
    assert find_rescued(project, project.state.case("b")) is not None


class TestBegan:
    def test_a_label_that_was_imported_began_from_none(self, project: Project, mended: Path) -> None:
        project.add_label("b", mended, role=Role.LABELLED, origin="imported")
        assert began_from(project, project.state.case("b")) == Began()
        assert project.label_record(project.state.case("b"))["training"] is None

    def test_a_correction_keeps_its_prediction(self, project: Project, mended: Path) -> None:
        seen = Began.of_row(predictions(project)["b"])
        review.correct(project, "b", mended)
        train(project)
        assert began_from(project, project.state.case("b")) == seen != Began()

    def test_so_does_a_draft(self, project: Project) -> None:
        seen = Began.of_row(predictions(project)["b"])
        save_draft(project, "b", two_labels(OBLIQUE), project.state.labels, seen)
        train(project)
        assert began_from(project, project.state.case("b")) == seen

    def test_a_prediction_that_is_shown_itself(self, project: Project) -> None:
        assert began_from(project, project.state.case("b")) is None

    def test_a_correction_of_what_was_drawn_from_nothing_is_not_measured(self, project: Project, mended: Path) -> None:
        review.correct(project, "b", mended, began=Began())
        assert decisions(project)["b"][-1].mean_dice is None


def test_a_change_is_one_of_the_same_label(project: Project, mended: Path) -> None:
    """A case that was corrected twice: what was measured with the first label is not beside the second."""
    review.correct(project, "b", mended)
    look_again(project, {"b": 0.90})
    review.begin_draft(project, "b")
    review.correct(project, "b", mended, began=Began())
    look_again(project, {"b": 0.95})
    assert [(one.before, one.now) for one in changes(project)] == [(None, 0.95)]


class TestNewLabels:
    def test_a_value_given_to_another_label_since_is_refused(self, project: Project, tmp_path: Path) -> None:
        given = project.state.labels.values
        value = project.state.labels.next_value
        array = two_labels(OBLIQUE).array.copy()
        array[0, 0, :3] = value
        table = project.state.labels.updated([Label(value, "tumour")])
        write_segmentation(tmp_path / "new.seg.nrrd", volumes.Volume(array, OBLIQUE), table)
        project.update_labels([Label(value, "cyst")])
        with pytest.raises(ProjectError, match=f"the value {value} of tumour was given to cyst meanwhile"):
            review.correct(project, "b", tmp_path / "new.seg.nrrd", add_labels=True, sure=True, given=given)
        assert project.refresh().case("b").label_version is None and project.state.labels.name_of(value) == "cyst"

    def test_the_table_itself_does_not_give_it_twice(self, project: Project) -> None:
        given = project.state.labels.values
        value = project.state.labels.next_value
        project.update_labels([Label(value, "cyst")])
        with pytest.raises(ProjectError, match="was given to cyst meanwhile"):
            project.update_labels([Label(value, "tumour")], given)
