"""What scripts in Slicer's Python console need between a project and the scene."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..project import Project, ProjectError
from ..project.label_writer import written
from ..project.session import Session, template_gaps
from .case_view import CaseFiles, CaseView
from .nodes import remove
from .segmentations import drawn
from .volumes import load_scan


def set_template(project: Project | None, case: str, labels: Any) -> int:
    """Give a case its label, from a file or from a segmentation node; returns the label's version.

    Raises:
        ProjectError: no project, an unknown case, or labels that lack something.
    """
    if project is None:
        raise ProjectError("open a project first")
    found = project.refresh().case(case)
    role = project.role_for_label(found.id)
    if not hasattr(labels, "GetSegmentation"):
        project.add_label(found.id, Path(labels), role=role, add_labels=True)
    else:
        scan = load_scan(project.image_path(found), found.id)
        try:
            given = project.state.labels
            painted = drawn(labels, scan, given)
        finally:
            remove(scan)
        if gaps := template_gaps(painted.counts, painted.table, list(painted.overlaps)):
            raise ProjectError(" ".join(gaps))
        table = project.update_labels(painted.table, given.values)
        with written(found.id, painted.labels, table) as path:
            project.add_label(found.id, path, role=role)
    version = project.state.case(found.id).label_version
    assert version is not None, "just given"
    return version


def show_prediction(session: Session, case: str) -> CaseView:
    """Open a predicted case, its uncertainty over it. Raises ProjectError for a case without prediction."""
    predicted = session.predicted()
    if session.project is None or case not in predicted:
        raise ProjectError(f"{case} has no prediction; there are: {', '.join(list(predicted)[:5]) or 'none'}")
    files = CaseFiles.for_review(session.project, case, predicted[case])
    view = CaseView(files, session.project.state.labels)
    view.show_uncertainty(True, 0.5, 30)
    return view
