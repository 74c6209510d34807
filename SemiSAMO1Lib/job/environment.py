"""The worker's own Python environment: where it lies, the commands that build it, and the clean surroundings it needs.

Nothing is run here: the panel runs the commands one after the other and shows what they print. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Oldest Python of the engine.
OLDEST = (3, 11)

#: Pythons by name, the best tried ones first.
_NAMED = ("python3.12", "python3.13", "python3.11", "python3.14")

#: torch first and alone: any other order lets a package pull another torch.
TORCH = "torch==2.13.0"

#: Writes DICOM SEG. Not for Slicer's own Python, where it could replace the pydicom that Slicer ships.
DICOM = "highdicom>=0.24"

#: Where wheels of torch with CUDA are for Windows; PyPI has them for Linux alone.
CUDA_WHEELS = "https://download.pytorch.org/whl/cu126"

#: Variables by which Slicer's own Python would leak into another one, which then crashes.
_LEAKING = ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONNOUSERSITE", "VIRTUAL_ENV")


class NoPython(RuntimeError):
    """No Python that could run the engine was found; the message says what to install."""


@dataclass(frozen=True)
class Command:
    """One step of a set-up: what it does, in words, what is run, and what is tried where that fails."""

    title: str
    arguments: tuple[str, ...]
    otherwise: tuple[tuple[str, ...], ...] = ()

    def next_try(self) -> Command | None:
        """The step with the next thing to try; None when there is none."""
        return Command(self.title, self.otherwise[0], self.otherwise[1:]) if self.otherwise else None


def sizes(platform: str = sys.platform) -> str:
    """What is said before anything is downloaded: PyTorch for Linux always brings the libraries for GPUs."""
    if platform == "darwin":
        return "about 0.5 GB to download and 2 GB on the disk"
    if platform == "win32":
        return "about 1 GB to download and 3 GB on the disk (with an NVIDIA GPU about 3 GB and 8 GB)"
    return "about 3 GB to download and 8 GB on the disk"


def this_python(executable: str = sys.executable, which: Callable[[str], str | None] = shutil.which) -> Path:
    """The Python that this process runs in. In the Slicer application, which may call itself the executable, that is
    PythonSlicer, the launcher of its own Python.

    Raises:
        NoPython: the application has none; to start the application instead would open a second Slicer.
    """
    if "python" in Path(executable).name.casefold():
        return Path(executable)
    around = Path(executable or ".").absolute().parents[:2]  # beside it, or in the bin of macOS' bundle
    for name in ("PythonSlicer", *(str(one / part) for one in around for part in ("PythonSlicer", "bin/PythonSlicer"))):
        if program := which(name):
            return Path(program)
    raise NoPython("PythonSlicer, the Python of Slicer, was not found beside Slicer: install Slicer anew.")


def own_folder() -> Path:
    """Where the worker's own environment lies on this computer."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "SemiSAMO1" / "environment"


def python_of(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def building(
    folder: Path,
    requirements: Path,
    constraints: Path,
    wheels: Path | None = None,
    which: Callable[[str], str | None] = shutil.which,
) -> list[Command]:
    """The commands that make the worker's own environment in `folder` from nothing.

    Args:
        folder: is replaced when it is there.
        requirements: what the engine needs besides torch.
        constraints: exact versions.
        wheels: a folder of wheels for a computer without a network; None: from the network.
        which: finds a program by name.

    Raises:
        NoPython: neither a Python of at least 3.11 nor uv is here.
    """
    # a name that is found need not work: a manager of versions leaves names for Pythons that are not switched on
    found = [program for name in _NAMED if (program := which(name))]
    tries: list[tuple[str, ...]] = [(program, "-m", "venv", "--clear", str(folder)) for program in found]
    if uv := which("uv"):
        tries.append((uv, "venv", "--seed", "--clear", "--python", "3.12", str(folder)))
    if launcher := which("py"):
        tries.append((launcher, "-3.12", "-m", "venv", "--clear", str(folder)))
    if not tries:
        raise NoPython(
            f"No Python {'.'.join(map(str, OLDEST))} or newer was found on this computer, and no uv that could fetch "
            "one. Install Python 3.12 from https://www.python.org (or uv from https://docs.astral.sh/uv), or name "
            "another Python."
        )
    python = str(python_of(folder))
    make = Command("making an environment", tries[0], tuple(tries[1:]))
    return [make, *installing(python, requirements, constraints, wheels, which)]


def installing(
    python: str,
    requirements: Path,
    constraints: Path,
    wheels: Path | None = None,
    which: Callable[[str], str | None] = shutil.which,
    platform: str = sys.platform,
) -> list[Command]:
    """The commands that put torch, then the rest and what writes DICOM SEG, into an environment that is there; see
    `building`."""
    source = ("--no-index", "--find-links", str(wheels)) if wheels is not None else ()
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *source)
    pinned = ("--constraint", str(constraints))
    gpu = platform == "win32" and wheels is None and which("nvidia-smi") is not None
    cuda = ("--extra-index-url", CUDA_WHEELS) if gpu else ()
    return [
        Command("installing PyTorch", (*pip, *pinned, *cuda, TORCH)),
        Command("installing the other packages", (*pip, *pinned, "--requirement", str(requirements), DICOM)),
    ]


def probing(python: str, device: str = "auto") -> Command:
    """The command that tries in a Python what a training needs; it prints one JSON line."""
    worker = Path(__file__).resolve().parents[1] / "worker.py"
    return Command("trying it", (python, "-u", str(worker), "--probe", device))


def clean(environment: Mapping[str, str], python: str, own_python: str = sys.executable) -> dict[str, str]:
    """Surroundings for a worker: another Python must see nothing of Slicer's; Slicer's own keeps what it needs."""
    kept = dict(environment)
    if Path(python).absolute() != Path(own_python).absolute():  # not resolved: environments share one Python by links
        for name in _LEAKING:
            kept.pop(name, None)
        kept["PYTHONNOUSERSITE"] = "1"
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
