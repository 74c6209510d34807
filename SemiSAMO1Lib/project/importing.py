"""Find the scans in a folder and make cases of them; what cannot be used is listed with its reason.

NIfTI, NRRD and MetaImage files are used where they lie. DICOM series are converted once to images/<case>.nrrd, without
patient tags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from ..image_io import (
    SUFFIXES,
    Header,
    UnreadableImage,
    check_scalar_3d,
    dicom_series,
    from_sitk,
    read_dicom_series,
    read_header,
    stem_of,
    suffix_of,
)
from ..volume import Geometry, Volume
from .cases import Skipped, check_scan, check_voxels, fingerprint

#: Image files that are not read, and HDF5 files outside of the published layout; they are listed, not passed over.
UNREAD_FORMATS = (
    *(".img", ".hdr", ".gipl", ".mnc", ".mgh", ".mgz", ".vtk", ".par", ".rec"),
    *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".h5", ".hdf5"),
)

#: Largest difference of neighbouring slice distances in a DICOM series, as a share of their median.
UNEVEN_SLICES = 0.02

#: Largest angle between the stack of slices and their normal, degrees; beyond it the gantry was tilted.
TILT_DEGREES = 0.5


@dataclass(frozen=True)
class Found:
    """A usable scan: a file to use in place, or a converted volume to be stored in the project."""

    name: str
    geometry: Geometry
    path: Path | None = None
    fingerprint: str = ""
    converted: Volume | None = None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A file or DICOM series that has not been looked into yet."""

    name: str
    check: Callable[[], Found]


def candidates(folder: Path, project: Path) -> Iterator[Candidate | Skipped]:
    """Everything below `folder` that could be a scan, sorted by path; hidden files and project folders are left out.

    Raises:
        NotADirectoryError: `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder. Give the folder that holds the scans.")
    yield from _below(folder, folder, project.resolve())


def look(candidate: Candidate) -> Found | Skipped:
    """Read one candidate and check it."""
    try:
        return candidate.check()
    except UnreadableImage as error:
        return Skipped(candidate.name, str(error))
    except OSError as error:
        return Skipped(candidate.name, f"cannot be read: {error.strerror or error}")
    except MemoryError:
        return Skipped(candidate.name, "too large for this computer's memory")


def _below(folder: Path, root: Path, project: Path) -> Iterator[Candidate | Skipped]:
    if folder.resolve() == project or (folder / "project.json").exists():
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield Skipped(_shown(folder, root), f"folder cannot be opened: {error.strerror}")
        return
    rest = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry, root, project)
        elif suffix_of(entry) == ".seg.nrrd":
            yield Skipped(_shown(entry, root), "a segmentation, not a scan")
        elif suffix_of(entry) in SUFFIXES:
            yield Candidate(_shown(entry, root), partial(_look_at_file, entry))
        elif suffix_of(entry) in UNREAD_FORMATS:
            yield Skipped(_shown(entry, root), "a format that is not read; convert it to NIfTI, NRRD or MetaImage")
        elif suffix_of(entry) in (".dcm", ".ima", "") or entry.suffix[1:].isdigit():
            rest.append(entry)
    if any(_is_dicom(entry) for entry in rest):
        yield from _series(folder, root)


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _look_at_file(path: Path) -> Found:
    header = read_header(path)
    check_scalar_3d(header.size, header.components)
    volume = check_scan(path)
    return Found(stem_of(path), volume.geometry, path, fingerprint(path))


def _is_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            stream.seek(128)
            return stream.read(4) == b"DICM"
    except OSError:
        return False


def _series(folder: Path, root: Path) -> Iterator[Candidate]:
    for number, (_, files) in enumerate(sorted(dicom_series(folder).items()), start=1):
        name = folder.name if number == 1 else f"{folder.name}-{number}"
        shown = _shown(folder, root)
        yield Candidate(
            shown if number == 1 else f"{shown} (series {number})",
            partial(_look_at_series, name, files),
        )


def _look_at_series(name: str, files: Sequence[Path]) -> Found:
    headers = [read_header(file) for file in files]
    _check_slices(headers)
    image = read_dicom_series(files)
    check_scalar_3d(image.GetSize(), image.GetNumberOfComponentsPerPixel())
    volume = from_sitk(_without_tags(image))
    check_voxels(volume)
    source = {
        "kind": "dicom",
        "study_uid": headers[0].metadata.get("0020|000d", "").strip("\0 "),
        "series_uid": headers[0].metadata.get("0020|000e", "").strip("\0 "),
        "frame_of_reference_uid": headers[0].metadata.get("0020|0052", "").strip("\0 "),
        "instance_uids": [header.metadata.get("0008|0018", "").strip("\0 ") for header in headers],
    }
    return Found(name, volume.geometry, converted=volume, source=source)


def _check_slices(headers: Sequence[Header]) -> None:
    """Raise UnreadableImage for uneven slice spacing or a tilted gantry."""
    if len(headers) == 1:
        frames = headers[0].metadata.get("0028|0008", "1").strip()
        if int(frames or 1) > 1:
            return  # one multi-frame file; its reader gives the spacing
        raise UnreadableImage("one DICOM slice; a volume is needed")
    try:
        places = np.array([_numbers(header, "0020|0032") for header in headers])
        across = np.array(_numbers(headers[0], "0020|0037"))
    except (KeyError, ValueError) as error:
        raise UnreadableImage("DICOM slices without position or orientation") from error
    steps = np.diff(places, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    if lengths.min() < 1e-3:
        raise UnreadableImage("two DICOM slices at the same place (several time points or echoes in one series?)")
    normal = np.cross(across[:3], across[3:])
    angle = np.degrees(np.arccos(np.clip(np.abs(steps @ normal) / lengths, 0, 1))).max()
    if angle > TILT_DEGREES:
        raise UnreadableImage(f"slices are sheared by {angle:.1f}° (gantry tilt); resample the series first")
    median = float(np.median(lengths))
    if np.abs(lengths - median).max() > UNEVEN_SLICES * median:
        raise UnreadableImage(
            f"uneven slice spacing from {lengths.min():.3g} to {lengths.max():.3g} mm (missing slices?)"
        )


def _numbers(header: Header, key: str) -> list[float]:
    return [float(word) for word in header.metadata[key].split("\\")]


def _without_tags(image: sitk.Image) -> sitk.Image:
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    return image
