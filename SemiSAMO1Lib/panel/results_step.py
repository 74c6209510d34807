"""Step 4: any predicted case with its segments and its uncertainty, worst first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from ..project.label_table import LabelTable
from ..project.session import Session
from ..scene.case_view import CaseFiles, CaseView
from .banner import Banner
from .widgets import choose, chosen, explain, fill_box, guarded, say


class ResultsStep:
    """Choose a case, see it, find where it is uncertain.

    Args:
        ui, session, banner: of the panel.
        show_case: opens a case in the scene and the editor; returns its view.
        open_case: the view that is open now, or None.
    """

    def __init__(
        self,
        ui: Any,
        session: Session,
        banner: Banner,
        show_case: Callable[[CaseFiles, LabelTable], CaseView],
        open_case: Callable[[], CaseView | None],
    ) -> None:
        self._ui, self._session = ui, session
        self._show_case, self._open_case = show_case, open_case
        self._predicted: dict[str, dict[str, Any]] = {}
        self._training: str | None = None
        guard = guarded(banner.show)
        self._guard = guard
        ui.resultCaseBox.connect("activated(int)", guard(self.open))
        ui.previousButton.connect("clicked(bool)", guard(lambda: self.step(-1)))
        ui.nextButton.connect("clicked(bool)", guard(lambda: self.step(1)))
        ui.uncertaintyCheckBox.connect("toggled(bool)", self.show_overlay)
        ui.opacitySlider.connect("valueChanged(double)", self.show_overlay)
        ui.thresholdSlider.connect("valueChanged(double)", self.show_overlay)
        ui.jumpButton.connect("clicked(bool)", guard(self.jump))
        self.look_again()

    # ------------------------------------------------------------------ which cases

    def look_again(self) -> None:
        """Read the results of the current training anew; the open case stays as it is."""
        self._predicted = self._session.predicted()
        project = self._session.project
        self._training = project.state.current_training if project is not None else None
        entries = []
        for case in self._session.worst_first():
            value = self._predicted[case]["scores"]["label_uncertainty"]
            shown = _("nothing found") if value is None else f"{100 * value:.0f} %"
            entries.append((f"{case}  ({shown})", case))
        fill_box(self._ui.resultCaseBox, entries)
        self.show()

    @property
    def training(self) -> str | None:
        """The training whose results are listed."""
        return self._training

    def order(self) -> list[str]:
        """Cases in the order of the list."""
        return [self._ui.resultCaseBox.itemData(n) for n in range(self._ui.resultCaseBox.count)]

    @property
    def view(self) -> CaseView | None:
        """The prediction that is open, if any."""
        view = self._open_case()
        return view if view is not None and view.files.training and view.scan is not None else None

    # ------------------------------------------------------------------ actions

    def step(self, by: int) -> None:
        """Go to the next or the previous case of the list."""
        box = self._ui.resultCaseBox
        place = box.currentIndex + by if self.view is not None else box.currentIndex
        if 0 <= place < box.count:
            choose(box, box.itemData(place))
            self.open()

    def open(self) -> None:
        """Show the chosen case: scan, prediction, uncertainty, at its most uncertain place."""
        project, identity = self._session.project, chosen(self._ui.resultCaseBox)
        if project is None or not identity:
            return
        row = self._predicted[identity]
        folder: Path = row["folder"]
        case = project.state.case(identity)
        files = CaseFiles(
            identity,
            row["training"],
            project.image_path(case),
            folder / row["prediction"],
            folder / row["uncertainty"],
        )
        with slicer.util.WaitCursor():
            self._show_case(files, project.state.labels)
        self.show_overlay()
        view = self.view
        if view is not None:
            view.jump_to_most_uncertain(self._ui.thresholdSlider.value)
        self.show()

    def show_overlay(self) -> None:
        ui, view = self._ui, self.view
        if view is not None:
            view.show_uncertainty(ui.uncertaintyCheckBox.checked, ui.opacitySlider.value, ui.thresholdSlider.value)

    def toggle_overlay(self) -> None:
        """The key for on and off."""
        self._ui.uncertaintyCheckBox.checked = not self._ui.uncertaintyCheckBox.checked

    def jump(self) -> None:
        view = self.view
        if view is not None and not view.jump_to_most_uncertain(self._ui.thresholdSlider.value):
            say(self._ui.resultReasonLabel, _("Nothing in this case is that uncertain."))

    # ------------------------------------------------------------------ show

    def show(self) -> None:
        ui = self._ui
        none = [] if self._predicted else [_("There are no predictions yet. Train first.")]
        box = ui.resultCaseBox
        opened = self.view is not None
        last = opened and box.currentIndex + 1 >= box.count
        first = box.currentIndex <= 0
        explain(
            ui.caseReasonLabel,
            (ui.nextButton, none or ([_("This was the last case.")] if last else [])),
            (ui.previousButton, none or ([_("This is the first case.")] if first and opened else [])),
        )
        explain(ui.resultReasonLabel, (ui.jumpButton, none or ([] if opened else [_("Open a case first.")])))
        for widget in (ui.uncertaintyCheckBox, ui.opacitySlider, ui.thresholdSlider):
            widget.enabled = opened
        text = self._scores() if opened else ""
        if ui.resultLabel.text != text:
            ui.resultLabel.text = text

    def _scores(self) -> str:
        view, project = self.view, self._session.project
        if view is None or project is None or view.files.case not in self._predicted:
            return ""
        row = self._predicted[view.files.case]
        lines = [_("Predicted by {training}; not checked by a person.").format(training=row["training"])]
        for value, scores in row["scores"]["labels"].items():
            doubt = "–" if scores["uncertainty"] is None else f"{100 * scores['uncertainty']:.0f} %"
            name = project.state.labels.name_of(int(value))
            lines.append(
                _("{name}: {ml:.2f} ml, uncertainty {doubt}").format(name=name, ml=scores["volume_ml"], doubt=doubt)
            )
        return "\n".join(lines)
