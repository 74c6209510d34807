"""Segmentation files as 3D Slicer itself saves and reads them, made by the slicer-core wheel in a process of its own.

Places are points (x, y, z) in mm, LPS, never indices: Slicer turns left-handed volumes round when it loads them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def save_job(
    image: Path, file: Path, layers: Sequence[Sequence[dict[str, Any]]], margin: int = 0, crop: bool = False
) -> dict[str, Any]:
    """Draw on a scan and save a .seg.nrrd.

    Args:
        image: the scan, loaded by Slicer.
        file: where the segmentation goes.
        layers: the segments of each layer; a segment has id, name, color (0-1), value, box ((low), (high) in mm) and
            may have tags.
        margin: voxels by which the drawing's grid is larger than the scan on every side.
        crop: save no more than the painted part.
    """
    return {
        "do": "save",
        "image": str(image),
        "file": str(file),
        "layers": layers,
        "margin": margin,
        "crop": crop,
    }


def load_job(file: Path, out: Path) -> dict[str, Any]:
    """Load a .seg.nrrd in Slicer and note its segments and the places of their voxels; see `loaded`."""
    return {"do": "load", "file": str(file), "out": str(out)}


def run(jobs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Do all jobs in one Slicer process."""
    listing = Path(folder) / "slicer-jobs.json"
    listing.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), str(listing)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if "all jobs done" not in done.stdout:
        raise RuntimeError(f"slicer-core failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")


def loaded(out: Path) -> list[dict[str, Any]]:
    """What Slicer read: for every segment id, name, color, value, layer, tag text and points (n, 3) in mm."""
    segments = json.loads(Path(out).read_text(encoding="utf-8"))
    return [{**one, "points": np.asarray(one["points"], float).reshape(-1, 3)} for one in segments]


def _save(job: dict[str, Any], slicer: Any, vtk: Any) -> None:
    from vtkmodules.util.numpy_support import numpy_to_vtk

    scene = slicer.vtkMRMLScene()
    volume = _add(scene, slicer.vtkMRMLScalarVolumeNode())
    reader = _add(scene, slicer.vtkMRMLVolumeArchetypeStorageNode())
    reader.SetFileName(job["image"])
    assert reader.ReadData(volume), f"Slicer cannot read {job['image']}"
    node = _add(scene, slicer.vtkMRMLSegmentationNode())
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    node.GetSegmentation().SetSourceRepresentationName("Binary labelmap")
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    size, margin = volume.GetImageData().GetDimensions(), job["margin"]
    extent = [number for n in size for number in (-margin, n - 1 + margin)]
    axes = [np.arange(extent[2 * i], extent[2 * i + 1] + 1) for i in range(3)]
    z, y, x = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    places = np.stack([x, y, z, np.ones_like(x)], -1) @ (_LPS_RAS @ _array(matrix)).T
    for layer in job["layers"]:
        drawn = np.zeros(x.shape, np.uint16 if max(one["value"] for one in layer) > 255 else np.uint8)
        for one in layer:
            low, high = np.array(one["box"])
            drawn[((places[..., :3] > low) & (places[..., :3] < high)).all(-1)] = one["value"]
        labelmap = slicer.vtkOrientedImageData()
        labelmap.SetExtent(extent)
        labelmap.GetPointData().SetScalars(numpy_to_vtk(drawn.ravel(), deep=1))
        labelmap.SetImageToWorldMatrix(matrix)
        for one in layer:
            segment = slicer.vtkSegment()
            segment.SetName(one["name"])
            segment.SetColor(*one["color"])
            segment.SetLabelValue(one["value"])
            for key, text in one.get("tags", {}).items():
                segment.SetTag(key, text)
            segment.AddRepresentation("Binary labelmap", labelmap)
            node.GetSegmentation().AddSegment(segment, one["id"])
    writer = _add(scene, slicer.vtkMRMLSegmentationStorageNode())
    writer.SetCropToMinimumExtent(job["crop"])
    writer.SetFileName(job["file"])
    assert writer.WriteData(node), f"Slicer cannot write {job['file']}"


def _load(job: dict[str, Any], slicer: Any, vtk: Any) -> None:
    from vtkmodules.util.numpy_support import vtk_to_numpy

    scene = slicer.vtkMRMLScene()
    node = _add(scene, slicer.vtkMRMLSegmentationNode())
    reader = _add(scene, slicer.vtkMRMLSegmentationStorageNode())
    reader.SetFileName(job["file"])
    assert reader.ReadData(node), f"Slicer cannot read {job['file']}"
    rows = []
    segmentation = node.GetSegmentation()
    for number in range(segmentation.GetNumberOfSegments()):
        segment = segmentation.GetNthSegment(number)
        labelmap = segment.GetRepresentation("Binary labelmap")
        points = np.zeros((0, 3))
        if labelmap.GetPointData().GetScalars() is not None:
            size = labelmap.GetDimensions()
            array = vtk_to_numpy(labelmap.GetPointData().GetScalars()).reshape(size[::-1])
            where = np.argwhere(array == segment.GetLabelValue())[:, ::-1] + np.array(labelmap.GetExtent()[::2])
            matrix = vtk.vtkMatrix4x4()
            labelmap.GetImageToWorldMatrix(matrix)
            points = (np.c_[where, np.ones(len(where))] @ (_LPS_RAS @ _array(matrix)).T)[:, :3]
        tags = vtk.reference("")
        segment.GetTag("SemiSAMO1.LabelValue", tags)
        rows.append(
            {
                "id": segmentation.GetNthSegmentID(number),
                "name": segment.GetName(),
                "color": list(segment.GetColor()),
                "value": segment.GetLabelValue(),
                "layer": segmentation.GetLayerIndex(segmentation.GetNthSegmentID(number)),
                "tag": str(tags),
                "points": points.tolist(),
            }
        )
    Path(job["out"]).write_text(json.dumps(rows), encoding="utf-8")


def _add(scene: Any, node: Any) -> Any:
    scene.AddNode(node)
    return node


def _array(matrix: Any) -> np.ndarray:
    return np.array([[matrix.GetElement(i, j) for j in range(4)] for i in range(4)])


if __name__ == "__main__":
    import slicer
    import vtkmodules.all as vtk

    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        {"save": _save, "load": _load}[each["do"]](each, slicer, vtk)
    print("all jobs done", flush=True)
