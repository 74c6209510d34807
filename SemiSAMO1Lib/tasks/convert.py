"""Projects to the HDF5 layout of the published code, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..engine.data.hdf5_layout import write_case, write_list
from ..engine.observer import Observer
from ..image_io import read_volume, write_volume
from ..project import Project, Role, read_labels
from ..project.results import prediction_files
from ..volume import Volume
from .compare import references_of
from .layout import ProtocolError, listed_cases, read_labelled


def export_layout(
    project: Project, root: Path, with_predictions: bool, observer: Observer, references: Path | None = None
) -> dict[str, Any]:
    """Write every case of a project as data/<case>.h5; train.txt names the labelled ones first.

    Args:
        project: excluded cases are left out.
        root: an empty or new folder.
        with_predictions: cases without a person's label get the current training's prediction as `label`.
        observer: gets progress.
        references: folder of labels of cases that nobody labelled in the project; they go to test.txt, to be measured
            against.

    Raises:
        ProtocolError: the folder holds something already.
        ValueError: a label value above 255, which the layout cannot hold.
    """
    if root.exists() and any(root.iterdir()):
        raise ProtocolError(f"{root} is not empty; choose a new folder")
    state = project.refresh()
    labelled = [*state.with_role(Role.TEMPLATE), *state.with_role(Role.LABELLED)]
    cases = [*labelled, *state.with_role(Role.UNLABELLED)]
    predictions = prediction_files(project) if with_predictions else {}
    truth = references_of(project, references) if references is not None else {}
    measured = [case.id for case in cases if case not in labelled and case.id in truth]
    for position, case in enumerate(cases):
        image = read_volume(project.image_path(case))
        label: Volume | None = None
        given = project.label_path(case) if case in labelled else truth.get(case.id)
        source = given or predictions.get(case.id)
        if source is not None:
            label = read_labels(source, image.geometry, allow_empty=True).volume
        write_case(root / "data" / f"{case.id}.h5", image, label, predicted=given is None)
        done = position + 1
        observer.event("progress", stage="exporting", done=done, of=len(cases), fraction=done / len(cases))
    write_list(root, "train", [case.id for case in cases])
    if measured:
        write_list(root, "test", measured)
    return {"root": str(root), "cases": len(cases), "labelled": [case.id for case in labelled], "test": measured}


def labelled_names(root: Path, count: int) -> list[str]:
    """The first `count` cases of train.txt, whose labels can be taken into a project.

    Raises:
        ProtocolError: train.txt names fewer cases, or a file's label is missing, empty or none.
    """
    if count == 0:
        return []
    names = listed_cases(root, root / "train.txt")
    if not 0 < count <= len(names):
        raise ProtocolError(
            f"{count} labelled cases were asked for; train.txt in {root} names {len(names)}. Lower --labeled-num "
            "or name more cases"
        )
    for name in names[:count]:
        if not read_labelled(root, name)[1].array.any():
            raise ProtocolError(f"{name}.h5: the label is empty; expected at least one value above 0")
    return names[:count]


def label_imported(project: Project, root: Path, names: Sequence[str]) -> list[str]:
    """Give cases their labels in a project into which the layout was imported.

    Args:
        project: holds them.
        root: folder of the layout.
        names: see `labelled_names`; the first becomes the template.

    Returns:
        their ids in the project.

    Raises:
        ProtocolError: a case was not imported.
    """
    by_file = {Path(case.source.get("file", "")).stem: case for case in project.refresh().cases}
    done: list[str] = []
    for name in names:
        case = by_file.get(name)
        if case is None:
            raise ProtocolError(f"{name} of train.txt could not be imported; the skipped scans say why")
        _, label = read_labelled(root, name)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "label.nrrd"
            write_volume(path, label)
            role = Role.LABELLED if done else Role.TEMPLATE
            origin = "imported" if done else "template"
            absent = sorted(set(project.refresh().labels.values) - set(np.unique(label.array).tolist()))
            project.add_label(case.id, path, origin=origin, role=role, absent=absent, add_labels=True)
        done.append(case.id)
    return done
