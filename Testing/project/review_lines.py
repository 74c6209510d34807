"""Lines of reviews.jsonl as older programs wrote them, and histories without the labels that made them."""

from typing import Any

from SemiSAMO1Lib import files
from SemiSAMO1Lib.project import Project


def write_line(project: Project, case: str, before: str, after: str, **facts: Any) -> None:
    """One decision; the project's state is not changed."""
    same = {"role_before": "unlabelled", "label_before": None, "label": None}
    who = {"time": "2026-01-01T12:00:00+0000", "reviewer": "ann"}
    files.append_line(project.reviews, {**who, "case": case, "before": before, "after": after, **same, **facts})
