"""Step 2: open one scan, name the labels, paint them in the Segment Editor, save the template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from ..project import Case, Label, LabelReading, LabelTable, Project, ProjectError, Review, Role
from ..project.advisor import Ranked
from ..project.drafts import discard_draft
from ..project.label_reader import DoubtfulLabel
from ..project.label_writer import written
from ..project.session import Session, in_sentences, template_gaps
from ..project.store import require_as_seen
from ..scene.case_view import CaseFiles, CaseView
from ..scene.segmentations import Drawn, drawn, replace_content
from ..scene.volumes import SceneError
from .banner import Banner
from .dialogs import Dialogs, ask_absent
from .widgets import chosen, explain, fill_box, guarded, say, silent

_VALUE, _NAME, _COLOR, _CODE = range(4)


class TemplateStep:
    """Paint the template, or take labels that are there already.

    Args:
        ui, session, banner, dialogs: of the panel.
        show_case: opens a case in the scene and the editor; returns its view.
        open_case: the view that is open now, or None.
        reviewer: the person's name.
        settle: waits for a draft that is being written.
        saved: what was painted in the open case is its label: nothing else keeps it any more.
    """

    def __init__(
        self,
        ui: Any,
        session: Session,
        banner: Banner,
        dialogs: Dialogs,
        show_case: Callable[[CaseFiles, LabelTable], CaseView],
        open_case: Callable[[], CaseView | None],
        reviewer: Callable[[], str | None],
        settle: Callable[[], None],
        saved: Callable[[], None],
    ) -> None:
        self._ui, self._session, self._banner, self._dialogs = ui, session, banner, dialogs
        self._show_case, self._open_case, self._reviewer = show_case, open_case, reviewer
        self._settle, self._saved = settle, saved
        self._rows: list[tuple[int, str, tuple[int, int, int], str]] = []
        guard = guarded(banner.show)
        table = ui.labelTable
        table.setColumnCount(4)
        table.setHorizontalHeaderLabels([_("value"), _("name"), _("colour"), _("terminology")])
        for column, width in enumerate((50, 130, 60)):
            table.setColumnWidth(column, width)
        table.verticalHeader().setVisible(False)
        table.horizontalHeader().setStretchLastSection(True)
        table.connect("cellChanged(int,int)", lambda row, column: guard(lambda: self._renamed(row, column))())
        ui.openTemplateButton.connect("clicked(bool)", guard(self.open))
        ui.adviseButton.connect("clicked(bool)", guard(self.advise))
        ui.addLabelButton.connect("clicked(bool)", guard(self.add_label))
        ui.removeLabelButton.connect("clicked(bool)", guard(self.remove_label))
        ui.colorButton.connect("clicked(bool)", guard(self.change_color))
        ui.takeNodeButton.connect("clicked(bool)", guard(self.take_node))
        ui.takeFileButton.connect("clicked(bool)", guard(self.take_file))
        ui.saveTemplateButton.connect("clicked(bool)", guard(self.save))
        ui.takeNodeSelector.connect("currentNodeChanged(vtkMRMLNode*)", lambda _node: self.show())
        ui.takeFileEdit.connect("currentPathChanged(QString)", lambda _path: self.show())
        self.show()

    # ------------------------------------------------------------------ state

    @property
    def view(self) -> CaseView | None:
        """The case that is open for painting: one that is no prediction."""
        view = self._open_case()
        return view if view is not None and not view.files.review and view.scan is not None else None

    @property
    def _table(self) -> LabelTable:
        return self._session.project.state.labels if self._session.project is not None else LabelTable()

    def drawn(self) -> Drawn | None:
        """What is painted now; None without an open case or a segment."""
        view = self.view
        if view is None or view.segmentation.GetSegmentation().GetNumberOfSegments() == 0:
            return None
        return view.drawn(self._table)

    # ------------------------------------------------------------------ actions

    def open(self) -> None:
        """Load the chosen scan for painting; the label in force, if it has one, is loaded with it."""
        project, identity = self._session.project, chosen(self._ui.templateCaseBox)
        if project is None or not identity:
            return
        case = project.refresh().case(identity)
        label = project.label_path(case) if case.label_version is not None else None
        if not project.state.labels.labels:
            number = project.state.labels.next_value
            project.update_labels([Label(number, _("structure {number}").format(number=number), (230, 159, 0))])
        with slicer.util.WaitCursor():
            self._show_case(CaseFiles(case.id, "", project.image_path(case), label=label), project.state.labels)
        self.show()

    def advise(self) -> None:
        """Look at all scans again, in the background, and recommend one."""
        self._session.start_advice()
        self.show_advice()

    def add_label(self) -> None:
        """A further label, with a segment for it in the open case."""
        project = self._session.project
        if project is None:
            return
        value = project.refresh().labels.next_value
        color = project.state.labels.with_labels([(value, "")]).labels[-1].color
        self._change([Label(value, _("structure {number}").format(number=value), color)])

    def _renamed(self, row: int, column: int) -> None:
        if column != _NAME or row >= len(self._rows):
            return
        value, before, *_rest = self._rows[row]
        name = self._ui.labelTable.item(row, column).text().strip()
        if name == before:
            return
        label = next(one for one in self._table if one.value == value)
        try:
            self._change([replace(label, name=name)])
        finally:
            self._rows = []
            self.show()

    def change_color(self) -> None:
        row = self._ui.labelTable.currentRow()
        if not 0 <= row < len(self._rows):
            raise ProjectError(_("Select a label in the table."))
        label = next(one for one in self._table if one.value == self._rows[row][0])
        color = self._dialogs.color(label.color)
        if color is not None:
            self._change([replace(label, color=color)])

    def _change(self, labels: list[Label]) -> None:
        assert self._session.project is not None, "a project is open"
        table = self._session.project.update_labels(labels)
        view = self._open_case()
        if view is not None and view.segmentation is not None:
            painted, named = view.changed, {label.value for label in labels}
            view.use_labels(label for label in table if label.value in named)
            if not painted:  # a name is kept in the project; nothing was drawn
                view.mark_saved()
        self.show()

    def take_node(self) -> None:
        """Copy a person's segmentation into the open case; theirs stays as it is."""
        node, view = self._ui.takeNodeSelector.currentNode(), self.view
        if node is None or view is None:
            return
        if node is view.segmentation:
            raise SceneError(_("{name} is what you paint; choose another one.").format(name=node.GetName()))
        found = drawn(node, view.scan, self._named_by(node), view.grid)
        if found.overlaps:
            raise SceneError(" ".join(in_sentences(found.overlaps)))
        if not any(found.counts.values()):
            text = _("Nothing of {name} lies in the scan of {case}: is it another scan's?")
            raise SceneError(text.format(name=node.GetName(), case=view.files.case))
        self._take(found)

    def _named_by(self, node: Any) -> LabelTable:
        """The labels of the project; one that only stands in for the first is the node's first segment's."""
        table, painted, segmentation = self._table, self.drawn(), node.GetSegmentation()
        if len(table) != 1 or segmentation.GetNumberOfSegments() == 0:
            return table
        (only,) = table
        invented = only.name == _("structure {number}").format(number=only.value)
        used = self._session.reasons_against_removing(only.value) or (
            painted is not None and painted.counts.get(only.value)
        )
        if used or not invented:
            return table
        return table.updated([replace(only, name=segmentation.GetNthSegment(0).GetName())])

    def remove_label(self) -> None:
        """Take a label out again that is painted nowhere, and its segment."""
        project, row = self._session.project, self._ui.labelTable.currentRow()
        if project is None:
            return
        if not 0 <= row < len(self._rows):
            raise ProjectError(_("Select a label in the table."))
        value, name, *_rest = self._rows[row]
        view = self._open_case()
        shown = view if view is not None and view.segmentation is not None else None
        if shown is not None and shown.drawn(self._table).counts.get(value):
            raise ProjectError(_("{name} is painted in the open scan.").format(name=name))
        self._session.remove_label(value)
        if shown is not None:
            painted = shown.changed
            shown.remove_label(value)
            if not painted:
                shown.mark_saved()
        self.show()

    def take_file(self) -> None:
        """Use a label file as the template's label at once; beside a template, as a further labelled scan's."""
        project, identity = self._session.project, chosen(self._ui.templateCaseBox)
        if project is None or not identity:
            return
        path = Path(self._ui.takeFileEdit.currentPath)
        try:
            reading = self._add(project, identity, path, refuse_doubts=True)
        except DoubtfulLabel as doubt:
            if self._dialogs.choose(_("Take"), str(doubt), [_("Choose another file"), _("It is right: take it")]) != 1:
                return
            reading = self._add(project, identity, path, refuse_doubts=False)
        said = _("The label of {case} is saved. Next: Train.").format(case=identity)
        self._banner.show(" ".join([said, *reading.notes]))
        self._ui.trainSection.collapsed = False
        self.open()

    def _add(self, project: Project, case: str, path: Path, refuse_doubts: bool) -> LabelReading:
        who, role = self._reviewer(), project.role_for_label(case)
        return project.add_label(case, path, role=role, add_labels=True, reviewer=who, refuse_doubts=refuse_doubts)

    def _take(self, found: Drawn) -> None:
        assert self._session.project is not None and self.view is not None, "a case is open"
        project, view = self._session.project, self.view
        known = project.state.labels.values
        painted = self.drawn()
        if painted is not None and any(painted.counts.values()):
            text = _("What is painted in {case} is replaced; Undo in the Segment Editor brings it back.")
            answers = [_("Replace it"), _("Cancel")]
            if self._dialogs.choose(_("Take"), text.format(case=view.files.case), answers, escape=1) != 0:
                return
        self._ui.segmentEditor.saveStateForUndo()
        table = project.update_labels(found.table, known)
        replace_content(view.segmentation, view.scan, found.labels, table)
        self.show()

    def save(self) -> None:
        """Write what is painted as the template's label, a new version; what is missing is said instead."""
        project, view, found = self._session.project, self.view, self.drawn()
        if project is None or view is None or found is None:
            return
        given = project.state.labels
        taken_out = {value for value in given.retired if not found.counts.get(value)}  # an older file still names it
        found = replace(found, table=found.table.without(taken_out))
        changed = view.own_changes(found.table, given.values)
        table = given.updated(changed)
        gaps = template_gaps(found.counts, table, list(found.overlaps))
        may_ask = not found.overlaps and any(found.counts.values())
        absent = ask_absent(self._dialogs, table, found.counts) if may_ask else None
        if absent is None:
            self._ui.templateMissingLabel.text = " ".join(gaps)
            return
        slicer.util.showStatusMessage(_("Saving the template..."))
        require_as_seen(project.refresh().case(view.files.case), view.as_seen)
        table = project.update_labels(changed, given.values)
        with slicer.util.WaitCursor(), written(view.files.case, found.labels, table) as path:
            role = project.role_for_label(view.files.case)
            who, seen = self._reviewer(), view.as_seen
            project.add_label(view.files.case, path, role=role, absent=absent, reviewer=who, seen=seen)
        view.as_seen = project.state.case(view.files.case)
        view.mark_saved()
        self._settle()
        self._saved()
        discard_draft(project, view.files.case, self._reviewer())
        slicer.util.showStatusMessage("")
        self._ui.templateMissingLabel.text = ""
        self._banner.show(_("The label of {case} is saved. Next: Train.").format(case=view.files.case))
        self._ui.trainSection.collapsed = False
        self.show()

    # ------------------------------------------------------------------ show

    def show(self) -> None:
        ui, project = self._ui, self._session.project
        cases = project.state.cases if project is not None else ()
        first = [case for case in cases if case.role is Role.TEMPLATE]
        # what was decided about in the review is opened there
        decided = (Review.ACCEPTED, Review.CORRECTED, Review.DRAFT)
        rest = [one for one in cases if one.role in (Role.UNLABELLED, Role.LABELLED) and one.review not in decided]
        ranking = self._session.ranking()
        places = {one.case: number for number, one in enumerate(ranking)}
        rest.sort(key=lambda case: places.get(case.id, len(places)))
        best = ranking[0].case if ranking and not ranking[0].warning else ""
        advised = {one.case: one for one in ranking}
        entries = [(_entry(case, best, advised.get(case.id)), case.id) for case in [*first, *rest]]
        if fill_box(ui.templateCaseBox, entries):
            for number, (_text, case_id) in enumerate(entries):
                ui.templateCaseBox.setItemData(number, _why(advised.get(case_id)), qt.Qt.ToolTipRole)
        self.show_advice()
        no_project = [] if project is not None else [_("Open or make a project first.")]
        no_case = no_project or ([] if entries else [_("Add scans first.")])
        not_open = no_case or ([] if self.view is not None else [_("Open a scan to paint it.")])
        no_node = [] if ui.takeNodeSelector.currentNode() else [_("Choose a segmentation to take.")]
        no_file = [] if ui.takeFileEdit.currentPath else [_("Name a file to take.")]
        self._show_labels()
        explain(
            ui.labelReasonLabel,
            (ui.openTemplateButton, no_case),
            (ui.addLabelButton, no_project),
            (ui.removeLabelButton, no_project),
            (ui.colorButton, no_project),
        )
        explain(ui.takeReasonLabel, (ui.takeNodeButton, not_open or no_node), (ui.takeFileButton, no_case or no_file))
        explain(ui.templateReasonLabel, (ui.saveTemplateButton, not_open))
        view = self.view
        template = first[0].id if first else _("none yet")
        open_now = _(" Open: {case}.").format(case=view.files.case) if view is not None else ""
        text = _("Template: {template}.").format(template=template) + open_now
        if ui.templateLabel.text != text:
            ui.templateLabel.text = text

    def show_advice(self) -> None:
        """Which scan is recommended and why, and which do not fit: on each tick, as the job goes on."""
        ui, ranking = self._ui, self._session.ranking()
        reasons = self._session.reasons_against_advice()
        ui.adviseButton.enabled = not reasons
        ui.adviseButton.toolTip = " ".join(reasons)
        running = self._session.advice_job is not None and self._session.advice_job.seen.state.active
        lines = []
        if running and self._session.advice_job is not None:
            share = self._session.advice_job.seen.fraction
            lines.append(_("Looking for the best scan to label: {share:.0%}").format(share=share))
        elif ranking and not self._has_template:
            best = ranking[0]
            if best.warning:
                lines.append(_("No scan looks like the others; choose the template yourself."))
            else:
                lines.append(_("Recommended: {case} ({reason}).").format(case=best.case, reason=best.reason))
        odd = [one for one in ranking if one.warning]
        if odd and not running:
            shown = "; ".join(f"{one.case}: {one.warning}" for one in odd[:3])
            more = _(" and {count} more").format(count=len(odd) - 3) if len(odd) > 3 else ""
            lines.append(_("Look at these scans: {shown}{more}").format(shown=shown, more=more))
        say(ui.adviceLabel, "\n".join(lines))

    @property
    def _has_template(self) -> bool:
        project = self._session.project
        return project is not None and bool(project.state.with_role(Role.TEMPLATE))

    def _show_labels(self) -> None:
        rows = [(label.value, label.name, label.color, _meaning(label)) for label in self._table]
        if rows == self._rows:
            return
        table = self._ui.labelTable
        with silent(table):
            table.setRowCount(len(rows))
            for number, (value, name, color, code) in enumerate(rows):
                for column, text in ((_VALUE, str(value)), (_NAME, name), (_COLOR, ""), (_CODE, code)):
                    item = qt.QTableWidgetItem(text)
                    if column != _NAME:
                        item.setFlags(qt.Qt.ItemIsEnabled | qt.Qt.ItemIsSelectable)
                    if column == _COLOR:
                        item.setBackground(qt.QBrush(qt.QColor(*color)))
                    table.setItem(number, column, item)
        self._rows = rows


def _entry(case: Case, best: str, advised: Ranked | None) -> str:
    """A case in the list: its role, or what the advice says of it and how much it looks like the others."""
    if case.role is not Role.UNLABELLED:
        return f"{case.id} ({case.role})"
    if advised is None:
        return case.id
    if advised.warning:
        return _("{case} (does not fit)").format(case=case.id)
    text = _("{case} (recommended, {alike:.2f})") if case.id == best else _("{case} ({alike:.2f})")
    return text.format(case=case.id, alike=advised.centrality)


def _why(advised: Ranked | None) -> str:
    """Why a scan stands where it stands in the list."""
    return "" if advised is None else advised.warning or advised.reason


def _meaning(label: Label) -> str:
    """What a label's terminology says; it is chosen in the Segment Editor and kept when the template is saved."""
    codes = label.terminology or {}
    return " ".join(codes[key]["meaning"] for key in ("modifier", "type", "region") if key in codes)
