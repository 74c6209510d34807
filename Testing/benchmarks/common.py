"""What the benchmarks share: where the real scans are, the machine in words, rows kept as they are made."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.config import TrainingConfig
from SemiSAMO1Lib.engine.data.hdf5_layout import write_case, write_list
from SemiSAMO1Lib.engine.refinement import write_pseudo_label
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.volume import Volume

#: Folder with `hippocampus` and `left_atrium`, each with images/ and labels/.
DATA = Path(os.environ.get("SEMISAMO1_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

#: Cohort -> scans of the pool (the template is one of them) and of the test, by sorted names.
SPLITS = {
    "left_atrium": (60, 20),
    "left_atrium_80": (80, 0),
    "hippocampus": (100, 95),
    "hippocampus_40": (40, 0),
    "phantoms": (16, 10),
}


def scans(cohort: str, count: int | None = None) -> list[Path]:
    """The first `count` scans of a cohort by name; `hippocampus_40` is a part of the hippocampus."""
    cohort = re.sub(r"_\d+$", "", cohort)
    found = sorted((DATA / cohort / "images").glob("*.nii.gz"))
    if not found:
        raise SystemExit(f"no scans in {DATA / cohort}; set SEMISAMO1_DATA to the folder of the cohorts")
    return found[:count]


def pool_of(cohort: str) -> list[Path]:
    """The scans of a cohort on which something may be chosen."""
    return scans(cohort, SPLITS[cohort][0])


def loaded(volume: Volume) -> Volume:
    """A scan that is in memory, for those who load it when they need it."""
    return volume


def learn_from_round_0(cohort: Cohort, config: TrainingConfig) -> None:
    """Make round 0's answers the pseudo-labels of a first round: a run without rounds needs none and makes none."""
    for case in cohort.ids:
        write_pseudo_label(cohort, 0, case, cohort.answer(0, case), config)


def reference_of(scan: Path) -> Path:
    return scan.parent.parent / "labels" / scan.name


def machine() -> dict[str, Any]:
    """The machine in words, for the tables."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older torch
    return {
        "cpu": able.get("cpu_name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of the code, `+` after it where files are changed; empty outside of a repository."""
    here = Path(__file__).resolve().parent

    def said(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    return said("rev-parse", "--short", "HEAD") + ("+" if said("status", "--porcelain", "--untracked-files=no") else "")


def measured_once(path: Path, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row that a file keeps, with its settings and the commit of the code; measured where there is none.

    Raises:
        SystemExit: the file holds a row of other settings.
    """
    if not path.exists():
        files.write_json(path, {**measure(), "settings": settings, "commit": commit()})
    row = dict(files.read_json(path))
    if row.get("settings") != settings:
        raise SystemExit(f"{path} was measured with {row.get('settings')}, not {settings}: give another folder")
    return row


def keep(row: dict[str, Any], rows: Path | None) -> None:
    """Print a row, with the commit of the code, and append it to a file: a long benchmark that is cut short loses
    nothing."""
    row = {**row, "commit": commit()}
    print(json.dumps(row), flush=True)
    if rows is not None:
        with open(rows, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def layout(cohort: str, count: int, root: Path) -> Path:
    """The first scans of a cohort in the HDF5 layout, z-scored as published; all but the first are in test.txt too."""
    names = []
    for scan in scans(cohort, count):
        image, label = read_volume(scan), read_volume(reference_of(scan))
        array = image.array.astype(np.float32)
        name = scan.name.split(".")[0]
        target = root / "data" / f"{name}.h5"
        if not target.exists():
            scaled = Volume((array - array.mean()) / array.std(), image.geometry)
            write_case(target, scaled, Volume(label.array.astype(np.uint8), image.geometry))
        names.append(name)
    write_list(root, "train", names)
    write_list(root, "test", names[1:])
    return root
