"""Compare predictions with references: a training's results, or two folders of label files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.evaluation.metrics import case_metrics, mean_of
from ..engine.observer import Observer
from ..image_io import SUFFIXES, read_geometry, stem_of, suffix_of
from ..project import Project
from ..project.cases import Role, same_name
from ..project.label_reader import read_labels
from ..volume import grid_of_both

#: A grid that holds a prediction and its reference has at most so many voxels, or so many times those of both.
_LARGEST, _APART = 2**27, 8


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


def references_of(project: Project, folder: Path) -> dict[str, Path]:
    """Case id -> reference in a folder, found by the name of the case's scan, else by the case's id.

    A name that several scans of the project have says nothing: such references are left out. Excluded cases have none.

    Raises:
        NothingToCompare: no file belongs to a case.
    """
    found: dict[str, Path] = {}
    cases = [case for case in project.refresh().cases if case.role is not Role.EXCLUDED]
    there = label_files(folder)
    for name, path in there.items():
        named = [case.id for case in cases if same_name(case.name, name)] or [c.id for c in cases if c.id == name]
        if len(named) == 1:
            found[named[0]] = path
    if not found:
        raise NothingToCompare(_nothing([case.name for case in cases], there))
    return found


def _nothing(names: Iterable[str], references: Iterable[str]) -> str:
    return (
        f"no prediction has a reference of the same name. Predictions: {sorted(names)[:3]}, "
        f"references: {sorted(references)[:3]}"
    )


def compare(
    predictions: Mapping[str, Path],
    references: Mapping[str, Path],
    distances: bool = True,
    values: Sequence[int] | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Measures of every case that has a reference.

    Measured is on a grid that holds both: a reference that was saved cropped is background elsewhere.

    Args:
        predictions, references: label files by case name.
        distances: compute surface distances too.
        values: label values to compare, also where neither file has them; None: those that one of the two has.
        observer: gets progress.

    Returns:
        {'mean_dice', 'mean_jaccard', 'mean_hd95_mm', 'mean_asd_mm', 'cases': [...], 'without_reference': [...]}; the
        means are means over cases of the means over foreground labels.

    Raises:
        NothingToCompare: no names in common.
        ValueError: a reference lies on another grid than its prediction, up to whole voxels, or far away from it.
    """
    common = [name for name in predictions if name in references]
    if not common:
        raise NothingToCompare(_nothing(predictions, references))
    rows = []
    for name in common:
        rows.append({"case": name, **_one(predictions[name], references[name], distances, values)})
        if observer is not None:
            done = len(rows)
            observer.event("progress", stage="comparing", done=done, of=len(common), fraction=done / len(common))
    names = ("mean_dice", "mean_jaccard", "mean_hd95_mm", "mean_asd_mm") if distances else ("mean_dice", "mean_jaccard")
    return {
        **{name: mean_of(row[name] for row in rows) for name in names},
        "cases": rows,
        "without_reference": [name for name in predictions if name not in references],
        "convention": "both empty: Dice 1, distances 0; one empty: Dice 0, distances undefined and left out of means",
    }


def _one(prediction_file: Path, reference_file: Path, distances: bool, values: Sequence[int] | None) -> dict[str, Any]:
    ours, theirs = read_geometry(prediction_file), read_geometry(reference_file)
    grid = grid_of_both(ours, theirs)
    if grid is None:
        raise ValueError(f"{prediction_file} lies on another grid than {reference_file}; resample one of them first")
    if grid.voxels > max(_LARGEST, _APART * (ours.voxels + theirs.voxels)):
        raise ValueError(f"{prediction_file} lies far from {reference_file}: is that the reference of another scan?")
    prediction, reference = (
        read_labels(one, grid, allow_empty=True).volume for one in (prediction_file, reference_file)
    )
    if values is None:
        found = set(np.unique(reference.array).tolist()) | set(np.unique(prediction.array).tolist())
        values = [int(value) for value in sorted(found - {0})]
    return case_metrics(prediction.array, reference.array, values, grid.spacing, distances)
