"""One open case in the scene: its scan, its prediction as segments, its uncertainty; closed again without a trace."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..project import Case, Project
from ..project.began import Began
from ..project.drafts import began_from
from ..project.label_reader import to_grid
from ..project.label_table import Label, LabelTable
from ..volume import Geometry
from . import overlay
from .nodes import group, items_of, remove, ungroup
from .segmentations import (
    Drawn,
    Snapshot,
    apply_labels,
    drawn,
    labels_given,
    load_segmentation,
    new_segmentation,
    snapshot,
    terminology_of,
    value_of,
)
from .volumes import SceneError, geometry_of, load_scan, show_scan

_LABELMAP = "Binary labelmap"

_FROM_NOTHING = Began()


@dataclass(frozen=True)
class CaseFiles:
    """What to show of a case. Without a prediction the segmentation starts empty, without a map there is no overlay.

    Attributes:
        case: its id.
        training: id of the training that predicted it; empty where none did.
        scan, prediction, uncertainty: files.
        label: what a person saved or has painted so far; shown in place of the prediction.
        review: opened to be reviewed; else to be painted as a template.
        predicted: `prediction`, as what a person saves is measured with it.
        began: the one that what is shown began from: a label or a draft may have begun from an earlier one, or none.
    """

    case: str
    training: str
    scan: Path
    prediction: Path | None = None
    uncertainty: Path | None = None
    label: Path | None = None
    review: bool = False
    predicted: Began = _FROM_NOTHING
    began: Began = _FROM_NOTHING

    @classmethod
    def for_review(cls, project: Project, case_id: str, row: Mapping[str, Any] | None) -> CaseFiles:
        """Of a case and its row of `results.predictions`, if the current training predicted it; the label in force
        comes before the prediction. Raises ProjectError where the scan is not there any more."""
        case = project.state.case(case_id)
        label = project.label_path(case) if case.label_version is not None else None
        predicted = Began.of_row(row)
        began = began_from(project, case) or predicted
        files = cls(case_id, "", project.image_path(case), None, None, label, True, predicted, began)
        if row is None:
            return files
        found = {key: row[key] for key in ("training", "prediction", "uncertainty")}
        return replace(files, **found)

    @property
    def title(self) -> str:
        return f"{self.case} ({self.training})" if self.training else self.case


class CaseView:
    """The nodes of one open case. `close` removes all of them; a person's own nodes are never touched."""

    def __init__(self, files: CaseFiles, table: LabelTable) -> None:
        self.files = files
        self.scan: Any = load_scan(files.scan, files.title)
        #: Where the scan's voxels lie by its file: a person may move its node, and what is painted belongs to the file.
        self.grid = geometry_of(self.scan)
        self._image = self.scan.GetImageData()
        self.segmentation: Any = None
        self.uncertainty: Any = None
        #: The case as the person sees it: what somebody else decides after that is not overruled.
        self.as_seen: Case | None = None
        try:
            shown = files.label or files.prediction
            name = f"{files.title} prediction" if shown is files.prediction is not None else f"{files.title} label"
            if shown is not None:
                self.segmentation = load_segmentation(shown, table, self.scan, name)
            else:
                self.segmentation = new_segmentation(table, self.scan, name)
            if files.uncertainty is not None:
                self.uncertainty = overlay.load_uncertainty(files.uncertainty, f"{files.title} uncertainty")
        except Exception:
            self._remove_nodes()
            raise
        self._table, self._given = table, labels_given(self.segmentation, table)
        self._folder = group(files.title, self.nodes)
        self._clean: dict[str, Any] | None = self.marks
        self._kept: dict[str, Any] | None = self._clean
        show_scan(self.scan)

    @property
    def changed(self) -> bool:
        """Whether the segments were changed since the case was opened or saved as a label."""
        return self._alive and self.marks != self._clean

    @property
    def unkept(self) -> bool:
        """Whether they were changed since they were last written anywhere, as a label or as a draft."""
        return self._alive and self.marks not in (self._clean, self._kept)

    @property
    def _alive(self) -> bool:
        return self.segmentation is not None and self.segmentation.GetScene() is not None

    def mark_saved(self) -> None:
        """What is painted now is the case's label, or nothing was painted; what it is called now is the project's."""
        self._clean = self._kept = self.marks
        self._given = labels_given(self.segmentation, self._table)

    def mark_kept(self) -> None:
        """What is painted now lies in the case's draft."""
        self._kept = self.marks

    def mark_painted(self) -> None:
        """What is shown was painted before, and lies in neither a label nor a draft."""
        self._clean = self._kept = None

    def mark_unkept(self) -> None:
        """The draft could not be written."""
        self._kept = None

    @property
    def marks(self) -> dict[str, Any]:
        """Changes whenever a segment is painted, added, removed, renamed, coloured or given another terminology."""
        segmentation = self.segmentation.GetSegmentation()
        found = {}
        for identity in segmentation.GetSegmentIDs():
            segment = segmentation.GetSegment(identity)
            labelmap = segment.GetRepresentation(_LABELMAP)
            painted = labelmap.GetMTime() if labelmap is not None else 0
            codes = repr(terminology_of(segment))
            found[identity] = (segment.GetName(), segment.GetColor(), codes, painted)
        return found

    @property
    def nodes(self) -> list[Any]:
        return [node for node in (self.scan, self.segmentation, self.uncertainty) if node is not None]

    def drawn(self, table: LabelTable) -> Drawn:
        """What is painted, on the scan's grid. Raises SceneError."""
        self._require_there()
        found = drawn(self.segmentation, self.scan, table, self._known_grid)
        return replace(found, labels=to_grid(found.labels, self.grid)[0])

    def snapshot(self, table: LabelTable) -> Snapshot:
        """What is painted, copied for another thread. Raises SceneError."""
        self._require_there()
        return replace(snapshot(self.segmentation, self.scan, table, self._known_grid), grid=self.grid)

    @property
    def _known_grid(self) -> Geometry | None:
        """The scan's by its file, while its node has the file's voxels; None once these were cropped or turned."""
        return self.grid if self.scan.GetImageData() is self._image else None

    def use_labels(self, labels: Iterable[Label]) -> None:
        """Take over names, colours and terminology of some labels; segments of others stay as a person made them."""
        taken = list(labels)
        apply_labels(self.segmentation, taken)
        now = labels_given(self.segmentation, self._table)
        self._given |= {label.value: now[label.value] for label in taken}

    def own_changes(self, drawn_labels: LabelTable, known: Collection[int]) -> list[Label]:
        """The labels of `drawn` that a person added, named, coloured or gave a terminology here: what somebody else
        changed in the project since the case was opened or saved is not taken back.

        Args:
            drawn_labels: the table of `drawn`.
            known: the values that the project has now: a label that it has no more is added again.
        """
        now = labels_given(self.segmentation, self._table)
        touched = {value for value, label in now.items() if label != self._given.get(value)}
        return [one for one in drawn_labels if one.value not in known or one.value not in now or one.value in touched]

    def _require_there(self) -> None:
        if not self._alive:
            raise SceneError(f"the segments of {self.files.case} were removed; open the case again")

    def remove_label(self, value: int) -> None:
        """Take the segment of a label out."""
        segmentation = self.segmentation.GetSegmentation()
        for identity in list(segmentation.GetSegmentIDs()):
            if value_of(segmentation.GetSegment(identity)) == value:
                segmentation.RemoveSegment(identity)

    def show_uncertainty(self, visible: bool, opacity: float, threshold: float) -> None:
        """Opacity 0 to 1; threshold in percent."""
        if self.uncertainty is None:
            return
        if visible:
            overlay.show(self.uncertainty, opacity, threshold)
        else:
            overlay.hide(self.uncertainty)

    def jump_to_most_uncertain(self, threshold: float) -> bool:
        """Move the views to where the prediction is least certain; False where nothing is that uncertain."""
        place = overlay.most_uncertain_place(self.uncertainty, threshold) if self.uncertainty is not None else None
        if place is None:
            return False
        overlay.jump(place)
        return True

    def close(self) -> None:
        """Remove the case's nodes; safe after the scene was closed."""
        if self.uncertainty is not None and self.uncertainty.GetScene() is not None:
            overlay.hide(self.uncertainty)
        items = items_of(self.nodes)
        self._remove_nodes()
        ungroup(self._folder, items)

    def _remove_nodes(self) -> None:
        for node in self.nodes:
            if node.GetScene() is not None:
                remove(node)
        self.scan = self.segmentation = self.uncertainty = None
