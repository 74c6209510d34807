"""`slicer.mrmlScene`, `slicer.app` and `slicer.modules` on the slicer-core wheel, as the application sets them up.

Only forwarding is written here; scene, nodes, readers, writers and logics are Slicer's own C++ classes. `boot()` gives
a fresh scene; the one before is taken down in the application's order (left to itself it crashes at exit).
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")

import slicer
import slicer.util
from vtkmodules.vtkCommonCore import vtkCollection

#: Module name -> (logic class, name in the application logic). Order as in the application.
LOGICS = {
    "subjecthierarchy": ("vtkSlicerSubjectHierarchyModuleLogic", "SubjectHierarchy"),
    "volumes": ("vtkSlicerVolumesLogic", "Volumes"),
    "terminologies": ("vtkSlicerTerminologiesModuleLogic", "Terminologies"),
    "segmentations": ("vtkSlicerSegmentationsModuleLogic", "Segmentations"),
    "colors": ("vtkSlicerColorLogic", "Colors"),
    "tables": ("vtkSlicerTablesLogic", "Tables"),
}

#: Slice view -> its orientation.
VIEWS = {"Red": "Axial", "Yellow": "Sagittal", "Green": "Coronal"}


class Module:
    """`slicer.modules.<name>`: a name, a logic, a path."""

    def __init__(self, name: str, logic: Any, path: str = "") -> None:
        self.name, self._logic, self.path = name, logic, path

    def logic(self) -> Any:
        return self._logic


class InputOutput:
    """What slicer.util's load and save functions ask of qSlicerCoreIOManager, by the same logics and storage nodes."""

    def __init__(self, application: Application) -> None:
        self._logics = application.logics

    def fileType(self, path: str) -> str:
        name = str(path).lower()
        if name.endswith((".seg.nrrd", ".seg.nhdr")):
            return "SegmentationFile"
        return "SceneFile" if name.endswith((".mrml", ".mrb")) else "VolumeFile"

    def loadNodes(self, kind: str, properties: dict[str, Any], out: Any = None, messages: Any = None) -> bool:
        nodes = {"VolumeFile": self._volume, "SegmentationFile": self._segmentation, "SceneFile": self._scene}[kind](
            properties, messages
        )
        for node in nodes:
            if out is not None:
                out.AddItem(node)
        return bool(nodes)

    def _volume(self, properties: dict[str, Any], _: Any) -> list[Any]:
        path = str(properties["fileName"])
        options = 1 if properties.get("labelmap") else 0
        node = self._logics["volumes"].AddArchetypeVolume(path, properties.get("name") or Path(path).stem, options)
        if node and properties.get("show", True):
            slicer.util.setSliceViewerLayers(background=node)
        return [node] if node else []

    def _segmentation(self, properties: dict[str, Any], messages: Any) -> list[Any]:
        path, name = str(properties["fileName"]), properties.get("name") or ""
        node = self._logics["segmentations"].LoadSegmentationFromFile(path, True, name, None, messages)
        return [node] if node else []

    def _scene(self, properties: dict[str, Any], _: Any) -> list[Any]:
        slicer.mrmlScene.SetURL(str(properties["fileName"]))
        return [slicer.mrmlScene] if slicer.mrmlScene.Import(None) else []

    def fileWriterFileType(self, node: Any, *_: Any) -> str:
        return type(node).__name__

    def saveNodes(self, kind: str, properties: dict[str, Any], messages: Any = None) -> bool:
        path = str(properties["fileName"])
        if kind == "SceneFile":
            slicer.mrmlScene.SetURL(path)
            slicer.mrmlScene.SetRootDirectory(str(Path(path).parent))
            return bool(slicer.mrmlScene.Commit())
        node = slicer.mrmlScene.GetNodeByID(properties["nodeID"])
        if not node.GetStorageNode():
            node.AddDefaultStorageNode()
        node.GetStorageNode().SetFileName(path)
        return bool(node.GetStorageNode().WriteData(node))


class SliceWidget:
    """`slicer.app.layoutManager().sliceWidget(name)`."""

    def __init__(self, logic: Any) -> None:
        self._logic = logic

    def sliceLogic(self) -> Any:
        return self._logic

    def mrmlSliceNode(self) -> Any:
        return self._logic.GetSliceNode()

    def mrmlSliceCompositeNode(self) -> Any:
        return self._logic.GetSliceCompositeNode()


class LayoutManager:
    def __init__(self) -> None:
        self.widgets: dict[str, SliceWidget] = {}

    def sliceViewNames(self) -> list[str]:
        return list(self.widgets)

    def sliceWidget(self, name: str) -> SliceWidget:
        return self.widgets[name]

    def mrmlSliceLogics(self) -> Any:
        return slicer.app.applicationLogic().GetSliceLogics()

    def resetSliceViews(self) -> None:
        for widget in self.widgets.values():
            widget.sliceLogic().FitSliceToBackground()


class Application:
    """`slicer.app`: the scene, the application logic and the module logics."""

    def __init__(self) -> None:
        self.temporaryPath = tempfile.mkdtemp(prefix="slicer-harness-")
        self.scene = slicer.mrmlScene = slicer.vtkMRMLScene()
        self.logic = slicer.vtkSlicerApplicationLogic()
        self.logic.SetHomeDirectory(self.temporaryPath)
        self.logic.SetShareDirectory("share")
        Path(self.logic.GetShareFilePath("ColorFiles")).mkdir(parents=True, exist_ok=True)
        self.logic.SetMRMLScene(self.scene)
        crosshair = slicer.vtkMRMLCrosshairNode()
        crosshair.SetCrosshairName("default")
        self.scene.AddNode(crosshair)
        self.logic.SetSliceLogics(vtkCollection())
        self.logic.SetViewLogics(vtkCollection())
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene, True)
        self.logic.SetTemporaryPath(self.temporaryPath)
        self.logics: dict[str, Any] = {}
        for name, (class_name, title) in LOGICS.items():
            logic = getattr(slicer, class_name)()
            logic.SetMRMLApplicationLogic(self.logic)  # before the scene: the color logic asks for it
            logic.SetMRMLScene(self.scene)
            self.logic.SetModuleLogic(title, logic)
            self.logics[name] = logic
        self.layout, self.files = LayoutManager(), InputOutput(self)
        slicer.modules = types.SimpleNamespace(**{name: Module(name, logic) for name, logic in self.logics.items()})
        for name, orientation in VIEWS.items():
            self._add_view(name, orientation)

    def _add_view(self, name: str, orientation: str) -> None:
        logic = slicer.vtkMRMLSliceLogic()
        logic.SetMRMLApplicationLogic(self.logic)
        logic.SetMRMLScene(self.scene)
        logic.AddSliceNode(name)
        self.logic.GetSliceLogics().AddItem(logic)
        logic.GetSliceNode().SetOrientation(orientation)
        self.layout.widgets[name] = SliceWidget(logic)

    def applicationLogic(self) -> Any:
        return self.logic

    def coreIOManager(self) -> InputOutput:
        return self.files

    def ioManager(self) -> InputOutput:
        return self.files

    def mrmlScene(self) -> Any:
        return self.scene

    def layoutManager(self) -> LayoutManager:
        return self.layout

    def testingEnabled(self) -> bool:
        return True

    def processEvents(self, *_: Any) -> None:
        widgets = sys.modules.get("PySide6.QtWidgets")
        if widgets and widgets.QApplication.instance():
            widgets.QApplication.processEvents()


def boot() -> Application:
    """A fresh application with an empty scene and three slice views."""
    shutdown()
    slicer.app = Application()
    return slicer.app


def shutdown() -> None:
    """Take the application down, scene first."""
    application = slicer.__dict__.pop("app", None)
    if application is None:
        return
    application.scene.Clear(True)
    slicer.modules = slicer.mrmlScene = None
    application.layout.widgets.clear()
    application.logics.clear()
    application.logic = application.scene = None
    gc.collect()
    shutil.rmtree(application.temporaryPath, ignore_errors=True)


atexit.register(shutdown)
