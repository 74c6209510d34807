"""Slice views drawn offscreen by Slicer's own displayable managers, as arrays of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from numpy.typing import NDArray
from vtk.util.numpy_support import vtk_to_numpy

#: What the application draws into a slice view besides the image.
_MANAGERS = (
    "vtkMRMLVolumeGlyphSliceDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLCrosshairDisplayableManager",
    "vtkMRMLColorLegendDisplayableManager",
)


class SliceView:
    """One slice view of the booted application; `image` renders it."""

    def __init__(self, name: str = "Red", size: tuple[int, int] = (400, 400)) -> None:
        self.logic = slicer.app.layoutManager().sliceWidget(name).sliceLogic()
        self.node = self.logic.GetSliceNode()
        self.renderer, self.window = vtk.vtkRenderer(), vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.SetSize(*size)
        self.window.AddRenderer(self.renderer)
        self.interactor = vtk.vtkGenericRenderWindowInteractor()
        self.interactor.SetRenderWindow(self.window)
        self.interactor.Initialize()
        self.interactor.SetSize(*size)
        mapper = vtk.vtkImageMapper()
        mapper.SetColorWindow(255)
        mapper.SetColorLevel(127.5)
        self.actor = vtk.vtkActor2D()
        self.actor.SetMapper(mapper)
        self.actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(self.actor)  # first: a fill is blended with what is there already
        self.renderer.GetActiveCamera().ParallelProjectionOn()
        slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance().SetMRMLApplicationLogic(
            slicer.app.applicationLogic()
        )
        self.group = slicer.vtkMRMLDisplayableManagerGroup()
        self.group.SetRenderer(self.renderer)
        for name_ in _MANAGERS:
            manager = slicer.vtkMRMLDisplayableManagerGroup.InstantiateDisplayableManager(name_)
            manager.SetMRMLApplicationLogic(slicer.app.applicationLogic())
            self.group.AddDisplayableManager(manager)
        self.group.SetMRMLDisplayableNode(self.node)
        self.node.SetMappedInLayout(1)
        self.logic.ResizeSliceNode(*size)

    def fit(self) -> None:
        self.logic.FitSliceToBackground()

    def image(self) -> NDArray[np.uint8]:
        """(rows, columns, 3), the first row above."""
        connection = self.logic.GetImageDataConnection()
        self.actor.GetMapper().SetInputConnection(connection)
        self.actor.SetVisibility(connection is not None)
        self.window.Render()
        grabber = vtk.vtkWindowToImageFilter()
        grabber.SetInput(self.window)
        grabber.ReadFrontBufferOff()
        grabber.Update()
        output = grabber.GetOutput()
        columns, rows, _ = output.GetDimensions()
        return vtk_to_numpy(output.GetPointData().GetScalars()).reshape(rows, columns, -1)[::-1, :, :3].copy()

    def pixel_of(self, ras: Any) -> tuple[int, int]:
        """(row, column) in `image` of a place in mm (RAS)."""
        matrix = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(self.node.GetXYToRAS(), matrix)
        column, row, *_ = matrix.MultiplyPoint([*ras, 1])
        return self.window.GetSize()[1] - 1 - round(row), round(column)

    def save(self, path: Path) -> None:
        from PIL import Image

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.image()).save(path)

    def close(self) -> None:
        self.group.SetMRMLDisplayableNode(None)
        self.window.Finalize()
