"""The project folder on disk: cases, labels, reviews. Standard library, numpy and SimpleITK only."""

from ..lock import Locked
from .cases import Case, Review, Role, Skipped
from .label_reader import LabelError, LabelReading, read_labels
from .label_table import Label, LabelTable
from .store import Project, ProjectError

__all__ = [
    "Case",
    "Label",
    "LabelError",
    "LabelReading",
    "LabelTable",
    "Locked",
    "Project",
    "ProjectError",
    "Review",
    "Role",
    "Skipped",
    "read_labels",
]
