"""The loop in the panel: an advice after adding scans, drafts by themselves, the queue, training again."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qt
import slicer
import vtk
from panel_helpers import Clock, wait

from SemiSAMO1Lib import files, lock
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.project import Label, Project, Role, read_labels, reviews
from SemiSAMO1Lib.project.drafts import drafts_put_aside, find_draft
from SemiSAMO1Lib.project.queue import FILTERS, queue
from SemiSAMO1Lib.project.results import predictions
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.scene.segmentations import Drawn, drawn, value_of

#: Seconds between the last change and the draft.
PAUSE_S = 20.0

KEEPER = "SemiSAMO1Lib.panel.draft_keeper"


def paint(panel: Any, size: int = 4) -> None:
    """A box of voxels in the first segment of the open case."""
    view = panel.view
    identity = view.segmentation.GetSegmentation().GetNthSegmentID(0)
    array = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan).copy()
    array[0:3, 0:size, 0:5] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)


def status_of(view: Any) -> set[str]:
    segmentation = view.segmentation.GetSegmentation()
    found = set()
    for identity in segmentation.GetSegmentIDs():
        text = vtk.reference("")
        segmentation.GetSegment(identity).GetTag("Segmentation.Status", text)
        found.add(str(text))
    return found


class TestDraftsByThemselves:
    def wait_for_draft(self, panel: Any, folder: Path, case: str) -> Path:
        wait(panel, lambda: find_draft(Project(folder), case) is not None, "the draft", 10)
        found = find_draft(Project(folder), case)
        assert found is not None
        return found

    def test_nothing_is_written_while_somebody_paints_on(
        self, panel: Any, trained: Path, opened: str, clock: Clock
    ) -> None:
        for size in (4, 5, 6):
            paint(panel, size)
            panel.tick()
            clock.now += PAUSE_S - 1
            panel.tick()
        assert find_draft(Project(trained), opened) is None

    def test_some_seconds_after_the_last_change_it_is(
        self, panel: Any, trained: Path, opened: str, clock: Clock
    ) -> None:
        paint(panel)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        self.wait_for_draft(panel, trained, opened)
        assert Project(trained).state.case(opened).review == "draft"

    def test_it_holds_exactly_what_is_on_the_screen(self, panel: Any, trained: Path, opened: str, clock: Clock) -> None:
        paint(panel)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        draft = self.wait_for_draft(panel, trained, opened)
        shown = drawn(panel.view.segmentation, panel.view.scan, Project(trained).state.labels).labels
        saved = read_labels(draft, shown.geometry).volume
        assert np.array_equal(saved.array, shown.array)

    def test_never_during_a_stroke(
        self, panel: Any, trained: Path, opened: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paint(panel)
        panel.tick()
        clock.now += 2 * PAUSE_S
        monkeypatch.setattr(f"{KEEPER}._painting", lambda: True)
        panel.tick()
        assert find_draft(Project(trained), opened) is None
        monkeypatch.setattr(f"{KEEPER}._painting", lambda: False)
        panel.tick()
        self.wait_for_draft(panel, trained, opened)

    def test_what_is_written_once_is_not_written_again(
        self, panel: Any, trained: Path, opened: str, clock: Clock
    ) -> None:
        paint(panel)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        draft = self.wait_for_draft(panel, trained, opened)
        written = draft.stat().st_mtime_ns
        for _ in range(3):
            clock.now += PAUSE_S
            panel.tick()
        panel.keep_work()
        assert draft.stat().st_mtime_ns == written

    def test_segments_that_overlap_are_told_of_when_it_is_brought_back(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        """A voxel has one label in a draft: what a segment lost to another one is said, not only done."""
        view = panel.view
        ids = [view.segmentation.GetSegmentation().GetNthSegmentID(n) for n in range(2)]
        for identity in ids:
            array = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan).copy()
            array[:] = 0
            array[0:2, 0:3, 0:4] = 1
            slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)
        names = [label.name for label in Project(trained).state.labels][:2]
        panel.close_case()
        ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(opened))
        panel.results.open()
        assert f"{names[0]} and {names[1]} shared 24 voxels; {names[1]} has them." in panel.banner.text

    def test_painting_in_another_module_is_kept_too(self, panel: Any, trained: Path, opened: str, clock: Clock) -> None:
        panel.enter()
        panel.leave()
        paint(panel)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        self.wait_for_draft(panel, trained, opened)
        assert panel._timer.active, "nobody looks at what is painted in the Segment Editor"

    def test_a_write_that_fails_in_the_thread_is_said_and_tried_again(
        self, panel: Any, trained: Path, opened: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(f"{KEEPER}.save_draft", full_disk)
        paint(panel)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        wait(panel, lambda: "No space left" in panel.banner.text, "the message", 10)
        monkeypatch.undo()
        panel.keep_work()
        assert find_draft(Project(trained), opened) is not None

    def test_leaving_the_module_writes_it(self, panel: Any, widget: Any, trained: Path, opened: str) -> None:
        paint(panel)
        widget.exit()
        assert find_draft(Project(trained), opened) is not None

    def test_an_accepted_case_is_reopened_by_painting(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        ui.acceptButton.click()
        ui.filterBox.setCurrentIndex(ui.filterBox.findData("accepted"))
        ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(opened))
        panel.results.open()
        paint(panel)
        panel.keep_work()
        case = Project(trained).state.case(opened)
        assert (case.review, case.label_version) == ("draft", 1), "the accepted label stays in force until it is done"

    def test_discarding_it_brings_back_what_was(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        paint(panel)
        panel.close_case()
        panel.results.open()
        assert "was brought back" in panel.banner.text
        ui.bannerButton.click()
        assert Project(trained).state.case(opened).review == "not_seen"
        assert find_draft(Project(trained), opened) is None

    def test_on_one_account_a_draft_belongs_to_slicers_user(
        self, panel: Any, app: Any, trained: Path, opened: str
    ) -> None:
        information = app.applicationLogic().GetUserInformation()
        information.SetName("Ann Reader")
        paint(panel)
        panel.close_case()
        information.SetName("Bob Reader")
        panel.results.open()
        assert f"painting of {opened} by Ann Reader on" in panel.banner.text
        paint(panel, 7)
        panel.close_case()
        assert len(drafts_put_aside(Project(trained), opened)) == 1, "Bob's draft took the place of Ann's"

    def test_a_draft_that_is_being_written_does_not_come_back_after_saving(
        self, panel: Any, ui: Any, trained: Path, opened: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from SemiSAMO1Lib.project.drafts import save_draft

        def slowly(*arguments: Any) -> Path:
            time.sleep(0.3)
            return save_draft(*arguments)

        monkeypatch.setattr(f"{KEEPER}.save_draft", slowly)
        paint(panel)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        ui.correctButton.click()
        time.sleep(0.5)
        assert find_draft(Project(trained), opened) is None
        assert Project(trained).state.case(opened).review == "corrected"

    def test_a_template_keeps_its_label_when_later_painting_is_discarded(
        self, panel: Any, ui: Any, with_template: Path
    ) -> None:
        ui.openTemplateButton.click()
        paint(panel)
        panel.close_case()
        ui.openTemplateButton.click()
        ui.bannerButton.click()
        case = Project(with_template).state.case("phantom_000")
        assert (str(case.role), case.label_version, case.review) == ("template", 1, "not_seen")

    def test_fresh_painting_blocks_skipping_and_rejecting(self, panel: Any, ui: Any, opened: str) -> None:
        paint(panel)
        panel.tick()
        assert not ui.skipButton.enabled and not ui.rejectButton.enabled

    def test_undo_asks_before_it_throws_painting_away(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        paint(panel)
        panel.tick()
        ui.undoButton.click()
        assert panel.view.changed, "the first answer keeps it"
        panel.dialogs.answer = 1
        ui.undoButton.click()
        assert not panel.view.changed and Project(trained).state.case(opened).review == "not_seen"

    def moved(self, panel: Any) -> None:
        """A person straightens the patient: scan and segments lie under one transform."""
        transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
        matrix = vtk.vtkMatrix4x4()
        matrix.SetElement(0, 3, 12.0)
        transform.SetMatrixTransformToParent(matrix)
        for node in (panel.view.scan, panel.view.segmentation):
            node.SetAndObserveTransformNodeID(transform.GetID())

    def painted(self, panel: Any) -> Any:
        """What is painted, voxel by voxel of the scan, as Slicer itself reads it."""
        view = panel.view
        found = np.zeros(view.grid.shape, np.uint8)
        for identity in view.segmentation.GetSegmentation().GetSegmentIDs():
            mask = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan)
            found[mask > 0] = value_of(view.segmentation.GetSegmentation().GetSegment(identity))
        return found

    def test_a_scan_that_somebody_moved_keeps_its_drafts_on_its_own_voxels(
        self, panel: Any, trained: Path, opened: str, clock: Clock
    ) -> None:
        self.moved(panel)
        paint(panel)
        panel.keep_work()
        draft, case = find_draft(Project(trained), opened), Project(trained).state.case(opened)
        assert draft is not None
        read = read_labels(draft, case.geometry)
        assert read.exact and np.array_equal(read.volume.array, self.painted(panel))

    def test_and_its_corrections(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        self.moved(panel)
        paint(panel)
        panel.tick()
        wanted = self.painted(panel)
        ui.correctButton.click()
        project = Project(trained)
        case = project.state.case(opened)
        assert case.review == "corrected", panel.banner.text
        assert np.array_equal(read_labels(project.label_path(case), case.geometry).volume.array, wanted)

    def test_a_scan_that_was_cropped_in_the_scene_keeps_what_lies_in_its_file(
        self, panel: Any, trained: Path, opened: str
    ) -> None:
        """Its node has other voxels: what is painted is brought to the file's by place."""
        paint(panel)
        wanted = self.painted(panel)
        view = panel.view
        cropped = vtk.vtkImageData()
        cropped.DeepCopy(view.scan.GetImageData())
        cropped.SetExtent(0, cropped.GetDimensions()[0] - 2, *cropped.GetExtent()[2:])
        cropped.AllocateScalars(vtk.VTK_SHORT, 1)
        view.scan.SetAndObserveImageData(cropped)
        panel.keep_work()
        draft, case = find_draft(Project(trained), opened), Project(trained).state.case(opened)
        assert draft is not None and np.array_equal(read_labels(draft, case.geometry).volume.array, wanted)

    def test_what_is_painted_is_kept_where_the_scan_was_deleted(self, panel: Any, trained: Path, opened: str) -> None:
        paint(panel)
        wanted = self.painted(panel)
        slicer.mrmlScene.RemoveNode(panel.view.scan)
        panel.keep_work()
        draft, case = find_draft(Project(trained), opened), Project(trained).state.case(opened)
        assert draft is not None and np.array_equal(read_labels(draft, case.geometry).volume.array, wanted)

    def test_or_whose_node_was_centred(self, panel: Any, trained: Path, opened: str) -> None:
        """*Center volume* changes the node's own origin; the segments are moved after it by hand."""
        paint(panel)
        wanted = self.painted(panel)
        matrix = vtk.vtkMatrix4x4()
        matrix.SetElement(1, 3, -7.0)
        for node in (panel.view.scan, panel.view.segmentation):
            node.ApplyTransformMatrix(matrix)
        panel.keep_work()
        draft, case = find_draft(Project(trained), opened), Project(trained).state.case(opened)
        assert draft is not None and np.array_equal(read_labels(draft, case.geometry).volume.array, wanted)


class TestStatus:
    """Slicer's own status of the segments says what was decided."""

    def test_nobody_has_looked_yet(self, panel: Any, opened: str) -> None:
        assert status_of(panel.view) == {"notstarted"}

    def test_painting_is_in_progress(self, panel: Any, opened: str) -> None:
        paint(panel)
        panel.keep_work()
        assert status_of(panel.view) == {"inprogress"}

    @pytest.mark.parametrize(("button", "status"), [("acceptButton", "completed"), ("rejectButton", "flagged")])
    def test_a_decision(self, panel: Any, ui: Any, opened: str, button: str, status: str) -> None:
        getattr(ui, button).click()
        ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(opened))
        panel.results.open()
        assert status_of(panel.view) == {status}

    def test_the_last_decision(self, panel: Any, ui: Any, opened: str) -> None:
        """No case follows: the open one says what was decided."""
        for _ in range(3):
            ui.rejectButton.click()
            panel.tick()
        assert status_of(panel.view) == {"flagged"}

    def test_a_template_is_completed(self, panel: Any, ui: Any, with_template: Path) -> None:
        ui.openTemplateButton.click()
        assert status_of(panel.view) == {"completed"}


class TestQueue:
    def test_the_list_is_the_queue(self, panel: Any, trained: Path, opened: str) -> None:
        assert panel.results.order() == [one.case for one in queue(Project(trained))]

    def test_after_a_decision_the_next_that_waits_is_shown(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        following = panel.results.order()[1]
        ui.rejectButton.click()
        assert panel.view.files.case == following

    def test_the_last_decision_leaves_the_case_open(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        for _ in range(3):
            ui.rejectButton.click()
            panel.tick()
        assert queue(Project(trained)) == [] and panel.view is not None

    def test_every_filter_can_be_chosen(self, ui: Any, opened: str) -> None:
        assert [ui.filterBox.itemData(row) for row in range(ui.filterBox.count)] == list(FILTERS)

    @pytest.mark.parametrize(
        ("wanted", "count"),
        [("all", 3), ("waiting", 2), ("rejected", 1), ("accepted", 0), ("corrected", 0), ("draft", 0)],
    )
    def test_filters(self, panel: Any, ui: Any, opened: str, wanted: str, count: int) -> None:
        ui.rejectButton.click()
        panel.close_case()
        ui.filterBox.setCurrentIndex(ui.filterBox.findData(wanted))
        assert len(panel.results.order()) == count

    @pytest.mark.parametrize("wanted", ["all", "waiting"])
    def test_what_was_left_out_is_not_listed(
        self, panel: Any, ui: Any, trained: Path, opened: str, wanted: str
    ) -> None:
        panel.close_case()
        Project(trained).exclude(opened)
        panel.tick()
        ui.filterBox.setCurrentIndex(ui.filterBox.findData(wanted))
        panel.results.refresh()
        assert opened not in panel.results.order() and len(panel.results.order()) == 2

    def test_what_is_open_and_was_left_out_cannot_be_decided(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        Project(trained).exclude(opened)
        panel.session.project.refresh()
        panel.tick()
        assert not ui.acceptButton.enabled and "left out" in ui.reviewReasonLabel.text

    def test_what_somebody_labelled_by_hand_does_not_wait(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        panel.close_case()
        row = predictions(Project(trained))[opened]
        Project(trained).add_label(opened, row["prediction"], origin="imported", role=Role.LABELLED)
        panel.tick()
        ui.filterBox.setCurrentIndex(ui.filterBox.findData("waiting"))
        panel.results.look_again()
        assert opened not in panel.results.order()

    def test_likely_quality_is_said_not_to_be_checked_yet(self, ui: Any, opened: str) -> None:
        assert "not yet checked on your scans: 0 of 10" in ui.standingLabel.text
        assert "Likely quality:" in ui.resultLabel.text and "±" not in ui.resultLabel.text

    def test_what_to_do_next_is_said(self, ui: Any, opened: str) -> None:
        assert "Go on: correct the worst" in ui.standingLabel.text

    def test_another_reviewers_decision_is_not_overruled(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        reviews.reject(Project(trained), opened, reviewer="ann")
        ui.acceptButton.click()
        assert "changed meanwhile by somebody else: it is rejected now" in panel.banner.text
        assert Project(trained).state.case(opened).review == "rejected"


def reopen(panel: Any, ui: Any, case: str, wanted: str = "all") -> None:
    """Open a case of the list again."""
    ui.filterBox.setCurrentIndex(ui.filterBox.findData(wanted))
    place = ui.resultCaseBox.findData(case)
    assert place >= 0, f"{case} is not among the cases {wanted!r}: {panel.results.order()}"
    ui.resultCaseBox.setCurrentIndex(place)
    panel.results.open()
    panel.tick()


def shown(panel: Any, folder: Path) -> np.ndarray[Any, Any]:
    """Label values on the screen."""
    return np.asarray(drawn(panel.view.segmentation, panel.view.scan, Project(folder).state.labels).labels.array)


def label_of(folder: Path, case: str) -> np.ndarray[Any, Any]:
    project = Project(folder)
    one = project.state.case(case)
    return read_labels(project.label_path(one), one.geometry).volume.array


def train_again(panel: Any, ui: Any) -> None:
    before = panel.session.training.job.id
    panel.tick()
    ui.trainButton.click()
    done = lambda: panel.session.project.refresh().current_training != before and not panel.session.busy  # noqa: E731
    wait(panel, done, "the next training")
    panel.tick()
    panel.close_case()
    panel.results.look_again()


class TestReopening:
    """What was decided can be looked at, and mended: a person's label is shown, not the prediction behind it."""

    def test_a_corrected_case_shows_its_label(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        paint(panel, 6)
        panel.tick()
        ui.correctButton.click()
        reopen(panel, ui, opened, "corrected")
        assert np.array_equal(shown(panel, trained), label_of(trained, opened))

    def test_mending_it_further_keeps_what_was_mended(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        paint(panel, 6)
        panel.tick()
        ui.correctButton.click()
        first = label_of(trained, opened)
        reopen(panel, ui, opened)
        paint(panel, 8)
        panel.tick()
        ui.correctButton.click()
        second = label_of(trained, opened)
        assert not np.array_equal(first, second) and (second[first > 0] > 0).all(), panel.banner.text
        assert Project(trained).state.case(opened).label_version == 2

    def test_undo_of_a_correction_shows_the_painting(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        paint(panel, 6)
        panel.tick()
        ui.correctButton.click()
        mended = label_of(trained, opened)
        reopen(panel, ui, opened)
        ui.undoButton.click()
        panel.tick()
        assert np.array_equal(shown(panel, trained), mended)
        ui.correctButton.click()
        assert np.array_equal(label_of(trained, opened), mended), "the painting was lost"

    @pytest.mark.parametrize("wanted", ["accepted", "corrected", "all"])
    def test_after_the_next_training_it_is_still_there(
        self, panel: Any, ui: Any, trained: Path, opened: str, wanted: str
    ) -> None:
        if wanted == "accepted":
            ui.acceptButton.click()
        else:
            paint(panel, 6)
            panel.tick()
            ui.correctButton.click()
        train_again(panel, ui)
        reopen(panel, ui, opened, wanted)
        assert np.array_equal(shown(panel, trained), label_of(trained, opened))
        assert "did not predict this case" in ui.resultLabel.text

    def test_there_it_is_mended_as_a_correction(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        ui.acceptButton.click()
        train_again(panel, ui)
        reopen(panel, ui, opened)
        paint(panel, 6)
        panel.tick()
        ui.correctButton.click()
        project = Project(trained)
        case = project.state.case(opened)
        assert (case.review, project.label_record(case)["origin"]) == ("corrected", "corrected"), panel.banner.text

    def test_taken_back_there_it_stays_in_the_list(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        """Without a prediction there is nothing to accept, and it is said why."""
        ui.acceptButton.click()
        train_again(panel, ui)
        reopen(panel, ui, opened)
        ui.undoButton.click()
        panel.tick()
        assert Project(trained).state.case(opened).review == "not_seen" and opened in panel.results.order()
        assert not ui.acceptButton.enabled and "did not predict this case" in ui.reviewReasonLabel.text

    def test_after_the_last_case_it_can_be_decided_on_further(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        """No case follows: the same one stays open, and what its own person decided is no other person's decision."""
        for _ in range(2):
            ui.rejectButton.click()
            panel.tick()
        ui.skipButton.click()
        panel.tick()
        ui.acceptButton.click()
        assert "somebody else" not in panel.banner.text, panel.banner.text
        assert Project(trained).state.case(panel.view.files.case).review == "accepted"

    def test_painting_on_a_rejected_case_is_kept_by_undo(
        self, panel: Any, ui: Any, trained: Path, opened: str, clock: Clock
    ) -> None:
        ui.rejectButton.click()
        reopen(panel, ui, opened)
        paint(panel, 6)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        wait(panel, lambda: find_draft(Project(trained), opened) is not None, "the draft", 10)
        ui.undoButton.click()
        assert Project(trained).state.case(opened).review == "draft", panel.banner.text
        ui.correctButton.click()
        assert Project(trained).state.case(opened).review == "corrected", panel.banner.text

    def test_a_finished_training_does_not_disturb_an_open_case_that_it_did_not_predict(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        ui.acceptButton.click()
        reopen(panel, ui, opened)
        before = panel.session.training.job.id
        ui.trainButton.click()
        done = lambda: panel.session.project.refresh().current_training != before and not panel.session.busy  # noqa: E731
        wait(panel, done, "the next training")
        panel.tick()
        # results are in force a moment before the job says that it is finished: whichever is seen last is shown
        assert panel.view.files.case == opened and ui.bannerButton.text in ("Show them", "Show the results")

    def test_an_offer_to_discard_is_for_its_own_case_alone(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        paint(panel, 6)
        panel.tick()
        panel.keep_work()
        panel.close_case()
        reopen(panel, ui, opened)
        assert "was brought back" in panel.banner.text
        other = next(case for case in panel.results.order() if case != opened)
        ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(other))
        panel.results.open()
        paint(panel, 7)
        painted = shown(panel, trained)
        panel.banner._act()
        assert panel.view.files.case == other and np.array_equal(shown(panel, trained), painted)
        assert find_draft(Project(trained), opened) is not None

    def test_step_two_does_not_offer_it(self, ui: Any, panel: Any, trained: Path, opened: str) -> None:
        ui.acceptButton.click()
        panel.tick()
        panel.template.show()
        assert ui.templateCaseBox.findData(opened) < 0, "saved there it would count as a template"


class TestNewSegments:
    def add(self, panel: Any, painted: bool) -> None:
        view = panel.view
        identity = view.segmentation.GetSegmentation().AddEmptySegment("", "Segment_4")
        if painted:
            array = np.zeros(slicer.util.arrayFromVolume(view.scan).shape, np.uint8)
            array[0, 0, 0:3] = 1
            slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)

    def reopened(self, panel: Any, ui: Any, folder: Path, case: str, name: str) -> tuple[int, Drawn]:
        """A draft with a new segment, opened again after the project gave its value to a label of this name."""
        self.add(panel, painted=True)
        panel.tick()
        panel.keep_work()
        panel.close_case()
        project = Project(folder)
        taken = project.state.labels.next_value
        project.update_labels([Label(taken, name, (1, 2, 3))])
        panel.tick()
        reopen(panel, ui, case)
        return taken, drawn(panel.view.segmentation, panel.view.scan, Project(folder).state.labels)

    def test_an_empty_one_is_no_label(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        before = Project(trained).state.labels.values
        self.add(panel, painted=False)
        paint(panel, 6)
        panel.tick()
        ui.correctButton.click()
        project = Project(trained)
        assert (project.state.labels.values, project.state.case(opened).review) == (before, "corrected")

    @pytest.mark.parametrize(("answer", "added"), [(0, False), (1, True)], ids=["go back", "add it"])
    def test_a_painted_one_is_asked_about(
        self, panel: Any, ui: Any, trained: Path, opened: str, answer: int, added: bool
    ) -> None:
        before = Project(trained).state.labels.values
        self.add(panel, painted=True)
        panel.tick()
        panel.dialogs.answer = answer
        ui.correctButton.click()
        project = Project(trained)
        assert (project.state.labels.values != before, project.state.case(opened).review == "corrected") == (
            added,
            added,
        )

    def test_one_in_a_draft_keeps_its_name(
        self, panel: Any, ui: Any, trained: Path, opened: str, tmp_path: Path
    ) -> None:
        """While it waited, the project gave its value to another label."""
        taken, found = self.reopened(panel, ui, trained, opened, "cyst")
        names = {label.name: label.value for label in found.table}
        assert names["cyst"] == taken and names["Segment_4"] != taken
        assert found.counts[names["Segment_4"]] == 3 and not found.counts[taken]

    def test_one_in_a_draft_becomes_the_label_that_the_project_has_by_now(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        """The same new structure was added with another case meanwhile."""
        taken, found = self.reopened(panel, ui, trained, opened, "segment_4")
        assert found.counts[taken] == 3 and len(found.table.values) == len(Project(trained).state.labels.values)


class TestLabelsThatCameLater:
    """A label that was added after the training: nobody looked for it in its predictions."""

    @pytest.fixture
    def later(self, panel: Any, trained: Path, opened: str) -> int:
        project = Project(trained)
        value = project.state.labels.next_value
        project.update_labels([Label(value, "late", (1, 2, 3))])
        panel.tick()
        panel.results.open()
        panel.tick()
        return value

    def declared(self, folder: Path, case: str) -> list[int]:
        project = Project(folder)
        return list(project.label_record(project.state.case(case))["declared"])

    def test_accepting_does_not_ask_about_it(self, panel: Any, ui: Any, trained: Path, opened: str, later: int) -> None:
        ui.acceptButton.click()
        assert later not in self.declared(trained, opened), panel.banner.text

    def test_a_correction_leaves_it_unknown(self, panel: Any, ui: Any, trained: Path, opened: str, later: int) -> None:
        paint(panel, 6)
        panel.tick()
        ui.correctButton.click()
        assert later not in self.declared(trained, opened), panel.banner.text


class TestSomebodyElse:
    def test_their_decision_is_shown(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        other = panel.results.order()[1]
        reviews.reject(Project(trained), other, reviewer="ann")
        panel.tick()
        assert "rejected" in ui.resultCaseBox.itemText(ui.resultCaseBox.findData(other))

    def test_painting_does_not_reopen_what_they_accepted(
        self, panel: Any, trained: Path, opened: str, clock: Clock
    ) -> None:
        reviews.accept(Project(trained), opened, reviewer="ann")
        paint(panel, 6)
        panel.tick()
        clock.now += PAUSE_S
        panel.tick()
        wait(panel, lambda: find_draft(Project(trained), opened) is not None, "the draft", 10)
        wait(panel, lambda: "changed meanwhile by somebody else" in panel.banner.text, "the message", 10)
        assert Project(trained).state.case(opened).review == "accepted"

    def test_a_correction_does_not_replace_theirs(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        paint(panel, 6)
        panel.tick()
        reviews.accept(Project(trained), opened, reviewer="ann")
        ui.correctButton.click()
        assert "changed meanwhile by somebody else" in panel.banner.text
        assert Project(trained).state.case(opened).label_version == 1


class TestWhoDecided:
    def test_it_stands_beside_the_state(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        reviews.skip(Project(trained), opened, reviewer="ann")
        panel.session.project.refresh()
        panel.results.show()
        assert "skipped by ann, 20" in ui.resultLabel.text

    def test_a_template_that_somebody_else_corrected_meanwhile_is_not_replaced(
        self, panel: Any, ui: Any, with_template: Path, cohort: Path
    ) -> None:
        """Two people at once: the one who saves later is told."""
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_000"))
        ui.openTemplateButton.click()
        other = Project(with_template)
        other.add_label("phantom_000", cohort / "labels" / "phantom_000.nrrd")
        paint(panel)
        panel.view.segmentation.GetSegmentation().GetNthSegment(0).SetName("mine")
        ui.saveTemplateButton.click()
        assert "mine" not in [label.name for label in Project(with_template).state.labels], "nothing of it is saved"
        assert "changed meanwhile by somebody else" in panel.banner.text
        assert Project(with_template).state.case("phantom_000").label_version == 2

    def test_a_template_is_saved_twice_by_one_person(self, panel: Any, ui: Any, with_template: Path) -> None:
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_000"))
        ui.openTemplateButton.click()
        for size in (4, 5):
            paint(panel, size)
            ui.saveTemplateButton.click()
        assert Project(with_template).state.case("phantom_000").label_version == 3, panel.banner.text


def test_results_of_an_older_program_are_shown(panel: Any, ui: Any, trained: Path) -> None:
    project = Project(trained)
    index = project.jobs / str(project.state.current_training) / "results" / "index.json"
    value = files.read_json(index)
    for row in value["cases"]:
        row["scores"] = {"uncertainty": 0.2, "label_uncertainty": 0.2}
        row.pop("uncertainty", None)
    files.write_json(index, value)
    panel.results.look_again()
    panel.results.open()
    assert "Predicted by" in ui.resultLabel.text


class TestLeavingOut:
    def test_a_selected_scan_is_left_out_and_taken_in_again(self, panel: Any, ui: Any, trained: Path) -> None:
        panel.tick()
        case = Project(trained).state.cases[1]
        ui.caseTable.selectRow(1)
        ui.excludeButton.click()
        assert Project(trained).state.case(case.id).role == "excluded"
        assert ui.excludeButton.text == "Take it in again"
        ui.excludeButton.click()
        assert Project(trained).state.case(case.id) == case

    def test_without_a_selection_the_button_says_why(self, panel: Any, ui: Any, trained: Path) -> None:
        panel.tick()
        assert not ui.excludeButton.enabled and "Select a scan" in ui.excludeButton.toolTip


class TestAdvice:
    def test_after_adding_scans_one_is_recommended(self, panel: Any, ui: Any, with_scans: Path) -> None:
        wait(panel, lambda: bool(panel.session.ranking()), "the ranking")
        panel.tick()
        best = panel.session.ranking()[0].case
        assert f"Recommended: {best}" in ui.adviceLabel.text
        assert ui.templateCaseBox.itemData(0) == best and "(recommended, 0." in ui.templateCaseBox.itemText(0)

    def test_every_scan_says_how_much_it_looks_like_the_others_and_why(
        self, panel: Any, ui: Any, with_scans: Path
    ) -> None:
        wait(panel, lambda: bool(panel.session.ranking()), "the ranking")
        panel.tick()
        for number, one in enumerate(panel.session.ranking()):
            assert f"{one.centrality:.2f})" in ui.templateCaseBox.itemText(number)
            assert ui.templateCaseBox.itemData(number, qt.Qt.ToolTipRole) == one.reason

    def test_a_scan_that_does_not_fit_is_never_recommended(self, panel: Any, ui: Any, with_scans: Path) -> None:
        """Where nothing looks like anything the first of the list has a warning too."""
        wait(panel, lambda: bool(panel.session.ranking()), "the ranking")
        panel.session._ranking = [replace(one, warning="another modality") for one in panel.session._ranking]
        panel.template.show()
        assert "Recommended" not in ui.adviceLabel.text and "No scan looks like the others" in ui.adviceLabel.text
        assert "recommended" not in ui.templateCaseBox.itemText(0)

    def test_what_was_left_out_is_neither_recommended_nor_warned_of(
        self, panel: Any, ui: Any, with_scans: Path
    ) -> None:
        wait(panel, lambda: bool(panel.session.ranking()), "the ranking")
        best = panel.session.ranking()[0].case
        Project(with_scans).exclude(best)
        panel.session.project.refresh()
        panel.tick()
        assert best not in ui.adviceLabel.text and "Recommended: " in ui.adviceLabel.text

    def test_with_a_template_nothing_is_recommended(self, panel: Any, ui: Any, with_template: Path) -> None:
        wait(panel, lambda: "looked at" not in ui.adviseButton.toolTip, "the end of the advice")
        assert not ui.adviseButton.enabled and "There is a template." in ui.adviseButton.toolTip

    def test_without_a_project_the_button_says_why(self, panel: Any, ui: Any) -> None:
        assert not ui.adviseButton.enabled and "Open or make a project" in ui.adviseButton.toolTip


def test_training_again_uses_what_was_reviewed(panel: Any, ui: Any, trained: Path, opened: str) -> None:
    paint(panel)
    panel.tick()
    ui.correctButton.click()
    ui.acceptButton.click()
    before = panel.session.training.job.id
    panel.tick()
    ui.trainButton.click()
    job = panel.session.training.job
    assert job.id != before
    rows = files.read_json(job.inputs / "cases.json")["labelled"]
    assert sorted(row["origin"] for row in rows) == ["accepted", "corrected", "template"]
    wait(panel, lambda: not panel.session.busy, "the end")


class TestExport:
    def test_everything_is_written(self, panel: Any, ui: Any, trained: Path, tmp_path: Path) -> None:
        ui.exportPathEdit.currentPath = str(tmp_path / "out")
        ui.exportButton.click()
        wait(panel, lambda: "The export is finished" in panel.banner.text, "the end of the export")
        assert (tmp_path / "out" / "volumes.csv").is_file() and str(tmp_path / "out") in ui.exportLabel.text

    def test_dicom_seg_asks_for_the_series(self, panel: Any, ui: Any, trained: Path, tmp_path: Path) -> None:
        ui.exportPathEdit.currentPath = str(tmp_path / "out")
        ui.formatBox.setCurrentIndex(ui.formatBox.findData("dicom-seg"))
        assert not ui.exportButton.enabled and "original DICOM series" in ui.exportReasonLabel.text

    def test_an_export_over_other_files_is_refused(self, panel: Any, ui: Any, trained: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
        ui.exportPathEdit.currentPath = str(tmp_path)
        ui.exportButton.click()
        assert "holds other files" in panel.banner.text

    def test_an_export_that_goes_on_is_found_again(self, panel: Any, ui: Any, trained: Path, tmp_path: Path) -> None:
        """Slicer was closed meanwhile: the bar, and no second export beside the first."""
        job = JobFolder.create(trained / "jobs", JobKind.EXPORT, {"output": str(tmp_path / "out")}, [])
        who = {**lock.identity(), "state": "running", "heartbeat": time.time() + 60, "fraction": 0.25}
        files.write_json(job.status, who)
        ui.openProjectButton.click()
        ui.exportPathEdit.currentPath = str(tmp_path / "other")
        panel.tick()
        assert ui.exportBar.value == 250 and not ui.exportButton.enabled
        assert "The export is under way" in ui.exportButton.toolTip

    def test_an_export_that_ended_with_another_computer_blocks_nothing(
        self, panel: Any, ui: Any, trained: Path, tmp_path: Path
    ) -> None:
        job = JobFolder.create(trained / "jobs", JobKind.EXPORT, {"output": str(tmp_path / "out")}, [])
        gone = {**lock.identity(), "host": "elsewhere", "state": "running", "heartbeat": time.time() - 3600}
        files.write_json(job.status, gone)
        ui.openProjectButton.click()
        ui.exportPathEdit.currentPath = str(tmp_path / "other")
        panel.tick()
        assert ui.exportButton.enabled, ui.exportButton.toolTip

    def test_without_a_training_nothing_can_be_applied(self, panel: Any, ui: Any, with_template: Path) -> None:
        panel.tick()
        assert not ui.applyButton.enabled and "Train first" in ui.applyButton.toolTip

    @pytest.fixture
    def with_settings(self, panel: Any, trained: Path) -> Path:
        """As if the stand-in for the worker had left the settings of a training behind."""
        work = trained / "jobs" / panel.session.current_training / "work"
        files.write_json(work / "config.json", {"rounds": 2})
        (work / "weights").mkdir()
        (work / "weights" / "round-2.pt").touch()
        panel.tick()
        return trained

    def test_a_report_that_cannot_be_written_says_why(self, panel: Any, ui: Any, with_settings: Path) -> None:
        ui.reportButton.click()
        wait(panel, lambda: "The report failed" in panel.banner.text, "the end of the report")
        assert "environment.json" in panel.banner.text and not ui.exportLabel.text

    @pytest.mark.parametrize("button", ["reportButton", "modelButton", "applyButton"])
    def test_a_training_of_which_the_predictions_alone_are_here(
        self, panel: Any, ui: Any, trained: Path, button: str
    ) -> None:
        """As in the sample."""
        panel.tick()
        assert not getattr(ui, button).enabled and "not its network" in getattr(ui, button).toolTip

    def test_of_a_training_that_was_stopped_there_is_a_report_alone(
        self, panel: Any, ui: Any, with_settings: Path
    ) -> None:
        next(with_settings.rglob("round-2.pt")).unlink()
        panel.tick()
        assert ui.reportButton.enabled and not ui.modelButton.enabled
        assert "resume it first" in ui.modelButton.toolTip and "resume it first" in ui.applyButton.toolTip

    def test_without_rounds_there_is_no_network_to_save(self, panel: Any, ui: Any, with_settings: Path) -> None:
        files.write_json(next(with_settings.rglob("config.json")), {"rounds": 0})
        panel.tick()
        assert not ui.modelButton.enabled and "no network" in ui.modelButton.toolTip

    @pytest.mark.parametrize("answer", [0, 1])
    def test_a_model_that_is_there_already_is_asked_about(
        self, panel: Any, ui: Any, with_settings: Path, tmp_path: Path, answer: int
    ) -> None:
        """Qt asked about the name that was typed, which has no ending."""
        (tmp_path / "model.zip").write_text("of before", encoding="utf-8")
        panel.dialogs.named, panel.dialogs.answer = tmp_path / "model", answer
        ui.modelButton.click()
        assert "model.zip is there already" in panel.dialogs.asked[-1]
        assert (panel.session.output_job is not None) == bool(answer)

    def test_a_model_that_nobody_named_is_not_written(self, panel: Any, ui: Any, with_settings: Path) -> None:
        before = panel.session.output_job
        ui.modelButton.click()
        assert panel.dialogs.asked[-1] == "Save the trained model" and panel.session.output_job is before

    @pytest.mark.parametrize("button", ["reportButton", "modelButton"])
    def test_without_a_training_there_is_none(self, panel: Any, ui: Any, with_template: Path, button: str) -> None:
        panel.tick()
        assert not getattr(ui, button).enabled and "Train first" in getattr(ui, button).toolTip


class TestEarlierTraining:
    @pytest.fixture
    def two(self, panel: Any, ui: Any, trained: Path) -> tuple[str, str]:
        """Two trainings with predictions, the second one listed; the names of both."""
        first = panel.session.current_training
        panel.tick()
        ui.trainButton.click()
        wait(panel, lambda: panel.session.current_training != first and not panel.session.busy, "the second training")
        panel.tick()
        assert panel.results.training == panel.session.current_training
        return first, panel.session.current_training

    def choose(self, ui: Any, name: str) -> None:
        """As a click does."""
        ui.trainingBox.setCurrentIndex(ui.trainingBox.findData(name))
        ui.trainingBox.activated.emit(ui.trainingBox.currentIndex)

    def test_with_one_training_there_is_nothing_to_choose(self, ui: Any, trained: Path) -> None:
        assert not ui.trainingBox.isVisibleTo(ui.trainingBox.parent())

    def test_the_newest_one_is_chosen_at_first(self, ui: Any, two: tuple[str, str]) -> None:
        assert ui.trainingBox.isVisibleTo(ui.trainingBox.parent())
        assert [ui.trainingBox.itemData(n) for n in range(ui.trainingBox.count)] == list(two)
        assert ui.trainingBox.itemData(ui.trainingBox.currentIndex) == two[1]

    def test_an_earlier_ones_predictions_count_again(
        self, panel: Any, ui: Any, trained: Path, two: tuple[str, str]
    ) -> None:
        self.choose(ui, two[0])
        assert Project(trained).state.current_training == two[0] and panel.results.training == two[0]
        panel.results.open()
        assert f"Predicted by {two[0]}" in ui.resultLabel.text
        panel.tick()
        assert "New predictions" not in panel.banner.text, "a person's own choice is no news"

    def test_a_round_that_came_since_is_to_be_looked_at_first(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        """A stopped training in use was resumed meanwhile: its next round is another prediction."""
        index = JobFolder(trained / "jobs" / panel.session.current_training).index
        text = index.read_text(encoding="utf-8")
        shutil.copytree(index.parent / "1", index.parent / "2")
        index.write_text(text.replace('"1/', '"2/'), encoding="utf-8")
        ui.acceptButton.click()
        assert "was predicted anew" in panel.banner.text
        assert Project(trained).state.case(opened).label_version is None

    def test_what_was_painted_is_kept(self, panel: Any, ui: Any, trained: Path, two: tuple[str, str]) -> None:
        panel.results.open()
        case = panel.view.files.case
        paint(panel)
        self.choose(ui, two[0])
        assert panel.view is None and find_draft(Project(trained), case) is not None


@pytest.mark.parametrize("answer", [0, 1])
def test_a_training_of_another_computer_is_taken_over_when_a_person_says_that_it_ended(
    panel: Any, ui: Any, with_template: Path, answer: int
) -> None:
    job = request_training(Project(with_template), {})
    gone = {**lock.identity(), "host": "elsewhere", "state": "running", "heartbeat": time.time() - 3600}
    files.write_json(job.status, gone)
    ui.openProjectButton.click()
    panel.tick()
    panel.dialogs.answer = answer
    ui.resumeButton.click()
    assert "ran on elsewhere" in panel.dialogs.asked[-1], panel.banner.text
    if answer:
        wait(panel, lambda: Project(with_template).state.current_training == job.id, "the end of the training")
    else:
        assert files.read_json(job.status)["host"] == "elsewhere", "it was taken over unasked"


def test_scans_that_a_training_left_out_are_named(panel: Any, trained: Path) -> None:
    index = panel.session.training.job.index
    skipped = [{"name": f"scan_{n}", "reason": "cannot be read"} for n in range(4)]
    files.write_json(index, {**files.read_json(index), "skipped": skipped})
    panel._trained()
    assert "Left out: scan_0: cannot be read; scan_1: cannot be read; scan_2: cannot be read and 1 more" in (
        panel.banner.text
    )


class TestMovedScans:
    def test_they_are_located(self, panel: Any, ui: Any, with_template: Path, cohort: Path, tmp_path: Path) -> None:
        moved = tmp_path / "moved"
        shutil.copytree(cohort / "images", moved)
        project = Project(with_template)
        lost = {case.id: str(tmp_path / "gone" / Path(case.absolute).name) for case in project.state.cases}
        cases = tuple(replace(one, absolute=lost[one.id], relative=lost[one.id]) for one in project.state.cases)
        project.change(lambda state: replace(state, cases=cases))
        ui.openProjectButton.click()
        assert "4 scans are not where they were" in panel.banner.text
        panel.dialogs.found = moved
        ui.bannerButton.click()
        wait(panel, lambda: "4 scans were found, 0 are still missing" in panel.banner.text, "the end of the search")
        assert Project(with_template).missing() == []

    def test_the_folder_can_be_named_at_any_time(
        self, panel: Any, ui: Any, with_template: Path, cohort: Path, tmp_path: Path
    ) -> None:
        """Also after the question was answered with nothing, and for scans that are lost while the project is open."""
        moved = tmp_path / "moved"
        shutil.copytree(cohort / "images", moved)
        project = Project(with_template)
        gone = [
            replace(one, absolute=f"/gone/{one.id}.nrrd", relative=f"/gone/{one.id}.nrrd") for one in cases_of(project)
        ]
        project.change(lambda state: replace(state, cases=tuple(gone)))
        panel.tick()
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_001"))
        ui.openTemplateButton.click()
        assert "Locate folder..." in panel.banner.text, "a person in Slicer was told of a shell alone"
        ui.locateButton.click()
        panel.dialogs.found = moved
        ui.locateButton.click()
        wait(panel, lambda: "4 scans were found, 0 are still missing" in panel.banner.text, "the end of the search")
        assert Project(with_template).missing() == []

    def test_without_scans_there_is_nothing_to_locate(self, ui: Any, project: Path) -> None:
        assert not ui.locateButton.enabled


def cases_of(project: Project) -> tuple[Any, ...]:
    return project.state.cases


@pytest.mark.parametrize("wanted", [True, False], ids=["going on", "from scratch"])
def test_a_training_goes_on_from_the_last_one_where_it_can(
    panel: Any, ui: Any, trained: Path, opened: str, wanted: bool
) -> None:
    """The stand-in's training has no weights: the next one begins anew by itself, and is not refused."""
    assert ui.continueCheckBox.checked, "going on was measured to be better"
    ui.continueCheckBox.checked = wanted
    before = panel.session.training.job.id
    ui.trainButton.click()
    assert panel.session.training.job.id != before, panel.banner.text
    assert panel.session.training.job.spec()["parameters"].get("continue_from") is None
