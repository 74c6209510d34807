"""A worker that does in a second what a training does in minutes: same folder, same files, predictions from the truth.

Run in place of `python -m SemiSAMO1Lib.worker JOB`; how it behaves stands in the job's parameters under `stand_in`:
'finish' (default), 'slow' (until it is cancelled), 'fail', 'die', 'mute' (never writes a status).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.observer import Stopped
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.job import JobFolder, State
from SemiSAMO1Lib.project import LabelTable, Project
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.project.reviews import finish_training
from SemiSAMO1Lib.tasks.reporter import Reporter
from SemiSAMO1Lib.tasks.run import work
from SemiSAMO1Lib.volume import Volume


def train(job: JobFolder, reporter: Reporter, behaviour: str, truth: Path) -> None:
    reporter.handshake(library="stand-in", device="cpu")
    for iteration in range(1, 4):
        reporter.event("losses", round=1, iteration=iteration, of=3, losses={"total": 1 / iteration, "supervised": 0.5})
        reporter.event("progress", stage="training 1", done=iteration, of=3, fraction=iteration / 6)
        print(f"iteration {iteration}", flush=True)
    if behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "fail":
        raise RuntimeError("no memory on this GPU")
    while behaviour == "slow":
        if reporter.should_stop():
            raise Stopped("stopped as asked")
        time.sleep(0.02)
    table = LabelTable.from_json(job.spec()["labels"])
    rows = []
    for case in files.read_json(job.inputs / "cases.json")["cases"]:
        label = read_volume(truth / f"{case['id']}.nrrd")
        folder = job.results / "1" / case["id"]
        write_segmentation(folder / "prediction.seg.nrrd", label, table)
        edge = np.abs(np.diff(label.array.astype(int), axis=2, prepend=0)).clip(0, 1) * 90
        write_volume(folder / "uncertainty.nrrd", Volume(edge.astype(np.uint8), label.geometry))
        doubt = float(edge.mean() / 100)
        labels = {str(one.value): {"volume_ml": 1.0, "uncertainty": doubt} for one in table}
        scores = {"uncertainty": doubt, "label_uncertainty": doubt, "labels": labels}
        place = f"1/{case['id']}"
        names = {"prediction": f"{place}/prediction.seg.nrrd", "uncertainty": f"{place}/uncertainty.nrrd"}
        rows.append({"case": case["id"], "scores": scores, **names})
    files.write_json(job.index, {"round": 1, "cases": rows, "skipped": []})
    finish_training(Project(job.project), job.id)


def main() -> int:
    job = JobFolder(Path(sys.argv[3]))  # -m SemiSAMO1Lib.worker JOB
    spec = job.spec()
    if spec["kind"] != "train":
        return work(job.path)
    behaviour = spec["parameters"].get("stand_in", os.environ.get("SEMISAMO1_STAND_IN", "finish"))
    if behaviour == "mute":
        print("no module named torch", flush=True)
        return 1
    with Reporter(job) as reporter:
        try:
            train(job, reporter, behaviour, Path(os.environ["SEMISAMO1_TRUTH"]))
        except Stopped as stop:
            reporter.end(State.INTERRUPTED, str(stop), stopped=True)
            return 3
        except Exception as error:
            reporter.end(State.FAILED, str(error))
            return 1
        reporter.end(State.FINISHED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
