"""A scripted module in the harness: `slicer.app` with Qt, the base classes of modules, loading and opening a module."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

from . import application, pythonqt

QAPPLICATION = pythonqt.install()

import qt
import slicer

from . import widgets

widgets.publish()


class MainWindow(qt.QMainWindow):
    """Slicer's main window, as far as a module sees it."""


class GuiApplication(application.Application):
    """`slicer.app` with the parts of Qt that slicer.util and modules use."""

    os = "linux"

    def __init__(self) -> None:
        super().__init__()
        self.window = MainWindow()
        self.handlers: dict[str, list[Any]] = {"startupCompleted()": [], "aboutToQuit()": []}

    def connect(self, signal: str, function: Any) -> None:
        if signal not in self.handlers:
            raise ValueError(f"the harness has no signal {signal}")
        self.handlers[signal].append(function)

    def disconnect(self, signal: str, function: Any) -> bool:
        known = function in self.handlers[signal]
        if known:
            self.handlers[signal].remove(function)
        return known

    def processEvents(self, *_: Any) -> None:
        QAPPLICATION.processEvents()

    def setOverrideCursor(self, cursor: Any) -> None:
        QAPPLICATION.setOverrideCursor(cursor)

    def restoreOverrideCursor(self) -> None:
        QAPPLICATION.restoreOverrideCursor()

    def startupEnvironment(self) -> Any:
        values = dict(os.environ)
        return types.SimpleNamespace(keys=values.keys, value=values.get)


def boot() -> GuiApplication:
    """A fresh application with a main window; settings live in its temporary folder."""
    application.Application = GuiApplication
    app = application.boot()
    formats, scope = qt.QSettings.Format.IniFormat, qt.QSettings.Scope.UserScope
    qt.QSettings.setPath(formats, scope, app.temporaryPath)
    qt.QSettings().clear()
    slicer.util.mainWindow = lambda verbose=True: app.window
    _base_classes()
    return app


def _base_classes() -> None:
    """slicer.i18n and slicer.ScriptedLoadableModule, which the wheel lacks: what modules use of them, own text."""
    translation = types.ModuleType("slicer.i18n")
    translation.tr = lambda text, context=None: text
    translation.translate = lambda context, text: text
    base = types.ModuleType("slicer.ScriptedLoadableModule")

    class ScriptedLoadableModule:
        def __init__(self, parent: Any) -> None:
            self.parent = parent

    class ScriptedLoadableModuleWidget:
        def __init__(self, parent: Any = None) -> None:
            self.moduleName = type(self).__name__.removesuffix("Widget")
            self.parent, self.layout = parent, parent.layout()

        def resourcePath(self, name: str) -> str:
            return str(Path(slicer.util.modulePath(self.moduleName)).parent / "Resources" / name)

        def setup(self) -> None:
            pass

        def onReload(self) -> None:
            pass

    class ScriptedLoadableModuleLogic:
        def __init__(self, parent: Any = None) -> None:
            self.parent = parent

    class ScriptedLoadableModuleTest(unittest.TestCase):
        def runTest(self) -> None:
            pass

    for one in (
        ScriptedLoadableModule,
        ScriptedLoadableModuleWidget,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
    ):
        setattr(base, one.__name__, one)
    for module in (translation, base):
        sys.modules[module.__name__] = module
        setattr(slicer, module.__name__.partition(".")[2], module)


def load(path: Path) -> Any:
    """Import a module file as Slicer's module factory does; it is `slicer.modules.<name>` then."""
    path = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    parent = types.SimpleNamespace(path=str(path))
    entry = application.Module(path.stem, None, str(path))
    getattr(loaded, path.stem)(parent)
    entry.title = parent.title
    setattr(slicer.modules, path.stem.lower(), entry)
    return loaded


def open_widget(loaded: Any) -> Any:
    """What happens when a person switches to the module for the first time."""
    parent = slicer.qMRMLWidget()
    parent.setLayout(qt.QVBoxLayout())
    parent.setMRMLScene(slicer.mrmlScene)
    widget = getattr(loaded, f"{loaded.__name__}Widget")(parent)
    widget.setup()
    widget.enter()
    return widget


def screenshot(widget: Any, path: Path, width: int = 460) -> None:
    """The panel as a person sees it."""
    widget.parent.resize(width, max(widget.parent.sizeHint().height(), 300))
    widget.parent.show()
    for _ in range(5):
        QAPPLICATION.processEvents()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    widget.parent.grab().save(str(path))
