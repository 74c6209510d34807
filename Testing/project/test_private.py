"""DICOM scans from import to export as NRRD and as a bundle: what the scanner wrote about a patient stands in no file.

DICOM SEG is left out: it belongs to the patient's study and says so.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_files import write_series

from SemiSAMO1Lib import files
from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.phantoms import PhantomSettings, make_phantom
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.volume import Volume

#: What `dicom_files` writes into the tags; shorter words may stand in a picture's letters by chance.
TOLD = (b"Mustermann", b"19640812", b"Klinik")

TINY = {"patch_voxels": 4096, "filters": 4, "device": "cpu", "rounds": 1, "iterations": 2, "threads": 1}


def shell(*words: object) -> None:
    command = [sys.executable, "-m", "SemiSAMO1Lib.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A project of three DICOM series, trained and exported, and its bundle unpacked."""
    folder = tmp_path_factory.mktemp("private")
    label = None
    for number in range(3):
        phantom = make_phantom(number, settings=PhantomSettings(spacing_mm=(6.0, 5.0, 5.0)))
        label = label or phantom.label
        whole = np.rint(phantom.image.array).astype(np.int16)
        write_series(folder / "scans" / f"series_{number}", Volume(whole, phantom.image.geometry))
    assert label is not None, "there are phantoms"
    write_volume(folder / "label.nrrd", label)
    files.write_json(folder / "tiny.json", TINY)
    project = folder / "project"
    shell("init", project, "--images", folder / "scans")
    first = next(case.id for case in Project(project).state.cases if case.geometry.same_grid(label.geometry))
    shell("template", project, "--case", first, "--labels", folder / "label.nrrd", "--sure")
    shell("train", project, "--config", folder / "tiny.json")
    shell("report", project)
    shell("export", project, "--output", folder / "exported")
    shell("bundle", project, "--output", folder / "model.zip")
    zipfile.ZipFile(folder / "model.zip").extractall(folder / "bundle")
    return {name: folder / name for name in ("project", "exported", "bundle")}


def said_by(path: Path) -> bytes:
    """What a file holds; one that is packed as a whole is unpacked (of NRRD the voxels alone are)."""
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


@pytest.mark.parametrize("place", ["project", "exported", "bundle"])
def test_no_file_says_who_the_patient_is(places: dict[str, Path], place: str) -> None:
    every = [path for path in places[place].rglob("*") if path.is_file()]
    told = [f"{path.relative_to(places[place])}: {word!r}" for path in every for word in TOLD if word in said_by(path)]
    assert len(every) > 3 and told == []


def test_report_and_log_are_among_them(places: dict[str, Path]) -> None:
    """The files that a person sends to somebody when something went wrong."""
    jobs = places["project"] / "jobs"
    assert {path.name for path in jobs.rglob("*")} >= {"report.html", "log.txt", "events.jsonl", "status.json"}
