"""Features are computed once per scan and kept: HDF5 files named by what they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import h5py
import numpy as np

from ...files import atomic_path
from ...volume import Geometry, Volume
from .base import FeatureMap, Generalist


class CachedFeatures:
    """A generalist whose features are read from a folder when they are there.

    A file's name is a hash of model, weights, preprocessing and the scan's voxels and place; a changed scan or another
    checkpoint never meets features that are not its own. Files may be removed at any time.
    """

    def __init__(self, generalist: Generalist, folder: Path | None) -> None:
        """
        Args:
            generalist: computes what is missing.
            folder: where the files lie; None: nothing is kept.
        """
        self.generalist = generalist
        self.folder = folder
        self.computed = 0

    @property
    def key(self) -> str:
        return self.generalist.key

    def features(self, volume: Volume) -> FeatureMap:
        path = None if self.folder is None else self.folder / f"{self._name(volume)}.h5"
        if path is not None and path.exists():
            try:
                return _read(path)
            except (OSError, KeyError, ValueError, TypeError, RuntimeError):
                path.unlink(missing_ok=True)  # damaged: computed anew
        found = self.generalist.features(volume)
        self.computed += 1
        if path is not None:
            with contextlib.suppress(OSError):  # a full disk or a read-only folder: they are computed again next time
                _write(path, found)
        return found

    def _name(self, volume: Volume) -> str:
        digest = hashlib.sha256(self.key.encode())
        digest.update(json.dumps(volume.geometry.to_json(), sort_keys=True).encode())
        digest.update(str(volume.array.dtype).encode())
        digest.update(np.ascontiguousarray(volume.array).data)
        return digest.hexdigest()


def _read(path: Path) -> FeatureMap:
    with h5py.File(path, "r") as file:
        geometry = Geometry.from_json(json.loads(file.attrs["geometry"]))
        return FeatureMap(geometry, file["channels"][()], file["weight"][()])


def _write(path: Path, found: FeatureMap) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("channels", data=found.channels, compression="gzip", fletcher32=True)
        file.create_dataset("weight", data=found.weight, compression="gzip", fletcher32=True)
        file.attrs["geometry"] = json.dumps(found.geometry.to_json())
