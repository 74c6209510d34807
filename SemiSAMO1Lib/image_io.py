"""The one door to image files: every read and write of a volume goes through here (numpy + SimpleITK).

Paths that the file readers on Windows cannot open (non-ASCII) take a detour over a temporary copy.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import struct
import tempfile
import zlib
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


#: Of these, the ones that may name other files, which hold the voxels.
DETACHED = (".nhdr", ".mhd")

_DATA_FILE = re.compile(rb"^(?:ElementDataFile *=|data ?file:)[ \t]*", re.MULTILINE)


class UnreadableImage(ValueError):
    """A file that is not a usable volume; the message says why."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its voxels are read."""

    size: tuple[int, ...]
    components: int
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
        metadata={key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()},
    )


def read_image(path: Path) -> sitk.Image:
    """Read a file as it is (any dimension, any components). Raises UnreadableImage."""
    _require_whole(path)
    with _readable(path) as name:
        return _guard(path, lambda: sitk.ReadImage(name))


def read_geometry(path: Path) -> Geometry:
    """The grid of a 3D file of one or several components (layers), without its voxels. Raises UnreadableImage."""
    with _readable(path) as name:
        reader = sitk.ImageFileReader()
        reader.SetFileName(name)
        _guard(path, reader.ReadImageInformation)
    check_scalar_3d(reader.GetSize(), 1)
    x, y, z = reader.GetSize()
    sx, sy, sz = reader.GetSpacing()
    return Geometry((z, y, x), (sz, sy, sx), reader.GetOrigin(), reader.GetDirection())


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


def write_image(path: Path, image: sitk.Image, metadata: dict[str, str] | None = None, compress: bool = True) -> None:
    """Write a SimpleITK image atomically, compressed where the format allows it and `compress` asks for it.

    Raises:
        ValueError: a format of two files, which cannot be replaced at once.
    """
    if suffix_of(path) in DETACHED:
        raise ValueError(f"{path.name} would be two files; write .mha or .nrrd instead")
    for key, value in (metadata or {}).items():
        image.SetMetaData(key, value)
    path = Path(path)
    with atomic_path(path) as temporary:
        if _needs_detour(temporary):
            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder) / f"image{suffix_of(path)}"
                sitk.WriteImage(image, str(plain), useCompression=compress)
                shutil.copyfile(plain, temporary)
        else:
            sitk.WriteImage(image, str(temporary), useCompression=compress)


def write_volume(path: Path, volume: Volume, metadata: dict[str, str] | None = None, compress: bool = True) -> None:
    """Write a volume with its geometry; bool is stored as uint8."""
    write_image(path, to_sitk(volume), metadata, compress)


def data_files(path: Path) -> list[Path]:
    """The files beside a header (.mhd, .nhdr) that hold its voxels; empty for a format in one file.

    A numbered pattern of names ("slice%03d.raw 1 20 1") is not followed.
    """
    if suffix_of(path) not in DETACHED:
        return []
    return [path.parent / os.fsdecode(name) for name in _data_names(path.read_bytes())[1]]


def _data_names(header: bytes) -> tuple[int, list[bytes]]:
    """Where the names of the data files begin in a header, and the names."""
    match = _DATA_FILE.search(header)
    if match is None:
        return len(header), []
    first, *others = [line.strip() for line in header[match.end() :].splitlines()] or [b""]
    if first.upper().startswith(b"LIST"):
        return match.end() + len(first), [name for name in others if name]
    return match.end(), [] if first.upper() == b"LOCAL" or b"%" in first else [first]


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
        if "Unable to determine ImageIO reader" in str(error):
            reason = f"what is in it is not of the format {suffix_of(path)}"
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
            if suffix_of(path) in DETACHED:
                _copy_with_data(path, copy)
            else:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
            names.append(str(copy))
        yield names


def _copy_with_data(path: Path, copy: Path) -> None:
    """Copy a header and its data files, which get plain names."""
    header = path.read_bytes()
    start, _ = _data_names(header)
    names = []
    for number, data in enumerate(data_files(path)):
        names.append(f"{copy.stem}-{number}{data.suffix if data.suffix.isascii() else '.raw'}")
        if not data.is_file():
            raise UnreadableImage(f"cannot be read: its data file {data.name} is missing")
        shutil.copyfile(data, copy.with_name(names[-1]))
    if names:
        between = b"\n" if header[start : start + 1] in (b"\r", b"\n") else b""
        header = header[:start] + between + "\n".join(names).encode() + b"\n"
    copy.write_bytes(header)


def _require_whole(path: Path) -> None:
    """Raise UnreadableImage for a NIfTI file that was cut short: its reader only warns, and fills up with zeros."""
    if suffix_of(path) not in (".nii", ".nii.gz") or not path.is_file():
        return
    with open(path, "rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if compressed else open(path, "rb") as stream:
            needed = _nifti_bytes(stream.read(540))
            if needed is None or _stored_bytes(path, compressed) == needed:
                return
            stream.seek(needed - 1)
            whole = len(stream.read(1)) == 1
    except (EOFError, zlib.error, gzip.BadGzipFile):
        whole = False
    if not whole:
        raise UnreadableImage("cannot be read: the file is cut short. Copy or download it again.")


def _nifti_bytes(header: bytes) -> int | None:
    """How long a NIfTI file must be, uncompressed, by its header; None when that is not one."""
    layouts = {348: ("8h", 40, "h", 72, "f", 108), 540: ("8q", 16, "h", 14, "q", 168)}
    for order in "<>":
        size = struct.unpack_from(f"{order}i", header)[0] if len(header) >= 4 else 0
        if size in layouts and len(header) >= size:
            shape, at_shape, bits, at_bits, offset, at_offset = layouts[size]
            dimensions, *lengths = struct.unpack_from(order + shape, header, at_shape)
            voxels = int(np.prod([max(1, n) for n in lengths[: max(0, dimensions)]], dtype=object))
            bits_per_voxel = struct.unpack_from(order + bits, header, at_bits)[0]
            begin = struct.unpack_from(order + offset, header, at_offset)[0]
            return int(begin) + voxels * bits_per_voxel // 8 if np.isfinite(begin) else None
    return None


def _stored_bytes(path: Path, compressed: bool) -> int:
    """The length of a file, uncompressed; of a gzip file what its last four bytes say (it may have several parts)."""
    if not compressed:
        return path.stat().st_size
    with open(path, "rb") as stream:
        stream.seek(-4, os.SEEK_END)
        return int(struct.unpack("<I", stream.read(4))[0])
