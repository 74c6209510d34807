"""Two people on one project: nobody's label, name or decision is lost by what the other one does meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slicer
from test_loop import paint

from SemiSAMO1Lib.project import Label, Project, read_labels, reviews
from SemiSAMO1Lib.project.history import decisions


def add_segment(view: Any, name: str) -> None:
    """Three voxels of a structure that the project does not know."""
    identity = view.segmentation.GetSegmentation().AddEmptySegment("", name)
    array = np.zeros(slicer.util.arrayFromVolume(view.scan).shape, np.uint8)
    array[0, 0, 0:3] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(array, view.segmentation, identity, view.scan)


class TestLabels:
    def test_a_value_that_was_given_away_during_a_question_is_not_taken(
        self, panel: Any, ui: Any, trained: Path, opened: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A's tumour and B's cyst would have had one value."""
        add_segment(panel.view, "tumour")
        panel.tick()
        value = Project(trained).state.labels.next_value

        def slowly(*_arguments: Any, **_more: Any) -> int:
            Project(trained).update_labels([Label(value, "cyst")])
            return 1

        with monkeypatch.context() as asked:
            asked.setattr(panel.dialogs, "choose", slowly)
            ui.correctButton.click()
        assert f"the value {value} of tumour was given to cyst meanwhile" in panel.banner.text
        assert Project(trained).state.case(opened).label_version is None
        panel.dialogs.answer = 1
        ui.correctButton.click()
        project = Project(trained)
        assert [label.name for label in project.state.labels][-2:] == ["cyst", "tumour"], panel.banner.text
        case = project.state.case(opened)
        found = read_labels(project.label_path(case), case.geometry)
        assert np.count_nonzero(found.volume.array == value + 1) == 3 and not (found.volume.array == value).any()

    def test_a_correction_does_not_take_back_what_somebody_else_named(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        first = Project(trained).state.labels.labels[0]
        paint(panel, 6)
        Project(trained).update_labels([replace(first, name="named by ann", color=(9, 9, 9))])
        panel.tick()
        ui.correctButton.click()
        project = Project(trained)
        assert project.state.case(opened).review == "corrected", panel.banner.text
        assert project.state.labels.labels[0] == replace(first, name="named by ann", color=(9, 9, 9))

    def test_what_a_person_named_in_the_segment_editor_is_taken(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        second = Project(trained).state.labels.labels[1]
        paint(panel, 6)
        segmentation = panel.view.segmentation.GetSegmentation()
        segmentation.GetSegment(segmentation.GetNthSegmentID(1)).SetName("named here")
        panel.tick()
        ui.correctButton.click()
        assert Project(trained).state.labels.labels[1] == replace(second, name="named here"), panel.banner.text

    def test_nor_does_a_template(self, panel: Any, ui: Any, with_template: Path) -> None:
        first = Project(with_template).state.labels.labels[0]
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_000"))
        ui.openTemplateButton.click()
        paint(panel, 6)
        Project(with_template).update_labels([replace(first, name="named by ann")])
        panel.tick()
        ui.saveTemplateButton.click()
        assert "is saved" in panel.banner.text
        assert Project(with_template).state.labels.labels[0].name == "named by ann"


class TestLabelsThatAreNoMore:
    def test_a_new_label_that_was_taken_back_can_be_saved_again(
        self, panel: Any, ui: Any, trained: Path, opened: str
    ) -> None:
        """Undo takes the label out of the table; the draft that comes back still has its segment."""
        add_segment(panel.view, "tumour")
        panel.tick()
        panel.dialogs.answer = 1
        ui.correctButton.click()
        ui.undoButton.click()
        assert "tumour" not in [label.name for label in Project(trained).state.labels], panel.banner.text
        ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(opened))
        panel.results.open()
        panel.tick()
        ui.correctButton.click()
        project = Project(trained)
        case = project.state.case(opened)
        assert case.review == "corrected", panel.banner.text
        found = read_labels(project.label_path(case), case.geometry)
        assert 3 in np.unique(found.volume.array, return_counts=True)[1] and "tumour" in found.names.values()

    def test_nor_is_painting_lost_of_one_that_was_removed_meanwhile(
        self, panel: Any, ui: Any, with_template: Path
    ) -> None:
        Project(with_template).update_labels([Label(9, "cyst")])
        panel.tick()
        ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_000"))
        ui.openTemplateButton.click()
        segmentation = panel.view.segmentation.GetSegmentation()
        (cyst,) = (one for one in segmentation.GetSegmentIDs() if segmentation.GetSegment(one).GetName() == "cyst")
        array = np.zeros(slicer.util.arrayFromVolume(panel.view.scan).shape, np.uint8)
        array[0, 0, 0:3] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, panel.view.segmentation, cyst, panel.view.scan)
        Project(with_template).retire_labels([9])
        panel.tick()
        ui.saveTemplateButton.click()
        project = Project(with_template)
        case = project.state.case("phantom_000")
        found = read_labels(project.label_path(case), case.geometry)
        assert "is saved" in panel.banner.text and np.count_nonzero(found.volume.array == 9) == 3


def test_a_first_terminology_is_not_a_change_of_the_one_who_paints(
    panel: Any, ui: Any, trained: Path, opened: str
) -> None:
    """It comes with a name and a colour, which would have been taken back."""
    first = Project(trained).state.labels.labels[0]
    paint(panel, 6)
    structure = {"scheme": "SCT", "value": "123037004", "meaning": "Anatomical Structure"}
    codes = {"category": structure, "type": {"scheme": "SCT", "value": "10200004", "meaning": "Liver"}}
    Project(trained).update_labels([replace(first, name="Liver", color=(9, 9, 9), terminology=codes)])
    panel.tick()
    ui.correctButton.click()
    assert Project(trained).state.labels.labels[0].name == "Liver", panel.banner.text


def test_a_name_that_was_saved_is_the_projects(panel: Any, ui: Any, with_template: Path) -> None:
    """Who named it first may paint on, and does not name it again."""
    ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_000"))
    ui.openTemplateButton.click()
    segmentation = panel.view.segmentation.GetSegmentation()
    segmentation.GetSegment(segmentation.GetNthSegmentID(0)).SetName("named here")
    for size, name in ((6, "named here"), (8, "named by ann")):
        paint(panel, size)
        panel.tick()
        ui.saveTemplateButton.click()
        assert Project(with_template).state.labels.labels[0].name == name
        named = replace(Project(with_template).state.labels.labels[0], name="named by ann")
        Project(with_template).update_labels([named])
        panel.tick()


class TestPaintingKeptOnThisComputer:
    @pytest.fixture
    def rescued(
        self, panel: Any, trained: Path, opened: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> list[int]:
        """The project's folder goes away, the scene is closed over painting of a case, and the folder comes back; how
        many voxels each label had."""
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        paint(panel, 6)
        painted = voxels(panel)
        away = trained.with_name("away")
        trained.rename(away)
        slicer.mrmlScene.Clear(False)
        away.rename(trained)
        panel.tick()
        return painted

    def open_again(self, panel: Any, ui: Any, case: str) -> None:
        panel.results.look_again()
        ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(case))
        panel.results.open()

    def test_it_comes_back_by_itself_where_nobody_decided(
        self, panel: Any, ui: Any, opened: str, rescued: list[int]
    ) -> None:
        self.open_again(panel, ui, opened)
        assert voxels(panel) == rescued and "was brought back from" in panel.banner.text

    def test_a_decision_made_meanwhile_is_shown_first(
        self, panel: Any, ui: Any, trained: Path, opened: str, rescued: list[int]
    ) -> None:
        reviews.accept(Project(trained), opened, reviewer="ann")
        self.open_again(panel, ui, opened)
        assert voxels(panel) != rescued, "ann's label was never on the screen"
        assert "Meanwhile the case is accepted by ann" in panel.banner.text
        ui.bannerButton.click()
        assert voxels(panel) == rescued
        ui.correctButton.click()
        assert [str(one.after) for one in decisions(Project(trained))[opened]] == ["accepted", "draft", "corrected"]

    def test_what_is_painted_on_that_leaves_it_there(
        self, panel: Any, ui: Any, trained: Path, opened: str, rescued: list[int], tmp_path: Path
    ) -> None:
        reviews.accept(Project(trained), opened, reviewer="ann")
        self.open_again(panel, ui, opened)
        paint(panel, 3)
        panel.keep_work()
        assert len(list((tmp_path / "data" / "SemiSAMO1" / "painting").glob("*.seg.nrrd"))) == 1

    def test_a_correction_that_is_refused_leaves_it_there(
        self, panel: Any, ui: Any, trained: Path, opened: str, rescued: list[int], tmp_path: Path
    ) -> None:
        self.open_again(panel, ui, opened)
        reviews.accept(Project(trained), opened, reviewer="ann")
        ui.correctButton.enabled = True
        ui.correctButton.click()
        assert "was changed meanwhile by somebody else" in panel.banner.text
        assert len(list((tmp_path / "data" / "SemiSAMO1" / "painting").glob("*.seg.nrrd"))) == 1


def voxels(panel: Any) -> list[int]:
    found = panel.view.drawn(panel.session.project.state.labels)
    return [found.counts[value] for value in sorted(found.counts)]
