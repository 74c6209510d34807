"""Some steps of every learner in one of several processes: the first prints the losses and, of all, the averages.

torchrun --standalone --nproc-per-node 3 Testing/engine/steps_together.py
"""

from __future__ import annotations

import json

import numpy as np
import torch
from engine_helpers import smooth_noise, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.cohort import signed_distances
from SemiSAMO1Lib.engine.data.patches import TrainingCase, find_centres
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.learners import LEARNERS, Learner, learner_named
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.engine.sampling import PatchSource
from SemiSAMO1Lib.tasks.together import leave

STEPS = 3
SHAPE = (16, 16, 16)
#: Of those that ask a SAM-Med3D: a small one with random weights, whose answers count as much as the labels.
ASKED = {"generalists": {"checkpoint": "random", "architecture": "small"}, "assistance": {"weight": 1.0}}


def case(seed: int) -> TrainingCase:
    image = smooth_noise(SHAPE, seed)
    label = np.digitize(smooth_noise(SHAPE, seed + 1), (0.0, 0.8)).astype(np.uint8)
    centres = find_centres(label, 3, np.random.default_rng(seed))
    weight = np.ones(SHAPE, np.float32)
    return TrainingCase(image, label, weight, centres, 1.0, signed_distances(label, 3, (1.0, 1.0, 1.0)))


def average_of(learner: Learner) -> torch.Tensor:
    """All parameters of the running average in a row."""
    return torch.cat([one.detach().flatten().clone() for one in learner.inference_model().parameters()])


def main() -> None:
    torch.set_num_threads(1)
    fabric = make_fabric("cpu", "32-true", together=True)
    ranks = Ranks(fabric)
    plan = tiny_plan(batch=6, labelled=6)
    config = tiny_config(iterations=10, optimizer="sgd", learning_rate=0.01, **ASKED)
    found = {}
    for name in LEARNERS:
        fabric.seed_everything(7, workers=False, verbose=False)
        learner = learner_named(name)(plan, config)
        learner.setup(fabric)
        source = PatchSource([case(0), case(2)], [case(4), case(6), case(8)], plan, config, 1, ranks.count)
        before = average_of(learner)
        losses = []
        for iteration in range(STEPS):
            generator = torch.Generator().manual_seed(iteration)
            losses.append(learner.step(source(iteration, ranks.number), 0.5, generator))
        average = average_of(learner)
        averages = fabric.all_gather(average).reshape(ranks.count, -1)
        apart = float((averages - averages[0]).abs().max())
        found[name] = {"losses": losses, "averages_apart": apart, "average": average[:: len(average) // 200].tolist()}
        found[name]["moved"] = float((average - before).abs().max())
    if ranks.first:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    leave(0)  # as the program does: torch's threads may abort a process that ends in the orderly way
