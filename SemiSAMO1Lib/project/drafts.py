"""Unfinished painting of a case, kept in the project until it is saved or discarded: closing a window loses nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from .. import files
from ..lock import identity
from ..volume import Volume
from .label_table import LabelTable
from .label_writer import write_segmentation
from .store import Project


def draft_file(project: Project, case: str) -> Path:
    """Where a case's draft lies, whether there is one or not."""
    return project.folder / "labels" / case / "draft.seg.nrrd"


def save_draft(project: Project, case: str, labels: Volume, table: LabelTable, training: str) -> Path:
    """Write a draft, in place of an older one.

    Args:
        project, case: whose.
        labels: values (z, y, x) on any grid of the case.
        table: names of the values, also of such that the project does not know yet.
        training: whose prediction it began from; empty for a label drawn from nothing.
    """
    path = draft_file(project, case)
    write_segmentation(path, labels, table)
    files.write_json(path.with_name("draft.json"), {"training": training, **identity()})
    return path


def training_of(project: Project, case: str) -> str | None:
    """Whose prediction a case's draft began from; None without a draft, or where it is not known."""
    path = draft_file(project, case).with_name("draft.json")
    try:
        return str(files.read_json(path).get("training", "")) or None
    except (OSError, ValueError):
        return None


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
    """Remove a case's draft: it was saved as a label, or a person does not want it."""
    path = draft_file(project, case)
    path.unlink(missing_ok=True)
    path.with_name("draft.json").unlink(missing_ok=True)
