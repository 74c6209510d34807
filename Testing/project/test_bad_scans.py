"""Inputs nobody may crash with: each is a listed skip with its reason, and the rest goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans import OBLIQUE, left_handed, scan, two_labels, write_scan

from SemiSAMO1Lib.image_io import to_sitk, write_volume
from SemiSAMO1Lib.job.folder import JobFolder, JobKind
from SemiSAMO1Lib.project import Label, LabelTable, Project
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.project.store import ProjectState
from SemiSAMO1Lib.tasks.run import FINISHED, work
from SemiSAMO1Lib.volume import Geometry, Volume


def image(make: Callable[[], sitk.Image], suffix: str = ".nrrd") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"bad{suffix}"
        sitk.WriteImage(make(), str(path))
        return path

    return write


def spoilt(value: float) -> sitk.Image:
    volume = scan(OBLIQUE)
    volume.array[3, 4, 5] = value
    return to_sitk(volume)


def cut(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_scan(folder / f"bad{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return write


def text(suffix: str, content: bytes = b"this is not an image") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / f"bad{suffix}").write_bytes(content)
        return folder / f"bad{suffix}"

    return write


def segmentation(folder: Path) -> Path:
    write_segmentation(folder / "bad.seg.nrrd", two_labels(OBLIQUE), LabelTable((Label(1, "a"), Label(2, "b"))))
    return folder / "bad.seg.nrrd"


def dangling(folder: Path) -> Path:
    (folder / "bad.nrrd").symlink_to(folder / "nowhere.nrrd")
    return folder / "bad.nrrd"


def sheared(folder: Path) -> Path:
    """A NIfTI file whose axes are not at right angles."""
    path = write_scan(folder / "bad.nii", Geometry((8, 8, 8)))
    content = bytearray(path.read_bytes())
    content[252:256] = b"\0\0\1\0"  # no quaternion, sform only
    content[280:328] = np.array([[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], "<f4").tobytes()
    path.write_bytes(bytes(content))
    return path


def flat(count: int) -> sitk.Image:
    return sitk.GetImageFromArray(scan(Geometry((count, 20, 20))).array)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "2D": (image(lambda: sitk.GetImageFromArray(scan(OBLIQUE).array[0])), "2D"),
    "4D": (image(lambda: sitk.JoinSeries([to_sitk(scan(OBLIQUE))] * 2)), "4D"),
    "4D NIfTI": (image(lambda: sitk.JoinSeries([to_sitk(scan(OBLIQUE))] * 2), ".nii.gz"), "4D"),
    "RGB": (image(lambda: sitk.Compose([to_sitk(scan(OBLIQUE))] * 3)), "components"),
    "complex": (image(lambda: sitk.RealAndImaginaryToComplex(*[to_sitk(scan(OBLIQUE))] * 2)), "components"),
    "NaN": (image(lambda: spoilt(np.nan)), "NaN"),
    "infinite": (image(lambda: spoilt(-np.inf)), "infinite"),
    "constant": (image(lambda: to_sitk(Volume(np.full(OBLIQUE.shape, 7, np.int16), OBLIQUE))), "constant"),
    "one slice": (image(lambda: flat(1)), "slices"),
    "three slices": (image(lambda: flat(3)), "slices"),
    "label map": (image(lambda: to_sitk(two_labels(OBLIQUE))), "label map"),
    "segmentation": (segmentation, "segmentation"),
    "text as .nii.gz": (text(".nii.gz"), "cannot be read"),
    "text as .nrrd": (text(".nrrd"), "cannot be read"),
    "empty .nii": (text(".nii", b""), "cannot be read"),
    "empty .mha": (text(".mha", b""), "cannot be read"),
    "cut .nii": (cut(".nii"), "cut short"),
    "cut .nii.gz": (cut(".nii.gz"), "cut short"),
    "cut .nrrd": (cut(".nrrd"), "cut short"),
    "cut .mha": (cut(".mha"), "cut short"),
    "dangling link": (dangling, "cannot be read"),
    "sheared": (sheared, "cannot be read"),
}


def imported(project: Project, folder: Path) -> ProjectState:
    job = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(folder)}, [])
    code = work(job.path)
    assert code == FINISHED, f"the import failed: {job.read_status()}"
    return project.refresh()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.create(tmp_path / "project")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good scan, last in the alphabet."""
    write_scan(tmp_path / "scans" / "zz.nrrd")
    return tmp_path / "scans"


@pytest.mark.parametrize("kind", BAD)
class TestBadScan:
    def test_it_is_listed_with_name_and_reason(self, project: Project, folder: Path, kind: str) -> None:
        make, reason = BAD[kind]
        path = make(folder)
        told = [(one.name, reason in one.reason) for one in imported(project, folder).skipped]
        assert told == [(path.name, True)], f"{kind}: {project.state.skipped} should name {path.name} and {reason!r}"

    def test_the_rest_goes_on(self, project: Project, folder: Path, kind: str) -> None:
        BAD[kind][0](folder)
        cases = [case.id for case in imported(project, folder).cases]
        assert cases == ["zz"], f"{kind}: only the good scan should be a case, got {cases}"


def test_all_bad_scans_at_once_are_all_listed(project: Project, folder: Path) -> None:
    for kind, (make, _) in BAD.items():
        (folder / kind).mkdir()
        make(folder / kind)
    listed = {one.name.split("/")[0] for one in imported(project, folder).skipped}
    assert listed == set(BAD), f"not listed: {set(BAD) - listed}"


@pytest.mark.parametrize(
    "geometry",
    [left_handed(OBLIQUE), Geometry((12, 20, 20), (10.0, 1.0, 1.0)), Geometry((4, 4, 4))],
    ids=["left-handed", "10:1", "4 voxels a side"],
)
def test_unusual_grids_are_usable(project: Project, folder: Path, geometry: Geometry) -> None:
    write_scan(folder / "a.nrrd", geometry, seed=3)
    state = imported(project, folder)
    assert state.case("a").geometry.same_grid(geometry), f"the grid changed: {state.case('a').geometry}"


@pytest.mark.parametrize("name", [".hidden.nrrd", "._zz.nrrd", ".hidden/a.nrrd"])
def test_hidden_files_are_left_out_quietly(project: Project, folder: Path, name: str) -> None:
    write_scan(folder / name, seed=3)
    state = imported(project, folder)
    assert ([c.id for c in state.cases], state.skipped) == (["zz"], ()), f"{name} is hidden: {state}"


def test_project_folders_inside_are_left_out(project: Project, folder: Path) -> None:
    write_scan(folder / "another project" / "images" / "a.nrrd", seed=3)
    Project.create(folder / "another project")
    cases = [case.id for case in imported(project, folder).cases]
    assert cases == ["zz"], f"the images of another project are not scans of this one: {cases}"


def test_a_project_inside_its_own_scan_folder_does_not_import_itself(folder: Path) -> None:
    project = Project.create(folder / "project")
    write_scan(project.folder / "images" / "a.nrrd", seed=3)
    cases = [case.id for case in imported(project, folder).cases]
    assert cases == ["zz"], f"a project should not find its own images: {cases}"


def test_two_scans_with_one_name_in_two_folders_are_two_cases(project: Project, folder: Path) -> None:
    write_scan(folder / "p1" / "t1.nii", seed=3)
    write_scan(folder / "p2" / "T1.nii", seed=4)
    ids = [case.id for case in imported(project, folder).cases]
    assert ids == ["t1", "T1-2", "zz"], f"ids should be unique ignoring case: {ids}"


def test_scans_of_one_header_in_two_folders_are_two_cases(project: Project, folder: Path) -> None:
    for seed in (3, 4):
        (folder / f"p{seed}").mkdir()
        sitk.WriteImage(to_sitk(scan(OBLIQUE, seed)), str(folder / f"p{seed}" / "t1.mhd"))
    ids = [case.id for case in imported(project, folder).cases]
    assert ids == ["t1", "t1-2", "zz"], f"the headers are equal, the voxels are not: {ids}"


def test_the_same_file_twice_is_one_case(project: Project, folder: Path) -> None:
    shutil.copyfile(folder / "zz.nrrd", folder / "a.nrrd")
    assert len(imported(project, folder).cases) == 1, "a copy is not another patient"


def test_every_copy_is_listed_by_its_own_path(project: Project, folder: Path) -> None:
    for name in ("p1", "p2"):
        (folder / name).mkdir()
        shutil.copyfile(folder / "zz.nrrd", folder / name / "t1.nrrd")
    listed = {one.name for one in imported(project, folder).skipped}
    assert listed == {"p2/t1.nrrd", "zz.nrrd"}, f"each skipped copy needs a name of its own: {listed}"


def test_importing_again_adds_nothing(project: Project, folder: Path) -> None:
    before = imported(project, folder).cases
    assert imported(project, folder).cases == before, "the second import should change no case"


@pytest.mark.parametrize(
    "name", ["Fall 1", "Müller, Größe", "con", "NUL", "x" * 60, "a.b.c", "東京", "-rf", "trailing. "]
)
@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz"])
def test_any_file_name_becomes_a_case_that_takes_a_label(
    project: Project, folder: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    path = write_scan(folder / f"{name}{suffix}", seed=3)
    write_volume(tmp_path / "labels.nrrd", two_labels(OBLIQUE))
    case = next(one for one in imported(project, folder).cases if Path(one.absolute) == path)
    project.add_label(case.id, tmp_path / "labels.nrrd")
    stored = project.folder / "labels" / case.id / "1.seg.nrrd"
    assert stored.is_file(), f"{name!r} became {case.id!r}, whose label is not at {stored}"
