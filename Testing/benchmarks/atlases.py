"""What several labelled scans gain in the registration: the template alone, the nearest three of them, all of them.

    python Testing/benchmarks/atlases.py hippocampus left_atrium

The labelled scans are the first by name, the first of them the template; the scored ones are those that follow. Rows:
the template alone; the three that look most like the case; all; each with and without the fit of each scan, at a place
and as a whole (`locality`, `worse`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, machine, reference_of, scans

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.data.grids import resample_labels
from SemiSAMO1Lib.engine.evaluation.metrics import dice
from SemiSAMO1Lib.engine.evaluation.paired import paired_difference
from SemiSAMO1Lib.engine.propagation.descriptors import working_spacing
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator, RegistrationSettings
from SemiSAMO1Lib.image_io import read_geometry, read_volume
from SemiSAMO1Lib.volume import Volume

#: So large that every labelled scan counts alike at every place.
EVERYWHERE = 1e9


def labelled_scan(scan: Path) -> LabelledCase:
    label = read_volume(reference_of(scan))
    return LabelledCase(
        scan.name.split(".")[0], read_volume(scan), Volume(label.array.astype(np.uint8), label.geometry)
    )


def scored(
    labelled: list[LabelledCase], cases: list[Path], settings: RegistrationSettings, spacing: float
) -> dict[str, float]:
    """Case -> mean Dice over the labels, on its own grid."""
    classes = int(labelled[0].label.array.max()) + 1
    propagator = RegistrationPropagator(spacing, classes, torch.device("cpu"), settings)
    prepared = propagator.prepare(labelled)
    found = {}
    for case in cases:
        volume, reference = read_volume(case), read_volume(reference_of(case))
        result = propagator.propagate(prepared, volume, volume.geometry)
        said = result.probabilities.argmax(0).numpy()
        truth = resample_labels(reference, volume.geometry)
        found[case.name] = float(np.mean([dice(said == value, truth == value) for value in range(1, classes)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohorts", nargs="+", choices=("hippocampus", "left_atrium"))
    parser.add_argument("--labelled", type=int, default=6)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--grid", type=int, default=300_000, help="voxels of the registration's grid (quick: 300 000)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for cohort in options.cohorts:
        chosen = scans(cohort, options.labelled + options.cases)
        labelled = [labelled_scan(scan) for scan in chosen[: options.labelled]]
        cases = chosen[options.labelled :]
        spacing = working_spacing([read_geometry(scan) for scan in chosen], options.grid)
        ways: dict[str, tuple[list[LabelledCase], dict[str, Any]]] = {
            "template alone": (labelled[:1], {}),
            "nearest three, all places alike": (labelled, {"locality": EVERYWHERE, "worse": EVERYWHERE}),
            "nearest three": (labelled, {}),
            "all, all places alike": (
                labelled,
                {"atlases": options.labelled, "locality": EVERYWHERE, "worse": EVERYWHERE},
            ),
            "all": (labelled, {"atlases": options.labelled}),
        }
        alone: dict[str, float] = {}
        for name, (given, changes) in ways.items():
            found = scored(given, cases, RegistrationSettings(**changes), spacing)
            alone = alone or found
            gain = paired_difference(found, alone)
            keep(
                {
                    "benchmark": "atlases",
                    "cohort": cohort,
                    "way": name,
                    "labelled": len(given),
                    "cases": len(cases),
                    "mean_dice": round(float(np.mean(list(found.values()))), 4),
                    "worst_dice": round(min(found.values()), 4),
                    "gain": [round(value, 4) for value in (gain.mean, gain.low, gain.high)],
                    **machine(),
                },
                options.rows,
            )


if __name__ == "__main__":
    main()
