"""What this Python has and lacks for the worker. Standard library only; every import is tried by itself."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Package -> (import name, needed for, how to get it).
PACKAGES = {
    "torch": ("torch", "the method", "pip install torch"),
    "monai": ("monai", "networks, inference", "pip install 'monai>=1.6'"),
    "lightning-fabric": ("lightning_fabric", "devices, precision", "pip install lightning-fabric"),
    "SimpleITK": ("SimpleITK", "every image file", "pip install SimpleITK"),
    "numpy": ("numpy", "arrays", "pip install numpy"),
    "scipy": ("scipy", "distance transforms", "pip install scipy"),
    "h5py": ("h5py", "HDF5 layout", "pip install h5py"),
    "pydantic": ("pydantic", "configuration", "pip install pydantic"),
    "matplotlib": ("matplotlib", "report", "pip install matplotlib"),
    "Jinja2": ("jinja2", "report", "pip install Jinja2"),
    "typer": ("typer", "the shell (optional)", "pip install 'semisamo1[shell]'"),
    "rich": ("rich", "the shell (optional)", "pip install 'semisamo1[shell]'"),
    "medpy": ("medpy.metric", "published metrics (optional)", "pip install 'semisamo1[metrics]'"),
    "highdicom": ("highdicom", "DICOM export (optional)", "pip install 'semisamo1[export]'"),
    "tensorboard": ("tensorboard", "curves (optional)", "pip install 'semisamo1[curves]'"),
}

OPTIONAL = ("typer", "rich", "medpy", "highdicom", "tensorboard")


def examine() -> dict[str, Any]:
    """Versions, devices, memory, write access and what is missing, JSON-able; never raises for a broken package."""
    packages = {name: _try(module) for name, (module, _, _) in PACKAGES.items()}
    missing = [name for name, found in packages.items() if "version" not in found and name not in OPTIONAL]
    return {
        "ready": not missing and sys.version_info >= (3, 11),
        "python": {"version": platform.python_version(), "executable": sys.executable, "needed": ">=3.11"},
        "system": {"name": platform.platform(), "cores": os.cpu_count(), "memory_bytes": _memory()},
        "packages": packages,
        "missing": [{"package": m, "for": PACKAGES[m][1], "get": PACKAGES[m][2]} for m in missing],
        "devices": _devices(),
        "write_access": _write_access(),
        "free_disk_bytes": _free_disk(),
    }


def print_doctor() -> None:
    """Print the examination as one JSON object."""
    print(json.dumps(examine(), indent=2))


def _try(module: str) -> dict[str, Any]:
    try:
        found = importlib.import_module(module)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    top = sys.modules[module.split(".", maxsplit=1)[0]]
    version = getattr(found, "__version__", None) or getattr(top, "__version__", None) or _installed_version(module)
    return {"version": str(version or "unknown")}


def _installed_version(module: str) -> str | None:
    from importlib import metadata

    for name, (import_name, _, _) in PACKAGES.items():
        if import_name == module:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                return None
    return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"name": "cpu"}]
    try:
        torch = importlib.import_module("torch")
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            title = torch.cuda.get_device_name(number)
            devices.append({"name": f"cuda:{number}", "title": title, "free_bytes": free, "total_bytes": total})
    except Exception as error:
        devices.append({"name": "cuda", "error": f"{type(error).__name__}: {error}"})
    return devices


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _write_access() -> dict[str, Any]:
    found = {}
    places = {"current folder": Path.cwd, "temporary folder": lambda: Path(tempfile.gettempdir())}
    for name, place in places.items():
        folder = None
        try:
            folder = place()
            with tempfile.TemporaryFile(dir=folder):
                found[name] = {"folder": str(folder), "writable": True}
        except OSError as error:
            found[name] = {"folder": str(folder), "writable": False, "error": str(error)}
    return found


def _free_disk() -> int | None:
    try:
        return shutil.disk_usage(Path.cwd()).free
    except OSError:
        return None
