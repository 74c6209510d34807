"""export-h5 and import-h5: a project as the published layout, and back, without a voxel or a millimetre lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from method_helpers import DONE, FAILED, SMALL, WRONG_USE, Shown, Trained, rewrite, shell, stored, write_names

from SemiSAMO1Lib.engine.data.hdf5_layout import read_case, write_case, write_list
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.phantoms import make_phantom
from SemiSAMO1Lib.project import Project, Role, read_labels
from SemiSAMO1Lib.project.importing import Candidate, Found, candidates, look
from SemiSAMO1Lib.tasks.layout import ProtocolError, listed_cases, read_labelled
from SemiSAMO1Lib.volume import Volume


def names_of(root: Path, name: str = "train") -> list[str]:
    return (root / f"{name}.txt").read_text(encoding="utf-8").split()


def label_of(project: Project, case_id: str) -> np.ndarray[Any, Any]:
    case = project.refresh().case(case_id)
    return read_labels(project.label_path(case), case.geometry).volume.array


def add_scans(project: Project, folder: Path) -> None:
    for candidate in candidates(folder, project.folder):
        found = look(candidate) if isinstance(candidate, Candidate) else candidate
        assert isinstance(found, Found), f"every phantom should become a case, got {found}"
        project.add(found)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Oblique scans a, b, c, d, e: c is the template, a is labelled too, b is excluded."""
    folder = tmp_path_factory.mktemp("project to export")
    for number, name in enumerate("abcde"):
        write_volume(folder / "images" / f"{name}.nrrd", make_phantom(number, 0, SMALL).image)
    project = Project.create(folder / "project")
    add_scans(project, folder / "images")
    for number, name, role in ((2, "c", Role.TEMPLATE), (0, "a", Role.LABELLED)):
        label = make_phantom(number, 0, SMALL).label
        write_volume(folder / "label.nrrd", Volume(np.array([0, 1, 2, 7], np.uint8)[label.array], label.geometry))
        project.add_label(name, folder / "label.nrrd", role=role)
    project.exclude("b")
    return project


@dataclass(frozen=True)
class There:
    """The project as a layout."""

    root: Path
    shown: Shown


@pytest.fixture(scope="module")
def there(project: Project, tmp_path_factory: pytest.TempPathFactory) -> There:
    root = tmp_path_factory.mktemp("exported") / "layout"
    return There(root, shell("export-h5", project.folder, root, "--json"))


@pytest.fixture(scope="module")
def back(there: There, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Shown]:
    """The layout as a project again, with both labels."""
    folder = tmp_path_factory.mktemp("imported") / "project"
    shown = shell("import-h5", there.root, folder, "--labeled-num", 2, "--json")
    return Project(folder), shown


# ---------------------------------------------------------------------- a file of it as a label


def test_a_label_of_the_layout_can_be_given(project: Project, there: There, tmp_path: Path) -> None:
    copied = Project(shutil.copytree(project.folder, tmp_path / "project"))
    cached = sorted((copied.folder / "cache").rglob("*"))
    shown = shell("template", copied.folder, "--case", "a", "--labels", there.root / "data" / "a.h5")
    assert shown.code == DONE, shown.text
    assert sorted((copied.folder / "cache").rglob("*")) == cached, "what was read of it stays nowhere"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda path: write_case(path, (one := make_phantom(0, 0, SMALL)).image, one.label, True), "prediction"),
        (lambda path: write_case(path, make_phantom(0, 0, SMALL).image), "no dataset 'label'"),
        (lambda path: path.write_text("none"), "cannot be used"),
    ],
    ids=["a prediction", "no label", "no HDF5"],
)
def test_a_file_of_the_layout_that_holds_no_persons_label_is_refused(
    project: Project, tmp_path: Path, made: Callable[[Path], Any], said: str
) -> None:
    made(tmp_path / "a.h5")
    shown = shell("template", project.folder, "--case", "a", "--labels", tmp_path / "a.h5")
    assert shown.code == WRONG_USE and said in shown.text, shown.text


# ---------------------------------------------------------------------- to the layout


def test_export_says_what_it_wrote(there: There) -> None:
    assert there.shown.json() == {"root": str(there.root), "cases": 4, "labelled": ["c", "a"], "test": []}


def test_the_template_comes_first_then_the_labelled_then_the_others(there: There) -> None:
    assert names_of(there.root) == ["c", "a", "d", "e"], "--labeled-num 1 takes the first: the template"


def test_excluded_cases_are_left_out(there: There) -> None:
    assert sorted(path.name for path in (there.root / "data").iterdir()) == ["a.h5", "c.h5", "d.h5", "e.h5"]


@pytest.mark.parametrize("name", ["c", "d"])
def test_plain_h5py_reads_the_image_along_x_y_z(project: Project, there: There, name: str) -> None:
    expected = read_volume(project.image_path(project.state.case(name))).array
    with h5py.File(there.root / "data" / f"{name}.h5", "r") as file:
        image = file["image"][()]
    assert image.dtype == np.float32 and np.array_equal(image[3, 4, 5], expected[5, 4, 3])


def test_plain_h5py_reads_the_label_along_x_y_z(project: Project, there: There) -> None:
    with h5py.File(there.root / "data" / "c.h5", "r") as file:
        label = file["label"][()]
    assert label.dtype == np.uint8 and np.array_equal(label, label_of(project, "c").T)


def test_unlabelled_cases_have_no_label(there: There) -> None:
    with h5py.File(there.root / "data" / "d.h5", "r") as file:
        assert sorted(file) == ["image"]


def test_the_files_say_their_axis_order(there: There) -> None:
    with h5py.File(there.root / "data" / "c.h5", "r") as file:
        assert file.attrs["axis_order"] == "xyz"


def test_the_files_say_their_geometry(project: Project, there: There) -> None:
    with h5py.File(there.root / "data" / "c.h5", "r") as file:
        found = json.loads(file.attrs["geometry"])
    assert found["spacing_zyx_mm"] == list(project.state.case("c").geometry.spacing)


def test_export_for_people(project: Project, tmp_path: Path) -> None:
    assert "4 cases in" in shell("export-h5", project.folder, tmp_path / "layout").text


def test_a_target_that_holds_something_is_refused(project: Project, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    shown = shell("export-h5", project.folder, tmp_path)
    assert shown.code == WRONG_USE and "is not empty; choose a new folder" in shown.text


def test_a_target_that_holds_something_is_left_alone(project: Project, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    shell("export-h5", project.folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_is_no_project(tmp_path: Path) -> None:
    shown = shell("export-h5", tmp_path, tmp_path / "layout")
    assert shown.code == WRONG_USE and "is not a project" in shown.text


def test_a_label_value_that_the_layout_cannot_hold(project: Project, tmp_path: Path) -> None:
    image = read_volume(project.image_path(project.state.case("c")))
    write_volume(tmp_path / "images" / "c.nrrd", image)
    other = Project.create(tmp_path / "project")
    add_scans(other, tmp_path / "images")
    write_volume(tmp_path / "label.nrrd", Volume(label_of(project, "c").astype(np.uint16) * 100, image.geometry))
    other.add_label("c", tmp_path / "label.nrrd")
    shown = shell("export-h5", other.folder, tmp_path / "layout")
    assert shown.code == WRONG_USE and "label value 700; the layout holds values up to 255" in shown.text, shown.text


# ---------------------------------------------------------------------- predictions as labels


@pytest.fixture(scope="module")
def with_predictions(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predictions") / "layout"
    shown = shell("export-h5", trained.project, root, "--predictions")
    assert shown.code == DONE, shown.text
    return root


def test_predictions_become_labels_of_unlabelled_cases(trained: Trained, with_predictions: Path) -> None:
    prediction = read_volume(trained.job.results / "0" / "phantom_001" / "prediction.seg.nrrd").array
    assert np.array_equal(stored(with_predictions, "phantom_001").T, prediction)


def test_a_prediction_is_no_reference(with_predictions: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(with_predictions, root)
    predicted = listed_cases(root, Path("train.txt"))[-1]
    write_list(root, "test", [predicted])
    with pytest.raises(ProtocolError, match="its label is a prediction"):
        read_labelled(root, predicted)


def test_a_prediction_is_no_template(with_predictions: Path, tmp_path: Path) -> None:
    count = len(listed_cases(with_predictions, Path("train.txt")))
    shown = shell("import-h5", with_predictions, tmp_path / "back", "--labeled-num", count)
    assert shown.code == WRONG_USE and "is a prediction" in shown.text


def test_references_go_to_the_list_of_what_is_measured(project: Project, tmp_path: Path) -> None:
    case = next(one for one in project.refresh().cases if one.label_version is None and str(one.role) == "unlabelled")
    label = np.zeros(case.geometry.shape, np.uint8)
    label[1:4, 1:4, 1:5] = 2
    write_volume(tmp_path / "truth" / f"{case.name}.nrrd", Volume(label, case.geometry))
    value = shell("export-h5", project.folder, tmp_path / "root", "--references", tmp_path / "truth", "--json").json()
    assert value["test"] == [case.id] == listed_cases(tmp_path / "root", Path("test.txt"))
    assert np.array_equal(read_labelled(tmp_path / "root", case.id)[1].array, label)


def test_a_persons_label_is_not_replaced_by_a_prediction(trained: Trained, tmp_path: Path) -> None:
    """A case that was labelled after the training has both."""
    shutil.copytree(trained.project, tmp_path / "project")
    label = trained.project.parent / "labels" / "phantom_001.nrrd"
    shell("template", tmp_path / "project", "--case", "phantom_001", "--labels", label)
    shell("export-h5", tmp_path / "project", tmp_path / "layout", "--predictions")
    assert np.array_equal(stored(tmp_path / "layout", "phantom_001").T, read_volume(label).array)


def test_without_asking_predictions_stay_out(trained: Trained, tmp_path: Path) -> None:
    shell("export-h5", trained.project, tmp_path / "layout")
    with h5py.File(tmp_path / "layout" / "data" / "phantom_001.h5", "r") as file:
        assert "label" not in file


def test_predictions_that_there_are_not(project: Project, tmp_path: Path) -> None:
    shown = shell("export-h5", project.folder, tmp_path / "layout", "--predictions")
    assert shown.code == WRONG_USE and "no finished training" in shown.text


# ---------------------------------------------------------------------- and back


def test_import_says_what_it_took(back: tuple[Project, Shown]) -> None:
    value = back[1].json()
    assert (value["cases"], value["labelled"], value["skipped"]) == (4, ["c", "a"], []), back[1].text


def test_the_first_of_the_list_is_the_template(back: tuple[Project, Shown]) -> None:
    state = back[0].refresh()
    roles = {case.id: case.role for case in state.cases}
    expected = {"c": Role.TEMPLATE, "a": Role.LABELLED, "d": Role.UNLABELLED, "e": Role.UNLABELLED}
    assert roles == expected


@pytest.mark.parametrize("name", ["a", "c", "d"])
def test_voxels_come_back(project: Project, back: tuple[Project, Shown], name: str) -> None:
    one, other = (read_volume(p.image_path(p.refresh().case(name))).array for p in (project, back[0]))
    assert np.array_equal(one.astype(np.float32), other)


@pytest.mark.parametrize("name", ["a", "c", "d"])
def test_spacing_direction_and_origin_come_back(project: Project, back: tuple[Project, Shown], name: str) -> None:
    one, other = (read_volume(p.image_path(p.refresh().case(name))).geometry for p in (project, back[0]))
    assert one.same_grid(other), f"{one} is not {other}"


@pytest.mark.parametrize("name", ["a", "c"])
def test_labels_come_back(project: Project, back: tuple[Project, Shown], name: str) -> None:
    assert np.array_equal(label_of(project, name), label_of(back[0], name))


def test_label_values_come_back(back: tuple[Project, Shown]) -> None:
    assert list(back[0].refresh().labels.values) == [1, 2, 7]


def test_import_for_people(layout: Path, tmp_path: Path) -> None:
    shown = shell("import-h5", layout, tmp_path / "project")
    assert "3 scans in" in shown.text and "labelled: p0" in shown.text, shown.text


def test_a_second_case_may_lack_a_value_of_the_first(layout: Path, tmp_path: Path) -> None:
    label = stored(layout, "p1")
    rewrite(layout, "p1", label=np.where(label == 2, 0, label))
    shown = shell("import-h5", layout, tmp_path / "project", "--labeled-num", 2, "--json")
    assert shown.code == DONE and shown.json()["labelled"] == ["p0", "p1"], shown.text


def test_label_values_with_gaps_and_above_255_are_taken(layout: Path, tmp_path: Path) -> None:
    values = np.array([0, 300, 2, 7], np.uint16)
    rewrite(layout, "p0", label=values[stored(layout, "p0")])
    shell("import-h5", layout, tmp_path / "project")
    assert np.array_equal(label_of(Project(tmp_path / "project"), "p0"), stored(layout, "p0").T)


def test_a_name_with_a_dot_is_no_suffix(layout: Path, tmp_path: Path) -> None:
    (layout / "data" / "p0.h5").rename(layout / "data" / "p0.v2.h5")
    write_names(layout, "train", ["p0.v2", "p1"])
    shown = shell("import-h5", layout, tmp_path / "project", "--json")
    assert shown.code == DONE and len(shown.json()["labelled"]) == 1, shown.text


def test_no_label_is_taken_when_none_is_asked_for(layout: Path, tmp_path: Path) -> None:
    shown = shell("import-h5", layout, tmp_path / "project", "--labeled-num", 0, "--json")
    assert shown.code == DONE and shown.json()["labelled"] == [], shown.text


def test_files_that_cannot_be_read_are_listed(layout: Path, tmp_path: Path) -> None:
    (layout / "data" / "p1.h5").write_bytes(b"nonsense")
    shown = shell("import-h5", layout, tmp_path / "project")
    assert shown.code == DONE and "skipped p1.h5: " in shown.text, shown.text


# ---------------------------------------------------------------------- bad input


def no_label(root: Path) -> None:
    rewrite(root, "p0", label=None)


def empty_label(root: Path) -> None:
    rewrite(root, "p0", label=np.zeros_like(stored(root, "p0")))


def no_list(root: Path) -> None:
    (root / "train.txt").unlink()


def short_list(root: Path) -> None:
    write_names(root, "train", ["p0"])


def absent_case(root: Path) -> None:
    write_names(root, "train", ["ghost", "p0"])


def no_data(root: Path) -> None:
    (root / "data").rename(root / "h5")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_label, "p0.h5 has no dataset 'label'"),
        (empty_label, "p0.h5: the label is empty"),
        (no_list, "train.txt does not exist"),
        (short_list, "2 labelled cases were asked for"),
        (absent_case, "'ghost'"),
        (no_data, "expected data/<case>.h5 and train.txt"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("told", ["message", "nothing written"])
def test_bad_input_is_named_before_anything_is_written(
    layout: Path, tmp_path: Path, spoil: Any, expected: str, told: str
) -> None:
    spoil(layout)
    shown = shell("import-h5", layout, tmp_path / "project", "--labeled-num", 2)
    if told == "message":
        assert shown.code == WRONG_USE and expected in shown.text, shown.text
    else:
        assert not (tmp_path / "project").exists(), "a project that holds half of it stands in the way of a second try"


def test_a_negative_number_of_labels(layout: Path, tmp_path: Path) -> None:
    shown = shell("import-h5", layout, tmp_path / "project", "--labeled-num", -1)
    assert shown.code == WRONG_USE and "-1 labelled cases were asked for" in shown.text, shown.text


def test_a_project_that_is_there_already(layout: Path, back: tuple[Project, Shown]) -> None:
    shown = shell("import-h5", layout, back[0].folder)
    assert shown.code == WRONG_USE and "is a project already" in shown.text


def test_a_layout_without_a_usable_scan_fails(layout: Path, tmp_path: Path) -> None:
    for path in (layout / "data").iterdir():
        path.write_bytes(b"nonsense")
    shown = shell("import-h5", layout, tmp_path / "project", "--labeled-num", 0)
    assert shown.code == FAILED and "no usable scan" in shown.text, shown.text


def test_what_is_exported_is_what_reproduce_reads(there: There) -> None:
    """The labelled cases carry their labels; nobody has to edit a list."""
    assert read_case(there.root / "data" / f"{names_of(there.root)[0]}.h5", with_label=True).label is not None
