"""A small run in one of several processes: the first prints which process wrote which file how often.

torchrun --standalone --nproc-per-node 3 Testing/engine/shares_together.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from engine_helpers import tiny_config
from numpy.typing import NDArray

from SemiSAMO1Lib.engine import rounds
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.phantoms import Phantom, PhantomSettings, make_phantom
from SemiSAMO1Lib.tasks.together import leave

#: Unlabelled scans.
CASES = 5


class Counting(Store):
    """Counts what is written, by its name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written: Counter[str] = Counter()

    def save_array(self, array: NDArray[Any], *names: str) -> None:
        self.written["/".join(names)] += 1
        super().save_array(array, *names)

    def save_tensors(self, tensors: Any, *names: str) -> None:
        self.written["/".join(names)] += 1
        super().save_tensors(tensors, *names)

    def save_json(self, value: Any, *names: str) -> None:
        self.written["/".join(names)] += 1
        super().save_json(value, *names)


def case_of(phantom: Phantom) -> EngineCase:
    return EngineCase(phantom.name, phantom.image.geometry, lambda: phantom.image)


def main() -> None:
    torch.set_num_threads(1)
    fabric = make_fabric("cpu", "32-true", together=True)
    ranks = Ranks(fabric)
    first, second, *others = [
        make_phantom(number, settings=PhantomSettings(spacing_mm=(6.0, 5.0, 5.0))) for number in range(CASES + 2)
    ]
    labelled = [LabelledCase(one.name, one.image, one.label) for one in (first, second)]
    store = Counting(Path(sys.argv[1]))
    config = tiny_config(rounds=2, iterations=2, batch=3, labelled_batch=3, neighbours=2)
    cases = [case_of(one) for one in others]
    yielded = len(list(rounds.run(cases, labelled, 4, config, store, Silent(), together=True)))
    told: list[Any] = [None] * ranks.count
    if ranks.count > 1:
        torch.distributed.all_gather_object(told, [dict(store.written), yielded])
    else:
        told = [[dict(store.written), yielded]]
    if ranks.first:
        print(json.dumps({"written": [one[0] for one in told], "yielded": [one[1] for one in told]}), flush=True)


if __name__ == "__main__":
    main()
    leave(0)  # as the program does: torch's threads may abort a process that ends in the orderly way
