"""Export: what is chosen, what is left out, the files, the table, and DICOM SEG on its own slices alone."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import PATIENT, write_series
from scans import OBLIQUE, write_scan

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.lock import identity
from SemiSAMO1Lib.project import Project, ProjectError, Role, Skipped, read_labels, reviews
from SemiSAMO1Lib.project.export import chosen, require_output
from SemiSAMO1Lib.project.importing import candidates, look
from SemiSAMO1Lib.project.label_table import Label
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.tasks.export import export
from SemiSAMO1Lib.volume import Geometry, Volume

#: Names of labels that Latin letters cannot write, or that are longer than DICOM allows.
NAMES = ("左心房", "appendage " * 8)


class Listening(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def handshake(self, **_: Any) -> None:
        pass

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "warning":
            self.warned.append(fields["text"])


def tagged(series: Path, tag: str, value: str) -> None:
    """Give every slice a tag as some scanners write it."""
    for path in series.iterdir():
        slice_ = pydicom.dcmread(path)
        with warnings.catch_warnings(action="ignore"):
            setattr(slice_, tag, value)
            slice_.save_as(path)


def project_of(folder: Path) -> Project:
    """Every scan below `folder`/scans is a case; the first is the template, the others are predicted."""
    project = Project.create(folder / "project")
    for candidate in candidates(folder / "scans", project.folder):
        assert not isinstance(candidate, Skipped)
        found = look(candidate)
        assert not isinstance(found, Skipped), found
        project.add(found)
    first, *others = project.refresh().cases
    write_volume(folder / f"{first.id}.nrrd", on(first.geometry))
    project.add_label(first.id, folder / f"{first.id}.nrrd", reviewer="ann")
    job = JobFolder.create(project.jobs, JobKind.TRAIN, {}, project.state.labels.to_json())
    rows = []
    for case in others:
        path = job.results / "1" / f"{case.id}.seg.nrrd"
        write_segmentation(path, on(case.geometry), project.state.labels)
        labels = {str(value): {"uncertainty": 0.25, "signals": {"expected_dice": 0.9}} for value in (1, 2)}
        scores = {"label_uncertainty": 0.25, "labels": labels}
        name = f"1/{case.id}.seg.nrrd"
        rows.append({"case": case.id, "scores": scores, "prediction": name, "sha256": files.sha256(path)})
    files.write_json(job.index, {"round": 1, "cases": rows, "skipped": []})
    reviews.finish_training(project, job.id)
    return project


def on(grid: Geometry) -> Volume:
    """Two labels on a grid, different in every slice."""
    array = np.zeros(grid.shape, np.uint8)
    z, y, x = grid.shape
    for k in range(1, z - 1):
        array[k, 1 : 2 + k % (y - 2), 1 : x // 2] = 1
        array[k, 1:3, x // 2 : x // 2 + 1 + k % 3] = 2
    return Volume(array, grid)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    for seed, name in enumerate("abcdef"):
        write_scan(tmp_path / "scans" / f"{name}.nrrd", seed=seed)
    project = project_of(tmp_path)
    reviews.accept(project, "b", reviewer="bob")
    reviews.reject(project, "c", reviewer="cem")
    project.exclude("d")
    return project


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def run(
    project: Project, folder: Path, kind: str = "nrrd", dicom: Path | None = None, listening: Listening | None = None
) -> list[dict[str, str]]:
    parameters = {"output": str(folder), "format": kind, "dicom": str(dicom) if dicom else None}
    job = JobFolder.create(project.jobs, JobKind.EXPORT, parameters, [])
    export(job, listening or Listening())  # type: ignore[arg-type]
    return list(csv.DictReader((folder / "volumes.csv").open(encoding="utf-8")))


class TestWhat:
    def test_labels_come_before_predictions(self, project: Project) -> None:
        found = {one.case.id: (one.what, one.by) for one in chosen(project)[0]}
        training = project.state.current_training
        assert found == {
            "a": ("label", "ann"),
            "b": ("label", "bob"),
            "e": ("prediction", training),
            "f": ("prediction", training),
        }

    def test_excluded_and_rejected_are_left_out_and_listed(self, project: Project, tmp_path: Path) -> None:
        run(project, tmp_path / "out")
        listed = dict(csv.reader((tmp_path / "out" / "left_out.csv").open(encoding="utf-8")))
        assert listed["c"].startswith("its prediction was rejected by cem, 20")
        assert listed["d"].startswith(f"excluded by {identity()['user']}, 20") and set(listed) == {"case", "c", "d"}
        assert not {"c.seg.nrrd", "d.seg.nrrd"} & {one.name for one in (tmp_path / "out").iterdir()}

    def test_a_case_that_a_person_labelled_is_exported_though_its_prediction_was_rejected(
        self, project: Project, tmp_path: Path
    ) -> None:
        write_volume(tmp_path / "c.nrrd", on(project.state.case("c").geometry))
        project.add_label("c", tmp_path / "c.nrrd", role=Role.LABELLED, reviewer="ann")
        assert {one.case.id: one.by for one in chosen(project)[0]}["c"] == "ann"

    @pytest.mark.parametrize("case", ["b", "e"], ids=["a label", "a prediction"])
    def test_of_a_changed_image_nothing_is_exported(self, project: Project, tmp_path: Path, case: str) -> None:
        write_scan(tmp_path / "scans" / f"{case}.nrrd", seed=99)
        assert "was changed since it was added" in dict(chosen(project)[1])[case]

    def test_a_label_outlives_its_image(self, project: Project, tmp_path: Path) -> None:
        (tmp_path / "scans" / "b.nrrd").unlink()
        assert "b" in {one.case.id for one in chosen(project)[0]}

    def test_a_case_that_was_never_predicted_is_listed(self, project: Project) -> None:
        project.change(lambda state: replace(state, current_training=None))
        assert dict(chosen(project)[1])["e"] == "no label and no prediction"

    def test_a_prediction_that_somebody_mended_in_place_is_not_the_machines(self, project: Project) -> None:
        path = next(project.jobs.rglob("e.seg.nrrd"))
        path.write_bytes(next(project.jobs.rglob("f.seg.nrrd")).read_bytes() + b" ")
        found, left_out = chosen(project)
        assert "e" not in {one.case.id for one in found}
        assert "not as 0001-train made it" in dict(left_out)["e"]

    def test_a_prediction_that_is_gone_does_not_end_the_export(self, project: Project, tmp_path: Path) -> None:
        next(project.jobs.rglob("e.seg.nrrd")).unlink()
        rows = run(project, tmp_path / "out")
        assert {row["case"] for row in rows} == {"a", "b", "f"}


class TestFiles:
    @pytest.mark.parametrize(("kind", "ending"), [("nrrd", ".seg.nrrd"), ("nifti", ".nii.gz")])
    def test_voxels_are_those_of_the_project(self, project: Project, tmp_path: Path, kind: str, ending: str) -> None:
        run(project, tmp_path / "out", kind)
        geometry = project.state.case("e").geometry
        saved = read_labels(tmp_path / "out" / f"e{ending}", geometry)
        assert saved.exact and np.array_equal(saved.volume.array, on(geometry).array)

    def test_the_table_says_what_is_which(self, project: Project, tmp_path: Path) -> None:
        rows = {(row["case"], row["value"]): row for row in run(project, tmp_path / "out")}
        assert (rows["b", "1"]["what"], rows["b", "1"]["by"], rows["b", "1"]["state"]) == ("label", "bob", "accepted")
        assert rows["e", "1"]["uncertainty_percent"] == "25.0" and 0 < float(rows["e", "1"]["likely_dice"]) < 1
        assert rows["a", "1"]["likely_dice"] == "", "a label is no estimate"

    def test_a_further_scan_that_was_labelled_by_hand_is_not_the_template(
        self, project: Project, tmp_path: Path
    ) -> None:
        further = project.state.case("f")
        write_volume(tmp_path / "f.nrrd", on(further.geometry))
        project.add_label("f", tmp_path / "f.nrrd", role=project.role_for_label("f"))
        rows = run(project, tmp_path / "out")
        assert {row["case"]: row["origin"] for row in rows if row["case"] in "af"} == {"a": "template", "f": "drawn"}

    def test_a_likely_dice_has_its_error(self, project: Project, tmp_path: Path) -> None:
        rows = {(row["case"], row["value"]): row for row in run(project, tmp_path / "out")}
        assert float(rows["e", "1"]["likely_dice_error"]) > 0
        assert rows["e", "1"]["likely_dice_checked"] == "not yet on these scans"

    @pytest.mark.parametrize("case", ["b", "e"], ids=["a label", "a prediction"])
    def test_a_label_that_was_added_later_has_no_volume(self, project: Project, tmp_path: Path, case: str) -> None:
        project.update_labels([Label(3, "late")])
        rows = {(row["case"], row["value"]): row["volume_ml"] for row in run(project, tmp_path / "out")}
        assert rows[case, "3"] == "" and rows[case, "1"] != "", "unknown is not 0 ml"

    @pytest.mark.parametrize(("case", "status"), [("b", "completed"), ("e", "notstarted")])
    def test_segments_carry_slicers_status(self, project: Project, tmp_path: Path, case: str, status: str) -> None:
        run(project, tmp_path / "out")
        header = (tmp_path / "out" / f"{case}.seg.nrrd").read_bytes()[:4000].decode("latin-1")
        assert header.count(f"Segmentation.Status:{status}") == 2, "one for each segment"

    def test_volumes_are_in_ml(self, project: Project, tmp_path: Path) -> None:
        rows = {(row["case"], row["value"]): row for row in run(project, tmp_path / "out")}
        geometry = project.state.case("e").geometry
        wanted = int((on(geometry).array == 2).sum()) * float(np.prod(geometry.spacing)) / 1000
        assert float(rows["e", "2"]["volume_ml"]) == pytest.approx(wanted, abs=1e-4)

    def test_how_good_a_prediction_was_stands_beside_the_label(self, project: Project, tmp_path: Path) -> None:
        """Of an accepted one: all of it; of the template nobody saw a prediction."""
        rows = {(row["case"], row["value"]): row["dice_seen_to_saved"] for row in run(project, tmp_path / "out")}
        assert (rows["b", "1"], rows["a", "1"], rows["e", "1"]) == ("1.0000", "", "")

    def test_an_export_can_be_made_again(self, project: Project, tmp_path: Path) -> None:
        assert run(project, tmp_path / "out") == run(project, tmp_path / "out")


class TestAgain:
    def test_a_case_that_is_left_out_now_leaves_no_file_of_before(self, project: Project, tmp_path: Path) -> None:
        run(project, tmp_path / "out")
        assert (tmp_path / "out" / "e.seg.nrrd").is_file()
        project.exclude("e")
        run(project, tmp_path / "out")
        assert not (tmp_path / "out" / "e.seg.nrrd").exists()

    def test_another_format_stays_beside_it(self, project: Project, tmp_path: Path) -> None:
        run(project, tmp_path / "out", "nrrd")
        run(project, tmp_path / "out", "nifti")
        assert (tmp_path / "out" / "e.seg.nrrd").is_file() and (tmp_path / "out" / "e.nii.gz").is_file()

    def test_an_export_that_writes_nothing_leaves_the_other_formats_table(
        self, project: Project, tmp_path: Path
    ) -> None:
        run(project, tmp_path / "out", "nrrd")
        before = (tmp_path / "out" / "volumes.csv").read_bytes()
        with pytest.raises(ValueError, match="nothing could be exported"):
            run(project, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        assert (tmp_path / "out" / "volumes.csv").read_bytes() == before

    def test_after_another_format_too(self, project: Project, tmp_path: Path) -> None:
        """The table is that of the last export; what the one before it wrote is known all the same."""
        run(project, tmp_path / "out", "nrrd")
        run(project, tmp_path / "out", "nifti")
        project.exclude("e")
        run(project, tmp_path / "out", "nrrd")
        assert not (tmp_path / "out" / "e.seg.nrrd").exists() and (tmp_path / "out" / "e.nii.gz").is_file()

    def test_after_one_that_was_ended_by_force(
        self, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its table is empty; what it wrote is known."""
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("SemiSAMO1Lib.tasks.export.write_tables", killed)
            run(project, tmp_path / "out")
        assert (tmp_path / "out" / "e.seg.nrrd").is_file()
        project.exclude("e")
        run(project, tmp_path / "out")
        assert not (tmp_path / "out" / "e.seg.nrrd").exists()

    def test_files_that_no_export_made_stay(self, project: Project, tmp_path: Path) -> None:
        run(project, tmp_path / "out")
        (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
        run(project, tmp_path / "out")
        assert (tmp_path / "out" / "mine.txt").is_file()


class TestRefusals:
    def test_an_unknown_format(self, project: Project, tmp_path: Path) -> None:
        with pytest.raises(ProjectError, match="there are: nrrd, nifti, dicom-seg"):
            require_output(project, tmp_path / "out", "png")

    def test_a_file_in_place_of_a_folder(self, project: Project, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("", encoding="utf-8")
        with pytest.raises(ProjectError, match=r"is a file\. Give a folder"):
            require_output(project, tmp_path / "out", "nrrd")

    def test_where_nothing_can_be_exported_some_reasons_and_their_number_are_said(
        self, project: Project, tmp_path: Path
    ) -> None:
        for case in project.state.cases:
            project.exclude(case.id)
        with pytest.raises(
            ValueError, match=r"nothing could be exported\. a: excluded.* and 3 more, see left_out\.csv"
        ):
            run(project, tmp_path / "out")

    @pytest.mark.parametrize("place", ["project", "project/images", "scans"])
    def test_a_folder_with_other_files(self, project: Project, tmp_path: Path, place: str) -> None:
        with pytest.raises(ProjectError, match=r"of its own|other files"):
            require_output(project, tmp_path / place, "nrrd")


class TestDicomSeg:
    @pytest.fixture
    def series(self, tmp_path: Path) -> Project:
        """Two cases from oblique DICOM series in folders of their own."""
        for number in (1, 2):
            rng = np.random.default_rng(number)
            volume = Volume(rng.integers(0, 900, OBLIQUE.shape).astype(np.int16), OBLIQUE)
            write_series(tmp_path / "scans" / f"p{number}", volume)
        return project_of(tmp_path)

    def read(self, path: Path) -> Any:
        import highdicom

        return highdicom.seg.segread(path)

    def test_every_slice_lies_on_its_source(self, series: Project, tmp_path: Path) -> None:
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        case = series.state.case("p2")
        found = self.read(tmp_path / "out" / "p2.dcm")
        uids = case.source["instance_uids"]
        planes = found.get_pixels_by_source_instance(uids, combine_segments=True, ignore_spatial_locations=False)
        assert np.array_equal(planes, on(case.geometry).array), "a slice has another slice's segmentation"

    def test_names_in_any_script_are_kept(self, series: Project, tmp_path: Path) -> None:
        series.update_labels(
            [replace(label, name=name) for label, name in zip(series.state.labels, NAMES, strict=True)]
        )
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        found = self.read(tmp_path / "out" / "p2.dcm")
        assert [one.segment_label for one in found.SegmentSequence] == [NAMES[0], NAMES[1][:64]]
        assert str(found.PatientName) == PATIENT

    def test_sides_and_regions_are_kept(self, series: Project, tmp_path: Path) -> None:
        def code(value: str, meaning: str) -> dict[str, str]:
            return {"scheme": "SCT", "value": value, "meaning": meaning}

        codes = {
            "category": code("49755003", "Morphologically Altered Structure"),
            "type": code("4147007", "Mass"),
            "modifier": code("24028007", "Right"),
            "region": code("64033007", "Kidney"),
            "region_modifier": code("7771000", "Left"),
        }
        series.update_labels([replace(series.state.labels.labels[0], terminology=codes)])
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        chosen, other = self.read(tmp_path / "out" / "p2.dcm").SegmentSequence
        kind, region = chosen.SegmentedPropertyTypeCodeSequence[0], chosen.AnatomicRegionSequence[0]
        assert (kind.CodeMeaning, region.CodeMeaning) == ("Mass", "Kidney")
        assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Right"
        assert region.AnatomicRegionModifierSequence[0].CodeMeaning == "Left"
        assert "AnatomicRegionSequence" not in other

    def test_it_names_its_segments_and_who_made_them(self, series: Project, tmp_path: Path) -> None:
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        label, prediction = (self.read(tmp_path / "out" / f"{case}.dcm") for case in ("p1", "p2"))
        assert [one.segment_label for one in label.SegmentSequence] == ["label 1", "label 2"]
        assert {one.algorithm_type.value for one in label.SegmentSequence} == {"MANUAL"}
        assert {one.algorithm_type.value for one in prediction.SegmentSequence} == {"AUTOMATIC"}

    @pytest.mark.parametrize(("decide", "kind"), [("accept", "AUTOMATIC"), ("correct", "SEMIAUTOMATIC")])
    def test_it_says_how_a_reviewed_label_was_made(
        self, series: Project, tmp_path: Path, decide: str, kind: str
    ) -> None:
        if decide == "accept":
            reviews.accept(series, "p2")
        else:
            write_volume(tmp_path / "p2.nrrd", on(series.state.case("p2").geometry))
            reviews.correct(series, "p2", tmp_path / "p2.nrrd", sure=True)
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        found = self.read(tmp_path / "out" / "p2.dcm")
        assert {one.algorithm_type.value for one in found.SegmentSequence} == {kind}

    def test_it_belongs_to_the_same_patient_and_study(self, series: Project, tmp_path: Path) -> None:
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        found = self.read(tmp_path / "out" / "p1.dcm")
        assert str(found.PatientName) == PATIENT
        assert found.StudyInstanceUID == series.state.case("p1").source["study_uid"]

    def test_a_moved_slice_is_refused_and_nrrd_is_offered(self, series: Project, tmp_path: Path) -> None:
        path = sorted((tmp_path / "scans" / "p2").iterdir())[2]
        slice_ = pydicom.dcmread(path)
        slice_.ImagePositionPatient[0] = float(slice_.ImagePositionPatient[0]) + 0.1
        slice_.save_as(path)
        rows = run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        listed = dict(csv.reader((tmp_path / "out" / "left_out.csv").open(encoding="utf-8")))
        assert {row["case"] for row in rows} == {"p1"}
        assert "0.1 mm from the source's" in listed["p2"] and "NRRD" in listed["p2"]

    def test_a_missing_slice_is_refused(self, series: Project, tmp_path: Path) -> None:
        sorted((tmp_path / "scans" / "p2").iterdir())[0].unlink()
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        listed = dict(csv.reader((tmp_path / "out" / "left_out.csv").open(encoding="utf-8")))
        assert "1 of" in listed["p2"] and "not in the folder" in listed["p2"]

    @pytest.mark.parametrize(
        ("tag", "value"),
        [
            ("PatientBirthDate", "1964-08-12"),
            ("PatientBirthDate", "12.08.1964"),
            ("PatientSex", "Female"),
            ("StudyTime", "12:30:00"),
        ],
    )
    def test_a_tag_that_is_not_as_dicom_has_it_is_left_empty_and_named(
        self, series: Project, tmp_path: Path, tag: str, value: str
    ) -> None:
        tagged(tmp_path / "scans" / "p2", tag, value)
        listening = Listening()
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans", listening)
        assert str(self.read(tmp_path / "out" / "p2.dcm").get(tag) or "") == ""
        (warned,) = listening.warned
        assert warned.startswith("p2: ") and tag in warned and value not in warned

    def test_headers_that_cannot_be_carried_over_are_refused_without_quoting_them(
        self, series: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As its libraries quote what they refuse."""

        def refuses(*_: object, **__: object) -> None:
            raise ValueError("Mustermann cannot be written")

        monkeypatch.setattr("highdicom.seg.Segmentation", refuses)
        with pytest.raises(ValueError, match=r"headers of its series are not as DICOM has them.*NRRD") as refused:
            run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        said = str(refused.value) + "".join(capsys.readouterr()) + (tmp_path / "out" / "left_out.csv").read_text()
        assert "Mustermann" not in said

    def test_a_name_of_one_part_is_in_the_file_and_in_nothing_that_is_printed(
        self, series: Project, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        """highdicom warns of names without a caret, and quotes them."""
        tagged(tmp_path / "scans" / "p2", "PatientName", "Erika Mustermann")
        run(series, tmp_path / "out", "dicom-seg", tmp_path / "scans")
        assert b"Erika Mustermann" in (tmp_path / "out" / "p2.dcm").read_bytes()
        assert not [one for one in recwarn if "Mustermann" in str(one.message)]

    def test_a_scan_that_was_no_dicom_is_refused(self, project: Project, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nothing could be exported.*did not come from DICOM"):
            run(project, tmp_path / "out", "dicom-seg", tmp_path / "scans")

    def test_without_the_series_it_is_asked_for(self, series: Project, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="needs the folder of the original series"):
            run(series, tmp_path / "out", "dicom-seg")

    @pytest.mark.parametrize("kind", ["nrrd", "nifti"])
    def test_nothing_else_holds_a_patients_tags(self, series: Project, tmp_path: Path, kind: str) -> None:
        run(series, tmp_path / "out", kind)
        held = [path.name for path in (tmp_path / "out").iterdir() if b"Mustermann" in path.read_bytes()]
        assert held == []
