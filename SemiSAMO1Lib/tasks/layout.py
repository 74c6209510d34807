"""The HDF5 layout of the published code as the protocol reads it, and the way from and to projects."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import h5py
import numpy as np

from ..engine.cases import EngineCase, LabelledCase
from ..engine.data.hdf5_layout import read_case
from ..volume import Geometry, Volume
from .inputs import ClassMap


class ProtocolError(ValueError):
    """The data or the settings do not allow the run: what was expected, what was found, what to do."""


def read_layout(root: Path, labelled: int) -> tuple[list[LabelledCase], list[EngineCase], ClassMap]:
    """Cases of train.txt: the first `labelled` with their labels, of all others the image alone.

    Arrays are taken as they are, every voxel 1 mm, as the published code does. Label values are mapped to classes in
    ascending order; gaps are allowed.

    Raises:
        ProtocolError: see `reproduce`.
    """
    names = listed_cases(root, root / "train.txt")
    if labelled < 1 or labelled >= len(names):
        raise ProtocolError(
            f"{labelled} labelled cases were asked for; train.txt in {root} names {len(names)}, and at least one must "
            "be left unlabelled. Lower --labeled-num or name more cases"
        )
    read = [labelled_case(root, name) for name in names[:labelled]]
    values = sorted({int(v) for _, _, label in read for v in np.unique(label.array)} - {0})
    if not values:
        raise ProtocolError(f"the labels of {names[:labelled]} are empty: expected at least one value above 0")
    class_map = ClassMap((0, *values))
    ready = [LabelledCase(name, image, class_map.to_indices(label)) for name, image, label in read]
    cases = [EngineCase(name, _grid(root, name), partial(_image, root, name)) for name in names[labelled:]]
    return ready, cases, class_map


def listed_cases(root: Path, listing: Path) -> list[str]:
    path = listing if listing.is_file() else root / listing.name
    if not path.is_file():
        raise ProtocolError(f"{path} does not exist; expected a text file with one case name a line, beside data/")
    names = [line.strip().removesuffix(".h5") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ProtocolError(f"{path} names no case; expected one case name a line")
    if absent := [name for name in names if not case_file(root, name).is_file()]:
        raise ProtocolError(f"{path.name} names {len(absent)} cases that are not in {root / 'data'}: {absent[:5]}")
    return names


def case_file(root: Path, name: str) -> Path:
    return root / "data" / f"{name}.h5"


def labelled_case(root: Path, name: str) -> tuple[str, Volume, Volume]:
    try:
        found = read_case(case_file(root, name), with_label=True)
    except (KeyError, OSError, ValueError) as error:
        raise ProtocolError(f"{name} cannot serve as a labelled case: {error}") from error
    assert found.label is not None, "asked for"
    grid = Geometry(found.image.array.shape)
    return name, Volume(found.image.array, grid), Volume(found.label.array, grid)


def _image(root: Path, name: str) -> Volume:
    """The image of a case; its label is not read."""
    array = read_case(case_file(root, name)).image.array
    return Volume(array, Geometry(array.shape))


def _grid(root: Path, name: str) -> Geometry:
    try:
        with h5py.File(case_file(root, name), "r") as file:
            if "image" not in file:
                raise ProtocolError(f"{name}.h5 has no dataset 'image'; it has {sorted(file)}")
            shape, order = file["image"].shape, str(file.attrs.get("axis_order", "xyz"))
    except OSError as error:
        raise ProtocolError(f"{name}.h5 cannot be read: {error}") from error
    if len(shape) != 3:
        raise ProtocolError(f"{name}.h5 holds a {len(shape)}D image; 3D is needed")
    z, y, x = (int(shape[order.index(axis)]) for axis in "zyx")
    return Geometry((z, y, x))
