"""The files between the stages of a run. A stage leaves whole files behind; a resumed run finds and skips them."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ... import files

#: Folders of what stages leave to each other: it can be made again from what a finished run keeps, which is its plan,
#: weights, transforms, library, and what was found out about the whole cohort.
_ON_THE_WAY = (
    *("images", "propagation", "confidence", "probabilities", "pseudo", "weights-of-voxels", "signatures"),
    *("links", "votes", "neighbours", "behind-by-case", "answers", "passes", "signals"),
    *("checks", "checks-of-answers", "uncertainty", "distances", "labelled", "looked-at"),
)


class SavedArray:
    """A saved array that is opened for each look at it: hundreds of them hold no file open between two looks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        there = _mapped(path)
        self.shape: tuple[int, ...] = there.shape
        self.ndim: int = there.ndim

    def __getitem__(self, where: Any) -> NDArray[Any]:
        """A part of it, read into memory."""
        return np.array(_mapped(self._path)[where])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        there = _mapped(self._path)
        return np.array(there, dtype) if copy else np.asarray(there, dtype)


def _mapped(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    return array


class Store:
    """Named arrays, tensors and JSON below one folder; every file is written atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, *names: str) -> Path:
        return self.folder.joinpath(*names)

    def has(self, *names: str) -> bool:
        return self.path(*names).exists()

    def save_array(self, array: NDArray[Any], *names: str) -> None:
        """Save one array as .npy, to be read whole or in parts."""
        with files.atomic_path(self.path(*names)) as temporary, open(temporary, "wb") as stream:
            np.save(stream, np.ascontiguousarray(array))

    def array(self, *names: str) -> NDArray[Any]:
        """A saved array, mapped from disk: only the parts that are used are read."""
        return _mapped(self.path(*names))

    def saved(self, *names: str) -> SavedArray:
        """The same, opened for each look at it: for those that are held by the hundred."""
        return SavedArray(self.path(*names))

    def save_tensors(self, tensors: Mapping[str, Any], *names: str) -> None:
        """Save tensors and plain values; they are loaded again without running any code."""
        with files.atomic_path(self.path(*names)) as temporary:
            torch.save(dict(tensors), temporary)

    def tensors(self, *names: str) -> dict[str, Any]:
        path = self.path(*names)
        try:
            loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be used: it is damaged, or holds program code, which is never run. "
                "Only files that this program wrote are loaded; remove it and resume to make it again."
            ) from error
        return loaded

    def save_json(self, value: Any, *names: str) -> None:
        files.write_json(self.path(*names), value)

    def json(self, *names: str) -> Any:
        return json.loads(self.path(*names).read_text(encoding="utf-8"))

    def once(self, make: Callable[[], Any], *names: str) -> Any:
        """The JSON value of a stage: computed and saved the first time, read afterwards."""
        if not self.has(*names):
            self.save_json(make(), *names)
        return self.json(*names)

    def keep_what_is_needed(self) -> None:
        """The run has ended: remove what can be made again."""
        for name in _ON_THE_WAY:
            shutil.rmtree(self.path(name), ignore_errors=True)

    def remove(self, *names: str) -> None:
        self.path(*names).unlink(missing_ok=True)
