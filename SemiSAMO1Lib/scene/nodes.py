"""Nodes of ours: never saved with a person's scene, never with a file of the project behind them, removed whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slicer
import vtk

#: Attribute that marks the nodes which this program made.
MARK = "SemiSAMO1"


def own(node: Any) -> Any:
    """Mark a node as ours: a person's scene neither saves it nor knows the file that it came from.

    Its storage node stays, without a path: it remembers that the node is as it was read, so that Slicer does not ask a
    person to save a scan that nobody changed.
    """
    storage = node.GetStorageNode() if hasattr(node, "GetStorageNode") else None
    if storage is not None:
        storage.SetFileName("")
        storage.SetSaveWithScene(False)
    node.SetAttribute(MARK, "1")
    node.SetSaveWithScene(False)
    for number in range(node.GetNumberOfDisplayNodes() if hasattr(node, "GetNumberOfDisplayNodes") else 0):
        node.GetNthDisplayNode(number).SetSaveWithScene(False)
    return node


def is_own(node: Any) -> bool:
    return node.GetAttribute(MARK) == "1"


def remove(node: Any) -> None:
    """Take a node of ours out of the scene, with what only served it; anything else is left alone."""
    if node is None or not is_own(node) or slicer.mrmlScene.GetNodeByID(node.GetID() or "") is not node:
        return
    servants = [node.GetStorageNode()] if hasattr(node, "GetStorageNode") else []
    if hasattr(node, "GetNumberOfDisplayNodes"):
        servants += [node.GetNthDisplayNode(n) for n in range(node.GetNumberOfDisplayNodes())]
    slicer.mrmlScene.RemoveNode(node)
    for servant in servants:
        if servant is not None and slicer.mrmlScene.IsNodePresent(servant):
            slicer.mrmlScene.RemoveNode(servant)


def forget_file(path: Path) -> None:
    """Remove the storage nodes that a failed reading of a file left in the scene."""
    nodes = slicer.util.getNodesByClass("vtkMRMLStorageNode")
    for node in nodes:
        if node.GetFileName() == str(path):
            slicer.mrmlScene.RemoveNode(node)


def group(name: str, nodes: list[Any]) -> int:
    """Put nodes into a folder of the subject hierarchy; returns the folder's item."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    folder = hierarchy.CreateFolderItem(hierarchy.GetSceneItemID(), name)
    for node in nodes:
        item = hierarchy.GetItemByDataNode(node)
        if not item:
            item = hierarchy.CreateItem(folder, node)
        hierarchy.SetItemParent(item, folder)
        hierarchy.SetItemAttribute(item, MARK, "1")
    hierarchy.SetItemAttribute(folder, MARK, "1")
    return int(folder)


def sweep_hierarchy() -> None:
    """Remove items of ours without a node: a saved scene keeps their names, though not their nodes."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    if hierarchy is None:
        return
    found = vtk.vtkIdList()
    hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), found, True)
    ours = [item for n in range(found.GetNumberOfIds()) if hierarchy.GetItemAttribute(item := found.GetId(n), MARK)]
    for item in reversed(ours):  # children first
        children = vtk.vtkIdList()
        hierarchy.GetItemChildren(item, children)
        if hierarchy.GetItemDataNode(item) is None and children.GetNumberOfIds() == 0:
            hierarchy.RemoveItem(item, False, False)


def items_of(nodes: list[Any]) -> set[int]:
    """The items of nodes in the subject hierarchy."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    if hierarchy is None:
        return set()
    return {int(hierarchy.GetItemByDataNode(node)) for node in nodes if node.GetScene() is not None}


def ungroup(folder: int, items: set[int]) -> None:
    """Remove a folder of the subject hierarchy, if it is still there, and items of ours; what a person put there, or
    made as a copy of ours, moves up.

    Args:
        folder: of `group`.
        items: of the nodes that were in it (`items_of`, before they were removed).
    """
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    every, children = vtk.vtkIdList(), vtk.vtkIdList()
    if hierarchy is not None:
        hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), every, True)
    if every.IsId(folder) < 0 or hierarchy.GetItemAttribute(folder, MARK) != "1":
        return  # the scene was closed since then
    hierarchy.GetItemChildren(folder, children)
    for item in [children.GetId(number) for number in range(children.GetNumberOfIds())]:
        node = hierarchy.GetItemDataNode(item)
        if item in items or (node is None and hierarchy.GetItemAttribute(item, MARK)):
            hierarchy.RemoveItem(item, False, False)
            continue
        if node is not None and is_own(node):  # Slicer copies attributes with a node
            node.RemoveAttribute(MARK)
            node.SetSaveWithScene(True)
        hierarchy.RemoveItemAttribute(item, MARK)
        hierarchy.SetItemParent(item, hierarchy.GetSceneItemID())
    hierarchy.RemoveItem(folder, False, False)
