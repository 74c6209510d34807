"""How long a training will take on this machine, said before it starts. numpy and the project alone: no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..choices import preset_values
from ..volume import Geometry

#: Seconds of the probe's convolution step on the machine on which the costs were measured (two CPU cores).
REFERENCE_STEP_S = 0.045

#: On it, seconds per million voxels: registering a scan (and fixed ones), a training step, predicting once.
REGISTERING, PER_SCAN, STEP, PREDICTING = 12.0, 0.5, 1.7, 3.3

#: Carrying again what was carried badly, as a share of carrying all.
DETOURS = 0.5

#: Registering two scans with each other, and letting the neighbours of a scan vote.
LINKING, VOTING = 2.0, 1.5

#: Seconds until the worker has imported, planned and read, and after the last round.
BEGINNING = 15.0

#: Patches in a step: two pseudo-labelled ones, which a teacher sees too, and a labelled one.
PATCHES_SEEN = 2 * 4 / 3 + 1


def estimate_seconds(
    scans: Sequence[Geometry],
    preset: str,
    step_s: float | None,
    rounds: int | None = None,
    iterations: int | None = None,
) -> float | None:
    """Seconds that a training will take, within about a factor of two; None without scans or a measured machine.

    Args:
        scans: grids of all scans, the template's included.
        preset: quick, standard or thorough.
        step_s: what the probe measured.
        rounds, iterations: other than the preset's.
    """
    if not scans or step_s is None:
        return None
    values: dict[str, Any] = preset_values(preset)
    rounds = values["rounds"] if rounds is None else rounds
    iterations = values["iterations"] if iterations is None else iterations
    trained = np.array([min(scan.voxels, values["training_voxels"]) for scan in scans]) / 1e6
    largest = values["registration"]["largest_grid"]
    registered = np.array([min(math.prod(scan.extent) / min(scan.spacing) ** 3, largest) for scan in scans]) / 1e6
    patch = min(values["patch_voxels"] / 1e6, float(np.median(trained)))
    width = (values["filters"] / 16) ** 2
    registering = (1 + DETOURS) * REGISTERING * registered.sum() + PER_SCAN * len(scans)
    a_round = STEP * width * PATCHES_SEEN * patch * iterations
    a_round += PREDICTING * width * trained.sum() * values["test_time_passes"] + 0.1 * len(scans)
    if neighbours := max(0, min(values["neighbours"], len(scans) - 2)):
        a_round += VOTING * trained.sum()
        registering += (LINKING * neighbours + VOTING) * trained.sum()
    return float(BEGINNING + (registering + rounds * a_round) * step_s / REFERENCE_STEP_S)


def in_words(seconds: float | None) -> str:
    """'about 3 minutes', 'about 2 hours'; rounded, because it is an estimate."""
    if seconds is None:
        return "unknown before set-up"
    if seconds < 90:
        return "about a minute"
    if seconds < 90 * 60:
        return f"about {max(2, round(seconds / 60))} minutes"
    return f"about {max(2, round(seconds / 3600))} hours"
