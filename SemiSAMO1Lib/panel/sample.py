"""The sample project: phantoms with the predictions of a real training, copied where a person may change them."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import slicer

from ..project import ProjectError


def place() -> Path:
    """Where the copy goes: a folder of its own each time, so that nobody's review is overwritten."""
    return Path(tempfile.mkdtemp(prefix="SemiSAMO1-sample-", dir=slicer.app.temporaryPath))


def unpack(archive: Path, target: Path) -> Path:
    """Copy the sample project to `target`; returns its folder. Raises ProjectError when it is not installed."""
    if not archive.is_file():
        raise ProjectError(f"the sample project is missing: {archive}. Make it with `make sample`.")
    folder = target / "phantoms"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def register(resources: Path) -> None:
    """Offer the phantoms in the Sample Data module: its first scan and that scan's label."""
    import SampleData

    archive = resources / "Sample" / "phantoms.zip"
    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="SemiSAMO1",
        sampleName="SemiSAMO1 phantoms",
        thumbnailFileName=str(resources / "Icons" / "SemiSAMO1.png"),
        uris=archive.as_uri(),
        fileNames="SemiSAMO1-phantoms.zip",
        nodeNames=None,
        loadFileType="ZipFile",
        customDownloader=lambda _source: show_first_scan(archive),
    )


def show_first_scan(archive: Path) -> list[Any]:
    """Load the sample's template and its label into the scene as a person's own nodes."""
    folder = unpack(archive, place())
    image = sorted((folder / "images").glob("*.nrrd"))[0]
    label = sorted((folder / "labels" / image.stem).glob("*.seg.nrrd"))[-1]
    return [slicer.util.loadVolume(str(image), {}), slicer.util.loadSegmentation(str(label), {})]
