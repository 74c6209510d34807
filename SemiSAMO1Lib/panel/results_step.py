"""Step 4: the queue. Each predicted case with its segments and its uncertainty, the worst first, and what to decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import slicer
from slicer.i18n import tr as _

from ..project import Case, Label, Project, ProjectError, Review, Role, reviews
from ..project.drafts import find_draft
from ..project.history import decided_by, decisions, unreadable_lines
from ..project.label_table import LabelTable
from ..project.label_writer import written
from ..project.queue import Waiting, lets_through
from ..project.results import Quality, asked_about, changes, predictions
from ..project.session import Session, in_sentences
from ..quality import ENOUGH
from ..quality import level as level_of
from ..scene.case_view import CaseFiles, CaseView
from ..scene.segmentations import show_status
from .banner import Banner
from .dialogs import Dialogs, ask_absent
from .widgets import choose, chosen, explain, fill_box, guarded, say


class ResultsStep:
    """Choose a case, see it, find where it is uncertain.

    Args:
        ui, session, banner, dialogs: of the panel.
        reviewer: the person's name.
        show_case: opens a case in the scene and the editor; returns its view.
        open_case: the view that is open now, or None.
        settle: waits for a draft that is being written.
        saved: what was painted in the open case is its label, or is not wanted: nothing else keeps it any more.
        renew: closes the open case, with its painting kept, and lists the predictions that count now.
    """

    def __init__(
        self,
        ui: Any,
        session: Session,
        banner: Banner,
        dialogs: Dialogs,
        reviewer: Callable[[], str | None],
        show_case: Callable[[CaseFiles, LabelTable], CaseView],
        open_case: Callable[[], CaseView | None],
        settle: Callable[[], None],
        saved: Callable[[], None],
        renew: Callable[[], None],
    ) -> None:
        self._ui, self._session, self._dialogs, self._reviewer = ui, session, dialogs, reviewer
        self._show_case, self._open_case, self._renew = show_case, open_case, renew
        self._settle, self._saved = settle, saved
        self._predicted: dict[str, dict[str, Any]] = {}
        self._order: list[str] = []
        self._made: tuple[str, int, int] | None = None
        self._decided_here: list[Case] = []
        self._came_by_itself = False
        self._rated = Quality({}, 0.0, 0)
        guard = guarded(banner.show)
        fill_box(ui.filterBox, [(text, name) for name, text in filters().items()])
        ui.filterBox.connect("currentIndexChanged(int)", guard(self.refresh))
        ui.resultCaseBox.connect("activated(int)", guard(self.open))
        ui.trainingBox.connect("activated(int)", guard(self.use_training))
        ui.previousButton.connect("clicked(bool)", guard(lambda: self.step(-1)))
        ui.nextButton.connect("clicked(bool)", guard(lambda: self.step(1)))
        ui.uncertaintyCheckBox.connect("toggled(bool)", self.show_overlay)
        ui.opacitySlider.connect("valueChanged(double)", self.show_overlay)
        ui.thresholdSlider.connect("valueChanged(double)", self.show_overlay)
        ui.jumpButton.connect("clicked(bool)", guard(self.jump))
        ui.acceptButton.connect("clicked(bool)", guard(self.accept))
        ui.correctButton.connect("clicked(bool)", guard(self.correct))
        ui.rejectButton.connect("clicked(bool)", guard(lambda: self._decide(reviews.reject)))
        ui.skipButton.connect("clicked(bool)", guard(lambda: self._decide(reviews.skip)))
        ui.undoButton.connect("clicked(bool)", guard(self.undo))
        self.look_again()

    # ------------------------------------------------------------------ which cases

    def look_again(self) -> None:
        """Read the results of the current training anew; the open case stays as it is."""
        self._made = self._session.made
        self._predicted = self._session.predicted()
        self._decided_here = []
        waiting = [one.case for one in self._waiting()]
        self._order = list(dict.fromkeys([*waiting, *self._rating().worst_first()]))
        self._list_cases()
        self.list_trainings()

    def list_trainings(self) -> None:
        """The trainings to choose from, stopped ones too; nothing to be seen where there is no choice."""
        ui, past = self._ui, self._session.past_trainings()
        text = _("{name}, {begun}, round {round}")
        fill_box(ui.trainingBox, [(text.format(**vars(one)), one.name) for one in past])
        choose(ui.trainingBox, self.training or "")
        ui.trainingBox.visible = ui.trainingBoxLabel_.visible = any(one.name != self.training for one in past)
        self.show()

    def refresh(self) -> None:
        """Decisions were made, here or by somebody else: the list says them; its order stays."""
        self._list_cases()
        self.show()

    def _list_cases(self) -> None:
        """The cases that the filter lets through, in the order in which they were offered; at the end those that were
        reviewed and are not predicted any more."""
        project, rated = self._session.project, self._rating()
        cases = project.state.cases if project is not None else ()
        states = {case.id: case.review for case in cases}
        left_out = {case.id for case in cases if case.role is Role.EXCLUDED}
        reviewed = self._reviewed()
        waiting = {one.case: one.random for one in self._waiting()}
        wanted = chosen(self._ui.filterBox) or "all"
        open_now = self.view.files.case if self.view is not None else None
        entries = []
        for case in [*(one for one in self._order if one in rated.estimates), *reviewed]:
            estimate, state = rated.estimates.get(case), states.get(case, Review.NOT_SEEN)
            level = estimate.level if estimate is not None else ""
            to_decide = case in waiting or state == Review.DRAFT
            if case != open_now and (case in left_out or not lets_through(wanted, level, state, to_decide)):
                continue
            marks = [_("drawn at random")] if waiting.get(case) else []
            if estimate is not None:
                marks.insert(0, _("nothing found") if estimate.likely is None else _level(level))
            shown = f"  ({', '.join(marks)})" if marks else ""
            decided = "" if state == Review.NOT_SEEN else f"  {state}"
            entries.append((f"{case}{shown}{decided}", case))
        fill_box(self._ui.resultCaseBox, entries)

    def _rating(self) -> Quality:
        """Of the predictions that are listed; new ones come with `look_again`."""
        if self._session.made == self._made:
            self._rated = self._session.rated()
        return self._rated

    def _waiting(self) -> list[Waiting]:
        return self._session.waiting() if self._session.made == self._made else []

    def _reviewed(self) -> list[str]:
        """Cases that a person accepted, corrected or paints on, and that the current training did not predict; also
        those of which such a decision was taken back and painting is left, or that are open."""
        project, kept = self._session.project, (Review.ACCEPTED, Review.CORRECTED, Review.DRAFT)
        if project is None:
            return []
        touched, view = decisions(project), self.view
        open_now = view.files.case if view is not None else None
        cases = [
            one for one in project.state.with_role(Role.LABELLED, Role.UNLABELLED) if one.id not in self._predicted
        ]
        return [
            case.id
            for case in cases
            if case.review in kept
            or case.id == open_now
            or (case.id in touched and find_draft(project, case.id) is not None)
        ]

    @property
    def made(self) -> tuple[str, int, int] | None:
        """The predictions that are listed, as `Session.made`."""
        return self._made

    @property
    def training(self) -> str | None:
        """The training whose results are listed."""
        return self._made[0] if self._made is not None else None

    def order(self) -> list[str]:
        """Cases in the order of the list."""
        return [self._ui.resultCaseBox.itemData(n) for n in range(self._ui.resultCaseBox.count)]

    @property
    def view(self) -> CaseView | None:
        """The case that is open to be reviewed, if any."""
        view = self._open_case()
        return view if view is not None and view.files.review and view.scan is not None else None

    # ------------------------------------------------------------------ actions

    def step(self, by: int) -> None:
        """Go to the next or the previous case of the list."""
        box = self._ui.resultCaseBox
        place = box.currentIndex + by if self.view is not None else box.currentIndex
        if 0 <= place < box.count:
            choose(box, box.itemData(place))
            self.open()

    def open(self) -> None:
        """Show the chosen case: scan, label or else prediction, uncertainty, at its most uncertain place."""
        if identity := chosen(self._ui.resultCaseBox):
            self._came_by_itself = False
            try:
                self._open(identity)
            except Exception:
                if (view := self.view) is not None:  # what is decided about is what the list names
                    choose(self._ui.resultCaseBox, view.files.case)
                raise

    def _open(self, identity: str) -> None:
        project = self._session.project
        if project is None:
            return
        project.refresh()
        files = CaseFiles.for_review(project, identity, self._predicted.get(identity))
        with slicer.util.WaitCursor():
            self._show_case(files, project.state.labels)
        self.show_overlay()
        view = self.view
        if view is not None:
            view.jump_to_most_uncertain(self._ui.thresholdSlider.value)
        self.show()

    def use_training(self) -> None:
        """Let the chosen training's predictions count instead of the current one's; what was decided about these stays,
        and what of them was rejected."""
        name = chosen(self._ui.trainingBox)
        if name is not None and name != self.training:
            self._session.use_training(name)
            self._renew()

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

    # ------------------------------------------------------------------ decisions

    def accept(self) -> None:
        """The prediction becomes the case's label; labels that it lacks must be declared absent."""
        project, view = self._session.project, self.view
        if project is None or view is None:
            return
        _require_seen(project, view)
        with slicer.util.WaitCursor():
            found = view.drawn(project.state.labels)
        asked = asked_about(project, view.files.case, view.files.training or None)
        table = project.state.labels.without(set(project.state.labels.values) - asked)
        absent = ask_absent(self._dialogs, table, found.counts)
        if absent is not None:
            case, who, training = view.files.case, self._reviewer(), view.files.training
            with slicer.util.WaitCursor():
                view.as_seen = reviews.accept(project, case, absent, who, training, view.as_seen)
            self._decided()

    def correct(self) -> None:
        """What a person painted becomes the case's label."""
        project, view = self._session.project, self.view
        if project is None or view is None:
            return
        with slicer.util.WaitCursor():
            found = view.drawn(project.state.labels)
        if found.overlaps:
            raise ProjectError(" ".join(in_sentences(found.overlaps)))
        known = project.state.labels.values
        new = [label for label in found.table if label.value not in known and found.counts.get(label.value)]
        if new and not self._may_add(new):
            return
        # an empty segment that somebody added by the way is no label
        changed = [one for one in view.own_changes(found.table, known) if one.value in known or one in new]
        table = project.state.labels.updated(changed)
        # neither is one that was added after the training: unless it was painted, it is unknown here
        began = view.files.began
        asked = asked_about(project, view.files.case, began.training or project.state.current_training)
        later = {value for value in known if value not in asked and not found.counts.get(value)}
        table = table.without(later)
        absent = ask_absent(self._dialogs, table, found.counts)
        if absent is None:
            return
        self._settle()
        case, who = view.files.case, self._reviewer()
        with slicer.util.WaitCursor(), written(case, found.labels, table) as path:
            if project.refresh().case(case).review in (Review.ACCEPTED, Review.CORRECTED):  # reopened by painting
                view.as_seen = reviews.begin_draft(project, case, who, view.as_seen)
            # painted over this very scan: there is no doubt whose it is
            view.as_seen = reviews.correct(
                project, case, path, absent, who, bool(new), True, began, view.as_seen, given=known
            )
        view.mark_saved()
        self._saved()
        if changed:
            project.update_labels(changed, known)
        self._decided()

    def _may_add(self, new: Sequence[Label]) -> bool:
        """Ask whether segments that the project does not know are to be labels of it."""
        names = ", ".join(label.name for label in new)
        text = _("{names}: no label of this project. A new label is unknown in all other labelled scans.")
        answers = [_("Go back"), _("Add it to the labels")]
        return self._dialogs.choose(_("Labels"), text.format(names=names), answers) == 1

    def _decide(self, action: Callable[..., Case]) -> None:
        project, view = self._session.project, self.view
        if project is not None and view is not None:
            _require_seen(project, view)
            view.as_seen = action(project, view.files.case, self._reviewer(), view.files.training, view.as_seen)
            self._decided()

    def undo(self) -> None:
        """Take the last decision about the open case back, else the last one that was made here: a decision opens the
        next case. What was painted and not saved is discarded, if wanted."""
        project, view = self._session.project, self.view
        if project is not None and view is not None and self._is_untouched(view):
            view = self._open_decided(self._decided_here.pop())
        if project is not None and view is not None:
            painted = view.changed or find_draft(project, view.files.case) is not None
            rejected = project.refresh().case(view.files.case).review == Review.REJECTED
            if painted and not rejected:
                text = _("What was painted in {case} is not saved. Discard it?").format(case=view.files.case)
                if self._dialogs.choose(_("Undo"), text, [_("Keep it"), _("Discard it")]) == 1:
                    self._settle()
                    view.mark_saved()
                    self._saved()
                    reviews.discard_draft(project, view.files.case, self._reviewer(), view.as_seen)
                    self._open(view.files.case)
                    self.refresh()
                return
            case = view.as_seen = reviews.undo(project, view.files.case, self._reviewer(), view.as_seen)
            self._decided_here = [one for one in self._decided_here if one.id != case.id]
            if painted and find_draft(project, case.id) is not None:  # the painting of what was rejected goes on
                case = view.as_seen = reviews.begin_draft(project, case.id, self._reviewer(), case)
            show_status(view.segmentation, case.review)
            if not painted and find_draft(project, case.id) is not None:  # the painting of a correction
                self._open(case.id)
            self.refresh()

    def _is_untouched(self, view: CaseView) -> bool:
        """Whether a decision opened this case, or nothing was decided about it, and nothing was done with it since."""
        project = self._session.project
        if project is None or not self._decided_here or view.changed:
            return False
        new = project.state.case(view.files.case).review == Review.NOT_SEEN
        return self._came_by_itself or (new and find_draft(project, view.files.case) is None)

    def _open_decided(self, decided: Case) -> CaseView | None:
        """Open a case again to take back what was decided about it here, if nobody decided otherwise since."""
        self._came_by_itself = False
        self._open(decided.id)
        self._list_cases()
        choose(self._ui.resultCaseBox, decided.id)
        self.show()
        if self.view is not None:
            self.view.as_seen = decided
        return self.view

    def _decided(self) -> None:
        """Show the next case that waits."""
        done = self.view.files.case if self.view is not None else ""
        if self.view is not None and self.view.as_seen is not None:
            self._decided_here = [*(one for one in self._decided_here if one.id != done), self.view.as_seen]
        self._list_cases()
        listed = set(self.order())
        following = [one.case for one in self._waiting() if one.case != done and one.case in listed]
        if following:
            choose(self._ui.resultCaseBox, following[0])
            self.open()
            self._came_by_itself = True
        elif self.view is not None and self.view.as_seen is not None:  # it stays open
            show_status(self.view.segmentation, self.view.as_seen.review)
        self._list_cases()
        self.show()

    def _reasons_against_deciding(self) -> tuple[list[str], list[str], list[str], list[str]]:
        """Why the open case cannot be accepted, corrected, rejected or skipped, and undone."""
        project, view = self._session.project, self.view
        if project is None or view is None:
            closed = [_("Open a case first.")]
            return closed, closed, closed, closed
        case = project.state.case(view.files.case)
        now = case.review
        decided = [_("This case is {state}; take that back first.").format(state=now.replace("_", " "))]
        painted = [_("You painted changes: save them with Correct, or discard them.")]
        nothing = [_("Nothing was painted.")]
        new = now in (Review.NOT_SEEN, Review.SKIPPED)
        if case.role is Role.EXCLUDED:
            left_out = [_("This case was left out; take it in again first.")]
            return left_out, left_out, left_out, left_out
        if new and case.role is Role.LABELLED:
            decided, new = [_("A person labelled it already.")], False
        elif new and (going := self._session.predicting) is not None:
            text = _("{training} goes on and predicts this case anew; decide when it has ended, or stop it.")
            decided, new = [text.format(training=going)], False
        elif new and case.id not in self._predicted:
            decided, new = [_("The current training did not predict this case.")], False
        changed = view.changed or find_draft(project, case.id) is not None
        # painting reopens what was accepted or corrected
        may_correct = bool({Review.CORRECTED, Review.DRAFT} & reviews.TRANSITIONS[now])
        return (
            (painted if changed else []) if new else decided,
            ([] if changed else nothing) if may_correct else decided,
            (painted if changed else []) if new else decided,
            [] if self._decided_here or now is not Review.NOT_SEEN or changed else [_("Nothing was decided yet.")],
        )

    # ------------------------------------------------------------------ show

    def show_decisions(self) -> None:
        """Buttons of the review: on each tick, because painting changes them."""
        ui = self._ui
        against_accepting, against_correcting, against_others, against_undoing = self._reasons_against_deciding()
        explain(
            ui.reviewReasonLabel,
            (ui.acceptButton, against_accepting),
            (ui.correctButton, against_correcting),
            (ui.rejectButton, against_others),
            (ui.skipButton, against_others),
            (ui.undoButton, against_undoing),
        )

    def show(self) -> None:
        ui = self._ui
        box = ui.resultCaseBox
        none = [] if self._predicted or box.count else [self._why_empty()]
        opened = self.view is not None
        last = opened and box.currentIndex + 1 >= box.count
        first = box.currentIndex <= 0
        explain(
            ui.caseReasonLabel,
            (ui.nextButton, none or ([_("This was the last case.")] if last else [])),
            (ui.previousButton, none or ([_("This is the first case.")] if first and opened else [])),
        )
        explain(ui.resultReasonLabel, (ui.jumpButton, none or ([] if opened else [_("Open a case first.")])))
        self.show_decisions()
        for widget in (ui.uncertaintyCheckBox, ui.opacitySlider, ui.thresholdSlider):
            widget.enabled = opened
        text = self._scores() if opened else ""
        if ui.resultLabel.text != text:
            ui.resultLabel.text = text
        say(ui.standingLabel, self._standing())

    def _why_empty(self) -> str:
        if self._ui.trainingBox.count:
            return _("No training's predictions count; choose one, or train again.")
        return _("There are no predictions yet. Train first.")

    def _standing(self) -> str:
        """How good the predictions are, what to do next, and what the last training learned of reviewed cases."""
        project = self._session.project
        found, said = self._session.standing()
        if project is None or said is None:
            return ""
        lines = []
        if found is not None:
            if found.of_all:
                text = _("Mean Dice of what was seen {mean:.3f}, from all {cases} cases. ")
            else:
                text = _(
                    "Mean Dice of what was seen {mean:.3f} (95 %: {low:.3f} to {high:.3f}), from {reviewed} of {cases} "
                    "cases, at random. "
                )
            text = text.format(**vars(found))
            lines.append(text + _("An accepted prediction counts 1, a rejected one 0."))
        verdict = {"enough": _("Enough"), "train": _("Train again"), "review": _("Go on")}[said.verdict]
        lines.append(f"{verdict}: {said.reason}.")
        learned = changes(project)
        if learned:
            shown = "; ".join(one.in_words for one in learned[:3])
            more = _(" and {count} more").format(count=len(learned) - 3) if len(learned) > 3 else ""
            lines.append(_("Reviewed before, predicted anew: {shown}{more}").format(shown=shown, more=more))
        if damaged := unreadable_lines(project):
            lines.append(_("{n} lines of the project's reviews cannot be read; they are left out.").format(n=damaged))
        rated = self._session.rated()
        if not rated.checked:
            text = _("Likely quality is not yet checked on your scans: {n} of {enough} are reviewed.")
            lines.append(text.format(n=rated.reviewed, enough=ENOUGH))
        return "\n".join(lines)

    def _scores(self) -> str:
        view, project = self.view, self._session.project
        if view is None or project is None:
            return ""
        row = self._predicted.get(view.files.case)
        case = project.state.case(view.files.case)
        checked = _("not checked by a person") if case.review == Review.NOT_SEEN else case.review.replace("_", " ")
        checked += decided_by(project, case)
        if row is None:
            not_predicted = _("The current training did not predict this case.")
            if case.label_version is None:
                return not_predicted
            return _("A person's label; {state}.").format(state=checked) + " " + not_predicted
        lines = [_("Predicted by {training}; {checked}.").format(training=row["training"], checked=checked)]
        rated = self._rating()
        estimate = rated.estimates[view.files.case]
        likely = _level(estimate.level)
        if rated.checked and estimate.likely is not None:
            likely += _(", Dice {likely:.2f} ± {error:.2f}").format(likely=estimate.likely, error=rated.error)
        lines.append(_("Likely quality: {likely}").format(likely=likely))
        for value, scores in row["scores"].get("labels", {}).items():  # an older program wrote no labels
            doubt, volume = scores.get("uncertainty"), scores.get("volume_ml")
            said = [_("{ml:.2f} ml").format(ml=volume)] if volume is not None else []
            said += [_("uncertainty {share:.0%}").format(share=doubt)] if doubt is not None else []
            if rated.checked and int(value) in estimate.labels:
                said.append(_("likely quality {likely}").format(likely=_level(level_of(estimate.labels[int(value)]))))
            lines.append(f"{project.state.labels.name_of(int(value))}: {', '.join(said)}")
        return "\n".join(lines)


def _require_seen(project: Project, view: CaseView) -> None:
    """Raise ProjectError where a training went on since the case was opened: its next round is another prediction."""
    row, seen = predictions(project).get(view.files.case), view.files.prediction
    if row is not None and seen is not None and row["prediction"] != seen:
        raise ProjectError(_("{case} was predicted anew; look at that one first.").format(case=view.files.case))


def filters() -> dict[str, str]:
    """Name (`FILTERS` of the queue) -> its words."""
    return {
        "all": _("all cases"),
        "waiting": _("waiting for a decision"),
        "low": _("likely quality low"),
        "draft": _("drafts"),
        "skipped": _("skipped"),
        "accepted": _("accepted"),
        "corrected": _("corrected"),
        "rejected": _("rejected"),
    }


def _level(level: str) -> str:
    return {"low": _("low"), "medium": _("medium"), "high": _("high")}[level]
