"""Scans and labels whose truth is known by place, on every kind of grid that users have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import slicer
from scipy.spatial.transform import Rotation

from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.project.label_table import Label, LabelTable
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.scene.case_view import CaseFiles
from SemiSAMO1Lib.volume import Geometry, Volume

_TURNED = Rotation.from_euler("zyx", (14, -9, 6), degrees=True).as_matrix()


def _grid(direction: np.ndarray, spacing: tuple[float, float, float] = (2.0, 1.5, 1.0)) -> Geometry:
    return Geometry((14, 18, 23), spacing, (-20.5, 11.25, 33.0), tuple(direction.ravel().tolist()))


#: Grids that users have: along the axes, turned, mirrored (Slicer turns these round), thick slices.
GRIDS = {
    "straight": _grid(np.eye(3)),
    "oblique": _grid(_TURNED),
    "left-handed": _grid(np.diag([-1.0, 1.0, 1.0])),
    "left-handed oblique": _grid(_TURNED @ np.diag([1.0, 1.0, -1.0])),
    "thick slices": _grid(_TURNED, (8.0, 0.9, 0.8)),
}

#: Values with gaps, one with codes.
TABLE = LabelTable(
    (
        Label(2, "liver", (221, 130, 101), {"type": {"scheme": "SCT", "value": "10200004", "meaning": "Liver"}}),
        Label(7, "tumour", (144, 238, 144)),
        Label(300, "vessel", (0, 151, 206)),
    )
)


def scan_on(grid: Geometry, seed: int = 0) -> Volume:
    """Noise: no two voxels alike."""
    return Volume(np.random.default_rng(seed).normal(300, 40, grid.shape).astype(np.float32), grid)


def labels_on(grid: Geometry, *values: int) -> Volume:
    """A box of every value, beside each other along x, all different in size."""
    array = np.zeros(grid.shape, np.uint16)
    for number, value in enumerate(values):
        array[2 : 9 + number, 3 : 8 + 2 * number, 2 + 7 * number : 7 + 7 * number] = value
    return Volume(array, grid)


def uncertainty_on(grid: Geometry) -> Volume:
    """Zero but for a column of 80 %, one voxel of 97 %, and a corner of 100 %: outside of what the template shows."""
    array = np.zeros(grid.shape, np.uint8)
    array[5, 4:9, 3:6] = 80
    array[9, 12, 20] = 97
    array[12:, 15:, 0:3] = 100
    return Volume(array, grid)


def write_case(folder: Path, grid: Geometry, name: str = "case_001") -> CaseFiles:
    scan, prediction = folder / f"{name}.nrrd", folder / name / "prediction.seg.nrrd"
    uncertainty = folder / name / "uncertainty.nrrd"
    write_volume(scan, scan_on(grid))
    write_segmentation(prediction, labels_on(grid, 2, 7), TABLE)
    write_volume(uncertainty, uncertainty_on(grid))
    return CaseFiles(name, "0002-train", scan, prediction, uncertainty)


def own_nodes() -> list[str]:
    """Names of the nodes in the scene that this program made."""
    nodes = [slicer.mrmlScene.GetNthNode(n) for n in range(slicer.mrmlScene.GetNumberOfNodes())]
    return [node.GetName() for node in nodes if node.GetAttribute("SemiSAMO1") == "1"]
