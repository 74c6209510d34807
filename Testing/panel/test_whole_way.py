"""From the sample to a reviewed case, by script, with the real worker, with five hundred cases, with two panels."""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qt
import slicer
from numpy.typing import NDArray
from panel_helpers import wait
from slicer_harness import module
from slicer_harness.views import SliceView

from SemiSAMO1Lib import files
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.project import Project, Role, read_labels, reviews
from SemiSAMO1Lib.project.results import changes
from SemiSAMO1Lib.quality import shipped
from SemiSAMO1Lib.scene.segmentations import drawn
from SemiSAMO1Lib.scene.volumes import geometry_of


class TestSample:
    @pytest.fixture
    def tried(self, panel: Any, ui: Any) -> Any:
        ui.tryItButton.click()
        return panel

    def test_its_predictions_are_there_at_once(self, tried: Any) -> None:
        assert len(tried.results.order()) == 11, tried.banner.text

    def test_a_case_opens_with_its_uncertainty(self, tried: Any, ui: Any) -> None:
        ui.nextButton.click()
        assert [node.GetName().split()[-1] for node in tried.view.nodes][1:] == ["prediction", "uncertainty"]

    def test_what_is_changed_is_a_copy(self, tried: Any) -> None:
        resources = Path(module.__file__).parents[2] / "SemiSAMO1" / "Resources"
        assert resources not in tried.session.project.folder.parents

    def test_labels_have_names(self, tried: Any) -> None:
        assert [label.name for label in tried.session.project.state.labels] == ["large organ", "small organ", "vessel"]

    def test_the_picture_shows_uncertainty_at_the_organs_border(self, tried: Any, ui: Any) -> None:
        ui.nextButton.click()
        ui.opacitySlider.value = 1.0
        view = SliceView("Red")
        view.fit()
        image = view.image().astype(int)
        view.close()
        colored = (image.max(2) - image.min(2)) > 60
        assert 0.01 < colored.mean() < 0.6, f"{colored.mean():.2f} of the picture is coloured"

    def test_every_scan_of_it_can_be_trained_on(self, tried: Any, ui: Any) -> None:
        assert ui.trainButton.enabled, ui.trainReasonLabel.text


class TestScripting:
    """The facade for Slicer's Python console."""

    @pytest.fixture
    def logic(self, panel: Any, loaded: Any) -> Any:
        return loaded.SemiSAMO1Logic()

    def until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, what
            time.sleep(0.05)

    def test_every_step(self, logic: Any, cohort: Path, tmp_path: Path) -> None:
        logic.openProject(tmp_path / "study")
        logic.addScans(cohort / "images")
        self.until(lambda: logic.session.poll() or len(logic.session.project.refresh().cases) == 4, "four scans")
        self.until(lambda: not _active(logic), "the end of adding")
        assert logic.setTemplate("phantom_000", cohort / "labels" / "phantom_000.nrrd") == 1
        logic.train(preset="quick")
        self.until(lambda: logic.status().state == "finished", "the training")
        scan, segmentation, uncertainty = logic.showCase(logic.cases()[0])
        assert (scan.GetClassName(), segmentation.GetClassName(), uncertainty.GetClassName()) == (
            "vtkMRMLScalarVolumeNode",
            "vtkMRMLSegmentationNode",
            "vtkMRMLScalarVolumeNode",
        )

    def test_a_segmentation_node_as_template(self, logic: Any, with_scans: Path, cohort: Path) -> None:
        logic.openProject(with_scans)
        label = slicer.util.loadLabelVolume(str(cohort / "labels" / "phantom_001.nrrd"), {"show": False})
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        slicer.modules.segmentations.logic().ImportLabelmapToSegmentationNode(label, node)
        assert logic.setTemplate("phantom_001", node) == 1
        state = Project(with_scans).state
        assert state.case("phantom_001").role is Role.TEMPLATE and state.labels.values == [1, 2, 3]

    def test_an_empty_segment_is_refused(self, logic: Any, with_scans: Path) -> None:
        logic.openProject(with_scans)
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        node.GetSegmentation().AddEmptySegment("", "liver")
        with pytest.raises(RuntimeError, match="liver is not painted"):
            logic.setTemplate("phantom_001", node)


def _active(logic: Any) -> bool:
    logic.session.poll()
    return bool(logic.session.import_job.seen.state.active)


#: A training of the real worker that is over in seconds.
SHORT = {
    "preset": "quick",
    "device": "cpu",
    "rounds": 1,
    "iterations": 4,
    "patch_voxels": 4096,
    "filters": 4,
    "threads": 1,
}


def train_really(panel: Any) -> None:
    """No stand-in: this Python, torch, one short round."""
    before = panel.session.current_training
    panel.session.python, panel.session.environment = Path(sys.executable), None
    panel.session.train(SHORT)
    wait(panel, lambda: panel.session.current_training != before and not panel.session.busy, "predictions", 180)
    panel.results.look_again()
    panel.results.open()


def test_the_real_worker_trains_to_the_end(panel: Any, ui: Any, with_template: Path) -> None:
    """Real predictions on the scans' own grids."""
    train_really(panel)
    assert panel.view.scan.GetImageData().GetDimensions() == panel.view.uncertainty.GetImageData().GetDimensions()
    assert ui.roundsTable.rowCount == 2, "round 0 and round 1"


def test_the_loop_with_the_real_worker(panel: Any, ui: Any, with_template: Path, cohort: Path) -> None:
    """Train, correct the worst case as the reference has it, accept the next, train again: what was learned is said."""
    train_really(panel)
    corrected = panel.view.files.case
    truth = read_labels(cohort / "labels" / f"{corrected}.nrrd", geometry_of(panel.view.scan)).volume.array
    seen = drawn(panel.view.segmentation, panel.view.scan, panel.session.project.state.labels).labels.array
    assert dice_of(seen, truth) < 0.999, "there is something to correct"
    segments = panel.view.segmentation.GetSegmentation()
    for label in panel.session.project.state.labels:
        identity = segments.GetSegmentIdBySegmentName(label.name)
        mine = (truth == label.value).astype(np.uint8)
        slicer.util.updateSegmentBinaryLabelmapFromArray(mine, panel.view.segmentation, identity, panel.view.scan)
    panel.tick()
    ui.correctButton.click()
    accepted = panel.view.files.case
    ui.acceptButton.click()
    project = Project(with_template)
    kept = {case: project.state.case(case).review for case in (corrected, accepted)}
    assert list(kept.values()) == ["corrected", "accepted"], panel.banner.text

    train_really(panel)
    learned = {one.case: one for one in changes(Project(with_template))}
    assert sorted(learned) == sorted(kept), "of both reviewed cases it is said how much they changed"
    assert learned[corrected].in_words in ui.standingLabel.text
    one = project.refresh().case(corrected)
    stored = read_labels(project.label_path(one), one.geometry).volume.array
    assert np.array_equal(stored, truth), "the correction stays as it was drawn"
    assert list(panel.session.predicted()) == [panel.view.files.case], "what is labelled is predicted no more"


def test_report_and_model_of_the_real_worker(
    panel: Any, ui: Any, with_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both by their buttons: the report is opened when a person says so, the model lies where it was asked for."""
    train_really(panel)
    report = with_template / "jobs" / panel.session.current_training / "report.html"
    report.unlink()
    ui.reportButton.click()
    assert "The report is under way" in ui.exportButton.toolTip
    wait(panel, lambda: "The report is finished" in panel.banner.text, "the report")
    opened: list[str] = []
    monkeypatch.setattr(qt.QDesktopServices, "openUrl", lambda url: opened.append(url.toLocalFile()) or True)
    ui.bannerButton.click()
    assert [Path(path) for path in opened] == [report.resolve()] and report.is_file()

    panel.dialogs.named = tmp_path / "for a friend"
    ui.modelButton.click()
    wait(panel, lambda: "Writing the model is finished" in panel.banner.text, "the model")
    names = zipfile.ZipFile(tmp_path / "for a friend.zip").namelist()
    assert any(name.endswith("models/model.ts") for name in names), names


def test_further_scans_are_segmented_by_the_button(
    panel: Any, ui: Any, with_template: Path, cohort: Path, tmp_path: Path
) -> None:
    """By the real worker, with the training that is shown."""
    train_really(panel)
    further = tmp_path / "further"
    further.mkdir()
    shutil.copy(cohort / "images" / "phantom_003.nrrd", further / "a_new_one.nrrd")
    ui.newScansPathEdit.currentPath, ui.exportPathEdit.currentPath = str(further), str(tmp_path / "segmented")
    panel.tick()
    assert ui.applyButton.enabled, ui.applyButton.toolTip
    ui.applyButton.click()
    wait(panel, lambda: "Segmenting further scans is finished" in panel.banner.text, "the further scan")
    found = read_volume(tmp_path / "segmented" / "a_new_one.seg.nrrd")
    assert found.geometry.same_grid(read_volume(further / "a_new_one.nrrd").geometry) and found.array.any()


def dice_of(found: NDArray[Any], truth: NDArray[Any]) -> float:
    """Of everything that is labelled."""
    both = np.count_nonzero((found > 0) & (found == truth))
    return 2 * both / (np.count_nonzero(found) + np.count_nonzero(truth))


DATA = Path(os.environ.get("SEMISAMO1_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.real_scans
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans in {DATA}; set SEMISAMO1_DATA to test on them")
def test_real_scans_from_the_folder_to_a_predicted_case(panel: Any, ui: Any, tmp_path: Path) -> None:
    """As a person does it: four hippocampi, the first labelled from its file, registration alone, the worst open."""
    scans = tmp_path / "scans"
    scans.mkdir()
    images = sorted((DATA / "hippocampus" / "images").iterdir())[:4]
    for path in images:
        shutil.copy(path, scans)
    ui.projectPathEdit.currentPath = str(tmp_path / "hippocampi")
    ui.openProjectButton.click()
    ui.scansPathEdit.currentPath = str(scans)
    ui.addFolderButton.click()
    wait(panel, lambda: len(panel.session.rows()) == 4 and not panel.session.import_job.seen.state.active, "four scans")
    ui.takeFileEdit.currentPath = str(DATA / "hippocampus" / "labels" / images[0].name)
    ui.takeFileButton.click()
    assert panel.view.files.case == panel.session.rows()[0].case, panel.banner.text
    panel.session.python, panel.session.environment = Path(sys.executable), None
    panel.session.train({"preset": "quick", "device": "cpu", "rounds": 0, "threads": 1})
    wait(panel, lambda: bool(panel.session.predicted()) and not panel.session.busy, "predictions", 180)
    panel.results.look_again()
    panel.results.open()
    truth = read_labels(
        DATA / "hippocampus" / "labels" / f"{panel.view.files.case}.nii.gz", geometry_of(panel.view.scan)
    )
    found = drawn(panel.view.segmentation, panel.view.scan, panel.session.project.state.labels).labels.array
    dice = dice_of(found, truth.volume.array)
    assert dice > 0.7, f"what the scene holds agrees with the truth: Dice {dice:.3f}"


class TestTwoPanels:
    def test_what_one_changes_the_other_shows(self, panel: Any, ui: Any, loaded: Any, with_scans: Path) -> None:
        other = module.open_widget(loaded)
        other.ui.projectPathEdit.currentPath = str(with_scans)
        other.ui.openProjectButton.click()
        ui.openTemplateButton.click()
        ui.addLabelButton.click()
        other.panel.tick()
        names = [other.ui.labelTable.item(row, 1).text() for row in range(other.ui.labelTable.rowCount)]
        other.exit()
        other.cleanup()
        assert names == ["structure 1", "structure 2"]

    def test_two_trainings_at_once_are_refused(self, panel: Any, ui: Any, loaded: Any, with_template: Path) -> None:
        panel.session.environment = {"PATH": "/usr/bin:/bin", "SEMISAMO1_STAND_IN": "slow"}
        ui.trainButton.click()
        wait(panel, lambda: panel.session.training.seen.pid is not None, "the worker")
        other = module.open_widget(loaded)
        other.ui.projectPathEdit.currentPath = str(with_template)
        other.ui.openProjectButton.click()
        reason = other.ui.trainReasonLabel.text
        other.exit()
        other.cleanup()
        ui.stopButton.click()
        wait(panel, lambda: not panel.session.busy, "the stop")
        assert "is under way" in reason


@pytest.mark.alone
class TestFiveHundredCases:
    """A tick, a click and an update of the table: median of 20 below 50 ms, with 100 MB of events."""

    @pytest.fixture
    def crowded(self, panel: Any, ui: Any, with_template: Path) -> Any:
        value = files.read_json(with_template / "project.json")
        pattern = value["cases"][1]
        value["cases"] += [{**pattern, "id": f"case_{n:03d}", "name": f"case_{n:03d}"} for n in range(496)]
        job = JobFolder.create(with_template / "jobs", JobKind.TRAIN, {"preset": "quick"}, value["labels"])
        rows = []
        for number, row in enumerate(value["cases"][1:]):
            signals = dict.fromkeys(shipped().names, 0.5 + number / 1200)
            labels = {str(one): {"signals": signals, "volume_ml": 1.0, "uncertainty": 0.2} for one in (1, 2, 3)}
            scores = {"uncertainty": 0.1, "label_uncertainty": 0.2, "labels": labels}
            rows.append({"case": row["id"], "scores": scores, "prediction": "p.seg.nrrd", "uncertainty": "u.nrrd"})
        files.write_json(job.index, {"round": 1, "cases": rows, "skipped": []})
        status = {"state": "finished", "host": "other", "heartbeat": time.time(), "fraction": 1.0, "pid": 1}
        files.write_json(job.status, status)
        event = {"kind": "losses", "round": 1, "iteration": 1, "of": 9, "losses": {"total": 0.5, "pseudo": 0.25}}
        line = json.dumps(event).encode() + b"\n"
        with job.events.open("wb") as stream:
            for _ in range(100):
                stream.write(line * ((1 << 20) // len(line)))
        files.write_json(with_template / "project.json", {**value, "current_training": job.id})
        ui.projectPathEdit.currentPath = ""
        ui.projectPathEdit.currentPath = str(with_template)
        ui.openProjectButton.click()
        return panel

    def median_ms(self, action: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        """Of 20 times, in the process's own time: other programs do not count, nor does what other tests left behind
        for Python to sweep, nor what happens `before` each. The best of three tries."""
        gc.collect()
        gc.freeze()
        try:
            return min(self._median_ms(action, before) for _ in range(3))
        finally:
            gc.unfreeze()

    def _median_ms(self, action: Callable[[], Any], before: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(20):
            before()
            began = time.process_time()
            action()
            module.QAPPLICATION.processEvents()
            seconds.append(time.process_time() - began)
        return 1000 * statistics.median(seconds)

    def test_a_tick(self, crowded: Any) -> None:
        assert self.median_ms(crowded.tick) < 50

    def test_a_tick_after_the_project_changed(self, crowded: Any, with_template: Path) -> None:
        """Somebody else decided about a case: likely quality, queue and list are made anew. The decisions themselves
        are theirs, and not timed."""
        other, waiting = Project(with_template), iter(range(1000))

        def decide() -> None:
            reviews.skip(other, f"case_{next(waiting):03d}")

        assert self.median_ms(crowded.tick, decide) < 50
        assert "skipped" in crowded.ui.resultCaseBox.itemText(crowded.ui.resultCaseBox.findData("case_000"))

    def test_the_whole_table_is_written_in_the_end(self, crowded: Any, ui: Any) -> None:
        wait(crowded, lambda: crowded.project.up_to_date, "500 rows")
        assert ui.caseTable.rowCount == 500

    def test_an_update_of_the_table(self, crowded: Any, ui: Any) -> None:
        wait(crowded, lambda: crowded.project.up_to_date, "500 rows")
        rows = [(r.case, r.size, r.spacing, r.role, r.state) for r in crowded.session.rows()]
        turn = iter(range(100))

        def update() -> None:
            mark = str(next(turn))
            crowded.project._table.show([(*row[:4], mark) for row in rows])

        assert self.median_ms(update) < 50

    @pytest.mark.parametrize("name", ["openProjectButton", "addLabelButton", "curvesButton"])
    def test_a_click(self, crowded: Any, ui: Any, name: str) -> None:
        wait(crowded, lambda: crowded.project.up_to_date, "500 rows")
        assert getattr(ui, name).enabled, "a disabled button does nothing"
        assert self.median_ms(getattr(ui, name).click) < 50
