"""Which reference belongs to which case: by the name of its scan; a wrong pair would compare two patients."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scans import OBLIQUE, two_labels, write_scan

from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.project import Project, ProjectError, Skipped
from SemiSAMO1Lib.project.importing import candidates, look
from SemiSAMO1Lib.tasks.compare import NothingToCompare, compare, references_of
from SemiSAMO1Lib.volume import Volume


def project_of(folder: Path, *names: str) -> Project:
    """A project with a scan of each name (paths below the folder of scans), in this order."""
    project = Project.create(folder / "project")
    for seed, name in enumerate(names):
        write_scan(folder / "scans" / name, seed=seed)
    for candidate in candidates(folder / "scans", project.folder):
        assert not isinstance(candidate, Skipped)
        found = look(candidate)
        assert not isinstance(found, Skipped), found
        project.add(found)
    return project


def references(folder: Path, *names: str) -> Path:
    for name in names:
        write_volume(folder / "truth" / name, two_labels(OBLIQUE))
    return folder / "truth"


def pairs(project: Project, folder: Path) -> dict[str, str]:
    """Name of the case's scan -> name of the reference's file."""
    found = references_of(project, folder)
    return {project.state.case(case).name: path.name for case, path in found.items()}


def test_names_that_only_differ_in_an_accent_keep_their_own_reference(tmp_path: Path) -> None:
    project = project_of(tmp_path, "Muller.nrrd", "Müller.nrrd")
    truth = references(tmp_path, "Muller.nrrd", "Müller.nrrd")
    assert pairs(project, truth) == {"Muller": "Muller.nrrd", "Müller": "Müller.nrrd"}


def test_a_reference_is_not_given_to_the_case_whose_id_it_happens_to_be(tmp_path: Path) -> None:
    project = project_of(tmp_path / "other", "Müller.nrrd", "Muller.nrrd")
    assert pairs(project, references(tmp_path, "Muller.nrrd")) == {"Muller": "Muller.nrrd"}


def test_accents_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    project = project_of(tmp_path, unicodedata.normalize("NFD", "Müller.nrrd"))
    assert len(pairs(project, references(tmp_path, unicodedata.normalize("NFC", "Müller.nrrd")))) == 1


def test_a_reference_may_be_called_like_the_case(tmp_path: Path) -> None:
    project = project_of(tmp_path, "a scan.nrrd")
    assert pairs(project, references(tmp_path, "a-scan.seg.nrrd")) == {"a scan": "a-scan.seg.nrrd"}


def test_a_name_of_two_scans_says_nothing(tmp_path: Path) -> None:
    project = project_of(tmp_path, "first/scan.nrrd", "second/scan.nrrd", "other.nrrd")
    assert pairs(project, references(tmp_path, "scan.nrrd", "other.nrrd")) == {"other": "other.nrrd"}


def test_an_excluded_scan_does_not_take_part(tmp_path: Path) -> None:
    """It was changed and added once more, as an error had advised, and the other one left out."""
    project = project_of(tmp_path, "first/scan.nrrd", "second/scan.nrrd")
    project.exclude("scan-2")
    assert references_of(project, references(tmp_path, "scan.nrrd")) == {"scan": tmp_path / "truth" / "scan.nrrd"}


def test_without_any_pair_both_sides_are_named(tmp_path: Path) -> None:
    project = project_of(tmp_path, "first.nrrd")
    with pytest.raises(NothingToCompare, match=r"'first'.*'second'"):
        references_of(project, references(tmp_path, "second.nrrd"))


def test_a_case_is_found_by_the_name_of_its_scan(tmp_path: Path) -> None:
    assert project_of(tmp_path, "Straße 7.nrrd").state.case("Straße 7").id == "Strasse-7"


def test_a_name_of_two_scans_is_no_case(tmp_path: Path) -> None:
    project = project_of(tmp_path, "first/a b.nrrd", "second/a b.nrrd")
    with pytest.raises(ProjectError, match="a-b, a-b-2"):
        project.state.case("a b")


def test_a_reference_far_away_is_no_reference(tmp_path: Path) -> None:
    """On the same lattice all the same: a grid with both in it would not fit into any memory."""
    label = two_labels(OBLIQUE)
    far = replace(OBLIQUE, origin=tuple((OBLIQUE.index_to_space @ np.array([9_000, 9_000, 9_000, 1.0]))[:3].tolist()))
    write_volume(tmp_path / "a.nrrd", label)
    write_volume(tmp_path / "b.nrrd", Volume(label.array, far))
    with pytest.raises(ValueError, match="is that the reference of another scan"):
        compare({"x": tmp_path / "a.nrrd"}, {"x": tmp_path / "b.nrrd"})
