"""Import of a folder: every format becomes the same case, DICOM without the patient's name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import PATIENT, write_series
from scans import OBLIQUE, scan, two_labels

from SemiSAMO1Lib import image_io
from SemiSAMO1Lib.engine.data.hdf5_layout import read_case, write_case, write_list
from SemiSAMO1Lib.files import read_lines
from SemiSAMO1Lib.image_io import read_volume, to_sitk
from SemiSAMO1Lib.job.folder import JobFolder, JobKind
from SemiSAMO1Lib.project import Project, Skipped
from SemiSAMO1Lib.project.importing import candidates
from SemiSAMO1Lib.project.store import ProjectState
from SemiSAMO1Lib.tasks.run import FAILED, FINISHED, work
from SemiSAMO1Lib.volume import Geometry, Volume

WHOLE = Volume(scan(OBLIQUE).array.astype(np.int16), OBLIQUE)


def imported(project: Project, folder: Path) -> ProjectState:
    """Run the import job of a folder in this process."""
    job = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(folder)}, [])
    code = work(job.path)
    assert code == FINISHED, f"the import failed: {job.read_status()}"
    return project.refresh()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.create(tmp_path / "project")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    return tmp_path / "scans"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".nhdr"])
class TestFormats:
    def test_the_file_becomes_a_case_where_it_lies(self, project: Project, folder: Path, suffix: str) -> None:
        path = folder / f"a scan{suffix}"
        sitk.WriteImage(to_sitk(WHOLE), str(path))
        (case,) = imported(project, folder).cases
        assert project.image_path(case).resolve() == path, "the file should be used in place"

    def test_the_case_has_the_file_s_grid(self, project: Project, folder: Path, suffix: str) -> None:
        sitk.WriteImage(to_sitk(WHOLE), str(folder / f"a scan{suffix}"))
        (case,) = imported(project, folder).cases
        assert case.geometry.same_grid(OBLIQUE), f"expected {OBLIQUE}, got {case.geometry}"


@pytest.mark.parametrize("suffix", [".NII.GZ", ".NII", ".NRRD"])
def test_capitals_in_the_ending_do_not_matter(project: Project, folder: Path, suffix: str) -> None:
    sitk.WriteImage(to_sitk(WHOLE), str(folder / f"x{suffix.lower()}"))
    (folder / f"x{suffix.lower()}").rename(folder / f"A{suffix}")
    state = imported(project, folder)
    assert [case.id for case in state.cases] == ["A"], f"{suffix} was not used: {state.skipped}"


# ---------------------------------------------------------------------- DICOM


@pytest.fixture
def series(project: Project, folder: Path) -> dict[str, Any]:
    """One imported DICOM series: its UIDs, its case and its stored volume."""
    uid, instances = write_series(folder / "Fall 1", WHOLE)
    (case,) = imported(project, folder).cases
    return {"uid": uid, "instances": instances, "case": case, "path": project.image_path(case)}


def test_dicom_voxels_are_right(series: dict[str, Any]) -> None:
    read = read_volume(series["path"]).array
    assert np.array_equal(read, WHOLE.array), "slices are in the wrong order, or values were not rescaled"


def test_dicom_geometry_is_right(series: dict[str, Any]) -> None:
    assert read_volume(series["path"]).geometry.same_grid(OBLIQUE), f"got {read_volume(series['path']).geometry}"


def test_dicom_geometry_in_the_case_is_the_file_s(series: dict[str, Any]) -> None:
    assert series["case"].geometry.same_grid(OBLIQUE), f"project.json says {series['case'].geometry}"


def test_dicom_series_uid_is_kept(series: dict[str, Any]) -> None:
    assert series["case"].source["series_uid"] == series["uid"], "an export to DICOM needs the series UID"


def test_dicom_instance_uids_are_kept_in_slice_order(series: dict[str, Any]) -> None:
    assert series["case"].source["instance_uids"] == series["instances"], "an export to DICOM needs them in order"


@pytest.mark.parametrize("word", [*PATIENT.split("^"), "K11Q", "19640812", "Klinik"])
def test_no_file_of_the_project_names_the_patient(series: dict[str, Any], project: Project, word: str) -> None:
    told = [p.name for p in project.folder.rglob("*") if p.is_file() and word.encode() in p.read_bytes()]
    assert not told, f"{word} stands in {told}"


def test_the_stored_volume_has_no_dicom_tags(series: dict[str, Any]) -> None:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(series["path"]))
    reader.ReadImageInformation()
    tags = [key for key in reader.GetMetaDataKeys() if "|" in key]
    assert not tags, f"tags were written: {tags}"


def test_two_series_in_one_folder_are_two_cases(project: Project, folder: Path) -> None:
    first, _ = write_series(folder / "CT", WHOLE)
    second, _ = write_series(folder / "CT", Volume(WHOLE.array[::-1].copy(), OBLIQUE), prefix="X")
    uids = {case.source["series_uid"] for case in imported(project, folder).cases}
    assert uids == {first, second}, f"expected one case per series, got {uids}"


def test_a_series_in_two_folders_is_one_case(project: Project, folder: Path) -> None:
    write_series(folder / "CT", WHOLE)
    shutil.copytree(folder / "CT", folder / "CT copy")
    state = imported(project, folder)
    skipped = [(one.name, "same series" in one.reason) for one in state.skipped]
    assert (len(state.cases), skipped) == (1, [("CT copy", True)]), f"expected a case and a skip: {state.skipped}"


def test_dicom_in_a_folder_with_umlauts_takes_the_detour(
    project: Project, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_io, "_needs_detour", lambda path: not str(path).isascii())
    write_series(folder / "Größe", WHOLE)
    (case,) = imported(project, folder).cases
    read = read_volume(project.image_path(case)).array
    assert np.array_equal(read, WHOLE.array), "the series changed over the detour"


def bad_places(kind: str) -> np.ndarray[Any, Any]:
    """Positions of the slices of WHOLE, spoilt."""
    direction = np.reshape(OBLIQUE.direction, (3, 3))
    count = np.arange(OBLIQUE.shape[0], dtype=float)
    count[6:] += {"uneven": 1.0}.get(kind, 0)
    step = direction[:, 2] * OBLIQUE.spacing[0] + direction[:, 1] * {"tilt": 0.3}.get(kind, 0)
    positions = np.array(OBLIQUE.origin) + count[:, None] * step
    if kind == "twice":
        positions[5] = positions[4]
    return positions


@pytest.mark.parametrize(("kind", "reason"), [("uneven", "uneven"), ("tilt", "tilt"), ("twice", "same place")])
def test_a_series_that_is_no_even_stack_is_skipped(project: Project, folder: Path, kind: str, reason: str) -> None:
    write_series(folder / "bad", WHOLE, bad_places(kind))
    write_series(folder / "good", WHOLE)
    state = imported(project, folder)
    told = {one.name: reason in one.reason for one in state.skipped}
    assert ([c.id for c in state.cases], told) == (["good"], {"bad": True}), f"expected a skip: {state.skipped}"


def test_one_dicom_slice_is_skipped(project: Project, folder: Path) -> None:
    write_series(folder / "good", WHOLE)
    one = Geometry((1, *OBLIQUE.shape[1:]), OBLIQUE.spacing, OBLIQUE.origin, OBLIQUE.direction)
    write_series(folder / "scout", Volume(WHOLE.array[:1], one))
    told = {s.name: "one DICOM slice" in s.reason for s in imported(project, folder).skipped}
    assert told == {"scout": True}, f"expected the scout as a skip with its reason, got {told}"


# ---------------------------------------------------------------------- HDF5 layout


def test_hdf5_round_trip_keeps_the_image(tmp_path: Path) -> None:
    write_case(tmp_path / "a.h5", scan(OBLIQUE), two_labels(OBLIQUE))
    read = read_case(tmp_path / "a.h5").image
    assert np.array_equal(read.array, scan(OBLIQUE).array), "voxels changed"


def test_hdf5_round_trip_keeps_the_label(tmp_path: Path) -> None:
    write_case(tmp_path / "a.h5", scan(OBLIQUE), two_labels(OBLIQUE))
    read = read_case(tmp_path / "a.h5", with_label=True).label
    assert read is not None and np.array_equal(read.array, two_labels(OBLIQUE).array), "the label changed"


def test_hdf5_round_trip_keeps_the_grid(tmp_path: Path) -> None:
    write_case(tmp_path / "a.h5", scan(OBLIQUE))
    assert read_case(tmp_path / "a.h5").image.geometry == OBLIQUE, "the grid changed"


def test_hdf5_files_are_x_y_z_as_published(tmp_path: Path) -> None:
    write_case(tmp_path / "a.h5", scan(OBLIQUE))
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["image"].shape == OBLIQUE.shape[::-1], "the published code expects slices last"


def plain_hdf5(path: Path, **datasets: np.ndarray[Any, Any]) -> Path:
    """A file as published: no attributes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file[name] = array
    return path


def test_hdf5_without_attributes_is_taken_as_x_y_z(tmp_path: Path) -> None:
    array = scan(OBLIQUE).array
    path = plain_hdf5(tmp_path / "a.h5", image=array.T)
    assert np.array_equal(read_case(path).image.array, array), "the first axis of the file should be x"


@pytest.mark.parametrize("word", ["x, y, z", "1 mm"])
def test_hdf5_without_attributes_says_what_was_assumed(tmp_path: Path, word: str) -> None:
    notes = read_case(plain_hdf5(tmp_path / "a.h5", image=scan(OBLIQUE).array.T)).notes
    assert word in " ".join(notes), f"{word!r} is an assumption that must be said: {notes}"


def test_hdf5_with_another_axis_order_is_turned(tmp_path: Path) -> None:
    array = scan(OBLIQUE).array
    path = plain_hdf5(tmp_path / "a.h5", image=array.transpose(1, 2, 0))
    with h5py.File(path, "a") as file:
        file.attrs["axis_order"] = "yxz"
    assert np.array_equal(read_case(path).image.array, array), "axis_order yxz was not followed"


def test_hdf5_cannot_hold_values_above_255(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="300"):
        write_case(tmp_path / "a.h5", scan(OBLIQUE), two_labels(OBLIQUE, 1, 300, np.uint16))


@pytest.mark.parametrize(
    ("datasets", "error"),
    [({"other": np.zeros((4, 4, 4))}, KeyError), ({"image": np.zeros((4, 4))}, ValueError)],
    ids=["no image", "2D"],
)
def test_hdf5_files_of_another_kind_are_refused(
    tmp_path: Path, datasets: dict[str, np.ndarray[Any, Any]], error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"a\.h5"):
        read_case(plain_hdf5(tmp_path / "a.h5", **datasets))


def test_hdf5_lists_keep_names_and_order(tmp_path: Path) -> None:
    write_list(tmp_path, "train", ["b", "a", "Größe 1"])
    assert (tmp_path / "train.txt").read_text("utf-8").split("\n") == ["b", "a", "Größe 1", ""], "the list changed"


def test_a_folder_in_the_hdf5_layout_is_imported(project: Project, folder: Path) -> None:
    plain_hdf5(folder / "data" / "a.h5", image=scan(OBLIQUE).array.T)
    write_case(folder / "data" / "b.h5", scan(OBLIQUE, 1))
    assert [c.id for c in imported(project, folder).cases] == ["a", "b"], "each file of data/ should be a case"


def test_assumptions_on_an_hdf5_file_are_an_event(project: Project, folder: Path) -> None:
    plain_hdf5(folder / "data" / "a.h5", image=scan(OBLIQUE).array.T)
    imported(project, folder)
    events, _ = read_lines(next(project.jobs.iterdir()) / "events.jsonl")
    notes = " ".join(one["text"] for one in events if one["kind"] == "note")
    assert "x, y, z" in notes, f"the person who imports should read what was assumed: {notes!r}"


def test_bad_hdf5_files_are_skips_and_the_rest_goes_on(project: Project, folder: Path) -> None:
    write_case(folder / "data" / "good.h5", scan(OBLIQUE))
    plain_hdf5(folder / "data" / "empty.h5")
    (folder / "data" / "text.h5").write_text("not HDF5")
    state = imported(project, folder)
    found = ([c.id for c in state.cases], sorted(s.name for s in state.skipped))
    assert found == (["good"], ["empty.h5", "text.h5"]), f"expected one case and two skips: {found}"


# ---------------------------------------------------------------------- nothing to import


def test_a_folder_without_a_usable_scan_fails_with_reasons(project: Project, folder: Path) -> None:
    (folder / "a.nrrd").write_text("no image")
    job = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(folder)}, [])
    code = work(job.path)
    status = job.read_status() or {}
    assert (code, "a.nrrd" in status["message"]) == (FAILED, True), f"the failure should name the file: {status}"


def test_a_folder_that_does_not_exist_fails_by_name(project: Project, tmp_path: Path) -> None:
    job = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(tmp_path / "nowhere")}, [])
    code = work(job.path)
    status = job.read_status() or {}
    assert (code, "nowhere" in status["message"]) == (FAILED, True), f"the failure should name the folder: {status}"


@pytest.mark.parametrize("name", ["scan.img", "scan.mgz", "photo.png", "stray.h5"])
def test_formats_that_are_not_read_are_listed(tmp_path: Path, name: str) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / name).write_bytes(b"something")
    found = list(candidates(tmp_path / "scans", tmp_path / "project"))
    assert [one.name for one in found if isinstance(one, Skipped)] == [name], (
        f"{name} was to be listed, not passed over"
    )
