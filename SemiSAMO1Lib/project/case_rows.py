"""A case as the inputs of a job tell it: where its image may lie and what it must be; a job reads nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..image_io import UnreadableImage, read_volume
from ..volume import Volume
from .cases import Case, check_voxels, fingerprint
from .store import NAME_THE_FOLDER, Project


def case_row(project: Project, case: Case) -> dict[str, Any]:
    """A case for `inputs/cases.json`."""
    places = [path.as_posix() for path in project.image_places(case)]
    row = {"id": case.id, "places": places, "fingerprint": case.fingerprint, "review": case.review}
    return {**row, **case.geometry.to_json()}


def find_image(row: dict[str, Any], project: Project | None = None) -> Path:
    """The image of a case in one of its places, unchanged; else where the project has located it since then.

    Raises:
        UnreadableImage: it is nowhere, or it was changed.
    """
    reason = f"the image is missing: {row['places'][0]}. Bring it back, or {NAME_THE_FOLDER}"
    known = [case for case in project.state.cases if case.id == row["id"]] if project is not None else []
    further = [place for case in known for place in project.image_places(case)] if project is not None else []
    for place in [*map(Path, row["places"]), *further]:
        try:
            if place.is_file():
                if fingerprint(place) == row["fingerprint"]:
                    return place
                reason = f"the image was changed since it was added: {place}"
        except OSError as error:
            reason = f"the image cannot be read ({error.strerror}): {place}"
    raise UnreadableImage(reason)


def checked_volume(path: Path) -> Volume:
    """A scan, read and checked. Raises UnreadableImage."""
    volume = read_volume(path)
    check_voxels(volume)
    return volume
