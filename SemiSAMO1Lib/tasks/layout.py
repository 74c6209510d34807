"""The HDF5 layout of the published code as the protocol reads it, and the way from and to projects."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import h5py
import numpy as np

from ..engine.cases import EngineCase, LabelledCase
from ..engine.data.hdf5_layout import Hdf5Case, read_case
from ..project.cases import check_voxels
from ..project.label_table import LARGEST_VALUE
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
    """Names of the cases in a list; a relative path is looked for in `root`, then here. Raises ProtocolError."""
    path = next((one for one in (root / listing, listing) if one.is_file()), None)
    if path is None:
        raise ProtocolError(f"{listing} does not exist; expected a text file with one case name a line, beside data/")
    names = [line.strip().removesuffix(".h5") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ProtocolError(f"{path} names no case; expected one case name a line")
    if absent := [name for name in names if not case_file(root, name).is_file()]:
        raise ProtocolError(
            f"{path.name} names {len(absent)} cases that are not in {root / 'data'}: {absent[:5]}. Correct the list, "
            "or add their files"
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ProtocolError(f"{path.name} names {repeated[:5]} more than once; expected one line a case")
    return names


def case_file(root: Path, name: str) -> Path:
    return root / "data" / f"{name}.h5"


def labelled_case(root: Path, name: str) -> tuple[str, Volume, Volume]:
    """Name, image and label of a case, every voxel 1 mm. Raises ProtocolError."""
    image, label = read_labelled(root, name)
    grid = Geometry(image.array.shape)
    return name, Volume(image.array, grid), Volume(label.array, grid)


def read_labelled(root: Path, name: str) -> tuple[Volume, Volume]:
    """Image and label of a case: see `read_labelled_file`."""
    return read_labelled_file(case_file(root, name))


def read_labelled_file(path: Path) -> tuple[Volume, Volume]:
    """Image and label of a file with their geometry; label values are whole numbers, and no prediction. Raises
    ProtocolError."""
    found, name = _checked(path, with_label=True), path.stem
    if found.predicted:
        raise ProtocolError(
            f"{name}.h5: its label is a prediction (export-h5 --predictions); nothing is measured against it, it is "
            "no template. Name cases that a person labelled"
        )
    assert found.label is not None, "asked for"
    label = found.label.array
    whole = label.dtype.kind in "biu" or (label.dtype.kind == "f" and np.array_equal(label, np.rint(label)))
    if not whole or label.min() < 0 or label.max() > LARGEST_VALUE:
        raise ProtocolError(
            f"{name}.h5: the label is {label.dtype} from {label.min()} to {label.max()}; expected whole numbers from 0 "
            f"to {LARGEST_VALUE}. Mend the file, or name another case in the list"
        )
    return found.image, Volume(label.astype(np.uint8 if label.max() <= 255 else np.uint16), found.label.geometry)


def _checked(path: Path, with_label: bool) -> Hdf5Case:
    try:
        found = read_case(path, with_label)
        check_voxels(found.image)
    except (KeyError, OSError, ValueError) as error:
        wanted, reason = "image and label" if with_label else "an image", error
        if isinstance(error, KeyError):  # as text it is in quotes
            reason = error.args[0]
        raise ProtocolError(
            f"{path.name} cannot be used: {reason}. Expected: {wanted} "
            "as 3D arrays of one size. Mend the file, or name another case in the list"
        ) from error
    return found


def _image(root: Path, name: str) -> Volume:
    """The image of a case; its label is not read."""
    array = _checked(case_file(root, name), with_label=False).image.array
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
    if sorted(order) != ["x", "y", "z"]:
        raise ProtocolError(f"{name}.h5: axis_order {order!r}; an order of x, y and z is needed")
    z, y, x = (int(shape[order.index(axis)]) for axis in "zyx")
    return Geometry((z, y, x))
