"""MRML: scans, segmentations and overlays in and out of Slicer's scene. Imports slicer and vtk, never qt or torch."""
