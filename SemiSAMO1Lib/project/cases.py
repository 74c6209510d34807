"""Cases: their names, roles, fingerprints, and the check that every scan passes on entry."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from ..image_io import UnreadableImage, data_files, read_volume
from ..volume import Geometry, Volume

#: Longest case id; it is a folder name, and paths on Windows are short.
LONGEST_ID = 40

#: A scan needs this many voxels along each axis: descriptors and 3D networks look at neighbours.
SMALLEST_SIDE = 4

#: Letters without an ASCII letter inside them.
_SPELT_OUT = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
)

_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))}


class Role(StrEnum):
    """What a case is for. Excluded: not trained on, predicted or exported; reversible."""

    TEMPLATE = "template"
    LABELLED = "labelled"
    UNLABELLED = "unlabelled"
    EXCLUDED = "excluded"


class Review(StrEnum):
    """States of a case's review. A training changes one of them alone: rejected becomes not_seen."""

    NOT_SEEN = "not_seen"
    SKIPPED = "skipped"
    DRAFT = "draft"
    ACCEPTED = "accepted"
    CORRECTED = "corrected"
    REJECTED = "rejected"


def said_origin(origin: str, is_template: bool) -> str:
    """A label's origin for people: further scans that are labelled by hand are recorded like the template."""
    return "drawn" if origin == "template" and not is_template else origin


@dataclass(frozen=True)
class Skipped:
    """A file that did not become a case, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One scan of the project.

    Attributes:
        id: folder name of the case, unique ignoring case.
        relative, absolute: the image, relative to the project folder and absolute.
        fingerprint: of the image file, see `fingerprint`.
        geometry: the image's grid.
        role: what the case is for.
        review: review state.
        label_version: number of the label in force, None when it has none.
        source: where a converted image came from (DICOM UIDs, HDF5 file); empty for a file used in place.
        name: what its file (without the ending) or DICOM folder is called; the id is made of it.
        extra: keys of a newer program, kept.
    """

    id: str
    relative: str
    absolute: str
    fingerprint: str
    geometry: Geometry
    role: Role = Role.UNLABELLED
    review: Review = Review.NOT_SEEN
    label_version: int | None = None
    source: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "image": {"relative": self.relative, "absolute": self.absolute},
            "fingerprint": self.fingerprint,
            **self.geometry.to_json(),
            "role": str(self.role),
            "review": str(self.review),
            "label_version": self.label_version,
            "source": self.source,
            **self.extra,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Case:
        return cls(
            id=row["id"],
            relative=row["image"]["relative"],
            absolute=row["image"]["absolute"],
            fingerprint=row["fingerprint"],
            geometry=Geometry.from_json(row),
            role=Role(row["role"]),
            review=Review(row["review"]),
            label_version=row["label_version"],
            source=row.get("source", {}),
            name=row.get("name") or row["id"],
            extra={key: value for key, value in row.items() if key not in _CASE_KEYS},
        )


#: Keys of a case in project.json that this program knows.
_CASE_KEYS = frozenset({one.name for one in fields(Case)} | {"image", *Geometry((1, 1, 1)).to_json()})


def make_id(name: str, taken: Iterable[str]) -> str:
    """A case id from a file name: safe as a folder name everywhere, unique ignoring case among `taken`."""
    plain = unicodedata.normalize("NFKD", name.translate(_SPELT_OUT)).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:LONGEST_ID].rstrip("-._") or "case"
    if plain.lower().split(".")[0] in _RESERVED:
        plain = f"case-{plain}"[:LONGEST_ID].rstrip("-._")
    used = {one.lower() for one in taken}
    candidate, number = plain, 2
    while candidate.lower() in used:
        ending = f"-{number}"
        candidate, number = plain[: LONGEST_ID - len(ending)] + ending, number + 1
    return candidate


def without_folders(text: str, places: Iterable[Path | str]) -> str:
    """A text that leaves the project, with the names of files alone: folders often are called after patients."""
    for place in sorted({form for one in places for form in (str(one), Path(one).as_posix())}, key=len, reverse=True):
        text = text.replace(place, Path(place).name)
    return text


def plain_name(name: str) -> str:
    """A name in the one way of writing accents: file systems have two."""
    return unicodedata.normalize("NFC", name)


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same letters, however a file system wrote their accents."""
    return plain_name(one) == plain_name(other)


def mentions(text: str, name: str) -> bool:
    """Whether a file's name holds this name as a word of its own, as in `scan_7-label` or `label of scan_7`."""
    where = re.escape(plain_name(name))
    return re.search(rf"(?<![^\W_]){where}(?![^\W_])", plain_name(text)) is not None


def fingerprint(path: Path) -> str:
    """SHA-256 over the size of the file (of a header: and of its data files), its first and last MiB, and 64 KiB at 64
    places between: equal for a moved file, different for a changed one. All of a file up to 6 MiB counts."""
    digest = hashlib.sha256()
    for part in (path, *(data for data in data_files(path) if data.is_file())):
        size = part.stat().st_size
        digest.update(f"{size} ".encode())
        with open(part, "rb") as stream:
            if size <= 6 << 20:
                digest.update(stream.read())
                continue
            digest.update(stream.read(1 << 20))
            for place in range(1, 65):
                stream.seek(place * size // 65)
                digest.update(stream.read(1 << 16))
            stream.seek(size - (1 << 20))
            digest.update(stream.read())
    return digest.hexdigest()


def relative_path(path: Path, folder: Path) -> str:
    """`path` seen from `folder`, with forward slashes; absolute where there is none (another Windows drive)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.as_posix()


def check_scan(path: Path) -> Volume:
    """Read a scan and make sure that it can be used. Raises UnreadableImage with the reason."""
    volume = read_volume(path)
    check_voxels(volume)
    return volume


def check_voxels(volume: Volume) -> None:
    """Raise UnreadableImage for a scan that no method can use, or for a label map."""
    array, geometry = volume.array, volume.geometry
    if min(geometry.shape) < SMALLEST_SIDE:
        raise UnreadableImage(
            f"{min(geometry.shape)} slices along one axis (size z, y, x: {geometry.shape}); {SMALLEST_SIDE} are needed"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise UnreadableImage(f"{bad} of {array.size} voxels are NaN or infinite; replace them and add the scan again")
    if array.min() == array.max():
        raise UnreadableImage(f"constant image, every voxel is {array.min()}")
    if not all(np.isfinite(s) and s > 0 for s in geometry.spacing):
        raise UnreadableImage(f"impossible spacing {geometry.spacing} mm")
    if looks_like_labels(volume):
        raise UnreadableImage("looks like a label map (few whole numbers, background 0), not a scan")


def looks_like_labels(volume: Volume) -> bool:
    """Few different whole numbers, most voxels 0: a mask or label map rather than a scan."""
    array = volume.array
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        return False
    sample = array.reshape(-1)
    if np.count_nonzero(sample) > 0.5 * sample.size or sample.min() < 0:
        return False
    return len(np.unique(sample)) <= 32
