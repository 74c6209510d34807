"""Round 0 alone, by every way of carrying the label: registration, prototypes, their fusion.

    python Testing/benchmarks/generalists.py --cases 20 --rows generalists.jsonl

Dice on each case's own grid, hippocampus, template = the first scan by name (and the next two, where three are).
SAM-Med3D has no weights here: its rows run with random ones (small configuration), to show the mechanism;
--checkpoint FILE measures the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import keep, loaded, machine, reference_of, scans

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.config import make_config
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.refinement.acceptance import mean_dice
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.volume import Volume

#: Labelled scans of the row with most of them; none of these is scored in any row.
MOST_LABELLED = 3


def variants(checkpoint: str | None) -> list[tuple[str, dict[str, Any], int]]:
    """Generalist, its settings, and how many scans are labelled."""
    weights = {"checkpoint": checkpoint} if checkpoint else {"checkpoint": "random", "architecture": "small"}
    published = {"preprocessing": "released", "coverage": "centre", "upsampling": "nearest"}
    return [
        ("registration", {}, 1),
        ("mind", {}, 1),
        ("mind", {"upsampling": "nearest"}, 1),
        ("mind", {"prototypes": 5}, 1),
        ("mind", {"prototypes": 20}, 1),
        ("mind", {"prototypes": 20}, 3),
        ("fused", {"prototypes": 20}, 1),
        ("fused", {**weights}, 1),
        ("sam-med3d", {**weights}, 1),
        ("sam-med3d", {**weights, "prototypes": 5}, 1),
        ("sam-med3d", {**weights, **published}, 1),
        ("sam-med3d", {**weights, **published, "label_cells": "nearest"}, 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20, help="scans, the template included")
    parser.add_argument("--checkpoint")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    files = scans("hippocampus", options.cases)
    volumes = [read_volume(file) for file in files]
    labels = [read_volume(reference_of(file)).array.astype(np.uint8) for file in files]
    first, *further = [
        LabelledCase(f"template {n}", v, Volume(labels[n], v.geometry)) for n, v in enumerate(volumes[:MOST_LABELLED])
    ]
    # the same scans are scored in every row, whether the further labels are used or not
    cases = [EngineCase(str(n), v.geometry, partial(loaded, v)) for n, v in enumerate(volumes) if n >= MOST_LABELLED]
    for generalist, settings, count in variants(options.checkpoint):
        row = {"benchmark": "generalists", "generalist": generalist, **settings, "cases": options.cases}
        try:
            measured = _measured(generalist, settings, [first, *further[: count - 1]], cases, labels)
        except ValueError as error:  # a way that cannot carry these labels says so: that is its row
            measured = {"refused": str(error)}
        keep({**row, "labelled": count, **measured, **machine()}, options.rows)


def _measured(
    generalist: str,
    settings: dict[str, Any],
    labelled: list[LabelledCase],
    cases: list[EngineCase],
    labels: list[np.ndarray],
) -> dict[str, Any]:
    config = make_config("quick", rounds=0, generalist=generalist, generalists=settings, device="cpu")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        found = list(run(cases, labelled, 3, config, store, Silent()))
        facts = store.json("propagation", f"{cases[0].id}.json")
    dice = [mean_dice(one.prediction.array, labels[int(one.case_id)], 3) for one in found]
    return {
        "mean_dice": round(float(np.mean(dice)), 4),
        "worst_dice": round(float(np.min(dice)), 4),
        "reliability": facts.get("reliability"),
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    main()
