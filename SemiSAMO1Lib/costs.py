"""What the stages of a training usually cost: for the estimate before it and for its progress. Standard library.

The figures are of two cores of a processor that multiplies bfloat16 in hardware, on which the probe's convolution step
takes `REFERENCE_STEP_S`; a slower processor is slower in everything. A GPU is faster in the network alone: registration
and votes are many small steps there, which the processor sets going one after the other (docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: Seconds of the probe's convolution step on the machine on which the costs were measured.
REFERENCE_STEP_S = 0.045


class Cost(NamedTuple):
    """Seconds for each thing that is done, and for each million voxels of it."""

    each: float
    million: float

    def of(self, count: float, millions: float) -> float:
        return self.each * count + self.million * millions


#: Carrying the template's label to a case; registering two cases with each other; the votes of linked cases and the
#: answer; signals of quality; results; pseudo-labels; one pass of the network over a case; one of its training steps.
CARRYING, LINKING, ANSWERING = Cost(0.5, 7.0), Cost(0.3, 0.9), Cost(0.15, 0.8)
SIGNALS, RESULTS, REFINING = Cost(0.03, 0.4), Cost(0.03, 0.2), Cost(0.03, 0.2)
PREDICTING, STEPPING = Cost(0.05, 1.8), Cost(0.02, 2.3)

#: Carrying again what was carried badly, as a share of carrying all: between 0.4 and 2.4.
DETOURS = 1.0

#: A step on a GPU takes at least so many seconds, a pass over a case so many: what is around the network.
GPU_STEP, GPU_PASS = 0.07, 0.05

#: Cases whose votes are compared with the network before a round's answers, of all that there are.
TRIED = 16

#: A pseudo-labelled patch is also seen, forward alone, by the teacher.
WITH_TEACHER = 4 / 3


@dataclass(frozen=True)
class Work:
    """What a training has to do. Voxels are millions, of all cases together unless said otherwise.

    Attributes:
        cases: that are segmented.
        registered, trained, whole: voxels on the grid of registration, on the working grid, and of the scans.
        step: voxels that a training step sees; a patch that a teacher sees, too, counts `WITH_TEACHER`.
        rounds, iterations, passes: of the training; passes of the network over a case.
        links: cases that each case is registered with.
        looked_at: labelled scans that are predicted in the end, to say what was learned of them.
        tried: cases whose votes are compared with the network before a round's answers.
        detours: whether what was carried badly is carried again.
        width: of the network, `width_of`.
    """

    cases: int
    registered: float
    trained: float
    whole: float
    step: float
    rounds: int
    iterations: int
    passes: int
    links: int = 0
    tried: int = 0
    looked_at: int = 0
    detours: bool = True
    width: float = 1.0


def width_of(filters: int) -> float:
    """What a network costs beside one of 16 filters on its finest level."""
    return (filters / 16) ** 2


def stage_seconds(work: Work, step_s: float = REFERENCE_STEP_S, on_gpu: bool = False) -> dict[str, float]:
    """Stage -> seconds that it will take, in the order of the run.

    Args:
        work: what is to be done.
        step_s: of the probe's convolution, on the device that is used; on a GPU that was not measured 0: what is around
            the network takes the time there.
        on_gpu: the device is one; what the processor does is then taken to be as fast as on the reference.
    """
    pace = step_s / REFERENCE_STEP_S
    around, n = 1.0 if on_gpu else pace, work.cases
    carrying = CARRYING.of(n, work.registered)
    answering = ANSWERING.of(n, work.trained) if work.links else REFINING.of(n, work.trained)
    looking = {"signals": SIGNALS.of(n, work.trained), "results": RESULTS.of(n, work.whole)}
    stages = {
        "propagation": around * carrying,
        "detours": around * DETOURS * carrying if work.detours else 0.0,
        "links": around * LINKING.of(n * work.links, work.trained * work.links),
        "answer 0": around * answering,
        **{f"{name} 0": around * seconds for name, seconds in looking.items()},
    }
    step = pace * work.width * STEPPING.of(1, work.step)
    one_pass = pace * work.width * PREDICTING.of(n, work.trained)
    if on_gpu:
        step, one_pass = max(step, GPU_STEP), max(one_pass, GPU_PASS * n)
    for number in range(1, work.rounds + 1):
        stages[f"training {number}"] = step * work.iterations
        stages[f"prediction {number}"] = one_pass * work.passes
        if work.tried:
            stages[f"votes {number}"] = around * answering * min(1.0, work.tried / max(n, 1))
        stages[f"answer {number}"] = around * answering
        stages |= {f"{name} {number}": around * seconds for name, seconds in looking.items()}
        if number < work.rounds:
            stages[f"refinement {number}"] = around * REFINING.of(n, work.trained)
    if work.rounds and work.looked_at:
        one = (around * (carrying + answering) + one_pass * work.passes) / max(n, 1)
        stages["looking again"] = one * work.looked_at
    return stages
