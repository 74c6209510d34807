"""Label files as commands are given them: in any format, with the order in which overlapping segments win."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..image_io import write_volume
from .console import WRONG_USE, fail


def parsed_priority(priority: str | None) -> list[int] | None:
    """Label values, the strongest first, from `2,1`."""
    try:
        return None if priority is None else [int(word) for word in priority.split(",")]
    except ValueError as error:
        raise fail(f"--priority {priority}: give label values with commas between, e.g. 2,1", WRONG_USE) from error


@contextmanager
def as_volume_file(labels: Path) -> Iterator[Path]:
    """The label file itself, or the labels of a file of the HDF5 layout, written elsewhere for as long as they are
    read."""
    if labels.suffix != ".h5":
        yield labels
        return
    from ..tasks.layout import read_labelled_file

    _, label = read_labelled_file(labels)
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{labels.stem}.nrrd"
        write_volume(path, label)
        yield path
