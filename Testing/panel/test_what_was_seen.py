"""What is saved is measured with the prediction that the person saw, and with no other."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from panel_helpers import wait
from test_loop import paint

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, start
from SemiSAMO1Lib.processes import start_time
from SemiSAMO1Lib.project import Project, reviews
from SemiSAMO1Lib.project.history import decisions
from SemiSAMO1Lib.project.training import request_training


def train_again(panel: Any, ui: Any) -> str:
    """The id of a further training, which is shown."""
    first = panel.session.current_training
    ui.trainButton.click()
    wait(panel, lambda: panel.session.current_training != first and not panel.session.busy, "the second training")
    panel.tick()
    panel._take_new_predictions()
    return str(panel.session.current_training)


def open_case(panel: Any, ui: Any, case: str) -> None:
    ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(case))
    panel.results.open()


@pytest.mark.parametrize("painted_on", [False, True], ids=["saved as it is", "painted on"])
def test_a_draft_of_an_earlier_training_is_measured_with_its_prediction(
    panel: Any, ui: Any, trained: Path, opened: str, painted_on: bool
) -> None:
    first = panel.session.current_training
    paint(panel)
    panel.keep_work()
    assert train_again(panel, ui) != first
    open_case(panel, ui, opened)
    if painted_on:
        paint(panel, 6)
        panel.keep_work()
    ui.correctButton.click()
    made = decisions(Project(trained))[opened][-1]
    assert (made.after, made.training) == ("corrected", first), panel.banner.text


def test_so_is_a_label_that_is_painted_again(panel: Any, ui: Any, trained: Path, opened: str, stand_in: Path) -> None:
    """A case that was corrected while a training ran is predicted by it too, but nobody saw that."""
    first = panel.session.current_training
    job = request_training(Project(trained), {})
    paint(panel)
    panel.tick()
    ui.correctButton.click()
    start(job, stand_in)
    wait(panel, lambda: panel.session.current_training != first and not panel.session.busy, "the second training")
    panel.tick()
    panel._take_new_predictions()
    open_case(panel, ui, opened)
    paint(panel, 8)
    panel.tick()
    ui.correctButton.click()
    made = decisions(Project(trained))[opened]
    assert [one.training for one in made if one.after == "corrected"] == [first, first], panel.banner.text


class TestATrainingThatIsResumed:
    @pytest.fixture
    def predicted_anew(self, panel: Any, trained: Path, opened: str) -> str:
        """The training in force has made another round; the case that is open."""
        job = JobFolder(trained / "jobs" / panel.session.current_training)
        value = files.read_json(job.index)
        for row in value["cases"]:
            for kind in ("prediction", "uncertainty"):
                old = job.results / row[kind]
                row[kind] = row[kind].replace(f"{value['round']}/", f"{value['round'] + 1}/", 1)
                (job.results / row[kind]).parent.mkdir(parents=True, exist_ok=True)
                old.rename(job.results / row[kind])
        files.write_json(job.index, {**value, "round": value["round"] + 1})
        return opened

    def test_its_new_predictions_are_offered(self, panel: Any, ui: Any, predicted_anew: str) -> None:
        panel.tick()
        assert "New predictions of" in panel.banner.text
        ui.bannerButton.click()
        open_case(panel, ui, predicted_anew)
        assert panel.view is not None and panel.view.files.case == predicted_anew

    def test_nothing_is_decided_while_it_goes_on(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        job = panel.session.training
        job.seen = type(job.seen)(**{**vars(job.seen), "state": type(job.seen.state).RUNNING})
        panel.results.show_decisions()
        assert not ui.acceptButton.enabled and "goes on and predicts this case anew" in ui.reviewReasonLabel.text


def test_while_its_report_is_written_one_may_decide(panel: Any, ui: Any, trained: Path, opened: str) -> None:
    """The predictions are final, and writing it takes a while."""
    job = JobFolder(trained / "jobs" / panel.session.current_training)
    files.write_json(job.work / "in-force.json", {})
    me = {"pid": os.getpid(), "process_start": start_time(os.getpid()), "heartbeat": time.time()}
    files.write_json(job.status, {**files.read_json(job.status), "state": "running", "stage": "report", **me})
    panel.session.poll()
    panel.results.show_decisions()
    assert panel.session.busy and ui.acceptButton.enabled, ui.reviewReasonLabel.text
    assert reviews.accept(Project(trained), opened).review == "accepted"


def test_a_first_training_that_was_stopped_can_be_looked_at(panel: Any, ui: Any, trained: Path) -> None:
    """What it did is kept, and nothing counts before a person says so."""
    name = panel.session.current_training
    job = JobFolder(trained / "jobs" / name)
    files.write_json(job.status, {**files.read_json(job.status), "state": "interrupted", "stopped": True})
    project = files.read_json(trained / "project.json")
    files.write_json(trained / "project.json", {**project, "current_training": None})
    ui.openProjectButton.click()
    assert ui.trainingBox.isVisibleTo(ui.trainingBox.parent()) and ui.trainingBox.itemData(0) == name
    assert "choose one, or train again" in ui.caseReasonLabel.text
    ui.trainingBox.setCurrentIndex(0)
    panel.results.use_training()
    assert Project(trained).state.current_training == name and panel.results.order()
