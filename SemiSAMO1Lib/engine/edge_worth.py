"""Whether grey values near borders bring a network's labels nearer to those that a person drew.

People do not draw every border where the grey values change most: the hippocampus' lies a voxel or two beside. A
network learns where they draw it; what the grey values say then leads it away. The labelled scans tell: their networks'
labels are moved by the grey values as answers are (`edges.py`), and compared with what was drawn.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from lightning_fabric import Fabric

from .cohort import Cohort
from .config import TrainingConfig
from .data.patches import TrainingCase
from .data.store import Store
from .edges import by_edges
from .evaluation.metrics import dice
from .inference.ensemble import predicted_where_it_fits
from .learners import Learner
from .observer import Observer
from .ranks import Ranks

#: Labelled scans that are asked, at most: the first ones.
ASKED = 4

#: Grey values have a say as long as they take no more of the labels' Dice than this. Measured: 0.006 to 0.012 where
#: they harm a cohort (hippocampus), and a gain of 0.0005 and 0.0007 where they do not (left atrium, phantoms); a
#: network that has learned its template nearly by heart loses as much where they do no harm (docs/experiments.md).
TOLERANCE = 0.003


def judge_grey_values(
    cohort: Cohort, number: int, learner: Learner, config: TrainingConfig, fabric: Fabric, observer: Observer
) -> None:
    """Keep what grey values do to the last round's network on the labelled scans: mean Dice without and with them."""

    def looked_at() -> object:
        cases = cohort.labelled_cases(config.seed)[:ASKED]
        found = np.array([_with_and_without(cohort, case, learner, config, fabric, observer) for case in cases])
        without, with_them = found.mean(0)
        return {"without": round(float(without), 4), "with": round(float(with_them), 4)}

    if config.edge_weight > 0 and number == config.rounds:
        Ranks(fabric).once(partial(cohort.store.once, looked_at, "edges", f"{number}.json"))


def edge_weight_of(store: Store, number: int, config: TrainingConfig) -> float:
    """The weight of grey values in a round's answers: that of the configuration, or 0 where they lead the round's
    network away from what was drawn. Before the last round, and where nobody looked, that of the configuration:
    pseudo-labels are the better for it (docs/experiments.md)."""
    names = ("edges", f"{number}.json")
    if number < config.rounds or not store.has(*names):  # looked for no earlier: see `Ranks.as_first`
        return config.edge_weight
    found = store.json(*names)
    return config.edge_weight if found["with"] >= found["without"] - TOLERANCE else 0.0


def _with_and_without(
    cohort: Cohort, case: TrainingCase, learner: Learner, config: TrainingConfig, fabric: Fabric, observer: Observer
) -> tuple[float, float]:
    """Mean Dice of a labelled scan's classes by the network, without and with the grey values' say."""
    plan, image = cohort.plan, np.asarray(case.image, np.float32)
    model = learner.inference_model()
    said, _ = predicted_where_it_fits(model, image, plan, fabric, 1, config.seed, observer, "a labelled scan")
    known, wanted = np.asarray(case.weight) > 0, np.asarray(case.target)
    there = [value for value in range(1, plan.classes) if (wanted == value).any()]
    moved = by_edges(said, image, plan.spacing, config.edge_weight)
    without, with_them = (
        float(np.mean([dice((label == value) & known, (wanted == value) & known) for value in there])) if there else 1.0
        for label in (said.argmax(0), moved.argmax(0))
    )
    return without, with_them
