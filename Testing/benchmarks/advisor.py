"""Is the recommended template better than one taken at random? Registration alone, on real scans.

    python Testing/benchmarks/advisor.py hippocampus --cases 40
    python Testing/benchmarks/advisor.py left_atrium --cases 20

The advisor sees the images. Then the recommended scan's label, and those of random others, are carried to every other
scan by registration (the quick preset's working grid); the references score them. Each template is scored on all scans
but itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import keep, machine, reference_of, scans

from SemiSAMO1Lib import files
from SemiSAMO1Lib.choices import preset_values
from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.evaluation.metrics import dice
from SemiSAMO1Lib.engine.propagation.descriptors import working_spacing
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.project.advisor import Frame, rank, sketch
from SemiSAMO1Lib.volume import Volume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", choices=("hippocampus", "left_atrium"))
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--random", type=int, default=10, help="templates taken at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="rows are kept here, and not computed again")
    options = parser.parse_args()
    found = scans(options.cohort)[options.first : options.first + options.cases]
    names = [scan.name.split(".")[0] for scan in found]
    volumes = [read_volume(scan) for scan in found]
    labels = [Volume(one.array.astype(np.uint8), one.geometry) for one in map(read_volume, map(reference_of, found))]
    frame = Frame.of([one.geometry for one in volumes])
    ranking = [one.case for one in rank({n: sketch(v, frame) for n, v in zip(names, volumes, strict=True)})]
    drawn = np.random.default_rng(options.seed).permutation([name for name in names if name != ranking[0]])
    done = files.read_lines(options.rows)[0] if options.rows and options.rows.exists() else []
    means = {row["template"]: row["mean_dice"] for row in done if row["cohort"] == options.cohort}
    for template in [ranking[0], *drawn[: options.random].tolist()]:
        if template not in means:
            means[template] = carried(names.index(template), volumes, labels)
            row = {"cohort": options.cohort, "template": template, "mean_dice": means[template]}
            keep({"benchmark": "advisor", **row, "recommended": template == ranking[0], **machine()}, options.rows)
    random = [means[name] for name in drawn[: options.random]]
    print(f"recommended {ranking[0]}: {means[ranking[0]]:.4f}")
    print(f"random: mean {np.mean(random):.4f}, best {max(random):.4f}, worst {min(random):.4f}")


def carried(template: int, volumes: list[Volume], labels: list[Volume]) -> float:
    """Mean Dice of the template's label, carried to every other scan."""
    classes = int(max(label.array.max() for label in labels)) + 1
    largest = preset_values("quick")["registration"]["largest_grid"]
    spacing = working_spacing([one.geometry for one in volumes], largest)
    propagator = RegistrationPropagator(spacing, classes, torch.device("cpu"))
    prepared = propagator.prepare([LabelledCase("template", volumes[template], labels[template])])
    values = []
    for number, (volume, label) in enumerate(zip(volumes, labels, strict=True)):
        if number != template:
            answer = propagator.propagate(prepared, volume, volume.geometry).probabilities.argmax(0).numpy()
            values.append(np.mean([dice(answer == value, label.array == value) for value in range(1, classes)]))
    return round(float(np.mean(values)), 4)


if __name__ == "__main__":
    main()
