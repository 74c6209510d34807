"""Scans and maps as volume nodes, and volume nodes as arrays with their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from ..volume import Geometry, Volume
from .nodes import forget_file, own

#: From Slicer's right-anterior-superior axes to left-posterior-superior ones, which files and the engine use.
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class SceneError(RuntimeError):
    """A node cannot be used; the message says why and what to do."""


def load_scan(path: Path, name: str) -> Any:
    """Load a scan file as a scalar volume node of ours, without showing it. Raises SceneError."""
    try:
        node = slicer.util.loadVolume(str(path), {"name": name, "show": False})
    except RuntimeError as error:
        forget_file(path)
        raise SceneError(f"{path} cannot be loaded: {error}") from error
    return own(node)


def volume_of(node: Any) -> Volume:
    """The voxels of a scalar volume node (z, y, x) and where they lie, its transforms included.

    The array is a view of the node's own memory: do not write into it.

    Raises:
        SceneError: no voxels, colour, or a transform that bends or shears.
    """
    image = node.GetImageData()
    if image is None or image.GetPointData().GetScalars() is None:
        raise SceneError(f"{node.GetName()} has no voxels")
    if image.GetNumberOfScalarComponents() != 1:
        raise SceneError(f"{node.GetName()} is a colour image; one number per voxel is needed")
    x, y, z = image.GetDimensions()
    array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(z, y, x)
    return Volume(array, geometry_of(node))


def geometry_of(node: Any) -> Geometry:
    """Where the voxels of a volume node lie in the patient (LPS), its parent transforms included. Raises SceneError."""
    ijk_to_ras = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(ijk_to_ras)
    matrix = slicer.util.arrayFromVTKMatrix(ijk_to_ras)
    parent = node.GetParentTransformNode()
    if parent is not None:
        if not parent.IsTransformToWorldLinear():
            raise SceneError(f"{node.GetName()} is under a transform that bends; harden it first (module Transforms)")
        to_world = vtk.vtkMatrix4x4()
        parent.GetMatrixTransformToWorld(to_world)
        matrix = slicer.util.arrayFromVTKMatrix(to_world) @ matrix
    matrix = RAS_TO_LPS @ matrix
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    direction = matrix[:3, :3] / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-3:
        raise SceneError(f"{node.GetName()} is sheared by its transform; resample it first")
    x, y, z = node.GetImageData().GetDimensions()
    sx, sy, sz = (float(s) for s in spacing)
    a, b, c = (float(v) for v in matrix[:3, 3])
    return Geometry((z, y, x), (sz, sy, sx), (a, b, c), tuple(direction.ravel().tolist()))


def turn_views_to(node: Any) -> None:
    """Turn all slice views to the planes of a volume, so that a voxel is a square on the screen, and fit it in."""
    for view in slicer.app.layoutManager().sliceViewNames():
        widget = slicer.app.layoutManager().sliceWidget(view)
        widget.mrmlSliceNode().RotateToVolumePlane(node)
        widget.sliceLogic().FitSliceToBackground()


def show_scan(node: Any) -> None:
    """Show a scan in all slice views, in its own planes."""
    slicer.util.setSliceViewerLayers(background=node)
    turn_views_to(node)
