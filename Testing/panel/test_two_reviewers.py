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


def voxels(panel: Any) -> list[int]:
    found = panel.view.drawn(panel.session.project.state.labels)
    return [found.counts[value] for value in sorted(found.counts)]
