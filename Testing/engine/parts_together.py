"""A run that cuts its scans in one of several processes: the first prints what was cut out and what was found.

torchrun --standalone --nproc-per-node 2 Testing/engine/parts_together.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from engine_helpers import tiny_config
from near_helpers import moved, planted, template_scan

from SemiSAMO1Lib.engine import rounds
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.tasks.together import leave
from SemiSAMO1Lib.volume import Volume


def case_of(number: int, scan: Volume) -> EngineCase:
    return EngineCase(f"case_{number}", scan.geometry, lambda: scan)


def main() -> None:
    torch.set_num_threads(1)
    ranks = Ranks(make_fabric("cpu", "32-true", together=True))
    template = template_scan()
    places = ((-20.0, -20.0, -20.0), (-40.0, -10.0, -25.0), (-5.0, -35.0, -40.0))
    scans = [planted(*template, moved(place, (0, 0, 8)), seed=30 + n)[0] for n, place in enumerate(places)]
    grids = {"registration": {"use_affine": False, "largest_grid": 60_000}, "training_voxels": 60_000}
    config, store = tiny_config(rounds=0, **grids), Store(Path(sys.argv[1]))
    cases = [case_of(number, scan) for number, scan in enumerate(scans)]
    given = (cases, [LabelledCase("t", *template)], 2, config, store, Silent())
    answers = {one.case_id: one.prediction.array.tobytes() for one in rounds.run(*given, together=True)}
    if ranks.first:
        found = {case: hashlib.sha256(array).hexdigest() for case, array in answers.items()}
        print(json.dumps({"parts": store.json("surroundings.json"), "answers": found}), flush=True)


if __name__ == "__main__":
    main()
    leave(0)  # as the program does: torch's threads may abort a process that ends in the orderly way
