"""Unfinished painting of a case, kept in the project until it is saved or discarded: closing a window loses nothing."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..lock import identity
from ..volume import Volume
from .cases import make_id
from .label_table import LabelTable
from .label_writer import write_segmentation
from .store import Project


def draft_file(project: Project, case: str) -> Path:
    """Where a case's draft lies, whether there is one or not."""
    return project.folder / "labels" / case / "draft.seg.nrrd"


#: Two segments that claimed the same voxels, how many; the second one has them.
Overlap = tuple[str, str, int]


def save_draft(
    project: Project,
    case: str,
    labels: Volume,
    table: LabelTable,
    training: str,
    new: Collection[int] = (),
    overlaps: Sequence[Overlap] = (),
) -> Path:
    """Write a draft, in place of an older one; another person's is put aside as `draft-of-<name>-<time>.seg.nrrd`.

    Args:
        project, case: whose.
        labels: values (z, y, x) on any grid of the case.
        table: names of the values, also of such that the project does not know yet.
        training: whose prediction it began from; empty for a label drawn from nothing.
        new: values that the project has not given. It may give them to other labels before the draft is opened again,
            so their segments go by name.
        overlaps: what segments lost because a voxel has one label; told when the draft is brought back.
    """
    path = draft_file(project, case)
    written = path.with_name("draft-new.seg.nrrd")
    write_segmentation(written, labels, table, "draft", new)
    _put_aside(project, case)
    written.replace(path)
    lost = {"overlaps": list(overlaps)} if overlaps else {}
    files.write_json(path.with_name("draft.json"), {"training": training, **identity(), **lost})
    return path


def drafts_put_aside(project: Project, case: str) -> list[Path]:
    """Drafts of this case by people whose place somebody else took."""
    return sorted(draft_file(project, case).parent.glob("draft-of-*.seg.nrrd"))


def _put_aside(project: Project, case: str) -> None:
    """Another person's draft is kept under a name of its own."""
    path = draft_file(project, case)
    if path.exists() and (theirs := _another_person(project, case)):
        when = make_id(theirs["time"].replace(":", ""), ())
        path.replace(path.with_name(f"draft-of-{make_id(theirs['user'], ())}-{when}.seg.nrrd"))


def by_whom(project: Project, case: str) -> str:
    """` by <user> on <host>, <time>` of another person's draft, for a sentence; empty for one's own."""
    theirs = _another_person(project, case)
    return " by {user} on {host}, {time}".format(**theirs) if theirs else ""


def _another_person(project: Project, case: str) -> dict[str, str]:
    """`user`, `host` and `time` of a draft that somebody else painted; empty where nobody else did."""
    record, me = _record(project, case), identity()
    found = {key: str(record.get(key)) for key in ("user", "host", "time")}
    known = {"user", "host"} <= set(record)
    return found if known and (found["user"], found["host"]) != (me["user"], me["host"]) else {}


def _record(project: Project, case: str) -> dict[str, Any]:
    """Who painted a draft, and when; empty where there is no draft."""
    try:
        return dict(files.read_json(draft_file(project, case).with_name("draft.json")))
    except (OSError, ValueError):
        return {}


def training_of(project: Project, case: str) -> str | None:
    """Whose prediction a case's draft began from; None without a draft, or where it is not known."""
    return str(_record(project, case).get("training", "")) or None


def overlaps_of(project: Project, case: str) -> list[Overlap]:
    """What segments of a case's draft lost to others, because a voxel has one label."""
    return [(str(one), str(other), int(n)) for one, other, n in _record(project, case).get("overlaps", ())]


def restore_draft(project: Project, case: str, labels: Path, training: str | None) -> Path:
    """Make a draft of a saved label again: its correction was taken back. A draft that is there already stays."""
    path = draft_file(project, case)
    if path.exists():
        return path
    with files.atomic_path(path) as temporary:
        shutil.copyfile(labels, temporary)
    files.write_json(path.with_name("draft.json"), {"training": training or "", **identity()})
    return path


def find_draft(project: Project, case: str) -> Path | None:
    """The draft of a case, if there is one."""
    path = draft_file(project, case)
    return path if path.is_file() else None


def discard_draft(project: Project, case: str) -> None:
    """Remove a case's draft: it was saved as a label, or a person does not want it; another person's is put aside."""
    _put_aside(project, case)
    path = draft_file(project, case)
    path.unlink(missing_ok=True)
    path.with_name("draft.json").unlink(missing_ok=True)
