"""The import job: look into every scan of a folder, make cases of the usable ones, list the others with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ..engine.observer import Stopped
from ..image_io import UnreadableImage, stem_of
from ..job.folder import JobFolder
from ..project import Project, Skipped
from ..project.cases import check_scan, check_voxels, fingerprint
from ..project.importing import Candidate, Found, candidates, look
from .reporter import Reporter


def import_scans(job: JobFolder, reporter: Reporter) -> None:
    """Add scans to the project: those below the folder `images` of the job's parameters, or the single `files`."""
    reporter.handshake(library=_version())
    project = Project(job.project)
    parameters = job.spec()["parameters"]
    if "files" in parameters:
        found: list[Candidate | Skipped] = [
            Candidate(Path(one).name, partial(_taken_over, Path(one))) for one in parameters["files"]
        ]
    else:
        found = list(_candidates(Path(parameters["images"]), job.project))
    skipped: list[Skipped] = []
    added: list[str] = []
    for position, candidate in enumerate(found):
        if reporter.should_stop():
            project.note_skipped(skipped, added)
            raise Stopped(f"stopped as asked; {len(added)} scans were added")
        result = candidate if isinstance(candidate, Skipped) else look(candidate)
        if isinstance(result, Found):
            case = project.add(result)
            for note in result.source.get("notes", ()):
                reporter.event("note", text=note)
            result = Skipped(candidate.name, case.reason) if isinstance(case, Skipped) else result
        if isinstance(result, Skipped):
            skipped.append(result)
            reporter.event("skipped", name=result.name, reason=result.reason)
        else:
            added.append(candidate.name)
            reporter.event("added", name=result.name)
        done = position + 1
        reporter.event("progress", stage="checking scans", done=done, of=len(found), fraction=done / len(found))
    project.note_skipped(skipped, added)
    if not project.refresh().cases:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in skipped[:5])
        place = parameters.get("images", "these files")
        raise ValueError(f"no usable scan in {place}. {reasons or 'No NIfTI, NRRD, MetaImage, DICOM or HDF5 file.'}")


def _candidates(folder: Path, project: Path) -> Iterator[Candidate | Skipped]:
    layout = sorted((folder / "data").glob("*.h5")) if (folder / "data").is_dir() else []
    for path in layout:
        yield Candidate(path.name, partial(_from_hdf5, path))
    read = {path.relative_to(folder).as_posix() for path in layout}
    yield from (one for one in candidates(folder, project) if one.name not in read)


def _taken_over(path: Path) -> Found:
    """A file that a front end wrote for the project, such as a volume of Slicer's scene: copied into its images."""
    volume = check_scan(path)
    source = {"kind": "scene", "sha256": fingerprint(path)}
    path.unlink()  # it was written for this alone
    return Found(stem_of(path), volume.geometry, converted=volume, source=source)


def _from_hdf5(path: Path) -> Found:
    from ..engine.data.hdf5_layout import read_case

    try:
        case = read_case(path)
    except (OSError, KeyError, ValueError) as error:
        raise UnreadableImage(str(error)) from error
    check_voxels(case.image)
    source = {"kind": "hdf5", "file": str(path.resolve()), "notes": list(case.notes), "sha256": fingerprint(path)}
    return Found(path.stem, case.image.geometry, converted=case.image, source=source)


def _version() -> str:
    from .. import __version__

    return __version__
