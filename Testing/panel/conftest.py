"""The module opened in the harness, on phantoms, with a stand-in for the worker."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slicer
from panel_helpers import Answers, Clock, wait
from slicer_harness import application, module

from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: Phantoms of a few thousand voxels: the panel is tested, not the method.
SMALL = PhantomSettings(spacing_mm=(6.0, 5.0, 5.0))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ and labels/ of four phantoms."""
    folder = tmp_path_factory.mktemp("cohort with ümlaut")
    write_cohort(folder, 4, settings=SMALL)
    return folder


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory, cohort: Path) -> Path:
    """A Python that runs the stand-in worker whatever it is asked to run."""
    path = tmp_path_factory.mktemp("stand-in") / "python"
    variables = f'PYTHONPATH="{ROOT}" SEMISAMO1_TRUTH="{cohort / "labels"}"'
    command = f'exec "{sys.executable}" "{HERE / "stand_in_worker.py"}" "$@"'
    path.write_text(f"#!/bin/sh\n{variables} {command}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def app(tmp_path: Path) -> Iterator[module.GuiApplication]:
    yield module.boot()
    application.shutdown()


@pytest.fixture
def loaded(app: module.GuiApplication) -> Any:
    """The module as Slicer's factory loads it."""
    return module.load(ROOT / "SemiSAMO1" / "SemiSAMO1.py")


@pytest.fixture
def widget(loaded: Any) -> Iterator[Any]:
    """The module's widget, opened."""
    one = module.open_widget(loaded)
    yield one
    if one.panel is not None:
        one.exit()
        one.cleanup()


@pytest.fixture
def panel(widget: Any, stand_in: Path) -> Any:
    """The panel, set up with the stand-in worker; questions are answered by `panel.dialogs`."""
    panel = widget.panel
    for part in (panel, panel.moved, panel.setup, panel.template, panel.train, panel.results, panel.export):
        name = "dialogs" if part is panel else "_dialogs"
        setattr(part, name, panel.dialogs if isinstance(panel.dialogs, Answers) else Answers())
        panel.dialogs = getattr(part, name)
    panel.settings.put("probe", {"ok": True, "executable": str(stand_in), "torch": "0", "device": "cpu", "step_s": 0.1})
    panel.session.python = panel.setup.python
    panel.setup.show()
    panel.train.show()
    return panel


@pytest.fixture
def ui(widget: Any) -> Any:
    return widget.ui


@pytest.fixture
def project(panel: Any, ui: Any, tmp_path: Path) -> Path:
    """A new project, opened by its path and button."""
    folder = tmp_path / "my project"
    ui.projectPathEdit.currentPath = str(folder)
    ui.openProjectButton.click()
    return folder


@pytest.fixture
def with_scans(panel: Any, ui: Any, project: Path, cohort: Path) -> Path:
    """The project with the phantoms in it, added by their folder and button."""
    ui.scansPathEdit.currentPath = str(cohort / "images")
    ui.addFolderButton.click()
    wait(panel, lambda: len(panel.session.rows()) == 4 and not panel.session.import_job.seen.state.active, "four cases")
    return project


@pytest.fixture
def with_template(panel: Any, ui: Any, with_scans: Path, cohort: Path) -> Path:
    """... and with the first one labelled from its file."""
    ui.templateCaseBox.setCurrentIndex(ui.templateCaseBox.findData("phantom_000"))
    ui.takeFileEdit.currentPath = str(cohort / "labels" / "phantom_000.nrrd")
    ui.takeFileButton.click()
    panel.tick()
    return with_scans


@pytest.fixture
def trained(panel: Any, ui: Any, with_template: Path) -> Path:
    """... and trained to the end by the stand-in worker."""
    ui.trainButton.click()
    wait(panel, lambda: bool(panel.session.predicted()) and not panel.session.busy, "predictions")
    panel.tick()
    return with_template


@pytest.fixture
def opened(panel: Any, ui: Any, trained: Path) -> str:
    """The first case of the queue, open; its id."""
    panel.results.look_again()
    panel.results.open()
    panel.tick()
    return str(panel.view.files.case)


@pytest.fixture
def clock(panel: Any) -> Clock:
    panel.drafts._clock = Clock()
    found: Clock = panel.drafts._clock
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The panel's tests run scripts with #! lines."""
    if os.name == "nt":
        for item in items:
            item.add_marker(pytest.mark.skip(reason="the stand-in worker is a shell script"))


_ = slicer  # the harness must be first to make slicer's application
