"""Which prediction a decision is about: one that nobody saw is not measured, nor one that was replaced since."""

from __future__ import annotations

from pathlib import Path

import pytest
from scans import OBLIQUE, two_labels
from test_reviews import mended, project, train  # noqa: F401

from SemiSAMO1Lib import files
from SemiSAMO1Lib import volume as volumes
from SemiSAMO1Lib.job import JobFolder
from SemiSAMO1Lib.project import Label, Project, ProjectError, Review, Role
from SemiSAMO1Lib.project import reviews as review
from SemiSAMO1Lib.project.began import Began
from SemiSAMO1Lib.project.drafts import began_from, save_draft
from SemiSAMO1Lib.project.history import decisions
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.project.queue import queue
from SemiSAMO1Lib.project.results import changes, prediction_seen, predictions

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
        monkeypatch.setattr(review, "is_under_way", lambda job: job.id == project.state.current_training)
        with pytest.raises(ProjectError, match="goes on and predicts b anew with each round"):
            action(project, "b")  # type: ignore[operator]


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
