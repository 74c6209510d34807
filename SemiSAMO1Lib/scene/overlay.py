"""Uncertainty over the scan: a colour table of its own, a fixed window of 0 to 100 %, threshold, opacity, legend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import slicer
import vtk
from numpy.typing import NDArray

from ..volume import UNSEEN
from .nodes import own
from .volumes import load_scan

#: Colours from certain to a guess (RGB 0-1), in equal steps; light ones are uncertain, as on the report.
_STEPS = (
    (0.00, 0.00, 0.02),
    (0.20, 0.04, 0.38),
    (0.45, 0.11, 0.43),
    (0.69, 0.19, 0.35),
    (0.89, 0.35, 0.20),
    (0.98, 0.59, 0.05),
    (0.95, 0.98, 0.64),
)

_TAG = "SemiSAMO1Uncertainty"


def color_table() -> Any:
    """The one colour table for uncertainties, made when it is not there."""
    node = slicer.mrmlScene.GetSingletonNode(_TAG, "vtkMRMLColorTableNode")
    if node is not None:
        return node
    node = slicer.vtkMRMLColorTableNode()
    node.SetSingletonTag(_TAG)
    node.SetName("Uncertainty")
    node.SetTypeToUser()
    node.SetNumberOfColors(101)
    at = np.linspace(0, 100, len(_STEPS))
    for percent in range(101):
        red, green, blue = (float(np.interp(percent, at, [step[c] for step in _STEPS])) for c in range(3))
        node.SetColor(percent, f"{percent} %", red, green, blue, 1.0)
    node.GetLookupTable().SetTableRange(0, 100)
    return own(slicer.mrmlScene.AddNode(node))


def load_uncertainty(path: Path, name: str) -> Any:
    """Load an uncertainty map (0-100 %) with its colours and fixed window. Raises SceneError."""
    node = load_scan(path, name)
    display = node.GetDisplayNode()
    display.SetAndObserveColorNodeID(color_table().GetID())
    display.AutoWindowLevelOff()
    display.SetWindowLevelMinMax(0, 100)
    display.SetApplyThreshold(True)
    display.SetInterpolate(False)  # between a certain and an uncertain voxel lies no half-certain one
    return node


def show(node: Any, opacity: float, threshold: float, legend: bool = True) -> None:
    """Lay a map over the scan in all slice views.

    Args:
        node: of `load_uncertainty`.
        opacity: 0 to 1.
        threshold: percent below which nothing is drawn.
        legend: draw the colour scale.
    """
    display = node.GetDisplayNode()
    display.AutoThresholdOff()
    display.SetThreshold(threshold, 100)
    slicer.util.setSliceViewerLayers(foreground=node, foregroundOpacity=opacity)
    colors = slicer.modules.colors.logic()
    scale = colors.GetColorLegendDisplayNode(node)
    if scale is None and legend:
        scale = colors.AddDefaultColorLegendDisplayNode(node)
        scale.SetSaveWithScene(False)
        scale.SetTitleText("uncertainty, %")
        scale.SetLabelFormat("%.0f")
        scale.SetNumberOfLabels(5)
    if scale is not None:
        scale.SetVisibility(legend)


def hide(node: Any) -> None:
    """Take the map off the slice views that show it; other foregrounds stay."""
    views = slicer.app.layoutManager().sliceViewNames() if slicer.app.layoutManager() is not None else ()
    for name in views:  # none while Slicer ends
        composite = slicer.app.layoutManager().sliceWidget(name).mrmlSliceCompositeNode()
        if composite.GetForegroundVolumeID() == node.GetID():
            composite.SetForegroundVolumeID(None)
    scale = slicer.modules.colors.logic().GetColorLegendDisplayNode(node)
    if scale is not None:
        scale.SetVisibility(False)


def most_uncertain_place(node: Any, threshold: float) -> tuple[float, float, float] | None:
    """Where to look first: in the slice along the third axis with the largest sum of uncertainty, the middle (RAS, mm)
    of its connected region with the largest sum.

    Only voxels from `threshold` percent on count, and none of 100 %: these lie outside of what the template shows. None
    where there is none.
    """
    array = slicer.util.arrayFromVolume(node)

    def counted(k: int) -> NDArray[np.float64]:
        one = array[k]
        return np.where((one >= max(threshold, 1)) & (one < UNSEEN), one, 0).astype(np.float64)

    per_slice = np.array([counted(k).sum() for k in range(len(array))])  # a map is large: never all of it in floats
    if not per_slice.any():
        return None
    k = int(per_slice.argmax())
    weight = counted(k)
    regions = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray((weight > 0).astype(np.uint8))))
    sums = np.bincount(regions.ravel(), weights=weight.ravel())
    rows, columns = np.nonzero(regions == 1 + int(sums[1:].argmax()))
    amounts = weight[rows, columns]
    middle = (np.average(columns, weights=amounts), np.average(rows, weights=amounts))
    nearest = int(np.argmin((columns - middle[0]) ** 2 + (rows - middle[1]) ** 2))
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    r, a, s, _ = matrix.MultiplyPoint((float(columns[nearest]), float(rows[nearest]), float(k), 1.0))
    return r, a, s


def jump(place: tuple[float, float, float]) -> None:
    """Move all slice views to a place (RAS, mm)."""
    slicer.vtkMRMLSliceNode.JumpAllSlices(slicer.mrmlScene, *place, slicer.vtkMRMLSliceNode.CenteredJumpSlice)
