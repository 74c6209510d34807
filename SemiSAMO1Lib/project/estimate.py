"""How long a training will take on this machine, said before it starts. numpy and the project alone: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..choices import preset_values
from ..costs import TRIED, WITH_TEACHER, Work, stage_seconds, width_of
from ..volume import Geometry

#: Seconds until the worker has imported, planned and read, and after the last round.
BEGINNING = 15.0


def estimate_seconds(
    scans: Sequence[Geometry],
    preset: str,
    step_s: float | None,
    rounds: int | None = None,
    iterations: int | None = None,
    on_gpu: bool = False,
) -> float | None:
    """Seconds that a training will take, within about a factor of two; None without scans or a measured machine.

    Args:
        scans: grids of all scans, the template's included.
        preset: quick, standard or thorough.
        step_s: what the probe measured.
        rounds, iterations: other than the preset's.
        on_gpu: the device that was measured is one.
    """
    if not scans or step_s is None:
        return None
    values: dict[str, Any] = preset_values(preset)
    largest = values["registration"]["largest_grid"]
    trained = np.array([min(scan.voxels, values["training_voxels"]) for scan in scans]) / 1e6
    registered = np.array([min(math.prod(scan.extent) / min(scan.spacing) ** 3, largest) for scan in scans]) / 1e6
    most = values["patch_voxels"] / 1e6
    patch = min(most, float(np.median(trained)))
    batch = max(1, min(4, int(most / (2 * patch))))  # of small scans a step sees more, as the plan has it
    links = max(0, min(values["neighbours"], len(scans) - 2))
    work = Work(
        cases=len(scans),
        registered=float(registered.sum()),
        trained=float(trained.sum()),
        whole=sum(scan.voxels for scan in scans) / 1e6,
        step=(1 + batch * WITH_TEACHER) * patch,
        rounds=values["rounds"] if rounds is None else rounds,
        iterations=values["iterations"] if iterations is None else iterations,
        passes=values["test_time_passes"],
        links=links,
        tried=TRIED if links else 0,
        width=width_of(values["filters"]),
    )
    return BEGINNING + sum(stage_seconds(work, step_s, on_gpu).values())


def in_words(seconds: float | None) -> str:
    """'about 3 minutes', 'about 2 hours'; rounded, because it is an estimate."""
    if seconds is None:
        return "unknown before set-up"
    if seconds < 90:
        return "about a minute"
    if seconds < 90 * 60:
        return f"about {max(2, round(seconds / 60))} minutes"
    return f"about {max(2, round(seconds / 3600))} hours"
