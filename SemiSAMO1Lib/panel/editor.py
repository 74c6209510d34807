"""The one embedded Segment Editor: its own node, set before the scene; bound to one segmentation and scan at a time."""

from __future__ import annotations

from typing import Any

import slicer

#: Undo keeps this much memory at most, bytes.
UNDO_BYTES = 1 << 30


class Editor:
    """Binds the editor widget to the open case; leaves the views alone whenever the module is not shown."""

    def __init__(self, widget: Any) -> None:
        self._widget = widget
        self._node: Any = None
        self._entered = False
        widget.segmentationNodeSelectorVisible = False
        widget.sourceVolumeNodeSelectorVisible = False
        widget.switchToSegmentationsButtonVisible = False
        widget.readOnly = True
        self.make()

    def make(self) -> None:
        """Give the editor a node of its own; needed again after the scene was closed."""
        node = slicer.vtkMRMLSegmentEditorNode()
        node.SetSaveWithScene(False)
        node.SetOverwriteMode(slicer.vtkMRMLSegmentEditorNode.OverwriteAllSegments)
        self._node = slicer.mrmlScene.AddNode(node)
        self._widget.setMRMLSegmentEditorNode(self._node)
        self._widget.setMRMLScene(slicer.mrmlScene)

    def edit(self, segmentation: Any, scan: Any) -> None:
        """Edit a segmentation on a scan; the scan's grid is the segmentation's before the first stroke."""
        self.rest()
        if self._node is None or self._node.GetScene() is None:
            self.make()
        segmentation.SetReferenceImageGeometryParameterFromVolumeNode(scan)
        voxels = scan.GetImageData().GetNumberOfPoints()
        self._widget.maximumNumberOfUndoStates = max(1, min(10, UNDO_BYTES // max(1, voxels)))
        self._widget.setSegmentationNode(segmentation)
        self._widget.setSourceVolumeNode(scan)
        self._widget.readOnly = False
        if self._entered:
            self.enter()

    def release(self) -> None:
        """Let go of what is edited: the case changes, or the scene goes."""
        self.rest()
        self._widget.readOnly = True  # its hidden selector may choose a segmentation of the scene by itself
        if self._node is not None and self._node.GetScene() is not None:
            self._widget.setSegmentationNode(None)
            self._widget.setSourceVolumeNode(None)

    def rest(self) -> None:
        """Put the tool down: its timers and observers must not fire into another case."""
        self._widget.setActiveEffect(None)

    def enter(self) -> None:
        self._entered = True
        self._widget.setupViewObservations()
        self._widget.installKeyboardShortcuts()

    def leave(self) -> None:
        """The module is left: no tool, no observers in the views, no keys."""
        self._entered = False
        self.rest()
        self._widget.removeViewObservations()
        self._widget.uninstallKeyboardShortcuts()

    def scene_closes(self) -> None:
        self.rest()
        self._widget.readOnly = True
        self._widget.removeViewObservations()
        self._node = None

    def scene_closed(self) -> None:
        self.make()
        if self._entered:
            self.enter()

    def close(self) -> None:
        """The panel goes for good."""
        self.leave()
        self._widget.setMRMLSegmentEditorNode(None)
        self._widget.setMRMLScene(None)
        if self._node is not None and self._node.GetScene() is not None:
            slicer.mrmlScene.RemoveNode(self._node)
        self._node = None
