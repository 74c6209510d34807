"""The project folder: one change at a time, labels written once, nothing lost, clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import OBLIQUE, scan, two_labels, write_scan

from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.lock import Locked, identity
from SemiSAMO1Lib.project import Case, LabelError, Project, ProjectError, Skipped, read_labels
from SemiSAMO1Lib.project.importing import Found, candidates, look
from SemiSAMO1Lib.project.store import MIGRATIONS, SCHEMA
from SemiSAMO1Lib.volume import Volume

ADD_SKIPPED = """
import sys
import unicodedata
from pathlib import Path
from SemiSAMO1Lib.project import Project, Skipped
for number in range(int(sys.argv[3])):
    Project(Path(sys.argv[1])).note_skipped([Skipped(f"{sys.argv[2]}-{number}", "a test")])
"""


def add_scans(project: Project, folder: Path) -> None:
    for candidate in candidates(folder, project.folder):
        found = look(candidate)
        assert isinstance(found, Found), f"the test's own scan is not usable: {found}"
        project.add(found)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A study folder with two scans in images/ and the project beside them."""
    write_scan(tmp_path / "study" / "images" / "a.nrrd", seed=1)
    write_scan(tmp_path / "study" / "images" / "b.nii.gz", seed=2)
    project = Project.create(tmp_path / "study" / "project")
    add_scans(project, tmp_path / "study" / "images")
    return project


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    write_volume(tmp_path / "labels.nrrd", two_labels(OBLIQUE))
    return tmp_path / "labels.nrrd"


def edit(project: Project, apply: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(project.file.read_text())
    apply(value)
    project.file.write_text(json.dumps(value))


def note(project: Project) -> None:
    project.note_skipped([Skipped("x", "a test")])


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder without write permission, for a user who is not root."""
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)


# ---------------------------------------------------------------------- project.json


def test_every_change_raises_the_revision_by_one(project: Project) -> None:
    before = project.refresh().revision
    note(project)
    note(project)
    assert project.refresh().revision == before + 2, "two changes should raise the revision by two"


def test_a_change_that_fails_changes_nothing(project: Project) -> None:
    before = project.file.read_bytes()
    with pytest.raises(ProjectError):
        project.exclude("no such case")
    assert project.file.read_bytes() == before, "project.json should be untouched"


def test_a_write_that_fails_leaves_the_old_file_whole(project: Project) -> None:
    before = project.file.read_bytes()
    with pytest.raises(TypeError):
        project.change(lambda state: replace(state, name=object()))  # type: ignore[arg-type]  # cannot become JSON
    assert project.file.read_bytes() == before, "project.json should be untouched"


def test_no_temporary_file_stays_behind(project: Project) -> None:
    with pytest.raises(TypeError):
        project.change(lambda state: replace(state, name=object()))  # type: ignore[arg-type]
    assert [one.name for one in project.folder.iterdir()] == ["project.json"], "temporary files or locks stayed"


def test_an_old_state_in_memory_overwrites_nothing(project: Project) -> None:
    other = Project(project.folder)
    other.note_skipped([Skipped("from elsewhere", "a test")])
    project.exclude("a")
    assert [one.name for one in project.state.skipped] == ["from elsewhere"], "the other change was lost"


@pytest.mark.parametrize(
    "inside",
    [lambda v: v, lambda v: v["cases"][0], lambda v: v["labels"][0]],
    ids=["top level", "case", "label"],
)
def test_unknown_keys_survive_a_change(
    project: Project, labels: Path, inside: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    project.add_label("a", labels)
    edit(project, lambda value: inside(value).update(of_a_newer_program={"x": [1, "ä"]}))
    note(project)
    kept = inside(json.loads(project.file.read_text())).get("of_a_newer_program")
    assert kept == {"x": [1, "ä"]}, f"the key of a newer program became {kept}"


@pytest.mark.parametrize("version", [SCHEMA, SCHEMA + 7])
def test_a_newer_schema_is_refused_with_both_versions(project: Project, version: int) -> None:
    edit(project, lambda value: value.update(schema=SCHEMA + 7))
    with pytest.raises(ProjectError, match=rf"\b{version}\b"):
        Project(project.folder)


def test_a_newer_schema_is_not_written_over(project: Project) -> None:
    edit(project, lambda value: value.update(schema=SCHEMA + 7))
    before = project.file.read_bytes()
    with pytest.raises(ProjectError):
        note(project)
    assert project.file.read_bytes() == before, "a project of a newer program should be left alone"


class TestOlderSchema:
    """A project of an older program is lifted; its file stays beside it."""

    @pytest.fixture
    def older(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> bytes:
        """project.json as a program wrote it that called the name a title; returns its bytes."""
        monkeypatch.setitem(MIGRATIONS, SCHEMA - 1, lambda value: {**value, "name": value.pop("title")})

        def back(value: dict[str, Any]) -> None:
            value.update(schema=SCHEMA - 1, title=value.pop("name"))

        edit(project, back)
        return project.file.read_bytes()

    def test_it_opens(self, project: Project, older: bytes) -> None:
        assert Project(project.folder).state.name == project.state.name

    def test_it_is_written_as_what_it_is_now(self, project: Project, older: bytes) -> None:
        Project(project.folder)
        assert json.loads(project.file.read_text())["schema"] == SCHEMA

    def test_the_old_file_is_kept(self, project: Project, older: bytes) -> None:
        Project(project.folder)
        assert (project.folder / f"project.schema-{SCHEMA - 1}.json").read_bytes() == older

    def test_one_that_nobody_can_read_any_more_is_refused(self, project: Project) -> None:
        edit(project, lambda value: value.update(schema=SCHEMA - 1))
        with pytest.raises(ProjectError, match="can no longer read"):
            Project(project.folder)


@pytest.mark.parametrize("text", ["{", "", "[]", "5", '{"schema": 1}', '{"schema": 1, "cases": 3}', "\udcff"])
def test_damaged_json_is_named(project: Project, text: str) -> None:
    project.file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises((ProjectError, ValueError), match=r"project\.json"):
        Project(project.folder)


def test_a_folder_without_project_json_is_no_project(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="not a project"):
        Project(tmp_path)


def test_a_project_is_not_made_over_another(project: Project) -> None:
    with pytest.raises(ProjectError, match="already"):
        Project.create(project.folder)


def test_changes_of_four_processes_are_all_kept(project: Project) -> None:
    before = project.refresh().revision
    command = [sys.executable, "-c", ADD_SKIPPED, str(project.folder)]
    running = [subprocess.Popen([*command, name, "10"]) for name in "abcd"]
    codes = [process.wait(60) for process in running]
    state = project.refresh()
    expected = {f"{name}-{number}" for name in "abcd" for number in range(10)}
    kept = {one.name for one in state.skipped}
    assert (codes, kept, state.revision) == ([0] * 4, expected, before + 40), "changes were lost"


def test_a_dead_process_s_lock_does_not_block_the_project(project: Project) -> None:
    code = "import json; from SemiSAMO1Lib.lock import identity; print(json.dumps(identity()))"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    (project.folder / "project.lock").write_text(dead)
    note(project)
    assert project.refresh().skipped == (Skipped("x", "a test"),), "the change should have been written"


def test_another_computer_s_lock_blocks_the_project(project: Project) -> None:
    (project.folder / "project.lock").write_text(json.dumps({**identity(), "host": "ward-7", "user": "eva"}))
    with pytest.raises(Locked, match="eva on ward-7"):
        note(Project(project.folder, patience_s=0.1))


def test_a_project_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProjectError, match="cannot be written"):
        Project.create(tmp_path / "file" / "project")


def test_a_project_in_a_read_only_folder_is_refused() -> None:
    with (
        tempfile.TemporaryDirectory() as name,
        read_only(Path(name)),
        pytest.raises(ProjectError, match="cannot be written"),
    ):
        Project.create(Path(name) / "project")


def test_a_change_of_a_read_only_project_is_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        project = Project.create(Path(name))
        with read_only(Path(name)), pytest.raises(ProjectError, match="cannot be written"):
            note(project)


# ---------------------------------------------------------------------- labels


def test_the_first_label_is_version_one(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    assert project.state.case("a").label_version == 1, "the first label is version 1"


def test_a_label_is_stored_voxel_by_voxel(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    stored = read_labels(project.label_path(project.state.case("a")), OBLIQUE).volume.array
    assert np.array_equal(stored, two_labels(OBLIQUE).array), "the stored label differs from the file given"


def test_a_second_label_leaves_the_first_file_byte_by_byte(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    first = project.folder / "labels" / "a" / "1.seg.nrrd"
    before = first.read_bytes()
    write_volume(labels, Volume(two_labels(OBLIQUE).array[::-1].copy(), OBLIQUE))
    project.add_label("a", labels)
    assert first.read_bytes() == before, "label 1 was written again"


def test_a_second_label_is_version_two(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    project.add_label("a", labels)
    path = project.label_path(project.state.case("a"))
    assert path.name == "2.seg.nrrd", f"the label in force should be version 2, it is {path.name}"


def test_a_removed_label_s_number_is_not_given_again(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    project.remove_label("a")
    project.add_label("a", labels)
    assert project.state.case("a").label_version == 2, "number 1 is taken for ever"


def test_a_label_file_changed_from_outside_is_refused(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    path = project.folder / "labels" / "a" / "1.seg.nrrd"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ProjectError, match="changed outside"):
        project.label_path(project.state.case("a"))


def test_a_lost_label_file_is_named(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    (project.folder / "labels" / "a" / "1.seg.nrrd").unlink()
    with pytest.raises(ProjectError, match=r"missing: .*1\.seg\.nrrd"):
        project.label_path(project.state.case("a"))


@pytest.mark.parametrize("origin", ["template", "corrected"])
def test_the_record_says_where_a_label_came_from(project: Project, labels: Path, origin: str) -> None:
    project.add_label("a", labels, origin=origin, reviewer="eva")
    record = project.label_record(project.state.case("a"))
    assert (record["origin"], record["reviewer"]) == (origin, "eva"), f"origin or reviewer lost: {record}"


def test_a_missing_value_is_refused(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    write_volume(labels, Volume(two_labels(OBLIQUE).array % 2, OBLIQUE))
    with pytest.raises(LabelError, match=r"2 .*absent"):
        project.add_label("b", labels)


def test_a_value_declared_absent_is_accepted_and_recorded(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    write_volume(labels, Volume(two_labels(OBLIQUE).array % 2, OBLIQUE))
    project.add_label("b", labels, absent=[2])
    assert project.label_record(project.state.case("b"))["absent"] == [2], "that label 2 is absent must be on record"


def test_a_painted_value_cannot_be_declared_absent(project: Project, labels: Path) -> None:
    with pytest.raises(LabelError, match=r"\[2\] are declared absent but painted"):
        project.add_label("a", labels, absent=[2])


def test_a_value_that_nobody_knows_cannot_be_declared_absent(project: Project, labels: Path) -> None:
    with pytest.raises(LabelError, match="99"):
        project.add_label("a", labels, absent=[99])


def test_an_unknown_value_is_refused(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    write_volume(labels, two_labels(OBLIQUE, 1, 7))
    with pytest.raises(LabelError, match=r"\[7\]"):
        project.add_label("b", labels, absent=[2])


def test_an_unknown_value_is_added_when_asked_for(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    write_volume(labels, two_labels(OBLIQUE, 1, 7))
    project.add_label("b", labels, absent=[2], add_labels=True)
    assert project.state.labels.values == [1, 2, 7], f"the table should have gained 7: {project.state.labels.values}"


def test_a_label_added_later_is_not_declared_in_older_ones(project: Project, labels: Path) -> None:
    project.add_label("a", labels)
    write_volume(labels, two_labels(OBLIQUE, 1, 7))
    project.add_label("b", labels, absent=[2], add_labels=True)
    declared = project.label_record(project.state.case("a"))["declared"]
    assert declared == [1, 2], f"label 7 is unknown in the older label, not background: {declared}"


def test_values_above_255_are_kept(project: Project, labels: Path) -> None:
    write_volume(labels, two_labels(OBLIQUE, 3, 1000, np.uint16))
    project.add_label("a", labels)
    stored = read_labels(project.label_path(project.state.case("a")), OBLIQUE).volume.array
    assert np.array_equal(stored, two_labels(OBLIQUE, 3, 1000, np.uint16).array), "values 3 and 1000 were changed"


@pytest.mark.parametrize("spoil", [-1.0, 0.5, np.nan])
def test_a_refused_label_changes_nothing(project: Project, labels: Path, spoil: float) -> None:
    array = two_labels(OBLIQUE, kind=np.float32).array
    array[0, 0, 0] = spoil
    write_volume(labels, Volume(array, OBLIQUE))
    before = project.file.read_bytes()
    with pytest.raises(LabelError):
        project.add_label("a", labels)
    assert (project.file.read_bytes(), (project.folder / "labels").exists()) == (before, False), "something was written"


# ---------------------------------------------------------------------- images


def test_a_moved_project_finds_its_images(project: Project, tmp_path: Path) -> None:
    shutil.move(tmp_path / "study", tmp_path / "moved Größe")
    moved = Project(tmp_path / "moved Größe" / "project")
    paths = [moved.image_path(case) for case in moved.state.cases]
    expected = [tmp_path / "moved Größe" / "images" / name for name in ("a.nrrd", "b.nii.gz")]
    assert [path.resolve() for path in paths] == expected, f"images were looked for elsewhere: {paths}"


def test_a_copied_project_uses_its_own_images(project: Project, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "study", tmp_path / "copy")
    copied = Project(tmp_path / "copy" / "project")
    path = copied.image_path(copied.state.case("a")).resolve()
    assert path == tmp_path / "copy" / "images" / "a.nrrd", f"the copy reads the original's image: {path}"


def test_a_project_moved_alone_finds_images_where_they_were(project: Project, tmp_path: Path) -> None:
    shutil.move(project.folder, tmp_path / "elsewhere" / "deep")
    moved = Project(tmp_path / "elsewhere" / "deep")
    path = moved.image_path(moved.state.case("a"))
    assert path == tmp_path / "study" / "images" / "a.nrrd", f"the absolute path should have been used: {path}"


def test_a_changed_image_is_flagged(project: Project) -> None:
    write_volume(Path(project.state.case("a").absolute), scan(OBLIQUE, seed=9))
    with pytest.raises(ProjectError, match="changed"):
        project.image_path(project.state.case("a"))


def test_a_changed_image_takes_no_label(project: Project, labels: Path) -> None:
    write_volume(Path(project.state.case("a").absolute), scan(OBLIQUE, seed=9))
    with pytest.raises(ProjectError, match="changed"):
        project.add_label("a", labels)


def test_a_missing_image_is_named(project: Project) -> None:
    path = Path(project.state.case("a").absolute)
    path.unlink()
    with pytest.raises(ProjectError, match=f"missing.*{path.name}"):
        project.image_path(project.state.case("a"))


def test_a_converted_volume_is_stored_in_the_project(project: Project) -> None:
    volume = scan(OBLIQUE, seed=5)
    case = project.add(Found("c", OBLIQUE, converted=volume, source={"kind": "dicom", "series_uid": "1.2.3"}))
    assert isinstance(case, Case), f"it should have become a case: {case}"
    stored = read_volume(project.folder / "images" / "c.nrrd").array
    assert np.array_equal(stored, volume.array), "the stored volume differs"


def test_the_same_series_again_is_skipped(project: Project) -> None:
    found = Found("c", OBLIQUE, converted=scan(OBLIQUE, 5), source={"kind": "dicom", "series_uid": "1.2.3"})
    project.add(found)
    again = project.add(found)
    assert isinstance(again, Skipped), f"one series, one case: {again}"


def test_a_series_that_is_a_case_is_not_written_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """To compress a large one takes seconds."""
    found = Found("c", OBLIQUE, converted=scan(OBLIQUE, 5), source={"kind": "dicom", "series_uid": "1.2.3"})
    project.add(found)
    monkeypatch.setattr("SemiSAMO1Lib.project.store.write_volume", lambda *_: pytest.fail("written again"))
    assert isinstance(project.add(found), Skipped)


def test_nothing_is_made_where_a_project_was(project: Project, tmp_path: Path) -> None:
    project.folder.rename(tmp_path / "away")
    found = Found("c", OBLIQUE, converted=scan(OBLIQUE, 5), source={"kind": "dicom", "series_uid": "1.2.3"})
    with pytest.raises(ProjectError, match="is not there at the moment"):
        project.add(found)
    assert not project.folder.exists()


class TestRelinking:
    """Scans that were moved are found by name and content."""

    @pytest.fixture
    def moved(self, project: Project, tmp_path: Path) -> Path:
        (tmp_path / "archive" / "deep").mkdir(parents=True)
        (tmp_path / "study" / "images").rename(tmp_path / "archive" / "deep" / "images")
        return tmp_path / "archive"

    def test_missing_scans_are_named(self, project: Project, moved: Path) -> None:
        assert [case.id for case in project.missing()] == ["a", "b"]

    def test_they_are_found_at_any_depth(self, project: Project, moved: Path) -> None:
        project.relink(project.moved_scans(moved))
        again = Project(project.folder)
        assert again.missing() == [] and moved in again.image_path(again.state.case("a")).resolve().parents

    def test_a_case_that_is_left_out_is_found_too(self, project: Project, moved: Path) -> None:
        """It may be taken in again; then its scan must be there."""
        project.exclude("b")
        assert [case.id for case in project.missing()] == ["a"], "nobody waits for a scan that is left out"
        assert sorted(project.moved_scans(moved)) == ["a", "b"]

    def test_another_file_of_the_same_name_is_not_taken(self, project: Project, moved: Path) -> None:
        write_scan(moved / "deep" / "images" / "a.nrrd", seed=99)
        assert list(project.moved_scans(moved)) == ["b"]

    def test_a_scan_whose_place_another_file_took_is_found_too(
        self, project: Project, moved: Path, tmp_path: Path
    ) -> None:
        write_scan(tmp_path / "study" / "images" / "a.nrrd", seed=99)
        assert sorted(project.moved_scans(moved)) == ["a", "b"]

    def test_accents_may_be_written_in_the_other_way(self, project: Project, tmp_path: Path) -> None:
        """As macOS and some archives do."""
        name = "Müller.nrrd"
        write_scan(tmp_path / "study" / "images" / unicodedata.normalize("NFC", name), seed=3)
        add_scans(project, tmp_path / "study" / "images")
        (tmp_path / "archive").mkdir()
        there = tmp_path / "archive" / unicodedata.normalize("NFD", name)
        (tmp_path / "study" / "images" / unicodedata.normalize("NFC", name)).rename(there)
        assert project.moved_scans(tmp_path / "archive") == {"Muller": there.resolve()}

    def test_a_folder_that_is_not_there_is_refused(self, project: Project, tmp_path: Path) -> None:
        with pytest.raises(ProjectError, match="is not a folder"):
            project.moved_scans(tmp_path / "nowhere")

    def test_a_search_that_is_stopped_looks_no_further(self, project: Project, tmp_path: Path) -> None:
        for number in range(5):
            (tmp_path / "much" / str(number)).mkdir(parents=True)
        asked: list[int] = []
        found = project.moved_scans(tmp_path / "much", stop=lambda: bool(asked.append(1)) or len(asked) > 2)
        assert found == {} and len(asked) == 3

    def test_a_project_that_moved_with_its_scans_needs_no_help(self, project: Project, tmp_path: Path) -> None:
        (tmp_path / "study").rename(tmp_path / "elsewhere")
        assert Project(tmp_path / "elsewhere" / "project").missing() == []
