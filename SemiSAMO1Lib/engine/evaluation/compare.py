"""Compare predictions with references: a training's results, or two folders of label files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...image_io import SUFFIXES, read_volume, stem_of, suffix_of
from ...volume import Volume, copy_on_lattice
from .metrics import case_metrics, mean_of


class NothingToCompare(ValueError):
    """No prediction has a reference of the same name."""


def label_files(folder: Path) -> dict[str, Path]:
    """Label files in a folder by case name, `.seg.nrrd` included. Raises ValueError for two files of one case."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(".") or not path.is_file() or suffix_of(path) not in (*SUFFIXES, ".seg.nrrd"):
            continue
        name = stem_of(path)
        if name in found:
            raise ValueError(f"two files for case {name!r}: {found[name].name} and {path.name}")
        found[name] = path
    return found


def compare(predictions: Mapping[str, Path], references: Mapping[str, Path], distances: bool = True) -> dict[str, Any]:
    """Measures of every case that has a reference.

    Dice is computed on the reference's own grid.

    Returns:
        {'mean_dice', 'mean_jaccard', 'mean_hd95_mm', 'mean_asd_mm', 'cases': [...], 'without_reference': [...]}; the
        means are means over cases of the means over foreground labels.

    Raises:
        NothingToCompare: no names in common.
    """
    common = [name for name in predictions if name in references]
    if not common:
        raise NothingToCompare(
            f"no prediction has a reference of the same name. Predictions: {sorted(predictions)[:3]}, "
            f"references: {sorted(references)[:3]}"
        )
    rows = [{"case": name, **_one(predictions[name], references[name], distances)} for name in common]
    names = ("mean_dice", "mean_jaccard", "mean_hd95_mm", "mean_asd_mm") if distances else ("mean_dice", "mean_jaccard")
    return {
        **{name: mean_of(row[name] for row in rows) for name in names},
        "cases": rows,
        "without_reference": [name for name in predictions if name not in references],
        "convention": "both empty: Dice 1, distances 0; one empty: Dice 0, distances undefined and left out of means",
    }


def _one(prediction_file: Path, reference_file: Path, distances: bool) -> dict[str, Any]:
    reference = read_volume(reference_file)
    prediction = _on_grid(read_volume(prediction_file), reference, prediction_file)
    values = sorted((set(np.unique(reference.array).tolist()) | set(np.unique(prediction.array).tolist())) - {0})
    values = [int(value) for value in values]
    return case_metrics(prediction.array, reference.array, values, reference.geometry.spacing, distances)


def _on_grid(prediction: Volume, reference: Volume, path: Path) -> Volume:
    copied = copy_on_lattice(prediction, reference.geometry)
    if copied is None:
        raise ValueError(
            f"{path.name} lies on another grid than its reference "
            f"({prediction.geometry} against {reference.geometry}); resample one of them first"
        )
    return copied
