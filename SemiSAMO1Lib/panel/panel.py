"""The whole panel: the steps, the one open case, the clock that looks at the jobs, and the way out of Slicer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from ..job import observe
from ..job.watch import trainings
from ..project import Review, Role, reviews
from ..project.advisor import Ranked
from ..project.drafts import began_from, by_whom, drafts_put_aside, find_draft, overlaps_of
from ..project.history import decided_by
from ..project.label_table import LabelTable
from ..project.session import Session, ended_in_words
from ..scene.case_view import CaseFiles, CaseView
from ..scene.nodes import sweep_hierarchy
from ..scene.segmentations import show_status
from . import sample
from .banner import Banner
from .dialogs import Dialogs
from .draft_keeper import DraftKeeper
from .editor import Editor
from .export_step import ExportStep
from .moved_scans import MovedScans
from .project_step import ProjectStep
from .results_step import ResultsStep
from .settings import Settings
from .setup_section import SetupSection
from .template_step import TemplateStep
from .train_step import TrainStep
from .widgets import guarded

#: Time between two looks at the jobs, ms.
TICK_MS = 1000

#: Keys of ours: Ctrl+Shift, so that neither Slicer's nor the Segment Editor's are taken.
KEYS = {
    "next": "Ctrl+Shift+N",
    "previous": "Ctrl+Shift+B",
    "uncertainty": "Ctrl+Shift+U",
    "jump": "Ctrl+Shift+J",
    "undo": "Ctrl+Shift+T",
}


class Panel:
    """Made once per module widget.

    Args:
        ui: the widgets of SemiSAMO1.ui, by name.
        resources: the module's Resources folder.
        dialogs: asks a person.
    """

    def __init__(self, ui: Any, resources: Path, dialogs: Dialogs | None = None) -> None:
        self.ui, self.resources = ui, Path(resources)
        self.dialogs = dialogs or Dialogs()
        self.settings, self.session = Settings(), Session()
        self.view: CaseView | None = None
        self._offered: tuple[str, int, int] | None = None
        self._told_unreadable: set[str] = set()
        self._away = False
        self._advised: list[Ranked] = []
        self.banner = Banner(ui)
        self.setup = SetupSection(ui, self.settings, self.dialogs, self.resources, self._python_changed)
        self.session.python = self.setup.python
        self.session.environment = slicer.util.startupEnvironment()
        self.editor = Editor(ui.segmentEditor)
        self.drafts = DraftKeeper(lambda: self.view, lambda: self.session.project, reviewer)
        self.project = ProjectStep(
            ui,
            self.session,
            self.settings,
            self.banner,
            self.close_case,
            self._opened,
            self._sample,
            lambda: self.view.nodes if self.view is not None else [],
        )
        shown = (self.show_case, lambda: self.view)
        kept = (self.drafts.settle, self.drafts.forget_rescue_of_open_case)
        self.template = TemplateStep(ui, self.session, self.banner, self.dialogs, *shown, reviewer, *kept)
        self.train = TrainStep(
            ui,
            self.session,
            self.banner,
            self.dialogs,
            self.setup.reasons,
            lambda: self.setup.probe,
            self._trained,
            self._broken_off,
        )
        renew = self._take_new_predictions
        self.results = ResultsStep(ui, self.session, self.banner, self.dialogs, reviewer, *shown, *kept, renew)
        self.export = ExportStep(ui, self.session, self.banner, self.dialogs)
        self.moved = MovedScans(ui, self.banner, self.dialogs, lambda: self.session.project, self._show_all)
        self._keys = self._make_keys()
        for view in (ui.setupLog, ui.trainLog):
            view.visible = False
        self._fold()
        self._timer = qt.QTimer()
        self._timer.setInterval(TICK_MS)
        self._timer.connect("timeout()", self.tick)

    # ------------------------------------------------------------------ module life

    def enter(self) -> None:
        """The module is shown: look at the jobs, give the editor its views."""
        self.editor.enter()
        for key in self._keys:
            key.enabled = True
        self._away = False
        self._timer.start()
        self.tick()
        if self.session.project is None:
            self._tell_of_recent()

    def leave(self) -> None:
        """Another module is shown: no keys, no tool; a training goes on by itself. An open case may be painted there
        too: its drafts go on."""
        self.editor.leave()
        self._keep_work_or_say()
        for key in self._keys:
            key.enabled = False
        self._away = True
        if self.view is None:
            self._timer.stop()

    def scene_closes(self) -> None:
        """Nobody can hold that up: what cannot be kept in the project now is kept beside it."""
        self.editor.rest()
        if lost := self._keep_work_or_say():
            self.banner.show(" ".join([lost, self.drafts.rescue()]))
        self.editor.scene_closes()
        if self.view is not None:
            self.view.close()
            self.view = None

    def scene_closed(self) -> None:
        self.editor.scene_closed()
        self._show_all()

    def scene_imported(self) -> None:
        """A saved scene was opened: it may name cases that were open when it was saved."""
        sweep_hierarchy()

    def close(self) -> None:
        """The panel goes for good. Jobs are separate processes: they are not touched."""
        self.leave()
        self._timer.stop()
        self.setup.close()
        if self._keep_work_or_say():
            self.drafts.rescue()
        if self.view is not None:
            self.view.mark_saved()
        self.close_case()
        self.drafts.close()
        self.moved.close()
        self.train.forget()
        self.editor.close()
        for key in self._keys:
            key.setParent(None)
            key.deleteLater()
        self._keys = []

    # ------------------------------------------------------------------ the open case

    def show_case(self, files: CaseFiles, table: LabelTable) -> CaseView:
        """Open a case in the scene in place of the one that is open, and bind the editor to it.

        Painting of it that was not finished is brought back, and said.
        """
        return self._show_case(files, table)

    def _show_case(self, files: CaseFiles, table: LabelTable, anyway: bool = False) -> CaseView:
        """The same; `anyway`: bring back what was kept on this computer also where somebody decided meanwhile."""
        self.close_case()
        slicer.util.showStatusMessage(_("Loading {case}...").format(case=files.case))
        project = self.session.project
        draft = find_draft(project, files.case) if project is not None else None
        # later than any draft: the next one could not be written
        rescued = self.drafts.rescued(files.case)
        brought = rescued is not None and (anyway or not rescued.overtaken)
        if brought and rescued is not None:
            shown = replace(files, label=rescued.file, began=rescued.began)
        elif draft is not None and project is not None:
            began = began_from(project, project.state.case(files.case))
            shown = replace(files, label=draft, began=began or files.began)
        else:
            shown = files
        self.view = CaseView(shown, table)
        self.drafts.rescued_is_shown(files.case, rescued.file if brought and rescued is not None else None)
        if brought and rescued is not None:
            self.view.mark_painted()
            text = _("Painting of {case} that could not be kept in the project was brought back from {file}.")
            shown_text = text.format(case=files.case, file=rescued.file)
            self.banner.show(shown_text, _("Discard it"), partial(self._discard_rescued, files, table))
        elif rescued is not None and project is not None:
            case = project.state.case(files.case)
            text = _(
                "Painting of {case} of {time} could not be kept in the project. Meanwhile the case is {state}{who}."
            )
            state = case.review.replace("_", " ")
            told = text.format(case=case.id, time=rescued.time[:16], state=state, who=decided_by(project, case))
            self.banner.show(told, _("Bring it back"), partial(self._bring_back, files, table))
        elif project is not None and draft is not None:
            case = project.state.case(files.case)
            who = by_whom(project, files.case, reviewer())
            text = _("Unfinished painting of {case}{who} was brought back.").format(case=files.case, who=who)
            if case.review in (Review.ACCEPTED, Review.CORRECTED, Review.REJECTED):
                decided = _(" The case is {state}{by}.")
                text += decided.format(state=case.review, by=decided_by(project, case))
            for one, other, count in overlaps_of(project, files.case):
                lost = _(" {one} and {other} shared {count} voxels; {other} has them.")
                text += lost.format(one=one, other=other, count=count)
            if others := drafts_put_aside(project, files.case):
                names = ", ".join(one.name for one in others)
                text += _(" Other people's is put aside in {folder}: {names}.").format(
                    folder=others[0].parent, names=names
                )
            self.banner.show(text, _("Discard it"), partial(self._discard, files, table))
        slicer.util.showStatusMessage("")
        if self.session.project is not None:
            case = self.session.project.state.case(files.case)
            saved = case.role is Role.TEMPLATE and case.label_version is not None
            show_status(self.view.segmentation, "accepted" if saved else case.review)
            self.view.as_seen = case
        self.editor.edit(self.view.segmentation, self.view.scan)
        self.ui.editorSection.collapsed = files.review
        return self.view

    def keep_work(self) -> None:
        """Write what was painted and not saved as the case's draft: nothing is lost when the case is closed."""
        self.drafts.flush()

    def _keep_work_or_say(self) -> str:
        """The same where nothing can be held up any more: why it could not be kept, else nothing."""
        try:
            self.keep_work()
        except (RuntimeError, ValueError, OSError) as error:
            name = self.view.files.case if self.view is not None else ""
            text = _("What was painted in {case} could not be kept: {error}").format(case=name, error=error)
            self.banner.show(text)
            return text
        return ""

    def _bring_back(self, files: CaseFiles, table: LabelTable) -> None:
        """Offered where somebody decided about a case while its painting was kept on this computer."""
        view = self.view
        if view is not None and view.files.case == files.case and self.drafts.rescued(files.case) is not None:
            self._show_case(files, table, anyway=True)
            self._show_all()

    def _discard_rescued(self, files: CaseFiles, table: LabelTable) -> None:
        """Offered when such painting was brought back: the case is shown as the project has it."""
        view = self.view
        if view is None or view.files.case != files.case or self.drafts.rescued(files.case) is None:
            return
        self.drafts.forget_rescue(files.case)
        view.mark_saved()
        self.show_case(files, table)
        self._show_all()

    def _discard(self, files: CaseFiles, table: LabelTable) -> None:
        """Offered when a draft was brought back; another case may be open since then, or the draft saved."""
        project, view = self.session.project, self.view
        if project is None or view is None or view.files.case != files.case or find_draft(project, files.case) is None:
            return
        self.drafts.settle()
        self.drafts.forget_rescue(files.case)
        case = reviews.discard_draft(project, files.case, reviewer(), view.as_seen)
        view.mark_saved()
        label = project.label_path(case) if case.label_version is not None else None
        began = began_from(project, case) or files.predicted
        self.show_case(replace(files, label=label, began=began), table)
        self._show_all()

    def close_case(self) -> None:
        """Close the open case, its painting kept; where that cannot be, a person may still leave it.

        Raises what stood against it, where the person would rather go back.
        """
        self.editor.rest()
        try:
            self.keep_work()
        except (RuntimeError, ValueError, OSError) as error:
            text = _("What was painted in {case} could not be kept: {error}")
            shown = text.format(case=self.view.files.case if self.view is not None else "", error=error)
            if self.dialogs.choose(_("Close"), shown, [_("Go back to it"), _("Close it, and lose it")]) != 1:
                raise
        self.editor.release()
        if self.view is not None:
            self.view.close()
            self.view = None

    # ------------------------------------------------------------------ the clock

    def tick(self) -> None:
        """Look at project and jobs, take in a little, show it."""
        try:
            self.drafts.tick()
        except (RuntimeError, ValueError, OSError) as error:
            self._say_once(str(error))
        if self._away:
            return
        try:
            self.moved.tick()
            changed = self.session.poll()
            self.train.tick()
            self.project.show()
            self._show_new_advice()
            self.results.show_decisions()
            self.export.show()
            self._tell_of_unreadable()
            if changed:
                self.template.show()
                self.results.refresh()
            self._offer_new_predictions()
        except (RuntimeError, ValueError, OSError) as error:  # damaged, locked or gone while it is open
            self._say_once(str(error))

    def _tell_of_unreadable(self) -> None:
        """Jobs that are left aside because their files cannot be read; each is told of once."""
        unreadable = self.session.unreadable
        if new := [job for job in unreadable if job not in self._told_unreadable]:
            text = _("{jobs} cannot be read, and is left aside: {reason}")
            self._say_once(text.format(jobs=", ".join(new), reason=unreadable[new[0]]))
        self._told_unreadable = set(unreadable)

    def _say_once(self, text: str) -> None:
        if self.banner.text != text:
            self.banner.show(text)

    def _show_new_advice(self) -> None:
        """A ranking that has come in orders the list of scans to label; on other ticks its progress is shown."""
        ranking = self.session.ranking()
        if ranking != self._advised:
            self._advised = list(ranking)
            self.template.show()
        else:
            self.template.show_advice()

    def _offer_new_predictions(self) -> None:
        """A finished training never replaces what is on the screen: it is offered."""
        newest = self.session.made
        if newest is None or newest in (self.results.made, self._offered):
            return
        self._offered = newest
        if self.results.view is None:
            self.results.look_again()
        else:
            text = _("New predictions of {training} are there.").format(training=newest[0])
            self.banner.show(text, _("Show them"), self._take_new_predictions)

    def _take_new_predictions(self) -> None:
        self._offered = None
        self.close_case()
        self.results.look_again()

    def _broken_off(self) -> None:
        """A training was stopped, or ended by an error: the rounds that it completed may be chosen."""
        self.results.list_trainings()

    def _trained(self) -> None:
        text, missed = _("The training is finished."), self.session.left_out()
        if missed:
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(missed.items())[:3])
            more = _(" and {count} more").format(count=len(missed) - 3) if len(missed) > 3 else ""
            text += _(" Left out: {shown}{more}").format(shown=shown, more=more)
        self.banner.show(text, _("Show the results"), self._take_new_predictions)
        self.ui.resultsSection.collapsed = False

    # ------------------------------------------------------------------ what happened

    def _opened(self) -> None:
        """A project was opened: nothing of the one before stays; jobs are found again."""
        self.close_case()
        self.train.forget()
        self._offered = None
        self.banner.hide()
        self.results.look_again()
        for step in (self.project, self.template, self.train, self.export):  # the results are shown already
            step.show()
        self._fold()
        self._tell_of_jobs()
        self.moved.tell()

    def _tell_of_recent(self) -> None:
        """No project is open: a banner for a training of a recent one that runs, or that ended since it was seen."""
        for folder in self.settings.recent:
            try:
                text = self._of_training(Path(folder))
            except (OSError, ValueError):  # it cannot be read: opening it says why
                continue
            if text:
                again = partial(self.project.open, Path(folder))
                self.banner.show(text, _("Open {name}").format(name=Path(folder).name), again)
                return

    def _of_training(self, folder: Path) -> str:
        """What is new of a project's training; empty for nothing."""
        found = trainings(folder / "jobs")
        if not found:
            return ""
        if observe(found[-1]).state.active:
            return _("A training of {name} is under way.").format(name=folder.name)
        if self.settings.get("seen", {}).get(str(folder)) != found[-1].id:
            return _("A training of {name} has ended.").format(name=folder.name)
        return ""

    def _tell_of_jobs(self) -> None:
        """A banner for a training that runs, or that ended since the project was last open."""
        project, watched = self.session.project, self.session.training
        if project is None:
            return
        seen = self.settings.get("seen", {})
        known = seen.get(str(project.folder.resolve()))
        if watched is not None and watched.seen.state.active:
            self.banner.show(_("{job} is under way.").format(job=watched.job.id))
        elif watched is not None and watched.job.id != known:
            self.banner.show(ended_in_words(watched))
        if watched is not None and not watched.seen.state.active:
            self.settings.put("seen", {**seen, str(project.folder.resolve()): watched.job.id})

    def _python_changed(self) -> None:
        self.session.python = self.setup.python
        self.train.show()

    def _fold(self) -> None:
        """Open the sections that come next for a person, fold the others."""
        project = self.session.project
        labelled = project is not None and bool(project.state.with_role(Role.TEMPLATE))
        self.ui.templateSection.collapsed = project is None or labelled
        self.ui.trainSection.collapsed = not labelled
        self.ui.resultsSection.collapsed = not self.session.predicted()
        self.ui.exportSection.collapsed = True
        self.ui.editorSection.collapsed = True

    def _show_all(self) -> None:
        try:
            for step in (self.project, self.template, self.train, self.results, self.export):
                step.show()
        except (RuntimeError, ValueError, OSError) as error:  # the project is away: a scene is closed all the same
            self._say_once(str(error))

    def _sample(self) -> Path:
        return sample.unpack(self.resources / "Sample" / "phantoms.zip", sample.place())

    # ------------------------------------------------------------------ keys and the way out

    def _undo(self) -> None:
        """The key does what the button does, and nothing where that has a reason against it."""
        self.results.show_decisions()
        if self.ui.undoButton.enabled:
            self.results.undo()

    def _make_keys(self) -> list[Any]:
        """Shortcuts that work only while the module is shown."""
        window = slicer.util.mainWindow()
        actions = {
            "next": lambda: self.results.step(1),
            "previous": lambda: self.results.step(-1),
            "uncertainty": self.results.toggle_overlay,
            "jump": self.results.jump,
            "undo": self._undo,
        }
        keys = []
        taken = {one.shortcut.toString() for one in window.findChildren(qt.QAction)} if window is not None else set()
        for name, sequence in KEYS.items():
            if window is None or sequence in taken:  # a person's own key, or another extension's, stays theirs
                continue
            key = qt.QShortcut(qt.QKeySequence(sequence), window)
            key.enabled = False
            key.connect("activated()", guarded(self.banner.show)(actions[name]))
            keys.append(key)
        return keys

    def may_quit(self) -> bool:
        """Asked when Slicer is about to be closed; False keeps it open."""
        self.editor.rest()
        if lost := self._keep_work_or_say():
            said = self.drafts.rescue()
            answers = [_("Go back to it"), _("Quit")]
            if self.dialogs.choose(_("Quit"), " ".join([lost, said]), answers) != 1:
                return False
        if self.session.project is None or not self._training_runs():
            self._put_case_away()
            return True
        text = _("A training is under way. It goes on without Slicer, and is found again when Slicer is opened.")
        answers = [_("Keep training"), _("Stop it and keep what is done"), _("Cancel")]
        answer = self.dialogs.choose(_("Training"), text, answers, escape=2)
        if answer == 1:
            self.session.stop_training()
        if answer != 2:
            self._put_case_away()
        return answer != 2

    def _put_case_away(self) -> None:
        """Slicer is about to be closed, and asks a person about nodes that were changed: ours are kept already, or a
        person was told where they are."""
        if self.view is None:
            return
        if self.view.changed and not self.view.unkept:
            text = _("What was painted in {case} is kept; it is brought back when the case is opened.")
            self.banner.show(text.format(case=self.view.files.case))
        self.view.mark_saved()
        self.close_case()
        self._show_all()

    def _training_runs(self) -> bool:
        with suppress(RuntimeError, ValueError, OSError):  # away: what was last known of it counts
            self.session.poll()
        return self.session.busy


def reviewer() -> str | None:
    """The person's name in Slicer's user information; None where there is none: then the account's name counts."""
    information = getattr(slicer.app, "applicationLogic", lambda: None)()
    user = information.GetUserInformation() if information is not None else None
    name = user.GetName() if user is not None and hasattr(user, "GetName") else ""
    return name or None
