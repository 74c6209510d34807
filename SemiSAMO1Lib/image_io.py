"""The one door to image files: every read and write of a volume goes through here (numpy + SimpleITK).

Paths that the file readers on Windows cannot open (non-ASCII) take a detour over a temporary copy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from .files import atomic_path
from .volume import Geometry, Volume

#: File name endings that hold one volume.
SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")


class UnreadableImage(ValueError):
    """A file that is not a usable volume; the message says why."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its voxels are read."""

    size: tuple[int, ...]
    components: int
    pixel_type: str
    metadata: dict[str, str]


def suffix_of(path: Path) -> str:
    """The ending that names the format, lower case, '.nii.gz' and '.seg.nrrd' in one piece."""
    name = path.name.lower()
    return next((s for s in (".seg.nrrd", ".nii.gz") if name.endswith(s)), path.suffix.lower())


def stem_of(path: Path) -> str:
    """The file name without the ending that names the format."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def read_header(path: Path) -> Header:
    """Read size, components and metadata only. Raises UnreadableImage."""
    with _readable(path) as name:
        reader = sitk.ImageFileReader()
        reader.SetFileName(name)
        _guard(path, reader.ReadImageInformation)
    return Header(
        size=reader.GetSize(),
        components=reader.GetNumberOfComponents(),
        pixel_type=sitk.GetPixelIDValueAsString(reader.GetPixelID()),
        metadata={key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()},
    )


def read_image(path: Path) -> sitk.Image:
    """Read a file as it is (any dimension, any components). Raises UnreadableImage."""
    with _readable(path) as name:
        return _guard(path, lambda: sitk.ReadImage(name))


def read_volume(path: Path) -> Volume:
    """Read one scalar 3D volume. Raises UnreadableImage for 2D, 4D, colour, empty, or not finite everywhere."""
    image = read_image(path)
    check_scalar_3d(image.GetSize(), image.GetNumberOfComponentsPerPixel())
    volume = from_sitk(image)
    if np.iscomplexobj(volume.array):
        raise UnreadableImage("complex numbers; a scan with one real number per voxel is needed")
    return volume


def check_scalar_3d(size: Sequence[int], components: int) -> None:
    """Raise UnreadableImage unless size and components are those of one scalar 3D volume."""
    if len(size) != 3:
        raise UnreadableImage(f"{len(size)}D image of size {tuple(size)}; one 3D volume is needed. Split or stack it.")
    if components != 1:
        raise UnreadableImage(f"{components} components per voxel (colour or vector image); one is needed")
    if min(size) < 1:
        raise UnreadableImage(f"empty image of size {tuple(size)}")


def write_image(path: Path, image: sitk.Image, metadata: dict[str, str] | None = None) -> None:
    """Write a SimpleITK image atomically, compressed where the format allows it."""
    for key, value in (metadata or {}).items():
        image.SetMetaData(key, value)
    path = Path(path)
    with atomic_path(path) as temporary:
        if _needs_detour(temporary):
            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder) / ("image" + "".join(path.suffixes[-2:]))
                sitk.WriteImage(image, str(plain), useCompression=True)
                shutil.copyfile(plain, temporary)
        else:
            sitk.WriteImage(image, str(temporary), useCompression=True)


def write_volume(path: Path, volume: Volume, metadata: dict[str, str] | None = None) -> None:
    """Write a volume with its geometry; bool is stored as uint8."""
    write_image(path, to_sitk(volume), metadata)


def read_dicom_series(files: Sequence[Path]) -> sitk.Image:
    """Read the sorted files of one DICOM series as one volume. Raises UnreadableImage."""
    reader = sitk.ImageSeriesReader()
    with _all_readable(files) as names:
        reader.SetFileNames(names)
        return _guard(files[0], reader.Execute)


def dicom_series(folder: Path) -> dict[str, list[Path]]:
    """The DICOM series in one folder: series UID -> files in the order of their position."""
    names = {}
    with _readable(folder) as name:
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(name):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(name, uid)
            names[uid] = [Path(folder) / Path(file).name for file in files]
    return names


def from_sitk(image: sitk.Image) -> Volume:
    """A volume that owns its array (z, y, x)."""
    x, y, z = image.GetSize()
    sx, sy, sz = image.GetSpacing()
    geometry = Geometry((z, y, x), (sz, sy, sx), image.GetOrigin(), image.GetDirection())
    return Volume(sitk.GetArrayFromImage(image), geometry)


def to_sitk(volume: Volume) -> sitk.Image:
    """A SimpleITK image with the volume's geometry; bool becomes uint8."""
    array: Any = volume.array.astype(np.uint8) if volume.array.dtype == bool else volume.array
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    place(image, volume.geometry)
    return image


def place(image: sitk.Image, geometry: Geometry) -> None:
    """Give an image the geometry's origin, spacing and direction."""
    image.SetOrigin(geometry.origin)
    image.SetSpacing(geometry.spacing[::-1])
    image.SetDirection(geometry.direction)


def _guard(path: Path, read: Any) -> Any:
    try:
        return read()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UnreadableImage(f"cannot be read: {reason} (damaged, cut short, or not an image)") from error


def _needs_detour(path: Path) -> bool:
    return os.name == "nt" and not str(path).isascii()


@contextmanager
def _readable(path: Path) -> Iterator[str]:
    with _all_readable([path]) as names:
        yield names[0]


@contextmanager
def _all_readable(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Names that the image readers can open: the paths themselves, or copies under an ASCII name."""
    if not any(_needs_detour(Path(path)) for path in paths):
        yield [str(path) for path in paths]
        return
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, path in enumerate(map(Path, paths)):
            copy = Path(folder) / f"{number}{suffix_of(path)}"
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
            names.append(str(copy))
        yield names
