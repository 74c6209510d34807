"""The project's folder goes away with a case open (a share, a disk): Slicer can be left, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slicer
from test_loop import paint

from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.project.cases import Review
from SemiSAMO1Lib.project.rescue import find_rescued


@pytest.fixture
def away(panel: Any, trained: Path, opened: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder, renamed while the open case has painting that is not kept; it comes back at the end."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    paint(panel, 6)
    elsewhere = trained.with_name("away")
    trained.rename(elsewhere)
    yield elsewhere
    if elsewhere.exists():
        elsewhere.rename(trained)


def test_slicer_may_quit_after_a_question(panel: Any, away: Path) -> None:
    panel.dialogs.answer = 1
    assert panel.may_quit() and panel.view is None
    assert len(panel.dialogs.asked) == 1 and "It is kept in" in panel.dialogs.asked[0]


def test_the_scene_can_be_closed(panel: Any, away: Path) -> None:
    panel.scene_closes()
    panel.scene_closed()
    assert panel.view is None


def test_the_panel_can_be_closed(panel: Any, away: Path, trained: Path, opened: str) -> None:
    panel.close()
    away.rename(trained)
    project = Project(trained)
    assert find_rescued(project, project.state.case(opened)) is not None


def test_the_painting_follows_a_project_that_was_moved(panel: Any, ui: Any, away: Path, opened: str) -> None:
    found = panel.view.drawn(panel.session.project.state.labels).counts
    slicer.mrmlScene.Clear(False)
    moved = away.with_name("moved for good")
    away.rename(moved)
    ui.projectPathEdit.currentPath = str(moved)
    ui.openProjectButton.click()
    ui.resultCaseBox.setCurrentIndex(ui.resultCaseBox.findData(opened))
    panel.results.open()
    assert panel.view.drawn(panel.session.project.state.labels).counts == found
    panel.keep_work()
    assert Project(moved).state.case(opened).review == Review.DRAFT
    assert find_rescued(Project(moved), Project(moved).state.case(opened)) is None, "it would come back over later work"
    moved.rename(away)


def test_a_copy_of_the_project_does_not_take_it(panel: Any, away: Path, trained: Path, opened: str) -> None:
    """It belongs to the one that is still there."""
    panel.scene_closes()
    away.rename(trained)
    (trained.with_name("copy")).mkdir()
    copy = trained.with_name("copy") / "project.json"
    copy.write_bytes((trained / "project.json").read_bytes())
    project = Project(copy.parent)
    assert find_rescued(project, project.state.case(opened)) is None
