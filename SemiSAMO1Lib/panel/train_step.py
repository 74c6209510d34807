"""Step 3: train in the background, watch it, stop it, go on with it; nothing here waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import slicer
from slicer.i18n import tr as _

from ..choices import GENERALISTS, LEARNERS, PRESETS
from ..job import State
from ..job.launcher import RanElsewhere
from ..project.estimate import estimate_seconds, in_words
from ..project.session import Session, Watched, ended_in_words, training_parameters
from ..project.training import LAST
from ..scene.curves import LossPlot
from .banner import Banner
from .dialogs import Dialogs
from .widgets import Rows, append_lines, choose, chosen, explain, fill_box, guarded

#: Points of the loss curves; more are thinned out.
MOST_POINTS = 2000


class TrainStep:
    """Train, Stop, Resume, progress, log, curves.

    Args:
        ui, session, banner, dialogs: of the panel.
        set_up_reasons: why the environment cannot train yet.
        probe: what the probe of the worker's Python found.
        finished: called when a training has finished.
        broken_off: called when one has ended in another way.
    """

    def __init__(
        self,
        ui: Any,
        session: Session,
        banner: Banner,
        dialogs: Dialogs,
        set_up_reasons: Callable[[], list[str]],
        probe: Callable[[], dict[str, Any]],
        finished: Callable[[], None],
        broken_off: Callable[[], None],
    ) -> None:
        self._ui, self._session, self._banner, self._dialogs = ui, session, banner, dialogs
        self._set_up_reasons, self._probe = set_up_reasons, probe
        self._finished, self._broken_off = finished, broken_off
        self._watched: Watched | None = None
        self._last_state: State | None = None
        self._losses: list[dict[str, Any]] = []
        self._scores: dict[int, tuple[str, ...]] = {}
        self._plot: LossPlot | None = None
        self._estimated: tuple[Any, ...] | None = None
        self._rounds = Rows(ui.roundsTable, [_("round"), _("cases"), _("mean uncertainty, %")])
        guard = guarded(banner.show)
        fill_box(ui.presetBox, [(name, name) for name in PRESETS])
        choose(ui.presetBox, "standard")
        fill_box(ui.learnerBox, [(text, name) for name, text in LEARNERS.items()])
        fill_box(ui.generalistBox, [(text, name) for name, text in GENERALISTS.items()])
        ui.trainButton.connect("clicked(bool)", guard(self.train))
        ui.stopButton.connect("clicked(bool)", guard(self.stop))
        ui.resumeButton.connect("clicked(bool)", guard(self.resume))
        ui.curvesButton.connect("clicked(bool)", guard(self.show_curves))
        self.show()

    # ------------------------------------------------------------------ actions

    def train(self) -> None:
        ui = self._ui
        changes = {
            "rounds": ui.roundsBox.value or None,
            "iterations": ui.iterationsBox.value or None,
            "seed": ui.seedBox.value,
        }
        parameters = training_parameters(
            chosen(ui.presetBox) or "standard",
            chosen(ui.deviceBox) or "auto",
            chosen(ui.learnerBox) or "mean_teacher",
            chosen(ui.generalistBox) or "registration",
            changes,
        )
        if ui.continueCheckBox.checked:
            parameters["continue_from"] = LAST
        with slicer.util.WaitCursor():  # labels are read once more, and copied
            self._session.train(parameters)
        self._banner.show(_("Training has begun. You may close Slicer; training goes on."))
        self.show()

    def stop(self) -> None:
        """Ask it to stop; one that does not answer may be ended at once, after a question."""
        watched = self._session.training
        if watched is None:
            return
        silent_here = watched.seen.state is State.NOT_RESPONDING and watched.seen.here
        if silent_here or watched.seen.state is State.STOPPING:
            answers = [_("Wait"), _("End it now")]
            text = _("The training stops at the next safe point. Ending it now loses at most the last seconds.")
            if silent_here:
                text = _("The training does not answer. Ended now, it can be resumed from its last checkpoint.")
            if self._dialogs.choose(_("Stop"), text, answers) == 1:
                self._session.end_training()
        else:
            self._session.stop_training()
        self.show()

    def resume(self) -> None:
        try:
            self._session.resume_training()
        except RanElsewhere as error:
            answers = [_("Leave it"), _("It has surely ended there: take it over")]
            if self._dialogs.choose(_("Resume"), str(error), answers) != 1:
                return
            self._session.resume_training(elsewhere=True)
        self._banner.show(_("Training goes on. You may close Slicer; training goes on."))
        self.show()

    def show_curves(self) -> None:
        """Draw the losses as a plot of Slicer and show it beside the views; the layout changes now, and not again."""
        if not self._losses:
            return
        if self._plot is None:
            assert self._watched is not None, "losses belong to a training"
            self._plot = LossPlot(self._watched.job.id)
        self._draw()
        plots = getattr(slicer.modules, "plots", None)
        if plots is not None:
            plots.logic().ShowChartInLayout(self._plot.chart)

    def _draw(self) -> None:
        if self._plot is not None:
            step = max(1, len(self._losses) // MOST_POINTS)
            self._plot.show(self._losses[::step])

    def forget(self) -> None:
        """Another project was opened: its training is a new one."""
        self._watched, self._last_state, self._losses, self._scores = None, None, [], {}
        if self._plot is not None:
            self._plot.close()
            self._plot = None
        self._rounds.show([])
        self._ui.trainLog.clear()

    # ------------------------------------------------------------------ show

    def tick(self) -> None:
        """Take in what the session has newly read of the training."""
        watched = self._session.training
        if watched is not self._watched:
            self.forget()
            self._watched = watched
            self._last_state = watched.seen.state if watched is not None else None
        if watched is not None:
            events, log = watched.take()
            losses = [event for event in events if event["kind"] == "losses"]
            self._losses += losses
            if len(self._losses) > 4 * MOST_POINTS:
                self._losses = self._losses[::2]
            append_lines(self._ui.trainLog, log)
            self._take_in_rounds(events)
            if losses:
                self._draw()
            self._notice_the_end(watched)
        self.show()

    def _notice_the_end(self, watched: Watched) -> None:
        state = watched.seen.state
        if state is self._last_state:
            return
        was_active = self._last_state is not None and self._last_state.active
        self._last_state = state
        if state is State.FINISHED and was_active:
            self._finished()
        elif was_active and not state.active:
            self._banner.show(ended_in_words(watched))
            self._broken_off()

    def show(self) -> None:
        ui, session = self._ui, self._session
        self._show_devices()
        self._show_estimate()
        reasons = self._set_up_reasons() + session.reasons_against_training()
        explain(ui.trainReasonLabel, (ui.trainButton, reasons))
        watched = session.training
        active = session.busy
        idle = [] if active else [_("No training is under way.")]
        against = self._set_up_reasons() + session.reasons_against_resuming()
        explain(ui.stopReasonLabel, (ui.stopButton, idle), (ui.resumeButton, against))
        explain(ui.curvesReasonLabel, (ui.curvesButton, [] if self._losses else [_("There are no losses yet.")]))
        ui.trainBar.visible = active
        if watched is None:
            text = ""
        elif active:
            ui.trainBar.value = round(1000 * watched.seen.fraction)
            left = (
                _(", {time} left").format(time=in_words(watched.seen.eta_s)) if watched.seen.eta_s is not None else ""
            )
            text = f"{watched.job.id}: {watched.seen.state}, {watched.seen.stage}{left}".replace("_", " ")
            if watched.seen.message:
                text += f". {watched.seen.message}"
        else:
            text = f"{watched.job.id}: {ended_in_words(watched)}"
        if ui.trainStageLabel.text != text:
            ui.trainStageLabel.text = text

    def _show_devices(self) -> None:
        entries = [(_("choose by itself"), "auto")]
        for one in self._probe().get("devices", [{"name": "cpu"}]):
            if "free_bytes" in one:
                text = _("{title}, {free} of {total} GB were free at set-up").format(
                    title=one["title"], free=one["free_bytes"] >> 30, total=one["total_bytes"] >> 30
                )
            else:
                text = _("CPU") if one["name"] == "cpu" else one["name"]
            entries.append((text, one["name"]))
        fill_box(self._ui.deviceBox, entries)

    def _show_estimate(self) -> None:
        ui, project = self._ui, self._session.project
        probe = self._probe()
        other = chosen(ui.deviceBox) not in (None, "auto", probe.get("device"))
        step_s = None if other else probe.get("step_s")  # only the probed device was measured
        preset = chosen(ui.presetBox) or "standard"
        changes = ui.roundsBox.value or None, ui.iterationsBox.value or None
        revision = (project.folder, project.state.revision) if project is not None else None
        asked = (revision, preset, step_s, *changes)
        if asked == self._estimated:
            return
        self._estimated = asked
        scans = [case.geometry for case in project.state.cases] if project is not None else []
        on_gpu = probe.get("device", "cpu") != "cpu"
        seconds = estimate_seconds(scans, preset, step_s, *changes, on_gpu=on_gpu)
        unknown = _("not measured on this device") if other else in_words(seconds)
        ui.estimateLabel.text = unknown if scans else _("add scans first")

    def _take_in_rounds(self, events: list[dict[str, Any]]) -> None:
        """The mean uncertainty of each finished round; round 0 is the carried label before any training."""
        for event in events:
            if event["kind"] == "round":
                doubt = event.get("label_uncertainty")
                shown = "–" if doubt is None else f"{100 * doubt:.0f}"
                title = str(event["round"]) if event["round"] else _("0 (before training)")
                self._scores[event["round"]] = (title, str(event["cases"]), shown)
        self._rounds.show([self._scores[number] for number in sorted(self._scores)])
