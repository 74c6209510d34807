"""Training again with a person's reviews: what counts, what does not, what was learned, and going on from before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from job_helpers import labelled_project, make_training, one_thread, run_to_end, truth_of

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder
from SemiSAMO1Lib.project import Project, ProjectError, Review, Role, reviews
from SemiSAMO1Lib.project.results import changes, predictions
from SemiSAMO1Lib.project.training import LAST, request_training
from SemiSAMO1Lib.tasks.compare import compare
from SemiSAMO1Lib.tasks.inputs import read_inputs
from SemiSAMO1Lib.tasks.reporter import Reporter
from SemiSAMO1Lib.tasks.train import _finish


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Five phantoms, the first the template, trained once; one corrected, one accepted, one rejected, one excluded."""
    project, names = labelled_project(tmp_path_factory.mktemp("again"), 6)
    seen = run_to_end(make_training(project, rounds=1))
    assert seen.state == "finished", seen.message
    project.refresh()
    reviews.correct(project, names[1], truth_of(project, names[1]), reviewer="ann")
    reviews.accept(project, names[2], _not_found(project, names[2]))
    reviews.reject(project, names[3])
    project.exclude(names[4])
    return project


def _not_found(project: Project, case: str) -> list[int]:
    rows = predictions(project)[case]["scores"]["labels"]
    return [int(value) for value, row in rows.items() if not row["voxels"]]


@pytest.fixture(scope="module")
def second(first: Project) -> JobFolder:
    """The next training, finished."""
    job = make_training(first, rounds=1)
    seen = run_to_end(job)
    assert seen.state == "finished", seen.message
    first.refresh()
    return job


def listed(job: JobFolder) -> dict[str, dict[str, dict[str, object]]]:
    listing = files.read_json(job.inputs / "cases.json")
    return {kind: {row["id"]: row for row in listing[kind]} for kind in ("labelled", "cases")}


def test_reviewed_cases_are_labelled_data(second: JobFolder) -> None:
    weights = {case: row["weight"] for case, row in listed(second)["labelled"].items()}
    assert weights == {"phantom_000": 1.0, "phantom_001": 0.8, "phantom_002": 0.5}


def test_of_a_rejected_case_it_is_said_how_much_of_it_stayed(first: Project, second: JobFolder) -> None:
    old, new = (predictions(first, one)["phantom_003"]["prediction"] for one in ("0001-train", second.id))
    wanted = compare({"a": new}, {"a": old}, distances=False, values=first.state.labels.values)["mean_dice"]
    found = {one.case: one for one in changes(first, second.id)}["phantom_003"]
    assert (found.rejected, found.now) == (True, wanted) and "with what was rejected" in found.in_words


def test_a_rejected_case_is_predicted_again_and_waits(first: Project, second: JobFolder) -> None:
    assert "phantom_003" in predictions(first) and first.state.case("phantom_003").review == "not_seen"


def test_an_excluded_case_is_in_neither_list(second: JobFolder) -> None:
    assert not {"phantom_004"} & (set(listed(second)["labelled"]) | set(listed(second)["cases"]))


def test_it_is_said_what_was_learned_of_the_reviewed_cases(first: Project, second: JobFolder) -> None:
    said = {one.case: one for one in changes(first) if not one.rejected}
    assert set(said) == {"phantom_001", "phantom_002"}
    assert said["phantom_002"].before is None, "an accepted prediction is its own label: nothing was measured"
    corrected = said["phantom_001"]
    assert 0 <= corrected.now <= 1 and f"Dice {corrected.before:.3f} to" in corrected.in_words


def test_the_report_says_it_too(first: Project, second: JobFolder) -> None:
    text = (second.path / "report.html").read_text(encoding="utf-8")
    learned = [one.in_words for one in changes(first)]
    assert all(one.replace("+", "&#43;") in text or one in text for one in learned), learned
    assert (
        "phantom_000 (template)" in text
        and "phantom_001 (corrected)" in text
        and "not yet checked on these scans" in text
    )


def test_signs_of_quality_reach_the_results(first: Project, second: JobFolder) -> None:
    row = predictions(first)["phantom_005"]["scores"]["labels"]["1"]
    assert {"expected_dice", "reverse", "between_rounds"} <= set(row["signals"])


def test_a_training_comes_into_force_once(first: Project, second: JobFolder) -> None:
    """Resumed after its report could not be written it undoes nothing that a person decided since."""
    first.change(lambda state: replace(state, current_training="0002-train"))
    first.restore("phantom_003", Review.REJECTED, Role.UNLABELLED, None)
    _finish(second, read_inputs(second), Reporter(second))
    found = first.refresh()
    first.change(lambda state: replace(state, current_training=second.id))
    first.restore("phantom_003", Review.NOT_SEEN, Role.UNLABELLED, None)
    assert (found.current_training, found.case("phantom_003").review) == ("0002-train", "rejected")


class TestGoingOn:
    def test_it_begins_with_the_earlier_weights(self, first: Project, second: JobFolder) -> None:
        job = make_training(first, rounds=1, continue_from=second.id)
        seen = run_to_end(job)
        assert seen.state == "finished", seen.message
        begun = job.work / "weights" / "round-0.pt"
        assert begun.read_bytes() == (second.work / "weights" / "round-1.pt").read_bytes()
        assert (job.work / "plan.json").read_bytes() == (second.work / "plan.json").read_bytes()

    def test_another_network_is_refused(self, first: Project, second: JobFolder) -> None:
        job = make_training(first, rounds=1, continue_from=second.id, filters=8)
        seen = run_to_end(job)
        assert seen.state == "failed" and "filters 4, now 8" in seen.message and "from scratch" in seen.message

    def test_a_network_that_saw_other_parts_of_scans_is_refused(self, first: Project, second: JobFolder) -> None:
        job = make_training(first, rounds=1, continue_from=second.id)
        files.write_json(job.inputs / "start" / "surroundings.json", {})
        seen = run_to_end(job)
        said = "what is seen the labels' surroundings alone, now whole scans"
        assert seen.state == "failed" and said in seen.message, seen.message

    def test_what_an_earlier_training_cut_out_is_known_to_the_next(self, first: Project, second: JobFolder) -> None:
        parts = second.work / "surroundings.json"
        files.write_json(parts, {"boxes": {}})
        job = make_training(first, rounds=1, continue_from=second.id)
        parts.unlink()
        assert files.read_json(job.inputs / "start" / parts.name) == {"boxes": {}}

    def test_the_last_one_is_gone_on_from_where_it_fits(self, first: Project, second: JobFolder) -> None:
        current = first.refresh().current_training
        job = make_training(first, rounds=1, continue_from=LAST)
        assert job.spec()["parameters"]["continue_from"] == current is not None
        assert (job.inputs / "start" / "weights.pt").is_file()

    def test_where_the_last_one_does_not_fit_a_training_begins_from_scratch(
        self, first: Project, second: JobFolder
    ) -> None:
        job = make_training(first, rounds=1, iterations=1, continue_from=LAST, filters=8)
        seen = run_to_end(job)
        assert seen.state == "finished", seen.message
        notes = [event.get("text", "") for event in files.read_lines(job.events)[0] if event["kind"] == "note"]
        assert any("from scratch" in text and "filters 4, now 8" in text for text in notes), notes
        assert not (job.work / "weights" / "round-0.pt").exists()

    def test_before_the_first_training_there_is_nothing_to_go_on_from(self, first: Project) -> None:
        current = first.refresh().current_training
        first.change(lambda state: replace(state, current_training=None))
        job = request_training(first, {"continue_from": LAST})
        first.change(lambda state: replace(state, current_training=current))
        assert job.spec()["parameters"]["continue_from"] is None

    def test_a_training_without_weights_is_refused(self, first: Project, tmp_path: Path) -> None:
        with pytest.raises(ProjectError, match="no weights to go on from"):
            one_thread(request_training(first, {"continue_from": "0001-train-that-never-was"}))
