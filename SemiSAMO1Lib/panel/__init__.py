"""The widgets of the Slicer module's steps: they show what `project` and `job` say. Imports qt, slicer, scene."""
