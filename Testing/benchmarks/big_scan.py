"""Opening and saving one case of 512 × 512 × 600 voxels in Slicer's scene: what Slicer does in its main thread.

    python Testing/benchmarks/big_scan.py

MRML of the slicer-core wheel, without the application's views. Files are written first and not timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import keep, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slicer_harness import application

from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.project import Label, LabelTable, read_labels
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.volume import Geometry, Volume

SHAPE = (600, 512, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    application.boot()
    from SemiSAMO1Lib.scene.case_view import CaseFiles, CaseView

    grid = Geometry(SHAPE, (1.0, 0.8, 0.8))
    table = LabelTable(tuple(Label(value, f"organ {value}") for value in (1, 2, 3)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = _write(folder, grid, table)
        view: CaseView = _timed(
            "open the case", lambda: CaseView(CaseFiles("big", "0002-train", *files), table), options
        )
        _timed("show the overlay", lambda: view.show_uncertainty(True, 0.5, 30), options)
        _timed("go to the most uncertain place", lambda: view.jump_to_most_uncertain(30), options)
        _timed("copy what was drawn, for a draft", lambda: view.snapshot(table), options)
        found = _timed("read what was drawn", lambda: view.drawn(table), options)
        target = folder / "saved.seg.nrrd"
        _timed("write the label", lambda: write_segmentation(target, found.labels, found.table), options)
        _timed("read a label, as Accept and Correct do", lambda: read_labels(target, grid), options)
        _timed("close the case", view.close, options)


def _write(folder: Path, grid: Geometry, table: LabelTable) -> tuple[Path, Path, Path]:
    generator = np.random.default_rng(0)
    label = np.zeros(SHAPE, np.uint8)
    for value in (1, 2, 3):
        label[60 * value : 60 * value + 200, 100:300, 100 * value : 100 * value + 90] = value
    noise = generator.integers(-20, 20, SHAPE[1:], np.int16)
    files = folder / "big.nrrd", folder / "prediction.seg.nrrd", folder / "uncertainty.nrrd"
    write_volume(files[0], Volume((40 * label.astype(np.int16) + noise).astype(np.int16), grid), compress=False)
    write_segmentation(files[1], Volume(label, grid), table)
    edges = (np.diff(label, axis=2, prepend=0) != 0).astype(np.uint8) * 80
    write_volume(files[2], Volume(edges, grid))
    return files


def _timed(what: str, action: Callable[[], Any], options: argparse.Namespace) -> Any:
    began = time.monotonic()
    result = action()
    keep(
        {"benchmark": "big_scan", "what": what, "seconds": round(time.monotonic() - began, 2), **machine()},
        options.rows,
    )
    return result


if __name__ == "__main__":
    main()
