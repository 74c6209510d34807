"""The HDF5 layout of the published code: `<root>/data/<case>.h5` with `image` and `label`, and lists of names.

The published files carry neither spacing nor orientation, and their arrays are (x, y, z), slices last. Files written
here say both; files without are taken as (x, y, z) with 1 mm voxels, and the reading says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ...files import atomic_path, write_text
from ...volume import Geometry, Volume

#: The lists of names beside `data`.
LISTS = ("train", "val", "test")


@dataclass(frozen=True)
class Hdf5Case:
    """A file of the layout: the scan, its label if it has one, and what had to be assumed."""

    image: Volume
    label: Volume | None
    notes: tuple[str, ...]
    predicted: bool = False


def read_case(path: Path, with_label: bool = False) -> Hdf5Case:
    """Read one file; the label is read only when asked for.

    Raises:
        OSError: not an HDF5 file.
        KeyError: it has no dataset `image` (or `label`).
        ValueError: a dataset is not 3D, or the two do not fit.
    """
    with h5py.File(path, "r") as file:
        for name in ("image", "label")[: 1 + with_label]:
            if name not in file:
                raise KeyError(f"{path.name} has no dataset {name!r}; it has {sorted(file)}")
        order = str(file.attrs.get("axis_order", ""))
        predicted = with_label and "label" in file and bool(file["label"].attrs.get("predicted", False))
        notes = [] if order else [f"{path.name}: no axis_order; taken as (x, y, z), slices last"]
        image = _zyx(file["image"][()], order or "xyz", path)
        label = _zyx(file["label"][()], order or "xyz", path) if with_label else None
        stored = file.attrs.get("geometry")
    if stored is not None:
        geometry = Geometry.from_json(json.loads(stored))
    else:
        geometry = Geometry(image.shape)
        notes.append(f"{path.name}: no spacing; taken as 1 mm, axes along the patient")
    if geometry.shape != image.shape or (label is not None and label.shape != image.shape):
        raise ValueError(f"{path.name}: image {image.shape}, geometry {geometry.shape} or label do not fit together")
    kept = None if label is None else Volume(label, geometry)
    return Hdf5Case(Volume(image, geometry), kept, tuple(notes), predicted)


def write_case(path: Path, image: Volume, label: Volume | None = None, predicted: bool = False) -> None:
    """Write one file as the published code expects it, (x, y, z), with geometry and axis order as attributes.

    Args:
        path: the file.
        image, label: on one grid.
        predicted: the label is a prediction; it is marked, so that nobody measures against it.

    Raises:
        ValueError: a label value above 255, which the layout cannot hold.
    """
    if label is not None and label.array.max() > 255:
        raise ValueError(f"{path.name}: label value {label.array.max()}; the layout holds values up to 255")
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("image", data=image.array.T.astype(np.float32), compression="gzip")
        if label is not None:
            stored = file.create_dataset("label", data=label.array.T.astype(np.uint8), compression="gzip")
            stored.attrs["predicted"] = predicted
        file.attrs["axis_order"] = "xyz"
        file.attrs["geometry"] = json.dumps(image.geometry.to_json())


def write_list(root: Path, name: str, cases: Iterable[str]) -> None:
    """Write a list of case names. Raises ValueError for a list that the layout does not have."""
    if name not in LISTS:
        raise ValueError(f"list {name!r}; the layout has {', '.join(LISTS)}")
    write_text(Path(root) / f"{name}.txt", "".join(f"{case}\n" for case in cases))


def _zyx(array: NDArray[Any], order: str, path: Path) -> NDArray[Any]:
    if array.ndim != 3:
        raise ValueError(f"{path.name}: {array.ndim}D dataset; 3D is needed")
    if sorted(order) != ["x", "y", "z"]:
        raise ValueError(f"{path.name}: axis_order {order!r}; an order of x, y and z is needed")
    return np.ascontiguousarray(array.transpose([order.index(axis) for axis in "zyx"]))
