"""Disks that are away or full, locks that nobody gives back, nodes that a person deletes: nothing is lost, nothing
freezes, and what is decided about is what is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slicer
import vtk
from panel_helpers import Clock, wait

from SemiSAMO1Lib import files, lock, processes
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.project import Project, session
from SemiSAMO1Lib.project.drafts import find_draft
from SemiSAMO1Lib.scene import nodes

#: Seconds between the last change and the draft, and at most between the first and the draft.
PAUSE_S, LONGEST_S = 20.0, 120.0


def paint(panel: Any, size: int = 4) -> None:
    """A box of voxels in the first segment of the open case."""
    put_box(panel.view.segmentation, panel.view.scan, 0, size)


def put_box(node: Any, scan: Any, number: int, size: int) -> None:
    identity = node.GetSegmentation().GetNthSegmentID(number)
    array = np.zeros(slicer.util.arrayFromVolume(scan).shape, np.uint8)
    array[0:3, 0:size, 0:5] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(array, node, identity, scan)


def damage_training(folder: Path) -> str:
    """The current training's status is no status any more; returns the training's name."""
    name = str(Project(folder).state.current_training)
    JobFolder(folder / "jobs" / name).status.write_text("[]")
    return name


def be_due(panel: Any, clock: Clock) -> None:
    """Painted, and nothing since then."""
    panel.tick()
    clock.now += PAUSE_S
    panel.tick()


class TestTheProjectIsAway:
    """A share or a disk that comes back."""

    def test_painting_is_kept_when_it_is_back(self, panel: Any, trained: Path, opened: str, clock: Clock) -> None:
        away = trained.with_name("elsewhere")
        paint(panel)
        trained.rename(away)
        be_due(panel, clock)
        wait(panel, lambda: "is not there at the moment" in panel.banner.text, "the message", 10)
        assert not trained.exists(), "painting was written to where the project is not"
        away.rename(trained)
        clock.now += 60
        panel.keep_work()
        assert find_draft(Project(trained), opened) is not None
        assert Project(trained).state.case(opened).review == "draft"

    @pytest.mark.parametrize("value", ["x" * 5000])
    def test_the_module_opens_without_what_it_remembers(self, panel: Any, trained: Path, value: str) -> None:
        """The name is longer than file systems take, which is an error like that of a share that is away."""
        panel.settings.put("recent", [f"/{value}", str(trained)])
        panel.settings.put("probe", {"ok": True, "executable": f"/{value}/python"})
        assert panel.settings.recent == [str(trained)] and panel.setup.probe == {}

    def test_a_project_whose_share_is_away_is_in_the_list_again_when_it_is_back(
        self, panel: Any, trained: Path, tmp_path: Path
    ) -> None:
        away = trained.with_name("away")
        panel.settings.put("recent", [str(trained)])
        trained.rename(away)
        panel.settings.remember(tmp_path)
        without = panel.settings.recent
        away.rename(trained)
        assert without == [] and panel.settings.recent == [str(trained)]

    def test_a_recent_project_whose_job_is_damaged_does_not_keep_it_closed(self, panel: Any, trained: Path) -> None:
        damage_training(trained)
        panel.session.close()
        panel.session.project = None
        panel.enter()
        panel.project.open(trained)
        assert panel.session.project is not None and panel.session.project.folder == trained.resolve()


class TestALockThatIsNotGivenBack:
    @pytest.fixture
    def foreign(self, trained: Path) -> Iterator[Path]:
        path = trained / "project.lock"
        yield path
        path.unlink(missing_ok=True)

    def test_it_does_not_hold_up_each_tick(
        self, panel: Any, trained: Path, opened: str, clock: Clock, foreign: Path
    ) -> None:
        paint(panel)
        files.write_json(foreign, {**lock.identity(), "host": "another computer"})
        be_due(panel, clock)
        wait(panel, lambda: find_draft(Project(trained), opened) is not None, "the draft", 10)
        began = time.monotonic()
        for _ in range(5):
            panel.tick()
        assert time.monotonic() - began < session.PATIENCE_S, "each tick waits for the lock"

    def test_what_was_painted_is_noted_when_it_is_free(
        self, panel: Any, ui: Any, trained: Path, opened: str, clock: Clock, foreign: Path
    ) -> None:
        """Also of a case that is not open any more."""
        paint(panel)
        files.write_json(foreign, {**lock.identity(), "host": "another computer"})
        ui.nextButton.click()
        assert panel.view.files.case != opened
        foreign.unlink()
        clock.now += 60
        panel.tick()
        assert Project(trained).state.case(opened).review == "draft"

    def test_it_is_noted_when_no_case_is_open_any_more(
        self, panel: Any, trained: Path, opened: str, clock: Clock, foreign: Path
    ) -> None:
        paint(panel)
        files.write_json(foreign, {**lock.identity(), "host": "another computer"})
        panel.close_case()
        foreign.unlink()
        clock.now += 60
        panel.tick()
        assert Project(trained).state.case(opened).review == "draft"

    def test_it_is_noted_in_the_project_that_it_belongs_to(
        self, panel: Any, ui: Any, trained: Path, opened: str, clock: Clock, foreign: Path, tmp_path: Path
    ) -> None:
        copied = shutil.copytree(trained, tmp_path / "another project")
        paint(panel)
        files.write_json(foreign, {**lock.identity(), "host": "another computer"})
        ui.projectPathEdit.currentPath = str(copied)
        ui.openProjectButton.click()
        foreign.unlink()
        clock.now += 60
        panel.tick()
        states = [Project(folder).state.case(opened).review for folder in (trained, copied)]
        assert states == ["draft", "not_seen"], f"of the project and of another one: {states}"


def test_a_note_that_fails_is_not_tried_at_each_tick(
    panel: Any, trained: Path, opened: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def full_disk(_project: Any, case: str, *_: Any) -> None:
        tried.append(case)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("SemiSAMO1Lib.panel.draft_keeper.reviews.begin_draft", full_disk)
    paint(panel)
    be_due(panel, clock)
    for _ in range(5):
        panel.tick()
    assert tried == [opened]
    panel.close_case()
    assert panel.dialogs.asked == [], "what was painted is in the draft: nothing is lost"


def test_who_paints_on_and_on_is_kept_too(panel: Any, trained: Path, opened: str, clock: Clock) -> None:
    began = clock.now
    for stroke in range(30):
        paint(panel, 4 + stroke % 4)
        panel.tick()
        clock.now += PAUSE_S / 2
        if find_draft(Project(trained), opened) is not None:
            break
    panel.drafts._take_result(wait=True)
    assert find_draft(Project(trained), opened) is not None and clock.now - began <= LONGEST_S + PAUSE_S


def test_threads_have_time_only_while_there_is_one(panel: Any, trained: Path, opened: str, clock: Clock) -> None:
    """In Slicer the main thread keeps Python while it waits for events."""
    assert not panel.drafts._time._timer.active
    paint(panel)
    be_due(panel, clock)
    assert panel.drafts._time._timer.active, "nothing gives the thread that writes a turn"
    wait(panel, lambda: find_draft(Project(trained), opened) is not None, "the draft", 10)
    wait(panel, lambda: panel.drafts._writing is None, "the thread's end", 10)
    wait(panel, lambda: not panel.drafts._time._timer.active, "the end of the gifts", 10)


def test_terminology_alone_is_a_change(panel: Any, trained: Path, opened: str) -> None:
    segmentation = panel.view.segmentation.GetSegmentation()
    segment = segmentation.GetSegment(segmentation.GetNthSegmentID(0))
    tag = slicer.vtkSegment.GetTerminologyEntryTagName()
    segment.SetTag(tag, "Any~SCT^123037004^Anatomical Structure~SCT^59652004^Atrium~^^~Any~^^~^^")
    assert panel.view.changed and panel.view.unkept


class TestWhatIsNamedIsWhatIsOpen:
    def test_a_case_that_cannot_be_opened_is_not_named(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        following = ui.resultCaseBox.itemData(ui.resultCaseBox.currentIndex + 1)
        scan = Project(trained).image_path(Project(trained).state.case(following))
        hidden = scan.with_suffix(".away")
        scan.rename(hidden)
        try:
            ui.nextButton.click()
        finally:
            hidden.rename(scan)
        assert panel.view.files.case == opened == ui.resultCaseBox.itemData(ui.resultCaseBox.currentIndex)

    def test_a_segmentation_that_a_person_deleted_is_said(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        panel.banner.hide()
        slicer.mrmlScene.RemoveNode(panel.view.segmentation)
        ui.acceptButton.click()
        assert panel.banner.text and Project(trained).state.case(opened).review == "not_seen"


class TestTakingASegmentation:
    @pytest.fixture
    def theirs(self, panel: Any, ui: Any, with_template: Path) -> Any:
        """Two segments of a person's own, on the open template's grid."""
        ui.openTemplateButton.click()
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "theirs")
        node.CreateDefaultDisplayNodes()
        node.SetReferenceImageGeometryParameterFromVolumeNode(panel.view.scan)
        for name in ("one", "two"):
            node.GetSegmentation().AddEmptySegment("", name)
        ui.takeNodeSelector.setCurrentNode(node)
        panel.dialogs.answer = 0
        return node

    def test_voxels_that_two_segments_claim_are_not_lost_in_silence(self, panel: Any, ui: Any, theirs: Any) -> None:
        before = panel.template.drawn().counts
        put_box(theirs, panel.view.scan, 0, 6)
        put_box(theirs, panel.view.scan, 1, 3)
        ui.takeNodeButton.click()
        assert "one and two share 45 voxels" in panel.banner.text and panel.template.drawn().counts == before

    def test_one_that_lies_elsewhere_is_refused(self, panel: Any, ui: Any, theirs: Any) -> None:
        before = panel.template.drawn().counts
        put_box(theirs, panel.view.scan, 0, 6)
        away = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "away")
        matrix = vtk.vtkMatrix4x4()
        matrix.SetElement(0, 3, 5000.0)
        away.SetMatrixTransformToParent(matrix)
        theirs.SetAndObserveTransformNodeID(away.GetID())
        ui.takeNodeButton.click()
        assert "Nothing of theirs lies in the scan" in panel.banner.text
        assert panel.template.drawn().counts == before


class TestATrainingThatDoesNotAnswer:
    @pytest.fixture
    def silent(self, panel: Any, trained: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A worker that lives and says nothing."""
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        status = {**lock.identity(), "state": "running", "heartbeat": time.time() - 3600, "fraction": 0.5}
        status |= {"pid": worker.pid, "process_start": processes.start_time(worker.pid)}
        job = JobFolder.create(trained / "jobs", JobKind.TRAIN, {}, [])
        files.write_json(job.status, status)
        panel.tick()
        yield worker
        worker.kill()
        worker.wait()

    def test_it_can_be_ended(self, panel: Any, ui: Any, silent: subprocess.Popen[bytes]) -> None:
        panel.dialogs.answer = 1
        ui.stopButton.click()
        assert "does not answer" in panel.dialogs.asked[-1]
        assert silent.wait(timeout=30) != 0, "it was to be ended"

    def test_it_is_left_alone_if_wished(self, panel: Any, ui: Any, silent: subprocess.Popen[bytes]) -> None:
        panel.dialogs.answer = 0
        ui.stopButton.click()
        assert silent.poll() is None


def test_a_case_that_cannot_be_kept_can_be_left(
    panel: Any, ui: Any, trained: Path, opened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("SemiSAMO1Lib.panel.draft_keeper.save_draft", full_disk)
    paint(panel)
    panel.dialogs.answer = 1
    ui.nextButton.click()
    assert "could not be kept: [Errno 28] No space left" in panel.dialogs.asked[-1]
    assert panel.view.files.case != opened


class TestASession:
    def test_reasons_against_training_are_looked_at_again(
        self, panel: Any, ui: Any, with_template: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "_REASONS_HOLD_S", 0.0)
        project = Project(with_template)
        scan = project.image_path(project.state.case("phantom_000"))
        hidden = scan.with_suffix(".away")
        scan.rename(hidden)
        panel.tick()
        assert not ui.trainButton.enabled
        hidden.rename(scan)
        panel.tick()
        assert ui.trainButton.enabled, ui.trainReasonLabel.text

    def test_a_damaged_job_does_not_keep_a_project_closed(self, panel: Any, ui: Any, trained: Path) -> None:
        name = damage_training(trained)
        panel.session.close()
        ui.projectPathEdit.currentPath = ""
        ui.projectPathEdit.currentPath = str(trained)
        ui.openProjectButton.click()
        assert panel.session.project is not None and "Project my project" in ui.projectLabel.text
        panel.tick()
        assert f"{name} cannot be read" in panel.banner.text

    def test_a_job_that_was_just_being_written_is_taken_in_later(self, panel: Any, trained: Path) -> None:
        job = JobFolder.create(trained / "jobs", JobKind.TRAIN, {}, [])
        job.status.write_text("")
        panel.tick()
        assert panel.session.training.job.id != job.id
        files.write_json(job.status, {**lock.identity(), "state": "finished", "heartbeat": time.time()})
        panel.tick()
        assert panel.session.training.job.id == job.id and not panel.session.unreadable


def test_a_persons_copy_of_our_node_stays(panel: Any, trained: Path, opened: str) -> None:
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    copy = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "copy")
    copy.Copy(panel.view.segmentation)
    hierarchy.CreateItem(panel.view._folder, copy)
    assert nodes.is_own(copy), "Slicer copies attributes with a node, or this test says nothing"
    panel.close_case()
    assert hierarchy.GetItemByDataNode(copy) and copy.GetScene() is slicer.mrmlScene and not nodes.is_own(copy)
    assert copy.GetSaveWithScene()


def test_a_persons_folder_in_ours_stays(panel: Any, trained: Path, opened: str) -> None:
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    theirs = hierarchy.CreateFolderItem(panel.view._folder, "my measurements")
    panel.close_case()
    assert hierarchy.GetItemParent(theirs) == hierarchy.GetSceneItemID()


def test_a_scan_that_a_person_deleted_leaves_no_folder(panel: Any, trained: Path, opened: str) -> None:
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    folder = panel.view._folder
    slicer.mrmlScene.RemoveNode(panel.view.scan)
    panel.close_case()
    every = vtk.vtkIdList()
    hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), every, True)
    assert every.IsId(folder) < 0
