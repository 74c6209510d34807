"""Stand-ins for the ctk and qMRML widgets that the module uses: same properties, signals and methods, no more.

`Testing/panel/test_adapter.py` compares them with what PythonQt can reach on the real ones (real_api.json, taken from
the headers of Slicer 5.12.3 and CTK).
"""

from __future__ import annotations

import sys
import types
import xml.etree.ElementTree as ElementTree
from typing import Any

import shiboken6
import slicer
from PySide6 import QtCore, QtUiTools, QtWidgets
from PySide6.QtCore import Property, Signal


def _stored(kind: Any, name: str, default: Any, notify: str | None = None, on: str | None = None) -> Property:
    """A Qt property, visible to .ui files, kept in the object."""

    def get(self: Any) -> Any:
        return self.__dict__.setdefault("_values", {}).get(name, default() if callable(default) else default)

    def put(self: Any, value: Any) -> None:
        old = get(self)
        self._values[name] = value
        if on:
            getattr(self, on)(value)
        if notify and old != value:
            getattr(self, notify).emit(value)

    return Property(kind, get, put)


class ctkCollapsibleButton(QtWidgets.QWidget):
    clicked = Signal(bool)
    toggled = Signal(bool)
    contentsCollapsed = Signal(bool)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._header = QtWidgets.QToolButton(self)
        self._header.setToolButtonStyle(QtCore.Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self._header.setArrowType(QtCore.Qt.ArrowType.DownArrow)
        self._header.clicked.connect(self._click)
        self.setContentsMargins(0, 26, 0, 0)

    def _title(self, text: str) -> None:
        self._header.setText(text)

    def _click(self) -> None:
        self.collapsed = not self.collapsed
        self.clicked.emit(not self.collapsed)

    def resizeEvent(self, _: Any) -> None:
        self._header.setGeometry(0, 0, self.width, 24)

    def _fold(self, folded: bool) -> None:
        self._header.setArrowType(QtCore.Qt.ArrowType.RightArrow if folded else QtCore.Qt.ArrowType.DownArrow)
        self.setMaximumHeight(26 if folded else 16_777_215)
        direct = QtCore.Qt.FindChildOption.FindDirectChildrenOnly
        for child in self.findChildren(QtWidgets.QWidget, "", direct):
            if child is not self._header:
                child.setVisible(not folded)
        self.toggled.emit(not folded)

    text = _stored(str, "text", "", on="_title")
    collapsed = _stored(bool, "collapsed", False, "contentsCollapsed", on="_fold")
    flat = _stored(bool, "flat", False)


class ctkPathLineEdit(QtWidgets.QWidget):
    currentPathChanged = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._edit, button = QtWidgets.QLineEdit(), QtWidgets.QToolButton()
        button.setText("...")
        layout.addWidget(self._edit)
        layout.addWidget(button)
        self._edit.textChanged.connect(lambda text: self.currentPathChanged.emit(text))

    currentPath = Property(str, lambda self: self._edit.property("text"), lambda self, v: self._edit.setText(v))
    filters = _stored(int, "filters", 0)
    nameFilters = _stored("QStringList", "nameFilters", list)
    settingKey = _stored(str, "settingKey", "")

    def addCurrentPathToHistory(self) -> None:
        pass


class ctkSliderWidget(QtWidgets.QWidget):
    valueChanged = Signal(float)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._slider, self._box = QtWidgets.QSlider(QtCore.Qt.Orientation.Horizontal), QtWidgets.QDoubleSpinBox()
        self._slider.setRange(0, 1000)
        layout.addWidget(self._slider)
        layout.addWidget(self._box)
        self._box.valueChanged.connect(self._moved)

    def _moved(self, value: float) -> None:
        width = self.maximum - self.minimum
        self._slider.setValue(int(1000 * (value - self.minimum) / width) if width else 0)
        self.valueChanged.emit(value)

    value = Property(float, lambda self: self._box.property("value"), lambda self, v: self._box.setValue(float(v)))
    minimum = Property(
        float, lambda self: self._box.property("minimum"), lambda self, v: self._box.setMinimum(float(v))
    )
    maximum = Property(
        float, lambda self: self._box.property("maximum"), lambda self, v: self._box.setMaximum(float(v))
    )
    singleStep = Property(
        float, lambda self: self._box.property("singleStep"), lambda self, v: self._box.setSingleStep(v)
    )
    decimals = Property(int, lambda self: self._box.property("decimals"), lambda self, v: self._box.setDecimals(int(v)))
    suffix = Property(str, lambda self: self._box.property("suffix"), lambda self, v: self._box.setSuffix(v))


class qMRMLWidget(QtWidgets.QWidget):
    mrmlSceneChanged = Signal("vtkMRMLScene*")

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        """Children that the .ui file connects get the scene, as the connection does in Slicer; others do not."""
        self._scene = scene
        for name in self.__dict__.get("_receivers", ()):
            self.findChild(QtWidgets.QWidget, name).setMRMLScene(scene)


class qMRMLNodeComboBox(QtWidgets.QWidget):
    currentNodeChanged = Signal(object)
    currentNodeIDChanged = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._observed: list[tuple[Any, int]] = []
        self._current: str | None = None
        self._filling = False
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._box = QtWidgets.QComboBox()
        layout.addWidget(self._box)
        self._box.currentIndexChanged.connect(self._picked)

    nodeTypes = _stored("QStringList", "nodeTypes", list, on="_fill")
    noneEnabled = _stored(bool, "noneEnabled", False, on="_fill")
    noneDisplay = _stored(str, "noneDisplay", "None", on="_fill")
    addEnabled = _stored(bool, "addEnabled", True)
    removeEnabled = _stored(bool, "removeEnabled", True)
    renameEnabled = _stored(bool, "renameEnabled", False)
    showHidden = _stored(bool, "showHidden", False)
    showChildNodeTypes = _stored(bool, "showChildNodeTypes", True, on="_fill")

    def setMRMLScene(self, scene: Any) -> None:
        for source, tag in self._observed:
            source.RemoveObserver(tag)
        self._scene = scene
        kinds = slicer.vtkMRMLScene
        events = (kinds.NodeAddedEvent, kinds.NodeRemovedEvent, kinds.EndCloseEvent, kinds.EndImportEvent)
        self._observed = [(scene, scene.AddObserver(int(e), lambda *_: self._fill())) for e in events] if scene else []
        self._fill()

    def mrmlScene(self) -> Any:
        return self._scene

    def _nodes(self) -> list[Any]:
        if self._scene is None or slicer.mrmlScene is None:  # the scene is being taken down
            return []
        nodes = [node for kind in self.nodeTypes for node in slicer.util.getNodesByClass(kind)]
        if not self.showChildNodeTypes:
            nodes = [node for node in nodes if node.GetClassName() in self.nodeTypes]
        return [node for node in nodes if self.showHidden or not node.GetHideFromEditors()]

    def _fill(self, *_: Any) -> None:
        if not shiboken6.isValid(self) or "_box" not in self.__dict__:  # scene events may outlive the widget
            return
        self._filling = True
        self._box.clear()
        if self.noneEnabled:
            self._box.addItem(self.noneDisplay, "")
        identities = []
        for node in self._nodes():
            self._box.addItem(node.GetName(), node.GetID())
            identities.append(node.GetID())
        self._filling = False
        first = None if self.noneEnabled or not identities else identities[0]
        self._set(self._current if self._current in identities else first)

    def _picked(self, index: int) -> None:
        if not self._filling:
            self._set(self._box.itemData(index) or None)

    def _set(self, identity: str | None) -> None:
        self._filling = True
        self._box.setCurrentIndex(self._box.findData(identity or ""))
        self._filling = False
        if identity != self._current:
            self._current = identity
            self.currentNodeChanged.emit(self.currentNode())
            self.currentNodeIDChanged.emit(identity or "")

    def currentNode(self) -> Any:
        return self._scene.GetNodeByID(self._current) if self._scene and self._current else None

    def setCurrentNode(self, node: Any) -> None:
        self._set(node.GetID() if node else None)


class qMRMLSegmentEditorWidget(QtWidgets.QWidget):
    """Remembers what the module told it and in which order; `told` is for the tests."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = QtWidgets.QVBoxLayout(self)
        self._place = QtWidgets.QLabel("Segment Editor")
        self._place.setAlignment(QtCore.Qt.AlignmentFlag.AlignCenter)
        self._place.setFrameShape(QtWidgets.QFrame.Shape.Box)
        self._place.setMinimumHeight(60)
        layout.addWidget(self._place)
        self._scene: Any = None
        self._node: Any = None
        self._told: list[str] = []

    segmentationNodeSelectorVisible = _stored(bool, "segmentationNodeSelectorVisible", True)
    sourceVolumeNodeSelectorVisible = _stored(bool, "sourceVolumeNodeSelectorVisible", True)
    switchToSegmentationsButtonVisible = _stored(bool, "switchToSegmentationsButtonVisible", True)
    maximumNumberOfUndoStates = _stored(int, "maximumNumberOfUndoStates", 0)
    readOnly = _stored(bool, "readOnly", False)

    def setMRMLSegmentEditorNode(self, node: Any) -> None:
        self._told.append("node" if node else "no node")
        self._node = node

    def setMRMLScene(self, scene: Any) -> None:
        self._told.append("scene" if scene else "no scene")
        self._scene = scene

    def setSegmentationNode(self, node: Any) -> None:
        self._node.SetAndObserveSegmentationNode(node)

    def setSourceVolumeNode(self, node: Any) -> None:
        self._node.SetAndObserveSourceVolumeNode(node)

    def setActiveEffectByName(self, name: str) -> None:
        self._told.append(f"effect {name}")
        if self._node is not None:
            self._node.SetActiveEffectName(name)

    def setActiveEffect(self, effect: Any) -> None:
        self._told.append("no effect" if effect is None else "effect")
        if self._node is not None and effect is None:
            self._node.SetActiveEffectName("")

    def saveStateForUndo(self) -> None:
        self._told.append("undo state")

    def setupViewObservations(self) -> None:
        self._told.append("observe views")

    def removeViewObservations(self) -> None:
        self._told.append("leave views")

    def installKeyboardShortcuts(self) -> None:
        self._told.append("keys")

    def uninstallKeyboardShortcuts(self) -> None:
        self._told.append("no keys")


CTK = {one.__name__: one for one in (ctkCollapsibleButton, ctkPathLineEdit, ctkSliderWidget)}
QMRML = {one.__name__: one for one in (qMRMLWidget, qMRMLNodeComboBox, qMRMLSegmentEditorWidget)}


class UiLoader(QtUiTools.QUiLoader):
    """Loads .ui files with the stand-ins; scene connections of the file are kept for `qMRMLWidget.setMRMLScene`."""

    def __init__(self) -> None:
        super().__init__()
        for one in (*CTK.values(), *QMRML.values()):
            self.registerCustomWidget(one)

    def load(self, device: Any, parent: Any = None) -> Any:
        root = ElementTree.fromstring(bytes(device.readAll().data()))
        receivers = []
        for connections in root.iter("connections"):
            for one in list(connections):
                if one.findtext("signal", "").startswith("mrmlSceneChanged"):
                    receivers.append(one.findtext("receiver"))
                    connections.remove(one)
        named = {widget.get("class") or "" for widget in root.iter("widget")}
        if unknown := {name for name in named if name.startswith(("ctk", "qMRML"))} - {*CTK, *QMRML}:
            raise NotImplementedError(f"no stand-in for {sorted(unknown)}")
        buffer = QtCore.QBuffer()
        buffer.setData(ElementTree.tostring(root))
        buffer.open(QtCore.QIODevice.OpenModeFlag.ReadOnly)
        widget = super().load(buffer, parent)
        widget._receivers = receivers
        return widget


def publish() -> None:
    """Make the stand-ins known as `ctk` and `slicer.qMRML...`."""
    ctk = types.ModuleType("ctk")
    ctk.__dict__.update(CTK)
    sys.modules["ctk"] = ctk
    sys.modules["qt"].QUiLoader = UiLoader
    for name, one in QMRML.items():
        setattr(slicer, name, one)
