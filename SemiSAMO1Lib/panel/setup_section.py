"""Set-up: which Python trains, how it gets what it needs, and the proof that it works. Nothing is asked or fetched on
opening; everything runs beside Slicer, with its output shown and a Cancel button."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from ..files import is_there
from ..job import environment
from ..job.environment import Command, NoPython
from .dialogs import Dialogs
from .settings import Settings
from .widgets import append_lines, chosen, explain, fill_box

OWN, SLICER, OTHER = "own", "slicer", "other"


class SetupSection:
    """The section and the state of the worker's Python.

    Args:
        ui: the panel's widgets.
        settings: remembers Python and probe.
        dialogs: asks once before anything is downloaded.
        resources: folder with requirements.txt and constraints.txt.
        changed: called when the Python or its state changed.
    """

    def __init__(
        self, ui: Any, settings: Settings, dialogs: Dialogs, resources: Path, changed: Callable[[], None]
    ) -> None:
        self._ui, self._settings, self._dialogs, self._resources = ui, settings, dialogs, resources
        self._changed = changed
        self._steps: list[Command] = []
        self._process: Any = None
        self._output = ""
        self._cancelled = False
        ways = [(_("an environment of its own (advised)"), OWN), (_("another Python"), OTHER)]
        if slicer.app.os != "macosx":
            ways.insert(1, (_("Slicer's Python"), SLICER))
        fill_box(ui.setupWayBox, ways)
        ui.setupWayBox.connect("currentIndexChanged(int)", self.show)
        ui.setupPythonEdit.connect("currentPathChanged(QString)", lambda _path: self.show())
        ui.setupButton.connect("clicked(bool)", self.start)
        ui.setupCancelButton.connect("clicked(bool)", self.cancel)
        ui.setupSection.collapsed = self.ready
        self.show()

    # ------------------------------------------------------------------ state

    @property
    def probe(self) -> dict[str, Any]:
        """What the last probe of the worker's Python found; empty before one."""
        found = self._settings.get("probe", {})
        return found if isinstance(found, dict) and is_there(Path(found.get("executable", ""))) else {}

    @property
    def ready(self) -> bool:
        return bool(self.probe.get("ok"))

    @property
    def python(self) -> Path | None:
        """The worker's Python, None before set-up."""
        return Path(self.probe["executable"]) if self.ready else None

    @property
    def running(self) -> bool:
        return self._process is not None

    def reasons(self) -> list[str]:
        """Why nothing can be trained yet."""
        if self.ready:
            return []
        return (
            [_("Set-up is running.")]
            if self.running
            else [_("Set up the training environment first (section Set-up).")]
        )

    def summary(self) -> str:
        """One line: what trains, on what."""
        found = self.probe
        if self.running:
            return self._steps[0].title if self._steps else ""
        if found.get("ok"):
            memory = f", {found['free_bytes'] >> 30} GB free" if "free_bytes" in found else ""
            device = found.get("device_name", found.get("device", ""))
            return _("Ready: PyTorch {torch} on {device}{memory}.").format(
                torch=found.get("torch", ""), device=device, memory=memory
            )
        if "error" in found:
            return _("Not ready: {error}").format(error=found["error"])
        return _("Training needs PyTorch and some packages: {sizes}. Review works without.").format(
            sizes=environment.sizes()
        )

    def show(self) -> None:
        """Bring the section up to date."""
        ui, way = self._ui, chosen(self._ui.setupWayBox)
        ui.setupStatusLabel.text = self.summary()
        ui.setupPythonEdit.visible = way == OTHER
        ui.setupPythonEditLabel_.visible = way == OTHER
        ui.setupButton.text = _("Set up again") if self.ready else _("Set up")
        reasons = [_("Set-up is running.")] if self.running else []
        if way == OTHER and not Path(ui.setupPythonEdit.currentPath or ".").is_file():
            reasons.append(_("Name the Python that shall train."))
        idle = [] if self.running else [_("No set-up is running.")]
        explain(ui.setupReasonLabel, (ui.setupButton, reasons))
        ui.setupCancelButton.enabled, ui.setupCancelButton.toolTip = self.running, " ".join(idle)

    # ------------------------------------------------------------------ run

    def start(self) -> None:
        """Ask once, then run the steps of the chosen way one after the other."""
        ui, way = self._ui, chosen(self._ui.setupWayBox)
        wheels = Path(ui.setupWheelsEdit.currentPath) if ui.setupWheelsEdit.currentPath else None
        try:
            steps, python = self._planned(way or OWN, wheels)
        except NoPython as error:
            ui.setupReasonLabel.text, ui.setupReasonLabel.visible = str(error), True
            return
        if len(steps) > 1:
            source = _("from the folder {folder}").format(folder=wheels) if wheels else _("from the internet (PyPI)")
            text = _("This installs {sizes} {source}. Slicer stays usable meanwhile.").format(
                sizes=environment.sizes(), source=source
            )
            if self._dialogs.choose(_("Set-up"), text, [_("Install"), _("Cancel")], escape=1) != 0:
                return
        if way == SLICER:
            try:
                install_into_slicer(self._resources / "requirements.txt", self._dialogs)
            except Exception as error:  # declined, no PyTorch extension, pip failed: each says what in its own way
                self._end(str(error) or type(error).__name__)
                return
        self._settings.put("python", python)
        self.run(steps)

    def _planned(self, way: str, wheels: Path | None) -> tuple[list[Command], str]:
        files = self._resources / "requirements.txt", self._resources / "constraints.txt"
        if way == OTHER:
            python = self._ui.setupPythonEdit.currentPath
            return [environment.probing(python)], python
        if way == SLICER:
            python = str(environment.this_python())
            return [environment.probing(python)], python
        folder = environment.own_folder()
        python = str(environment.python_of(folder))
        return [*environment.building(folder, *files, wheels), environment.probing(python)], python

    def run(self, steps: list[Command]) -> None:
        """Run commands one after the other beside Slicer; the last one must be a probe."""
        self._steps, self._cancelled = list(steps), False
        self._ui.setupLog.clear()
        self._next()

    def _next(self) -> None:
        step = self._steps[0]
        append_lines(self._ui.setupLog, [f"> {step.title}: {' '.join(step.arguments)}"])
        self._output = ""
        process = self._process = qt.QProcess(self._ui.setupSection)
        process.setProcessChannelMode(qt.QProcess.MergedChannels)
        variables = qt.QProcessEnvironment()
        start_up = slicer.util.startupEnvironment()
        for name, value in environment.clean(start_up, step.arguments[0]).items():
            variables.insert(name, value)
        process.setProcessEnvironment(variables)
        process.connect("readyRead()", self._read)
        process.connect("finished(int,QProcess::ExitStatus)", self._finished)
        process.connect("errorOccurred(QProcess::ProcessError)", self._failed_to_start)
        process.start(step.arguments[0], list(step.arguments[1:]))
        self.show()
        self._changed()

    def _read(self) -> None:
        if self._process is not None:
            text = text_of(self._process.readAll())
            self._output = (self._output + text)[-20_000:]
            append_lines(self._ui.setupLog, [line for line in text.splitlines() if line.strip()])

    def _failed_to_start(self, error: Any) -> None:
        if error == qt.QProcess.FailedToStart and not self._another_try():
            self._end(f"{self._steps[0].arguments[0]} could not be started")

    def _finished(self, code: int) -> None:
        if self._process is None:
            return
        self._read()
        if code != 0 and not self._cancelled and self._another_try():
            return
        step = self._steps.pop(0)
        if self._cancelled:
            self._end(_("Set-up was cancelled."))
        elif self._steps and code == 0:
            self._let_go()
            self._next()
        elif self._steps or "--probe" not in step.arguments:
            lines = [line for line in self._output.splitlines() if line.strip()]
            last = lines[-1] if lines else _("no output")
            self._end(_("{step} failed: {last}").format(step=step.title, last=last))
        else:
            self._probed(step.arguments[0])

    def _another_try(self) -> bool:
        """Try the step in its next way, if it has one."""
        following = self._steps[0].next_try()
        if following is None:
            return False
        self._steps[0] = following
        self._let_go()
        self._next()
        return True

    def _probed(self, python: str) -> None:
        """Take the answer of the probe; the Python that was started counts, not what it calls itself: PythonSlicer is a
        launcher of another program."""
        lines = [line for line in self._output.splitlines() if line.startswith("{")]
        try:
            found = json.loads(lines[-1])
        except (IndexError, ValueError):
            self._end(_("the Python that shall train gave no answer"))
            return
        self._settings.put("probe", {**found, "executable": python})
        self._end("")

    def _let_go(self) -> None:
        """Forget the process; it is deleted later, because we may be inside of one of its signals."""
        process, self._process = self._process, None
        if process is not None:
            process.deleteLater()

    def _end(self, error: str) -> None:
        self._let_go()
        self._steps = []
        if error:
            append_lines(self._ui.setupLog, [error])
            if not self.ready:
                python = self._settings.get("python", "")
                self._settings.put("probe", {"ok": False, "error": error, "executable": python})
        self._ui.setupSection.collapsed = self.ready and not error
        self.show()
        if error:
            self._ui.setupStatusLabel.text = error
        self._changed()

    def cancel(self) -> None:
        """Stop the set-up; it can be started again."""
        if self._process is not None:
            self._cancelled = True
            self._process.kill()

    def close(self) -> None:
        """The panel goes: a set-up that runs is stopped."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.waitForFinished(3000)


def text_of(output: Any) -> str:
    """What a process printed; its bytes come as bytes or as text, as the Qt binding likes."""
    data = output.data()
    return data if isinstance(data, str) else bytes(data).decode("utf-8", errors="replace")


def install_into_slicer(requirements: Path, dialogs: Dialogs) -> None:
    """Put PyTorch and the other packages into Slicer's own Python, by Slicer's ways.

    PyTorch comes from the PyTorch extension, the rest from slicer.packaging: both ask, and show what they do. Where
    Slicer is older, pip_install does neither: the question is ours.

    Raises:
        RuntimeError: the PyTorch extension is not installed, or a person declined.
    """
    try:
        import PyTorchUtils
    except ModuleNotFoundError as error:
        raise RuntimeError(
            _("Slicer's Python gets PyTorch by the extension PyTorch: install it in the Extensions Manager, restart.")
        ) from error
    logic = PyTorchUtils.PyTorchUtilsLogic()
    if not logic.torchInstalled() and logic.installTorch(askConfirmation=True) is None:
        raise RuntimeError(_("PyTorch was not installed."))
    try:
        from slicer import packaging  # nothing else need have imported it
    except ImportError:
        lines = requirements.read_text(encoding="utf-8").splitlines()
        names = ", ".join(line for line in lines if line and not line.startswith("#"))
        text = _("This installs into Slicer's own Python: {names}. Slicer waits meanwhile.").format(names=names)
        if dialogs.choose(_("Set-up"), text, [_("Install"), _("Cancel")], escape=1) != 0:
            raise RuntimeError(_("The packages were not installed.")) from None
        slicer.util.pip_install(["--requirement", str(requirements)])
    else:
        packaging.pip_ensure(packaging.load_requirements(str(requirements)), requester="SemiSAMO1")
