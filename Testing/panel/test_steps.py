"""Every step, by its buttons: what is shown, what is refused and why, what lands in the project."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import qt
import slicer
from panel_helpers import wait
from slicer_harness import module

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, start
from SemiSAMO1Lib.project import Project, Role, reviews
from SemiSAMO1Lib.project.drafts import find_draft
from SemiSAMO1Lib.project.queue import queue
from SemiSAMO1Lib.project.training import request_training


def put_box(node: Any, scan: Any) -> None:
    """A segment of a person's own."""
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(scan)
    identity = node.GetSegmentation().AddEmptySegment("", "label 1")
    array = (slicer.util.arrayFromVolume(scan) * 0).astype("uint8")
    array[0:2, 0:2, 0:2] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(array, node, identity, scan)


class TestOpening:
    def test_nothing_is_asked(self, panel: Any) -> None:
        assert panel.dialogs.asked == []

    def test_nothing_is_in_the_scene_but_the_editors_node(self, widget: Any) -> None:
        names = [node.GetClassName() for node in slicer.util.getNodesByClass("vtkMRMLVolumeNode")]
        assert names == []

    def test_without_a_project_train_says_what_to_do(self, panel: Any, ui: Any) -> None:
        assert not ui.trainButton.enabled
        assert ui.trainReasonLabel.text == "Open or make a project first." == ui.trainButton.toolTip

    def test_before_set_up_train_says_so(self, widget: Any) -> None:
        assert "Set up the training environment" in widget.ui.trainReasonLabel.text


class TestProject:
    def test_a_new_folder_becomes_a_project(self, project: Path) -> None:
        assert (project / "project.json").is_file()

    def test_it_is_remembered(self, panel: Any, project: Path) -> None:
        assert panel.settings.recent == [str(project.resolve())]

    def test_a_folder_with_other_files_is_refused_in_the_banner(self, panel: Any, ui: Any, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("years")
        ui.projectPathEdit.currentPath = str(tmp_path / "full")
        ui.openProjectButton.click()
        assert "holds other files" in panel.banner.text and panel.session.project is None

    def test_a_damaged_project_is_named_in_the_banner(self, panel: Any, ui: Any, project: Path) -> None:
        (project / "project.json").write_text("{nonsense")
        ui.projectPathEdit.currentPath = ""
        ui.projectPathEdit.currentPath = str(project)
        ui.openProjectButton.click()
        assert "project.json" in panel.banner.text

    def test_a_project_that_is_damaged_while_it_is_open_is_told_of(self, panel: Any, project: Path) -> None:
        (project / "project.json").write_text("{cut sho")
        panel.tick()
        panel.tick()
        assert "project.json" in panel.banner.text

    def test_scans_of_a_folder_become_rows(self, ui: Any, with_scans: Path) -> None:
        shown = [ui.caseTable.item(row, 0).text() for row in range(ui.caseTable.rowCount)]
        assert shown == ["phantom_000", "phantom_001", "phantom_002", "phantom_003"]

    def test_what_cannot_be_used_is_listed_with_its_reason(
        self, panel: Any, ui: Any, project: Path, cohort: Path, tmp_path: Path
    ) -> None:
        scans = tmp_path / "scans"
        scans.mkdir()
        (scans / "good.nrrd").write_bytes((cohort / "images" / "phantom_000.nrrd").read_bytes())
        (scans / "bad.nrrd").write_text("nonsense")
        ui.scansPathEdit.currentPath = str(scans)
        ui.addFolderButton.click()
        wait(panel, lambda: "bad.nrrd" in ui.skippedLabel.text, "the skipped scan")
        assert "cannot be read" in ui.skippedLabel.text

    def test_a_volume_of_the_scene_becomes_a_case(self, panel: Any, ui: Any, project: Path, cohort: Path) -> None:
        node = slicer.util.loadVolume(str(cohort / "images" / "phantom_001.nrrd"), {"name": "Müller MR", "show": False})
        ui.sceneVolumeSelector.setCurrentNode(node)
        ui.addVolumeButton.click()
        wait(panel, lambda: len(panel.session.rows()) == 1, "the case")
        state = Project(project).state
        assert (state.cases[0].id, node.GetScene() is slicer.mrmlScene) == ("Muller-MR", True)

    def test_while_scans_are_added_no_others_are(self, panel: Any, ui: Any, project: Path, cohort: Path) -> None:
        ui.scansPathEdit.currentPath = str(cohort / "images")
        ui.addFolderButton.click()
        assert not ui.addFolderButton.enabled and "wait" in ui.addFolderButton.toolTip


class TestTemplate:
    @pytest.fixture
    def opened(self, panel: Any, ui: Any, with_scans: Path) -> Any:
        ui.openTemplateButton.click()
        return panel.view

    def paint(self, view: Any, number: int, high: int = 6) -> None:
        identity = view.segmentation.GetSegmentation().GetNthSegmentID(number)
        array = slicer.util.arrayFromVolume(view.scan) * 0
        array[2:5, 2:5, 2 + 4 * number : high + 4 * number] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array.astype("uint8"), view.segmentation, identity, view.scan)

    def test_the_editor_is_bound_to_segmentation_and_scan(self, panel: Any, opened: Any) -> None:
        node = panel.editor._node
        assert (node.GetSegmentationNode(), node.GetSourceVolumeNode()) == (opened.segmentation, opened.scan)

    def test_the_editors_own_node_is_set_before_the_scene(self, ui: Any, panel: Any) -> None:
        assert ui.segmentEditor._told[:2] == ["node", "scene"]

    def test_without_a_case_it_paints_into_nothing(self, panel: Any, ui: Any, with_scans: Path) -> None:
        """Its hidden selector may choose a person's own segmentation by itself."""
        before = ui.segmentEditor.readOnly
        ui.openTemplateButton.click()
        during = ui.segmentEditor.readOnly
        panel.close_case()
        assert (before, during, ui.segmentEditor.readOnly) == (True, False, True)

    def test_its_selectors_are_hidden(self, ui: Any, panel: Any) -> None:
        assert not ui.segmentEditor.segmentationNodeSelectorVisible
        assert not ui.segmentEditor.sourceVolumeNodeSelectorVisible

    def test_a_first_label_is_there(self, ui: Any, opened: Any) -> None:
        assert ui.labelTable.item(0, 1).text() == "structure 1"

    def test_a_further_label_gets_a_segment(self, ui: Any, opened: Any) -> None:
        ui.addLabelButton.click()
        assert opened.segmentation.GetSegmentation().GetNumberOfSegments() == 2

    def test_a_renamed_label_renames_its_segment(self, ui: Any, opened: Any, with_scans: Path) -> None:
        ui.labelTable.item(0, 1).setText("atrium")
        segment = opened.segmentation.GetSegmentation().GetNthSegment(0)
        assert [segment.GetName(), Project(with_scans).state.labels.name_of(1)] == ["atrium", "atrium"]

    def test_two_labels_of_one_name_are_refused(self, panel: Any, ui: Any, opened: Any) -> None:
        ui.addLabelButton.click()
        ui.labelTable.item(1, 1).setText("structure 1")
        assert "two labels" in panel.banner.text and ui.labelTable.item(1, 1).text() == "structure 2"

    def test_an_unpainted_label_is_named_and_nothing_is_saved(self, ui: Any, opened: Any, with_scans: Path) -> None:
        ui.addLabelButton.click()
        self.paint(opened, 0)
        ui.saveTemplateButton.click()
        assert ui.templateMissingLabel.text == "structure 2 is not painted."
        assert Project(with_scans).state.with_role(Role.TEMPLATE) == []

    def test_a_label_may_be_declared_absent(self, panel: Any, ui: Any, opened: Any, with_scans: Path) -> None:
        ui.addLabelButton.click()
        self.paint(opened, 0)
        panel.dialogs.answer = 1
        ui.saveTemplateButton.click()
        project = Project(with_scans)
        (template,) = project.state.with_role(Role.TEMPLATE)
        assert "structure 2" in panel.dialogs.asked[-1] and project.label_record(template)["absent"] == [2]

    def test_a_label_whose_segment_was_removed_is_missing(self, ui: Any, opened: Any) -> None:
        ui.addLabelButton.click()
        self.paint(opened, 0)
        segmentation = opened.segmentation.GetSegmentation()
        segmentation.RemoveSegment(segmentation.GetNthSegmentID(1))
        ui.saveTemplateButton.click()
        assert ui.templateMissingLabel.text == "structure 2 is not painted."

    def test_labels_that_overlap_are_named(self, ui: Any, opened: Any) -> None:
        ui.addLabelButton.click()
        self.paint(opened, 0, high=8)
        self.paint(opened, 1)
        ui.saveTemplateButton.click()
        assert "share" in ui.templateMissingLabel.text

    def test_a_painted_template_is_saved(self, ui: Any, opened: Any, with_scans: Path) -> None:
        self.paint(opened, 0)
        ui.saveTemplateButton.click()
        (template,) = Project(with_scans).state.with_role(Role.TEMPLATE)
        assert (template.id, template.label_version) == ("phantom_000", 1)

    def test_saving_again_makes_a_new_version(self, ui: Any, opened: Any, with_scans: Path) -> None:
        self.paint(opened, 0)
        ui.saveTemplateButton.click()
        ui.saveTemplateButton.click()
        (template,) = Project(with_scans).state.with_role(Role.TEMPLATE)
        assert template.label_version == 2

    def test_a_segmentation_of_the_scene_is_copied(self, panel: Any, ui: Any, opened: Any) -> None:
        theirs = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "theirs")
        theirs.GetSegmentation().AddEmptySegment("", "structure 1")
        array = (slicer.util.arrayFromVolume(opened.scan) * 0).astype("uint8")
        array[3:5, 3:6, 3:7] = 1
        identity = theirs.GetSegmentation().GetNthSegmentID(0)
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, theirs, identity, opened.scan)
        ui.takeNodeSelector.setCurrentNode(theirs)
        ui.takeNodeButton.click()
        assert panel.template.drawn().counts == {1: 24}
        assert theirs.GetSegmentation().GetNumberOfSegments() == 1, "the person's segmentation was changed"

    def theirs(self, scan: Any, name: str) -> Any:
        """A person's own segmentation with one painted segment of this name."""
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "theirs")
        node.GetSegmentation().AddEmptySegment("", name)
        array = (slicer.util.arrayFromVolume(scan) * 0).astype("uint8")
        array[3:5, 3:6, 3:7] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, node, node.GetSegmentation().GetNthSegmentID(0), scan)
        return node

    def take(self, ui: Any, node: Any) -> None:
        ui.takeNodeSelector.setCurrentNode(node)
        ui.takeNodeButton.click()

    def test_its_name_takes_the_place_of_the_label_that_was_invented(
        self, ui: Any, opened: Any, with_scans: Path
    ) -> None:
        self.take(ui, self.theirs(opened.scan, "liver"))
        assert [(one.value, one.name) for one in Project(with_scans).state.labels] == [(1, "liver")]

    def test_but_not_of_one_that_is_painted(self, panel: Any, ui: Any, opened: Any, with_scans: Path) -> None:
        self.paint(opened, 0)
        self.take(ui, self.theirs(opened.scan, "liver"))
        assert [one.name for one in Project(with_scans).state.labels] == ["structure 1", "liver"]

    def test_what_is_painted_here_is_no_segmentation_to_take(self, panel: Any, ui: Any, opened: Any) -> None:
        self.take(ui, opened.segmentation)
        assert "is what you paint" in panel.banner.text

    def remove(self, ui: Any, row: int) -> None:
        ui.labelTable.setCurrentCell(row, 1)
        ui.removeLabelButton.click()

    def test_a_label_that_was_added_by_the_way_can_be_removed(self, ui: Any, opened: Any, with_scans: Path) -> None:
        ui.addLabelButton.click()
        self.remove(ui, 1)
        assert [one.name for one in Project(with_scans).state.labels] == ["structure 1"]
        assert opened.segmentation.GetSegmentation().GetNumberOfSegments() == 1 and not opened.changed

    def test_its_value_is_not_given_again(self, ui: Any, opened: Any, with_scans: Path) -> None:
        ui.addLabelButton.click()
        self.remove(ui, 1)
        ui.addLabelButton.click()
        assert Project(with_scans).state.labels.values == [1, 3]

    def test_one_that_is_painted_stays(self, panel: Any, ui: Any, opened: Any, with_scans: Path) -> None:
        self.paint(opened, 0)
        self.remove(ui, 0)
        assert "is painted in the open scan" in panel.banner.text and len(Project(with_scans).state.labels) == 1

    def test_one_that_is_painted_in_another_scans_draft_stays(
        self, panel: Any, ui: Any, opened: Any, with_scans: Path
    ) -> None:
        self.paint(opened, 0)
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_001"))
        ui.openTemplateButton.click()
        self.remove(ui, 0)
        assert "is painted in a draft" in panel.banner.text and len(Project(with_scans).state.labels) == 1

    def test_one_that_a_training_knows_stays(self, panel: Any, ui: Any, trained: Path) -> None:
        """Its predictions name it: none of them could be accepted any more."""
        job = JobFolder(Project(trained).jobs / Project(trained).state.current_training)
        ui.addLabelButton.click()
        table = Project(trained).state.labels
        files.write_json(job.path / "job.json", {**job.spec(), "labels": table.to_json()})
        self.remove(ui, len(table) - 1)
        assert "is among the labels of a training" in panel.banner.text
        assert Project(trained).state.labels == table

    def test_a_label_that_was_removed_does_not_come_back_by_an_older_file(
        self, ui: Any, opened: Any, with_scans: Path, panel: Any
    ) -> None:
        """A draft names the empty segments too."""
        ui.addLabelButton.click()
        self.paint(opened, 0)
        panel.close_case()
        self.remove(ui, 1)
        ui.openTemplateButton.click()
        ui.saveTemplateButton.click()
        assert Project(with_scans).state.labels.values == [1] and panel.dialogs.asked == []

    def test_one_that_is_in_force_stays(self, panel: Any, ui: Any, with_template: Path) -> None:
        before = Project(with_template).state.labels
        panel.close_case()
        self.remove(ui, 0)
        assert "is painted in saved labels" in panel.banner.text and Project(with_template).state.labels == before

    def test_a_file_is_taken_at_once(self, with_template: Path) -> None:
        (template,) = Project(with_template).state.with_role(Role.TEMPLATE)
        assert template.id == "phantom_000"

    def test_a_file_beside_a_template_makes_a_further_labelled_scan(
        self, panel: Any, ui: Any, with_template: Path, cohort: Path
    ) -> None:
        """Two templates would leave it to chance which one the cases are compared with."""
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_001"))
        ui.takeFileEdit.currentPath = str(cohort / "labels" / "phantom_001.nrrd")
        ui.takeFileButton.click()
        state = Project(with_template).state
        assert [case.id for case in state.with_role(Role.TEMPLATE)] == ["phantom_000"], panel.banner.text
        assert [case.id for case in state.with_role(Role.LABELLED)] == ["phantom_001"]

    def test_a_scan_given_as_labels_is_refused(self, panel: Any, ui: Any, with_scans: Path, cohort: Path) -> None:
        ui.takeFileEdit.currentPath = str(cohort / "images" / "phantom_000.nrrd")
        ui.takeFileButton.click()
        assert "phantom_000.nrrd" in panel.banner.text and Project(with_scans).state.with_role(Role.TEMPLATE) == []


class TestNothingIsLost:
    """What was painted and not saved is there again, whatever closed it."""

    @pytest.fixture
    def painted(self, panel: Any, ui: Any, with_template: Path) -> Any:
        """The template open, sixty voxels painted into its first label and not saved."""
        ui.openTemplateButton.click()
        self.before = panel.template.drawn().counts
        view = panel.view
        identity = view.segmentation.GetSegmentation().GetNthSegmentID(0)
        array = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan).copy()
        array[0:3, 0:4, 0:5] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)
        self.after = panel.template.drawn().counts
        assert self.after[1] > self.before[1]
        return view

    def again(self, panel: Any, ui: Any) -> dict[int, int]:
        """Open the template anew; what is painted there."""
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_000"))
        ui.openTemplateButton.click()
        counts: dict[int, int] = panel.template.drawn().counts
        return counts

    def test_when_another_case_is_opened(self, panel: Any, ui: Any, painted: Any) -> None:
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_001"))
        ui.openTemplateButton.click()
        assert panel.dialogs.asked == [] and self.again(panel, ui) == self.after

    def test_when_the_scene_is_closed(self, panel: Any, ui: Any, painted: Any) -> None:
        slicer.mrmlScene.Clear(False)
        assert self.again(panel, ui) == self.after

    def test_when_another_project_is_opened(
        self, panel: Any, ui: Any, painted: Any, with_template: Path, tmp_path: Path
    ) -> None:
        ui.projectPathEdit.currentPath = str(tmp_path / "other")
        ui.openProjectButton.click()
        ui.projectPathEdit.currentPath = str(with_template)
        ui.openProjectButton.click()
        assert self.again(panel, ui) == self.after

    def test_when_slicer_is_quit(self, panel: Any, painted: Any, with_template: Path) -> None:
        assert panel.may_quit() and find_draft(Project(with_template), "phantom_000") is not None

    def test_when_the_panel_is_closed(self, panel: Any, widget: Any, painted: Any, with_template: Path) -> None:
        widget.exit()
        widget.cleanup()
        assert find_draft(Project(with_template), "phantom_000") is not None

    def test_slicer_does_not_ask_about_what_is_kept(self, panel: Any, painted: Any) -> None:
        """Its own question before it ends is about nodes that changed since they were read."""
        assert panel.may_quit()
        changed = slicer.mrmlScene.GetStorableNodesModifiedSinceRead()
        assert not changed and "is kept" in panel.banner.text

    def test_when_slicer_ends_the_panel_goes_before_its_window(self, app: Any, widget: Any, painted: Any) -> None:
        for handler in app.handlers["aboutToQuit()"]:
            handler()
        assert widget.panel is None and slicer.util.getNodesByClass("vtkMRMLSegmentationNode") == []

    def test_and_the_rest_does_no_harm(self, app: Any, widget: Any, painted: Any, with_template: Path) -> None:
        app.handlers["aboutToQuit()"][0]()
        widget.exit()
        widget.cleanup()
        assert find_draft(Project(with_template), "phantom_000") is not None

    def test_it_is_said_that_it_was_brought_back(self, panel: Any, ui: Any, painted: Any) -> None:
        self.again(panel, ui)
        assert "Unfinished painting of phantom_000 was brought back." in panel.banner.text

    def test_it_can_be_discarded(self, panel: Any, ui: Any, painted: Any, with_template: Path) -> None:
        self.again(panel, ui)
        ui.bannerButton.click()
        assert panel.template.drawn().counts == self.before
        assert find_draft(Project(with_template), "phantom_000") is None

    def test_saving_ends_the_draft(self, panel: Any, ui: Any, painted: Any, with_template: Path) -> None:
        self.again(panel, ui)
        ui.saveTemplateButton.click()
        assert find_draft(Project(with_template), "phantom_000") is None
        assert self.again(panel, ui) == self.after

    def test_painting_survives_a_draft_that_cannot_be_written(
        self, panel: Any, ui: Any, painted: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("SemiSAMO1Lib.panel.draft_keeper.save_draft", full_disk)
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_001"))
        ui.openTemplateButton.click()
        assert panel.view is painted and panel.template.drawn().counts == self.after

    def test_and_a_scene_that_is_closed_on_it(
        self, panel: Any, ui: Any, painted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_template: Path
    ) -> None:
        """Nobody can hold that up: it lies on this computer until the case is opened again."""

        def away(*_: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        panel.keep_work()
        self.paint_more(painted)
        more = panel.template.drawn().counts
        with monkeypatch.context() as broken:
            broken.setattr("SemiSAMO1Lib.panel.draft_keeper.save_draft", away)
            slicer.mrmlScene.Clear(False)
        assert "Input/output error" in panel.banner.text and str(tmp_path) in panel.banner.text
        assert self.again(panel, ui) == more and "brought back" in panel.banner.text, "the older draft came instead"
        panel.keep_work()
        assert find_draft(Project(with_template), "phantom_000") is not None, "then it is a draft like any other"
        assert list((tmp_path / "SemiSAMO1" / "painting").iterdir()) == [], "it would come back over later work"

    def paint_more(self, view: Any) -> None:
        identity = view.segmentation.GetSegmentation().GetNthSegmentID(0)
        array = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan).copy()
        array[4:7, 0:4, 0:5] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)

    @pytest.fixture
    def away(self, painted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The project's folder cannot be written any more."""

        def fails(*_: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        monkeypatch.setattr("SemiSAMO1Lib.panel.draft_keeper.save_draft", fails)

    def test_quitting_on_it_says_where_it_lies(self, panel: Any, ui: Any, away: None) -> None:
        panel.dialogs.answer = 1
        assert panel.may_quit() and len(panel.dialogs.asked) == 1
        assert "Input/output error" in panel.dialogs.asked[0] and "It is kept in" in panel.dialogs.asked[0]
        assert self.again(panel, ui) == self.after, "Slicer's own question was answered with Cancel"

    def test_going_back_to_it_holds_slicer(self, panel: Any, painted: Any, away: None) -> None:
        assert not panel.may_quit() and panel.view is painted

    def test_without_a_question_it_is_kept_all_the_same(
        self, panel: Any, widget: Any, loaded: Any, away: None, tmp_path: Path
    ) -> None:
        widget.exit()
        widget.cleanup()
        assert len(list((tmp_path / "SemiSAMO1" / "painting").glob("*.seg.nrrd"))) == 1

    def test_what_came_back_can_be_discarded(self, panel: Any, ui: Any, away: None) -> None:
        slicer.mrmlScene.Clear(False)
        assert self.again(panel, ui) == self.after
        ui.bannerButton.click()
        assert panel.template.drawn().counts == self.before and self.again(panel, ui) == self.before

    def test_renaming_a_label_is_no_painting(self, panel: Any, ui: Any, with_template: Path) -> None:
        ui.openTemplateButton.click()
        ui.labelTable.item(0, 1).setText("another name")
        panel.close_case()
        assert find_draft(Project(with_template), "phantom_000") is None

    def test_looking_alone_leaves_no_draft(self, panel: Any, ui: Any, with_template: Path) -> None:
        ui.openTemplateButton.click()
        panel.close_case()
        assert find_draft(Project(with_template), "phantom_000") is None

    def test_changes_to_a_prediction_are_kept_too(self, panel: Any, ui: Any, trained: Path) -> None:
        panel.results.look_again()
        panel.results.open()
        view, case = panel.view, panel.view.files.case
        identity = view.segmentation.GetSegmentation().GetNthSegmentID(0)
        array = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan) * 0
        array[0:2, 0:2, 0:2] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)
        ui.nextButton.click()
        assert find_draft(Project(trained), case) is not None

    def test_taking_labels_over_painted_ones_asks(self, panel: Any, ui: Any, painted: Any) -> None:
        theirs = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "theirs")
        put_box(theirs, panel.view.scan)
        ui.takeNodeSelector.setCurrentNode(theirs)
        panel.dialogs.answer = 1
        ui.takeNodeButton.click()
        assert "is replaced" in panel.dialogs.asked[-1] and panel.template.drawn().counts == self.after

    def test_taking_labels_can_be_undone(self, panel: Any, ui: Any, painted: Any) -> None:
        theirs = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "theirs")
        put_box(theirs, panel.view.scan)
        ui.takeNodeSelector.setCurrentNode(theirs)
        ui.takeNodeButton.click()
        assert "undo state" in ui.segmentEditor._told

    def test_a_name_given_in_the_editor_outlives_a_further_label(self, panel: Any, ui: Any, painted: Any) -> None:
        segment = painted.segmentation.GetSegmentation().GetNthSegment(1)
        segment.SetName("my name")
        ui.addLabelButton.click()
        assert segment.GetName() == "my name"


class TestTraining:
    def test_with_a_template_it_may_begin(self, panel: Any, ui: Any, with_template: Path) -> None:
        assert ui.trainButton.enabled, ui.trainReasonLabel.text

    def test_the_time_is_estimated(self, ui: Any, with_template: Path) -> None:
        assert ui.estimateLabel.text.startswith("about")

    def test_of_a_device_that_was_not_measured_no_time_is_promised(
        self, panel: Any, ui: Any, with_template: Path
    ) -> None:
        gpu = {"name": "cuda:0", "title": "GPU", "free_bytes": 8 << 30, "total_bytes": 12 << 30}
        panel.settings.put("probe", {**panel.setup.probe, "devices": [{"name": "cpu"}, gpu]})
        panel.tick()
        ui.deviceBox.setCurrentIndex(ui.deviceBox.findData("cuda:0"))
        panel.tick()
        assert ui.estimateLabel.text == "not measured on this device"
        assert ui.deviceBox.itemText(ui.deviceBox.currentIndex) == "GPU, 8 of 12 GB were free at set-up"

    def test_it_is_said_that_slicer_may_be_closed(self, panel: Any, ui: Any, with_template: Path) -> None:
        ui.trainButton.click()
        assert "You may close Slicer; training goes on." in panel.banner.text
        wait(panel, lambda: not panel.session.busy, "the end")

    def test_to_the_end(self, panel: Any, ui: Any, trained: Path) -> None:
        assert sorted(panel.session.predicted()) == ["phantom_001", "phantom_002", "phantom_003"]
        assert "The training is finished." in panel.banner.text

    def test_the_log_is_shown(self, ui: Any, trained: Path) -> None:
        assert "iteration 3" in ui.trainLog.toPlainText()

    def test_the_losses_become_a_plot(self, panel: Any, ui: Any, trained: Path) -> None:
        ui.curvesButton.click()
        chart = slicer.util.getNodesByClass("vtkMRMLPlotChartNode")[0]
        assert chart.GetNumberOfPlotSeriesNodes() == 2

    def test_new_losses_do_not_change_the_layout(
        self, panel: Any, ui: Any, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown: list[Any] = []
        logic = types.SimpleNamespace(ShowChartInLayout=shown.append)
        monkeypatch.setattr(slicer.modules, "plots", types.SimpleNamespace(logic=lambda: logic), raising=False)
        ui.curvesButton.click()
        node = slicer.util.getNodesByClass("vtkMRMLTableNode")[0]
        before = node.GetTable().GetNumberOfRows()
        more = {"kind": "losses", "round": 1, "iteration": 4, "of": 4, "losses": {"total": 0.1, "supervised": 0.1}}
        files.append_line(panel.session.training.job.events, more)
        panel.tick()
        assert (len(shown), node.GetTable().GetNumberOfRows()) == (1, before + 1)

    def test_one_that_the_shell_started_is_watched(
        self, panel: Any, ui: Any, with_template: Path, stand_in: Path
    ) -> None:
        job = request_training(Project(with_template), {"preset": "quick", "stand_in": "slow"})
        start(job, stand_in)
        wait(panel, lambda: ui.stopButton.enabled, "Stop")
        ui.stopButton.click()
        wait(panel, lambda: not panel.session.busy, "the stop")
        assert panel.session.training.job.id == job.id

    def test_a_stop_is_no_error(
        self, panel: Any, ui: Any, with_template: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "slow"}
        ui.trainButton.click()
        wait(panel, lambda: ui.stopButton.enabled and panel.session.training.seen.pid is not None, "Stop")
        ui.stopButton.click()
        wait(panel, lambda: not panel.session.busy, "the stop")
        assert "was stopped. What was done is kept." in panel.banner.text and "fail" not in panel.banner.text

    def test_a_stopped_one_is_resumed(self, panel: Any, ui: Any, with_template: Path) -> None:
        panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "slow"}
        ui.trainButton.click()
        wait(panel, lambda: panel.session.training.seen.pid is not None, "the worker")
        ui.stopButton.click()
        wait(panel, lambda: ui.resumeButton.enabled, "Resume")
        panel.session.environment = {"PATH": "/usr/bin:/bin"}
        ui.resumeButton.click()
        wait(panel, lambda: bool(panel.session.predicted()), "predictions")

    def test_a_failure_says_what_happened(self, panel: Any, ui: Any, with_template: Path) -> None:
        panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "fail"}
        ui.trainButton.click()
        wait(panel, lambda: "failed" in panel.banner.text, "the failure")
        assert "no memory on this GPU" in panel.banner.text

    def test_a_killed_worker_is_interrupted_and_can_be_resumed(self, panel: Any, ui: Any, with_template: Path) -> None:
        panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "die"}
        ui.trainButton.click()
        wait(panel, lambda: "interrupted" in panel.banner.text, "the interruption")
        assert ui.resumeButton.enabled

    def test_a_running_one_is_found_again(
        self, panel: Any, ui: Any, loaded: Any, widget: Any, with_template: Path
    ) -> None:
        panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "slow"}
        ui.trainButton.click()
        wait(panel, lambda: panel.session.training.seen.pid is not None, "the worker")
        widget.exit()
        widget.cleanup()
        again = module.open_widget(loaded)
        again.ui.projectPathEdit.currentPath = str(with_template)
        again.ui.openProjectButton.click()
        assert "is under way" in again.panel.banner.text and again.ui.stopButton.enabled
        again.ui.stopButton.click()
        wait(again.panel, lambda: not again.panel.session.busy, "the stop")
        again.exit()
        again.cleanup()


class TestResults:
    @pytest.fixture
    def opened(self, panel: Any, ui: Any, trained: Path) -> Any:
        ui.bannerButton.click()
        panel.results.look_again()
        panel.results.open()
        return panel.view

    def test_cases_are_listed_worst_first(self, panel: Any, opened: Any) -> None:
        doubts = [panel.results._predicted[case]["scores"]["label_uncertainty"] for case in panel.results.order()]
        assert doubts == sorted(doubts, reverse=True) and len(doubts) == 3

    def test_scan_prediction_and_uncertainty_are_in_the_scene(self, opened: Any) -> None:
        assert [node.GetClassName() for node in opened.nodes] == [
            "vtkMRMLScalarVolumeNode",
            "vtkMRMLSegmentationNode",
            "vtkMRMLScalarVolumeNode",
        ]

    def test_the_check_box_takes_the_overlay_off(self, ui: Any, opened: Any) -> None:
        ui.uncertaintyCheckBox.checked = False
        view = slicer.app.layoutManager().sliceWidget("Red").mrmlSliceCompositeNode()
        assert view.GetForegroundVolumeID() is None

    def test_the_sliders_count(self, ui: Any, opened: Any) -> None:
        ui.opacitySlider.value = 0.75
        ui.thresholdSlider.value = 55
        view = slicer.app.layoutManager().sliceWidget("Red").mrmlSliceCompositeNode()
        assert view.GetForegroundOpacity() == pytest.approx(0.75)
        assert opened.uncertainty.GetDisplayNode().GetLowerThreshold() == 55

    def test_next_goes_to_the_next_and_closes_the_one_before(self, panel: Any, ui: Any, opened: Any) -> None:
        first = panel.view.files.case
        ui.nextButton.click()
        assert panel.view.files.case == panel.results.order()[1] != first
        assert len(slicer.util.getNodesByClass("vtkMRMLSegmentationNode")) == 1

    def test_after_the_last_case_next_says_so(self, panel: Any, ui: Any, opened: Any) -> None:
        ui.nextButton.click()
        ui.nextButton.click()
        assert not ui.nextButton.enabled and ui.nextButton.toolTip == "This was the last case."

    def test_the_scores_name_the_labels(self, ui: Any, opened: Any) -> None:
        assert "label 1: 1.00 ml" in ui.resultLabel.text

    def test_a_new_training_does_not_replace_what_is_on_the_screen(self, panel: Any, ui: Any, opened: Any) -> None:
        assert ui.trainButton.enabled, ui.trainReasonLabel.text
        ui.trainButton.click()
        wait(panel, lambda: "results" in ui.bannerButton.text or "them" in ui.bannerButton.text, "an offer")
        assert panel.view is opened and opened.scan.GetScene() is not None
        ui.bannerButton.click()
        assert panel.view is None and panel.results.training == panel.session.training.job.id


class TestReview:
    """Decisions about predictions by their buttons."""

    @pytest.fixture
    def opened(self, panel: Any, ui: Any, trained: Path) -> str:
        """The least certain case, open; its id."""
        panel.results.look_again()
        panel.results.open()
        panel.tick()
        return str(panel.view.files.case)

    def paint(self, panel: Any) -> None:
        view = panel.view
        identity = view.segmentation.GetSegmentation().GetNthSegmentID(0)
        array = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan).copy()
        array[0:3, 0:4, 0:5] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)
        panel.tick()

    def state(self, folder: Path, case: str) -> tuple[str, str]:
        found = Project(folder).state.case(case)
        return found.review, str(found.role)

    def test_accepting_makes_a_label_and_goes_on(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        ui.acceptButton.click()
        assert self.state(trained, opened) == ("accepted", "labelled")
        assert panel.view.files.case != opened, "the next case is shown"

    def test_rejecting(self, ui: Any, trained: Path, opened: str) -> None:
        ui.rejectButton.click()
        assert self.state(trained, opened) == ("rejected", "unlabelled")

    def test_skipping(self, ui: Any, trained: Path, opened: str) -> None:
        ui.skipButton.click()
        assert self.state(trained, opened) == ("skipped", "unlabelled")

    def test_painted_changes_are_saved_by_correct(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        self.paint(panel)
        ui.correctButton.click()
        assert self.state(trained, opened) == ("corrected", "labelled")
        assert find_draft(Project(trained), opened) is None

    def test_with_painted_changes_it_cannot_be_accepted(self, panel: Any, ui: Any, opened: str) -> None:
        self.paint(panel)
        assert not ui.acceptButton.enabled and "You painted changes" in ui.reviewReasonLabel.text

    def test_without_them_there_is_nothing_to_correct(self, ui: Any, opened: str) -> None:
        assert not ui.correctButton.enabled and ui.correctButton.toolTip == "Nothing was painted."

    def test_undo_takes_a_decision_back(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        ui.rejectButton.click()
        ui.previousButton.click()
        assert panel.view.files.case == opened
        ui.undoButton.click()
        assert self.state(trained, opened) == ("not_seen", "unlabelled")

    def test_undo_right_after_a_decision_takes_that_one_back(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        """The next case is open by then, about which nothing was decided."""
        ui.rejectButton.click()
        panel.tick()
        ui.undoButton.click()
        assert (self.state(trained, opened)[0], panel.view.files.case) == ("not_seen", opened), panel.banner.text
        assert ui.resultCaseBox.itemData(ui.resultCaseBox.currentIndex) == opened, "the list shows another case"

    def test_undo_goes_back_decision_by_decision(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        ui.acceptButton.click()
        second = panel.view.files.case
        ui.rejectButton.click()
        ui.undoButton.click()
        assert (self.state(trained, second)[0], self.state(trained, opened)[0]) == ("not_seen", "accepted")
        ui.undoButton.click()
        panel.tick()
        assert self.state(trained, opened)[0] == "not_seen" and not ui.undoButton.enabled, panel.banner.text

    def test_undo_of_an_open_case_that_was_decided_is_that_cases(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        ui.acceptButton.click()
        second = panel.view.files.case
        ui.rejectButton.click()
        ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(opened))
        panel.results.open()
        ui.undoButton.click()
        assert (self.state(trained, second)[0], self.state(trained, opened)[0]) == ("rejected", "not_seen")

    def test_undo_does_not_touch_a_case_that_a_decision_opened(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        """All others were skipped: a skipped one comes next, and its old skip is not what the person takes back."""
        project = Project(trained)
        others = [one.case for one in queue(project) if one.case != opened]
        for case in others:
            reviews.skip(project, case)
        panel.tick()
        ui.rejectButton.click()
        assert panel.view.files.case in others
        ui.undoButton.click()
        assert self.state(trained, opened)[0] == "not_seen", panel.banner.text
        assert {self.state(trained, case)[0] for case in others} == {"skipped"}

    def test_somebody_elses_decision_is_not_taken_back(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        ui.acceptButton.click()
        second = panel.view.files.case
        ui.acceptButton.click()
        project = Project(trained)
        reviews.undo(project, second, "colleague")
        reviews.reject(project, second, "colleague")
        panel.tick()
        ui.undoButton.click()
        assert self.state(trained, second)[0] == "rejected" and "somebody else" in panel.banner.text

    def test_the_list_says_what_was_decided(self, ui: Any, opened: str) -> None:
        ui.rejectButton.click()
        texts = [ui.resultCaseBox.itemText(n) for n in range(ui.resultCaseBox.count)]
        assert [text.split()[-1] for text in texts if text.startswith(opened)] == ["rejected"]

    def test_the_reviewer_is_written_down(self, app: Any, ui: Any, trained: Path, opened: str) -> None:
        app.applicationLogic().GetUserInformation().SetName("Ann Reader")
        ui.rejectButton.click()
        line = files.read_lines(trained / "reviews.jsonl")[0][-1]
        assert (line["reviewer"], line["case"]) == ("Ann Reader", opened)

    def test_a_label_that_is_not_there_is_asked_about(self, panel: Any, ui: Any, trained: Path, opened: str) -> None:
        view = panel.view
        identity = view.segmentation.GetSegmentation().GetNthSegmentID(0)
        empty = slicer.util.arrayFromSegmentBinaryLabelmap(view.segmentation, identity, view.scan) * 0
        slicer.util.updateSegmentBinaryLabelmapFromArray(empty, view.segmentation, identity, view.scan)
        panel.tick()
        ui.correctButton.click()
        assert "Not found in this scan: label 1" in panel.dialogs.asked[-1]
        assert self.state(trained, opened)[0] == "not_seen", "the answer was to go on looking"
        panel.dialogs.answer = 1
        ui.correctButton.click()
        assert self.state(trained, opened)[0] == "corrected"


class TestTheScene:
    def test_closing_it_in_the_middle_leaves_the_panel_usable(self, panel: Any, ui: Any, trained: Path) -> None:
        panel.results.look_again()
        panel.results.open()
        slicer.mrmlScene.Clear(False)
        assert panel.view is None
        panel.results.open()
        assert panel.view.scan.GetScene() is slicer.mrmlScene

    def test_after_closing_it_the_editor_has_a_new_node(self, panel: Any, ui: Any) -> None:
        before = panel.editor._node
        slicer.mrmlScene.Clear(False)
        assert panel.editor._node is not before and panel.editor._node.GetScene() is slicer.mrmlScene

    def test_leaving_the_module_puts_the_tool_down(self, widget: Any, ui: Any) -> None:
        widget.exit()
        assert ui.segmentEditor._told[-3:] == ["no effect", "leave views", "no keys"]

    def test_entering_gives_the_editor_views_and_keys(self, ui: Any, widget: Any) -> None:
        assert ui.segmentEditor._told[-2:] == ["observe views", "keys"]


class TestQuitting:
    def test_without_a_training_nothing_is_asked(self, panel: Any) -> None:
        assert panel.may_quit() and panel.dialogs.asked == []

    @pytest.mark.parametrize(("answer", "quits", "stops"), [(0, True, False), (1, True, True), (2, False, False)])
    def test_with_one_it_is_asked(
        self, panel: Any, ui: Any, with_template: Path, answer: int, quits: bool, stops: bool
    ) -> None:
        panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "slow"}
        ui.trainButton.click()
        wait(panel, lambda: panel.session.training.seen.pid is not None, "the worker")
        panel.dialogs.answer = answer
        assert panel.may_quit() is quits
        assert panel.session.training.job.cancel_request.exists() is stops
        panel.session.stop_training() if not stops else None
        wait(panel, lambda: not panel.session.busy, "the stop")


class TestComingBack:
    """A new session: recent projects are known, jobs are told of before a project is opened."""

    def again(self, loaded: Any, widget: Any) -> Any:
        widget.exit()
        widget.cleanup()
        return module.open_widget(loaded)

    def test_a_training_that_ended_meanwhile_is_told_of(
        self, panel: Any, loaded: Any, widget: Any, trained: Path
    ) -> None:
        panel.settings.put("seen", {})
        other = self.again(loaded, widget)
        text = other.panel.banner.text
        other.ui.bannerButton.click()
        opened = other.panel.session.project
        other.exit()
        other.cleanup()
        assert "has ended" in text and opened is not None and opened.folder == trained.resolve()

    def test_one_that_was_seen_is_not_told_of_again(self, ui: Any, loaded: Any, widget: Any, trained: Path) -> None:
        ui.openProjectButton.click()
        other = self.again(loaded, widget)
        text = other.panel.banner.text
        other.exit()
        other.cleanup()
        assert text == ""

    def test_recent_projects_can_be_chosen(self, loaded: Any, widget: Any, with_scans: Path) -> None:
        other = self.again(loaded, widget)
        names = [other.ui.recentBox.itemText(n) for n in range(other.ui.recentBox.count)]
        other.exit()
        other.cleanup()
        assert names == ["choose...", with_scans.name]


class TestKeys:
    def test_all_are_ctrl_shift(self, widget: Any) -> None:
        keys = sys.modules["SemiSAMO1Lib.panel.panel"].KEYS
        assert all(key.startswith("Ctrl+Shift+") for key in keys.values())

    def test_they_work_inside_the_module_alone(self, panel: Any, widget: Any) -> None:
        inside = {key.enabled for key in panel._keys}
        widget.exit()
        assert (inside, {key.enabled for key in panel._keys}) == ({True}, {False})

    def test_a_key_that_is_taken_is_left_to_its_owner(self, app: Any, loaded: Any) -> None:
        action = qt.QAction(app.window)
        action.setShortcut(qt.QKeySequence("Ctrl+Shift+N"))
        other = module.open_widget(loaded)
        ours = {key.key.toString() for key in other.panel._keys}
        other.exit()
        other.cleanup()
        assert "Ctrl+Shift+N" not in ours and len(ours) == 4

    @pytest.mark.parametrize(("key", "goes_to"), [("Ctrl+Shift+N", 1), ("Ctrl+Shift+B", 0), ("Ctrl+Shift+T", 0)])
    def test_a_key_does_what_it_says(self, panel: Any, ui: Any, trained: Path, key: str, goes_to: int) -> None:
        """From the second case: onto the third, back to the first, and the first's decision taken back."""
        panel.results.look_again()
        order = panel.results.order()
        panel.results.open()
        if key == "Ctrl+Shift+T":
            ui.rejectButton.click()
        elif key == "Ctrl+Shift+B":
            panel.results.step(1)
        pressed = next(one for one in panel._keys if one.key.toString() == key)
        pressed.activated.emit()
        assert panel.view.files.case == order[goes_to], panel.banner.text
        assert Project(trained).state.case(order[0]).review == "not_seen"


def test_the_reviewer_is_slicers_user(panel: Any, ui: Any, app: Any, with_scans: Path, cohort: Path) -> None:
    app.applicationLogic().GetUserInformation().SetName("Ann Reader")
    ui.takeFileEdit.currentPath = str(cohort / "labels" / "phantom_000.nrrd")
    ui.takeFileButton.click()
    project = Project(with_scans)
    assert project.label_record(project.state.case("phantom_000"))["reviewer"] == "Ann Reader"


def test_a_worker_that_never_starts_is_told_of(
    panel: Any, ui: Any, with_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "mute"}
    ui.trainButton.click()
    logs = with_template / "jobs"
    wait(
        panel,
        lambda: any("torch" in log.read_text() for log in logs.glob("*-train/log.txt")),
        "the worker's last words",
    )
    monkeypatch.setattr(sys.modules["SemiSAMO1Lib.job.watch"], "HANDSHAKE_S", 0.5)
    wait(panel, lambda: "did not start" in panel.banner.text, "the failure")
    assert "no module named torch" in panel.banner.text, "the end of its log says why"


def test_terminology_that_was_chosen_in_the_editor_is_kept(panel: Any, ui: Any, with_scans: Path) -> None:
    ui.openTemplateButton.click()
    view = panel.view
    segment = view.segmentation.GetSegmentation().GetNthSegment(0)
    codes = "~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~^^~~^^~^^"
    segment.SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), f"DICOM master list{codes}")
    array = (slicer.util.arrayFromVolume(view.scan) * 0).astype("uint8")
    array[2:5, 2:5, 2:5] = 1
    identity = view.segmentation.GetSegmentation().GetNthSegmentID(0)
    slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)
    ui.saveTemplateButton.click()
    assert ui.labelTable.item(0, 3).text() == "Liver"
