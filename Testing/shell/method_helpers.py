"""The HDF5 layout in miniature, and commands as a person types them, for the tests of the published protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from shell_runner import Shown, shell
from torch import Tensor

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder
from SemiSAMO1Lib.phantoms import Phantom, PhantomSettings, make_phantom

#: Exit codes, as the shell promises them.
DONE, FAILED, WRONG_USE = 0, 1, 2

#: Voxels so large that a run takes a second.
SMALL = PhantomSettings(spacing_mm=(5.0, 4.5, 4.5))

#: A network of four channels, arithmetic that is the same everywhere, the small SAM-Med3D.
TINY: dict[str, Any] = {
    "specialist": "dynunet",
    "filters": 4,
    "precision": "32-true",
    "checkpoint_seconds": 0,
    "registration": {"use_affine": False},
    "uncertainty_passes": 2,
    "generalists": {"architecture": "small"},
}


@dataclass(frozen=True)
class Run:
    """A finished run of `reproduce`."""

    root: Path
    output: Path
    shown: Shown


@dataclass(frozen=True)
class Trained:
    """A project whose current training is one by MIND-SSC prototypes alone."""

    project: Path
    config: Path
    shown: Shown

    @property
    def job(self) -> JobFolder:
        return JobFolder(self.project / "jobs" / self.shown.json()["job"])


def reproduce(root: Path, output: Path, *options: object, **changes: Any) -> Shown:
    """A tiny run: registration, one round of three iterations, unless the options say otherwise.

    Args:
        root: folder of the layout.
        output: where the run goes.
        options: of the command; they win.
        changes: of the configuration file.
    """
    config = output.parent / f"{output.name}.config.json"
    files.write_json(config, {**TINY, **changes})
    usual = ("--rounds", 1, "--iterations", 3, "--patch", 16, 16, 16, "--device", "cpu", "--generalist", "registration")
    return shell("reproduce", "--root", root, "--output", output, "--config", config, *usual, *options)


def phantom(number: int) -> Phantom:
    """A phantom with grey values as the published files have them: mean 0, deviation 1."""
    return make_phantom(number, 0, SMALL)


def zscored(array: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray((array - array.mean()) / array.std(), np.float32)


def write_published(path: Path, image: NDArray[Any], label: NDArray[Any] | None = None) -> None:
    """A file as the published code has it: `image` and `label`, (x, y, z), no attribute; the arrays are (z, y, x)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image.T, compression="gzip")
        if label is not None:
            file.create_dataset("label", data=label.T, compression="gzip")


def write_names(root: Path, name: str, names: Iterable[str]) -> None:
    (root / f"{name}.txt").write_text("".join(f"{one}\n" for one in names), encoding="utf-8")


def write_layout(root: Path, count: int = 3) -> Path:
    """p0 (labelled), p1, ... in train.txt; the last one again in val.txt and test.txt."""
    names = [f"p{number}" for number in range(count)]
    for number, name in enumerate(names):
        one = phantom(number)
        write_published(root / "data" / f"{name}.h5", zscored(one.image.array), one.label.array)
    write_names(root, "train", names)
    write_names(root, "val", names[-1:])
    write_names(root, "test", names[-1:])
    return root


def rewrite(root: Path, name: str, **datasets: NDArray[Any] | None) -> None:
    """Replace datasets of a case, given as they lie in the file, (x, y, z); None removes one."""
    with h5py.File(root / "data" / f"{name}.h5", "r+") as file:
        for key, value in datasets.items():
            del file[key]
            if value is not None:
                file.create_dataset(key, data=value)


def stored(root: Path, name: str, key: str = "label") -> NDArray[Any]:
    """A dataset as it lies in the file, (x, y, z)."""
    with h5py.File(root / "data" / f"{name}.h5", "r") as file:
        array: NDArray[Any] = file[key][()]
        return array


def weights_of(output: Path, number: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(output / "weights" / f"round-{number}.pth", weights_only=True)
    return state


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bitwise."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def curves(folder: Path) -> dict[str, list[float]]:
    """Every curve below a folder, as TensorBoard reads them: name -> values in the order of iterations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [one.value for one in found.Scalars(name)] for name in found.Tags()["scalars"]}
