"""What a bundle runs: its network on one scan, from file to file. It travels in the bundle."""

from __future__ import annotations

from pathlib import Path

from .. import files
from ..engine.inference.portable import PortableModel
from ..image_io import read_volume, suffix_of, write_volume
from ..project.label_table import LabelTable
from ..project.label_writer import write_segmentation


def segment_file(
    root: Path | str, scan: Path | str, output: Path | str, uncertainty: Path | str | None = None, device: str = "cpu"
) -> None:
    """Segment a scan.

    Args:
        root: the bundle's folder.
        scan: the scan's file.
        output: label map in any volume format, or segments with names and colours (.seg.nrrd).
        uncertainty: map of it to write, 0-100 %; None: none.
        device: cpu, cuda or cuda:0.
    """
    labels, doubt = PortableModel(Path(root), device).segment(read_volume(Path(scan)))
    if suffix_of(Path(output)) == ".seg.nrrd":
        write_segmentation(Path(output), labels, LabelTable.from_json(files.read_json(Path(root) / "labels.json")))
    else:
        write_volume(Path(output), labels)
    if uncertainty is not None:
        write_volume(Path(uncertainty), doubt)
