"""SemiSAMO1: label one scan, segment the others. Module, widget's shell, logic for scripts, self-test."""

import sys
from pathlib import Path

import qt
import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

try:
    import SemiSAMO1Lib  # installed beside this file
except ModuleNotFoundError as error:
    if error.name != "SemiSAMO1Lib":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the source tree: the library is a sibling
    import SemiSAMO1Lib

HOMEPAGE = "https://github.com/SemiSAMO1/SlicerSemiSAMO1"


class SemiSAMO1(ScriptedLoadableModule):
    """What Slicer lists; nothing is loaded, asked or fetched here."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("SemiSAMO1")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = []
        parent.contributors = ["The SemiSAMO1 developers"]
        parent.helpText = _(
            "Label one scan of a study; the others are segmented in the background, with maps of uncertainty. "
            'See the <a href="{homepage}">documentation</a>. Research software, not a medical device.'
        ).format(homepage=HOMEPAGE)
        parent.acknowledgementText = _(
            "After SemiSAM-O1, SemiSAM+ and SemiSAM. SAM-Med3D, when it is used, is the work of its authors."
        )


class QuitQuestion(qt.QWidget):
    """Sees Slicer's window being closed and lets the panel ask about a training that is under way."""

    def __init__(self, panel):
        qt.QWidget.__init__(self)
        self._panel = panel

    def eventFilter(self, watched, event):
        if event.type() == qt.QEvent.Close and not self._panel.may_quit():
            event.ignore()
            return True
        return False


class SemiSAMO1Widget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """Loads the .ui file and hands everything to the panel."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.panel = None
        self._quit_question = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        from SemiSAMO1Lib.panel.panel import Panel

        widget = slicer.util.loadUI(self.resourcePath("UI/SemiSAMO1.ui"))
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        widget.setMRMLScene(slicer.mrmlScene)
        self.panel = Panel(self.ui, Path(self.resourcePath("UI")).parent)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, lambda *_args: self.panel.scene_closes())
        self.addObserver(scene, scene.EndCloseEvent, lambda *_args: self.panel.scene_closed())
        self.addObserver(scene, scene.EndImportEvent, lambda *_args: self.panel.scene_imported())
        window = slicer.util.mainWindow()
        if window is not None:
            self._quit_question = QuitQuestion(self.panel)
            window.installEventFilter(self._quit_question)
        slicer.app.connect("aboutToQuit()", self._close_panel)

    def enter(self):
        self.panel.enter()

    def exit(self):
        if self.panel is not None:
            self.panel.leave()

    def cleanup(self):
        window = slicer.util.mainWindow()
        if window is not None and self._quit_question is not None:
            window.removeEventFilter(self._quit_question)
        slicer.app.disconnect("aboutToQuit()", self._close_panel)
        self._close_panel()

    def _close_panel(self):
        """While the window and its views are still there: at the end of Slicer, `cleanup` comes after them."""
        self.removeObservers()
        if self.panel is not None:
            self.panel.close()
            self.panel = None

    def onReload(self):
        """Developer's Reload: the library is read anew with the module."""
        for name in [one for one in sys.modules if one.partition(".")[0] == "SemiSAMO1Lib"]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)


class SemiSAMO1Logic(ScriptedLoadableModuleLogic):
    """Every step for Slicer's Python console, without the panel. What runs in the background has to end before the next
    step: README.md, *Tutorial*, has `wait`.

    >>> logic = SemiSAMO1Logic()
    >>> logic.openProject("/data/study")
    >>> wait(logic.addScans("/data/scans"))
    >>> logic.setTemplate("scan_001", slicer.util.getNode("Segmentation"))
    >>> wait(logic.train(preset="quick"))
    >>> logic.status().state
    >>> logic.showCase(logic.cases()[0])
    """

    def __init__(self, parent=None):
        ScriptedLoadableModuleLogic.__init__(self, parent)
        from SemiSAMO1Lib.panel.settings import Settings
        from SemiSAMO1Lib.project.session import Session

        probe = Settings().get("probe", {})
        self.session = Session()
        self.session.environment = slicer.util.startupEnvironment()
        self.session.python = Path(probe["executable"]) if probe.get("ok") else None
        self._view = None

    def openProject(self, folder):
        """Open a project, or make one in an empty folder; returns it."""
        return self.session.open(Path(folder))

    def addScans(self, folder):
        """Start adding the scans of a folder in the background; returns the job."""
        return self.session.add_folder(Path(folder)).job

    def setTemplate(self, case, labels):
        """Give a case its label: a label file, or a segmentation node that is drawn on the case's scan; returns the
        label's version."""
        from SemiSAMO1Lib.scene import scripting

        return scripting.set_template(self.session.project, case, labels)

    def train(self, preset="standard", device="auto", **parameters):
        """Start a training in the background; returns the job. Further parameters as in the configuration."""
        return self.session.train({"preset": preset, "device": device, **parameters}).job

    def status(self):
        """What the newest training is doing: state, stage, fraction, eta_s, message."""
        self.session.poll()
        return self.session.training.seen if self.session.training is not None else None

    def stop(self):
        """Ask the training to stop; it keeps what it has."""
        self.session.stop_training()

    def resume(self):
        """Go on with a training that was stopped or interrupted; returns the job."""
        return self.session.resume_training().job

    def cases(self):
        """Predicted cases, likely the worst first."""
        return self.session.rated().worst_first()

    def showCase(self, case):
        """Show a predicted case; returns its nodes: scan, segmentation, uncertainty."""
        from SemiSAMO1Lib.scene import scripting

        if self._view is not None:
            self._view.close()
        self._view = scripting.show_prediction(self.session, case)
        return self._view.scan, self._view.segmentation, self._view.uncertainty


class SemiSAMO1Test(ScriptedLoadableModuleTest):
    """Runs in a real Slicer: the scenarios of docs/real-slicer.md, unattended; writes what it found."""

    def runTest(self):
        from SemiSAMO1Lib.panel import self_test

        self.assertEqual(self_test.run(), [])


def registerSampleData():
    """The phantoms in the Sample Data module."""
    from SemiSAMO1Lib.panel import sample

    sample.register(Path(__file__).resolve().parent / "Resources")


if hasattr(slicer, "app") and hasattr(slicer.app, "connect"):
    slicer.app.connect("startupCompleted()", registerSampleData)

__all__ = ["SemiSAMO1", "SemiSAMO1Lib", "SemiSAMO1Logic", "SemiSAMO1Test", "SemiSAMO1Widget"]
