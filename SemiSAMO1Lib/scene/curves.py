"""Losses of a training as a plot of Slicer: one table, one series per loss, one chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import slicer
import vtk

from ..project.label_table import COLOURS
from .nodes import own, remove


class LossPlot:
    """The chart of one training; `show` replaces its points."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.table: Any = None
        self.chart: Any = None
        self.series: dict[str, Any] = {}

    def show(self, rows: Sequence[dict[str, Any]]) -> None:
        """Draw 'losses' events: (round, iteration, of, losses by name); the axis counts over all rounds."""
        if not rows:
            return
        names = list(dict.fromkeys(name for row in rows for name in row["losses"]))
        self._make(names)
        columns = {name: vtk.vtkDoubleArray() for name in ("iteration", *names)}
        for name, column in columns.items():
            column.SetName(name)
            column.SetNumberOfTuples(len(rows))
        for number, row in enumerate(rows):
            columns["iteration"].SetValue(number, (row["round"] - 1) * row["of"] + row["iteration"])
            for name in names:
                columns[name].SetValue(number, row["losses"].get(name, float("nan")))
        table = vtk.vtkTable()
        for column in columns.values():
            table.AddColumn(column)
        self.table.SetAndObserveTable(table)

    def _make(self, names: Sequence[str]) -> None:
        scene = slicer.mrmlScene
        if self.chart is None or self.chart.GetScene() is None:
            self.series = {}
            self.table = own(scene.AddNewNodeByClass("vtkMRMLTableNode", f"{self.title} losses"))
            self.chart = own(scene.AddNewNodeByClass("vtkMRMLPlotChartNode", f"{self.title} losses"))
            self.chart.SetTitle(self.title)
            self.chart.SetXAxisTitle("iteration")
            self.chart.SetYAxisTitle("loss")
        for name in names:
            if name in self.series:
                continue
            one = own(scene.AddNewNodeByClass("vtkMRMLPlotSeriesNode", name))
            one.SetAndObserveTableNodeID(self.table.GetID())
            one.SetXColumnName("iteration")
            one.SetYColumnName(name)
            one.SetPlotType(slicer.vtkMRMLPlotSeriesNode.PlotTypeScatter)
            one.SetMarkerStyle(slicer.vtkMRMLPlotSeriesNode.MarkerStyleNone)
            one.SetColor(*(channel / 255 for channel in COLOURS[len(self.series) % len(COLOURS)]))
            self.chart.AddAndObservePlotSeriesNodeID(one.GetID())
            self.series[name] = one

    def close(self) -> None:
        for node in (self.chart, *self.series.values(), self.table):
            if node is not None and node.GetScene() is not None:
                remove(node)
        self.table = self.chart = None
        self.series = {}
