"""What a person may choose for a training, known without the engine: presets, learners, generalists. Standard library.

The engine takes its presets from here; a test holds the names against its registries.
"""

from __future__ import annotations

from typing import Any

#: Parameters of a preset that differ from `STANDARD`.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "rounds": 2,
        "iterations": 160,
        "training_voxels": 300_000,
        "test_time_passes": 1,
        "neighbours": 5,
        "registration": {"largest_grid": 300_000},
    },
    "standard": {},
    "thorough": {
        "iterations": 1_000,
        "training_voxels": 3_000_000,
        "patch_voxels": 500_000,
        "filters": 32,
        "test_time_passes": 4,
    },
}

#: The parameters that decide how long a training takes, of the standard preset.
STANDARD: dict[str, Any] = {
    "rounds": 3,
    "iterations": 400,
    "training_voxels": 1_000_000,
    "patch_voxels": 200_000,
    "filters": 16,
    "test_time_passes": 2,
    "neighbours": 8,
    "registration": {"largest_grid": 2_000_000},
}

#: Learner -> how it is called in the literature.
LEARNERS = {
    "mean_teacher": "Mean teacher (MT)",
    "uncertainty_mean_teacher": "Uncertainty-aware mean teacher (UAMT)",
    "adversarial": "Adversarial (DAN)",
    "dual_task": "Dual-task consistency (DTC)",
    "semisam": "SemiSAM on mean teacher",
    "semisam_uncertainty": "SemiSAM on uncertainty-aware mean teacher",
    "semisam_plus": "SemiSAM+",
    "supervised_only": "Template only (baseline)",
    "pseudo_only": "Pseudo-labels only (baseline)",
}

#: Published name of a learner -> its name here.
SHORT_NAMES = {
    "mt": "mean_teacher",
    "uamt": "uncertainty_mean_teacher",
    "dan": "adversarial",
    "dtc": "dual_task",
    "semisam-uamt": "semisam_uncertainty",
    "semisam+": "semisam_plus",
    "supervised": "supervised_only",
    "pseudo": "pseudo_only",
}

#: Generalist -> what it needs.
GENERALISTS = {
    "registration": "Registration",
    "fused": "Registration and features",
    "mind": "Self-similarity features (MIND)",
    "sam-med3d": "SAM-Med3D (needs its checkpoint)",
}


def full_name(name: str) -> str:
    """The name of a learner here, from that or the published one."""
    return SHORT_NAMES.get(name, name)


def preset_values(preset: str) -> dict[str, Any]:
    """All of STANDARD's parameters as a preset has them. Raises KeyError for an unknown preset."""
    return {**STANDARD, **PRESETS[preset]}
