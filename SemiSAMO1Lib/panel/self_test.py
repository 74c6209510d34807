"""What only a real Slicer can prove, run unattended: `SemiSAMO1Test` in the module's Reload & Test, or from a shell.

    Slicer --additional-module-paths FOLDER/SemiSAMO1 \\
        --python-code "import SemiSAMO1; from SemiSAMO1Lib.panel import self_test; self_test.run_and_exit()"

docs/real-slicer.md says what each scenario is for. The result is one JSON file: scenario, passed, seconds, error.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import qt
import slicer

from ..project.drafts import find_draft
from . import sample
from .draft_keeper import LONGEST_S


def run() -> list[str]:
    """Run all scenarios, each in an empty scene; write the result; return the names of those that failed.

    The result goes to the file that SEMISAMO1_TEST_RESULT names, else into Slicer's temporary folder.
    """
    named = os.environ.get("SEMISAMO1_TEST_RESULT")
    target = Path(named) if named else Path(slicer.app.temporaryPath) / "SemiSAMO1Test.json"
    found = []
    for scenario in SCENARIOS:
        slicer.mrmlScene.Clear(False)
        began, error = time.monotonic(), ""
        try:
            scenario()
        except Exception:
            error = traceback.format_exc()
        name = scenario.__name__
        found.append(
            {"scenario": name, "passed": not error, "seconds": round(time.monotonic() - began, 2), "error": error}
        )
    version = f"{slicer.app.majorVersion}.{slicer.app.minorVersion}"
    target.write_text(json.dumps({"slicer": version, "scenarios": found}, indent=2), encoding="utf-8")
    return [str(row["scenario"]) for row in found if not row["passed"]]


def run_and_exit() -> None:
    """Run all scenarios and close Slicer; its exit code is the number of scenarios that failed."""
    slicer.util.exit(len(run()))


def _panel() -> Any:
    """The module's panel, as a person opens it."""
    slicer.util.selectModule("SemiSAMO1")
    slicer.app.processEvents()
    return slicer.modules.semisamo1.widgetRepresentation().self().panel


def _sampled() -> Any:
    panel = _panel()
    panel.project.open(sample.unpack(panel.resources / "Sample" / "phantoms.zip", sample.place()))
    return panel


def opening_the_module_asks_nothing() -> None:
    before = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLVolumeNode")
    assert _panel() is not None
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLVolumeNode") == before


def the_real_editor_paints_into_the_template() -> None:
    panel = _sampled()
    panel.template.open()
    editor = panel.ui.segmentEditor
    before = panel.template.drawn().counts
    editor.setActiveEffectByName("Threshold")
    effect = editor.activeEffect()
    assert effect is not None, "the Threshold effect is missing"
    effect.setParameter("MinimumThreshold", "300")
    effect.setParameter("MaximumThreshold", "10000")
    effect.self().onApply()
    editor.setActiveEffect(None)
    assert panel.template.drawn().counts != before, "nothing was painted"


def undo_of_the_real_editor_brings_the_label_back() -> None:
    panel = _sampled()
    panel.template.open()
    before = panel.template.drawn().counts
    the_editor = panel.ui.segmentEditor
    the_editor.setActiveEffectByName("Margin")
    the_editor.activeEffect().self().onApply()
    the_editor.setActiveEffect(None)
    the_editor.undo()
    assert panel.template.drawn().counts == before


def leaving_the_module_leaves_no_tool_behind() -> None:
    panel = _sampled()
    panel.template.open()
    panel.ui.segmentEditor.setActiveEffectByName("Paint")
    slicer.util.selectModule("Data")
    assert panel.ui.segmentEditor.activeEffect() is None


def the_subject_hierarchy_groups_the_case() -> None:
    panel = _sampled()
    panel.results.step(1)
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    parents = {hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) for node in panel.view.nodes}
    assert [hierarchy.GetItemName(one) for one in parents] == [panel.view.files.title]


def the_overlay_is_drawn() -> None:
    panel = _sampled()
    panel.results.step(1)
    slicer.app.processEvents()
    view = slicer.app.layoutManager().sliceWidget("Red").sliceView()
    image = view.grab().toImage()
    colors = {image.pixel(x, y) for x in range(0, image.width(), 7) for y in range(0, image.height(), 7)}
    assert len(colors) > 50, "the slice view shows nothing"


def closing_the_scene_in_the_middle_does_no_harm() -> None:
    panel = _sampled()
    panel.results.step(1)
    slicer.mrmlScene.Clear(False)
    panel.results.open()
    assert panel.view.scan.GetScene() is slicer.mrmlScene


def fifty_cases_take_no_memory() -> None:
    panel = _sampled()
    order = panel.results.order()
    before = 0.0
    for number in range(60):
        if number == 10:
            gc.collect()
            before = _resident_mb()
        panel.ui.resultCaseBox.setCurrentIndex(number % len(order))
        panel.results.open()
        slicer.app.processEvents()
    gc.collect()
    assert slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode") == 1
    grown = _resident_mb() - before
    assert grown < 100, f"50 case changes grew the memory by {grown:.0f} MB"


def _resident_mb() -> float:
    """Memory of this process, MB; 0 where the system does not say it in a file."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 2**20
    except OSError:
        return 0.0


def a_draft_is_written_while_nobody_touches_slicer() -> None:
    """The thread that writes it has its turn while the main thread waits for events."""
    panel = _sampled()
    panel.results.step(1)
    view, project = panel.view, panel.session.project
    segment = view.segmentation.GetSegmentation().GetNthSegmentID(0)
    mask = np.zeros(slicer.util.arrayFromVolume(view.scan).shape, np.uint8)
    mask[:2, :2, :2] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, view.segmentation, segment, view.scan)
    clock = panel.drafts._clock
    panel.drafts.tick()
    panel.drafts._clock = lambda: clock() + LONGEST_S
    try:
        panel.drafts.tick()
    finally:
        panel.drafts._clock = clock
    loop, timer = qt.QEventLoop(), qt.QTimer()
    timer.setSingleShot(True)
    timer.connect("timeout()", loop.quit)
    timer.start(5_000)
    loop.exec_()
    assert find_draft(project, view.files.case) is not None, "five seconds later there is no draft"


def the_workers_python_starts() -> None:
    """PythonSlicer, started as the worker is, answers the doctor."""
    from ..job import environment
    from .setup_section import text_of

    process = qt.QProcess()
    variables = qt.QProcessEnvironment()
    python = str(environment.this_python())
    for name, value in environment.clean(slicer.util.startupEnvironment(), python).items():
        variables.insert(name, value)
    process.setProcessEnvironment(variables)
    worker = Path(__file__).resolve().parents[1] / "worker.py"
    process.start(python, [str(worker), "--doctor"])
    assert process.waitForFinished(60_000), "PythonSlicer did not answer"
    text = text_of(process.readAllStandardOutput())
    assert json.loads(text)["python"]["version"], text


def scans_are_added_before_any_set_up() -> None:
    """The first job of a person who has just installed the extension."""
    samples = Path(_sampled().session.project.folder) / "images"
    panel = _panel()
    folder = sample.place() / "new"
    folder.mkdir()
    panel.project.open(folder)
    panel.session.python = None
    adding = panel.session.add_folder(samples)
    panel.session.python = panel.setup.python
    until = time.monotonic() + 120
    while adding.seen.state.active and time.monotonic() < until:
        slicer.app.processEvents()
        panel.tick()
        time.sleep(0.1)
    assert len(panel.session.project.refresh().cases) == len(list(samples.glob("*.nrrd"))), adding.seen


def a_big_scan_opens_in_bearable_time() -> None:
    """512 × 512 × 600, as many CT scans are: shown and bound to the editor."""
    panel = _panel()
    array = np.zeros((600, 512, 512), np.int16)
    array[200:400, 150:350, 150:350] = 300
    node = slicer.util.addVolumeFromArray(array, name="big")
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "big label")
    segmentation.GetSegmentation().AddEmptySegment("", "organ")
    began = time.monotonic()
    panel.editor.edit(segmentation, node)
    slicer.app.processEvents()
    assert time.monotonic() - began < 5, "binding a big scan to the editor takes too long"
    panel.editor.release()


def the_question_when_slicer_is_closed_is_installed() -> None:
    _panel()
    widget = slicer.modules.semisamo1.widgetRepresentation().self()
    assert widget._quit_question is not None and widget.panel.may_quit()


SCENARIOS: list[Callable[[], None]] = [
    opening_the_module_asks_nothing,
    the_real_editor_paints_into_the_template,
    undo_of_the_real_editor_brings_the_label_back,
    leaving_the_module_leaves_no_tool_behind,
    the_subject_hierarchy_groups_the_case,
    the_overlay_is_drawn,
    closing_the_scene_in_the_middle_does_no_harm,
    fifty_cases_take_no_memory,
    a_draft_is_written_while_nobody_touches_slicer,
    the_workers_python_starts,
    scans_are_added_before_any_set_up,
    a_big_scan_opens_in_bearable_time,
    the_question_when_slicer_is_closed_is_installed,
]
