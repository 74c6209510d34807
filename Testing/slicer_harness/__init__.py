"""Slicer's scene, its views and its Qt without the Slicer application, for tests.

`application`: a real MRML scene and real module logics on the slicer-core wheel. `views`: real slice views, rendered
offscreen. `pythonqt`: PySide6 made to behave as PythonQt does. `widgets`: stand-ins for the ctk and qMRML widgets.
"""
