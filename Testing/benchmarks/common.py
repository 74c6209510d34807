"""What the benchmarks share: where the real scans are, the machine in words, rows kept as they are made."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

#: Folder with `hippocampus` and `left_atrium`, each with images/ and labels/.
DATA = Path(os.environ.get("SEMISAMO1_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def scans(cohort: str, count: int | None = None) -> list[Path]:
    """The first `count` scans of a cohort by name."""
    found = sorted((DATA / cohort / "images").glob("*.nii.gz"))
    if not found:
        raise SystemExit(f"no scans in {DATA / cohort}; set SEMISAMO1_DATA to the folder of the cohorts")
    return found[:count]


def reference_of(scan: Path) -> Path:
    return scan.parent.parent / "labels" / scan.name


def machine() -> dict[str, Any]:
    """The machine in words, for the tables."""
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep(row: dict[str, Any], rows: Path | None) -> None:
    """Print a row and append it to a file, so that a long benchmark that is cut short loses nothing."""
    print(json.dumps(row), flush=True)
    if rows is not None:
        with open(rows, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
