"""Review: which steps are possible from which state, what lands on disk, what undo brings back, the queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import OBLIQUE, two_labels, write_scan

from SemiSAMO1Lib import files
from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.project import LabelError, Project, ProjectError, Role, Skipped
from SemiSAMO1Lib.project import reviews as review
from SemiSAMO1Lib.project.importing import candidates, look
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.project.reviews import TRANSITIONS, Review
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.volume import Volume

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
        rows.append({"case": case.id, "scores": scores, "prediction": f"1/{case.id}/prediction.seg.nrrd"})
    files.write_json(job.index, {"round": 1, "cases": rows, "skipped": []})
    project.set_current_training(job.id)


def bring(project: Project, state: Review) -> None:
    """Put case b into a state."""
    project.restore("b", str(state), Role.UNLABELLED, None)


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

#: The steps of DESIGN section 3 that are one action.
POSSIBLE = {
    *((now, to) for now in (Review.NOT_SEEN, Review.SKIPPED) for to in TRANSITIONS[now] if to is not Review.DRAFT),
    (Review.DRAFT, Review.CORRECTED),
    (Review.CORRECTED, Review.CORRECTED),
}


@pytest.mark.parametrize(("now", "to"), STEPS, ids=[f"{a} to {b}" for a, b in STEPS])
def test_the_table_of_steps(project: Project, actions: Any, now: Review, to: Review) -> None:
    bring(project, now)
    if (now, to) in POSSIBLE:
        assert actions[to]().review == to
        return
    with pytest.raises(ProjectError, match=f"is {now} and cannot become {to}"):
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
        row = review.predictions(project)["b"]
        empty = Volume(np.where(two_labels(OBLIQUE).array == 1, 1, 0).astype(np.uint8), OBLIQUE)
        write_segmentation(row["prediction"], empty, project.state.labels)
        with pytest.raises(LabelError, match="absent"):
            review.accept(project, "b")
        assert project.refresh().case("b").review == "not_seen"

    def test_unless_it_is_declared_absent(self, project: Project) -> None:
        row = review.predictions(project)["b"]
        empty = Volume(np.where(two_labels(OBLIQUE).array == 1, 1, 0).astype(np.uint8), OBLIQUE)
        write_segmentation(row["prediction"], empty, project.state.labels)
        assert project.label_record(review.accept(project, "b", absent=[2]))["absent"] == [2]


class TestCorrecting:
    def test_the_label_is_the_persons(self, project: Project, mended: Path) -> None:
        record = project.label_record(review.correct(project, "b", mended))
        assert record["origin"] == "corrected"

    def test_it_is_noted_how_much_was_changed(self, project: Project, mended: Path) -> None:
        review.correct(project, "b", mended)
        line = files.read_lines(project.folder / "reviews.jsonl")[0][-1]
        before, after = int((two_labels(OBLIQUE).array > 0).sum()), int((two_labels(OBLIQUE).array[3:] > 0).sum())
        assert line["dice_seen_to_saved"] == pytest.approx(2 * after / (before + after), abs=1e-4)

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

    def test_every_decision_and_undo_is_a_line(self, project: Project) -> None:
        review.reject(project, "b", reviewer="ann")
        review.undo(project, "b")
        lines = files.read_lines(project.folder / "reviews.jsonl")[0]
        steps = [(line["before"], line["after"], line.get("undo", False)) for line in lines]
        assert steps == [("not_seen", "rejected", False), ("rejected", "not_seen", True)]
        assert lines[0]["reviewer"] == "ann" and lines[0]["time"]


class TestQueue:
    def test_the_worst_comes_first_ties_by_name(self, project: Project) -> None:
        assert [one.case for one in review.queue(project)] == ["e", "c", "d", "b"], "nothing found is the worst"

    def test_skipped_cases_are_at_its_end(self, project: Project) -> None:
        review.skip(project, "e")
        assert [one.case for one in review.queue(project)] == ["c", "d", "b", "e"]

    def test_decided_cases_are_not_in_it(self, project: Project) -> None:
        review.accept(project, "c")
        review.reject(project, "d")
        assert [one.case for one in review.queue(project)] == ["e", "b"]

    def test_excluded_cases_are_not_in_it(self, project: Project) -> None:
        project.set_role("e", Role.EXCLUDED)
        assert [one.case for one in review.queue(project)] == ["c", "d", "b"]

    def test_before_a_training_it_is_empty(self, tmp_path: Path) -> None:
        assert review.queue(Project.create(tmp_path / "new")) == []


class TestRefusals:
    @pytest.mark.parametrize("action", [review.accept, review.reject, review.skip])
    def test_the_template_is_not_reviewed(self, project: Project, action: Any) -> None:
        with pytest.raises(ProjectError, match="is template"):
            action(project, "a")

    @pytest.mark.parametrize("action", [review.accept, review.reject, review.skip])
    def test_a_case_without_a_prediction_is_not_reviewed(self, project: Project, action: Any) -> None:
        project.set_current_training(None)
        with pytest.raises(ProjectError, match="no prediction"):
            action(project, "b")

    def test_an_unknown_case_is_named(self, project: Project) -> None:
        with pytest.raises(ProjectError, match="no case 'z'"):
            review.reject(project, "z")
