"""Quality without ground truth: the trainings that the model is fitted on, the fit, and how well it holds elsewhere.

    python Testing/benchmarks/quality.py collect --folder FOLDER     the trainings (over an hour on two cores)
    python Testing/benchmarks/quality.py fit --folder FOLDER         signals, fit with one cohort left out, calibration
    python Testing/benchmarks/quality.py ship --folder FOLDER        writes the shipped coefficients

Two can collect beside each other, with `--threads 1` and other `--runs` each. Trainings that are done are not run
again. They differ in cohort, scans, template, seed and preset; some begin from a template that was labelled badly on
purpose. All scans belong to the pool of `one_label.py`: its test scans take no part in any choice.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cohorts import wait
from common import commit, scans
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import spearmanr

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.evaluation.quality_fit import fit
from SemiSAMO1Lib.engine.evaluation.signals import cohort_signals
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.engine.surroundings import Surroundings
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.job import JobFolder, JobKind, start
from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.quality import DOUBTS, QualityModel
from SemiSAMO1Lib.tasks.compare import compare
from SemiSAMO1Lib.tasks.inputs import read_inputs
from SemiSAMO1Lib.tasks.train import config_of
from SemiSAMO1Lib.volume import Volume

ROOT = Path(__file__).resolve().parents[2]

#: Phantoms that differ more from each other, and are seen worse.
HARD = PhantomSettings(deformation_mm=6.0, noise=35.0, bias=0.4, size_variation=0.2)


def shifted(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A label drawn three voxels off along the last axis."""
    return np.roll(label, 3, axis=2)


def thin(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A label drawn one voxel too small."""
    return np.where(ndimage.binary_erosion(label > 0), label, 0).astype(np.uint8)


@dataclass(frozen=True)
class Run:
    """One training: `first` and `count` choose scans of the sorted cohort, the first of them is the template."""

    name: str
    cohort: str
    first: int
    count: int
    preset: str = "quick"
    seed: int = 0
    spoil: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None


RUNS = (
    Run("phantoms-a", "phantoms", 0, 14),
    Run("hippocampus-a", "hippocampus", 0, 40),
    Run("left_atrium-a", "left_atrium", 0, 20),
    Run("phantoms-b", "phantoms-hard", 0, 14, seed=1),
    Run("hippocampus-b", "hippocampus", 40, 13, seed=1),
    Run("hippocampus-c", "hippocampus", 53, 13, seed=2),
    Run("left_atrium-b", "left_atrium", 20, 11, seed=1),
    Run("hippocampus-thin", "hippocampus", 66, 13, seed=3, spoil=thin),
    Run("left_atrium-thin", "left_atrium", 31, 11, seed=2, spoil=thin),
    Run("phantoms-thin", "phantoms-hard", 20, 12, seed=2, spoil=thin),
    Run("hippocampus-shifted", "hippocampus", 79, 13, seed=4, spoil=shifted),
    Run("left_atrium-shifted", "left_atrium", 42, 11, seed=3, spoil=shifted),
    Run("phantoms-shifted", "phantoms", 40, 12, seed=3, spoil=shifted),
    Run("hippocampus-standard", "hippocampus", 87, 13, "standard", seed=5),
    Run("left_atrium-c", "left_atrium", 49, 11, seed=4),
)

#: Training -> scans of one kind.
COHORTS = {run.name: run.cohort for run in RUNS}


def chosen(run: Run, folder: Path) -> tuple[list[Path], Path]:
    """The scans of a run and the folder of their references."""
    if not run.cohort.startswith("phantoms"):
        found = scans(run.cohort)
        return found[run.first : run.first + run.count], found[0].parent.parent / "labels"
    made = folder / "phantoms" / run.name
    if not made.exists():
        write_cohort(made, run.count, run.first + run.seed, HARD if run.cohort == "phantoms-hard" else None)
    return sorted((made / "images").iterdir()), made / "labels"


def collect(folder: Path, runs: Sequence[str] = (), threads: int | None = None) -> None:
    """The trainings of these names, or all."""
    for run in RUNS:
        if runs and run.name not in runs:
            continue
        place = folder / run.name
        if (place / "done").exists():
            continue
        shutil.rmtree(place, ignore_errors=True)
        found, references = chosen(run, folder)
        (place / "scans").mkdir(parents=True)
        for scan in found:
            shutil.copyfile(scan, place / "scans" / scan.name)
        project = Project.create(place / "project")
        importing = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(place / "scans")}, [])
        start(importing)
        wait(importing)
        reference = references / found[0].name
        if run.spoil is not None:
            label = read_volume(reference)
            reference = place / found[0].name
            write_volume(reference, Volume(run.spoil(label.array.astype(np.uint8)), label.geometry))
        project.add_label(found[0].name.split(".")[0], reference)
        parameters = {"preset": run.preset, "seed": run.seed, "keep_rounds": True, "test_time_passes": 2}
        job = request_training(project, {**parameters, "threads": threads})
        start(job)
        wait(job)
        files.write_text(place / "done", commit())
        print(run.name, flush=True)


def rows_of(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Signals and true Dice of every label of every case of a training's last round; kept in a file."""
    kept = folder / "rows" / f"{run.name}.json"
    if kept.exists():
        return list(files.read_json(kept))
    job = JobFolder(folder / run.name / "project" / "jobs" / "0002-train")
    inputs, config, store = read_inputs(job), config_of(job), Store(job.work)
    plan = Plan.model_validate(store.json("plan.json"))
    parts = Surroundings.of(store)
    cases, labelled = [parts.case(one) for one in inputs.cases], [parts.labelled(one) for one in inputs.labelled]
    cohort = Cohort(cases, labelled, plan, store)
    number = config.rounds
    signals = cohort_signals(cohort, number, config, Silent(), Ranks())
    found, references = chosen(run, folder)
    truth = {scan.name.split(".")[0]: references / scan.name for scan in found}
    predictions = {case: job.results / str(number) / case / "prediction.seg.nrrd" for case in signals}
    doubts = {row["case"]: row["scores"]["label_uncertainty"] for row in files.read_json(job.index)["cases"]}
    rows = []
    for row in compare(predictions, {case: truth[case] for case in signals}, distances=False)["cases"]:
        for order, value in enumerate(sorted(row["labels"], key=int)):
            dice = row["labels"][value]["dice"]
            entropy, mine = doubts[row["case"]], signals[row["case"]][order]
            rows.append({"run": run.name, "case": row["case"], "dice": dice, "entropy": entropy, "signals": mine})
            rows[-1]["commit"] = (folder / run.name / "done").read_text(encoding="utf-8")
    files.write_json(kept, rows)
    return rows


def fitted(rows: list[dict[str, Any]], only: str | None = None) -> QualityModel:
    """The model of these rows; it chooses among all signals, or has one alone."""
    signals, dice = [row["signals"] for row in rows], [row["dice"] for row in rows]
    trainings = [row["run"] for row in rows]
    cohorts = [COHORTS[run] for run in trainings]
    origin = {
        "cohorts": sorted(set(cohorts)),
        "trainings": sorted(set(trainings)),
        "rows": len(rows),
        "commits": sorted({row["commit"] for row in rows}),
        "command": "python Testing/benchmarks/quality.py ship --folder FOLDER",
    }
    if only is not None:
        return fit(signals, dice, trainings, cohorts, [only], origin, least=0)
    return fit(signals, dice, trainings, cohorts, sorted(signals[0]), origin)


def anatomy(run: str) -> str:
    return run.split("-", maxsplit=1)[0]


def by_case(rows: list[dict[str, Any]], model: QualityModel) -> list[dict[str, Any]]:
    """Mean over the labels of each case: true and likely Dice, and the plain entropy."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["case"]), []).append(row)
    found = []
    for (run, case), mine in groups.items():
        likely = float(np.mean(model.likely([row["signals"] for row in mine])))
        dice = float(np.mean([row["dice"] for row in mine]))
        entropy = 1.0 if mine[0]["entropy"] is None else mine[0]["entropy"]
        found.append({"run": run, "case": case, "dice": dice, "likely": likely, "certainty": 1 - entropy})
    return found


def calibration(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman correlation and mean absolute error of the estimate, and Spearman of plain certainty."""
    dice = [one["dice"] for one in cases]
    likely = [one["likely"] for one in cases]
    return {
        "cases": len(cases),
        "spearman": round(float(spearmanr(likely, dice)[0]), 3),
        "entropy": round(float(spearmanr([one["certainty"] for one in cases], dice)[0]), 3),
        "error": round(float(np.mean(np.abs(np.subtract(likely, dice)))), 4),
        "dice": round(float(np.mean(dice)), 4),
    }


def held_out(rows: list[dict[str, Any]], only: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Cohort -> its cases, estimated by a model that saw none of them."""
    found = {}
    for name in ("hippocampus", "left_atrium", "phantoms"):
        others = [row for row in rows if anatomy(row["run"]) != name]
        mine = [row for row in rows if anatomy(row["run"]) == name]
        if mine and others:
            found[name] = by_case(mine, fitted(others, only))
    return found


def all_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for run in RUNS if (folder / run.name / "done").exists() for row in rows_of(run, folder)]


def show(folder: Path) -> None:
    rows = all_rows(folder)
    plain = held_out(rows, "inside_entropy")
    for name, cases in held_out(rows).items():
        print(f"{name}, held back", calibration(cases))
        print("    plain entropy made a Dice by the same fit", calibration(plain[name]))
        mine = [row for row in rows if anatomy(row["run"]) == name]
        print("    fitted on itself", calibration(by_case(mine, fitted(mine))))
        for run in dict.fromkeys(one["run"] for one in cases):
            inside = [one for one in cases if one["run"] == run]
            spread = float(np.std([one["dice"] for one in inside]))
            print(f"    {run:24}", calibration(inside), f"standard deviation {spread:.3f}")
    model = fitted(rows)
    weights = dict(zip(model.names, model.coefficients, strict=True))
    anatomies = ("hippocampus", "left_atrium", "phantoms")
    print("signals by themselves, Spearman over all labels and its mean inside trainings:", *anatomies)
    for name in sorted(rows[0]["signals"]):
        shown = "   ".join(alone(name, [row for row in rows if anatomy(row["run"]) == one]) for one in anatomies)
        print(f"{name:28} {shown}   weight {weights.get(name, 0):+.3f}")


def alone(name: str, rows: list[dict[str, Any]]) -> str:
    """How well one signal ranks by itself."""

    def rank(some: list[dict[str, Any]]) -> float:
        pairs = [(one, row["dice"]) for row in some if (one := row["signals"].get(name)) is not None]
        if len(pairs) < 3 or len({one for one, _ in pairs}) < 2:
            return float("nan")
        said, true = (np.array(one) for one in zip(*pairs, strict=True))
        return float(spearmanr(said, true)[0]) * (-1 if name in DOUBTS else 1)

    inside = [rank([row for row in rows if row["run"] == run]) for run in dict.fromkeys(row["run"] for row in rows)]
    known = [one for one in inside if not np.isnan(one)]
    return f"{rank(rows):+.2f} {np.mean(known) if known else float('nan'):+.2f}"


def ship(folder: Path) -> None:
    rows = all_rows(folder)
    errors = [calibration(cases)["error"] for cases in held_out(rows).values()]
    model = replace(fitted(rows), error=round(float(np.mean(errors)), 4))
    files.write_json(ROOT / "SemiSAMO1Lib" / "quality.json", model.to_json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("collect", "fit", "ship"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=(), choices=[run.name for run in RUNS], metavar="NAME")
    parser.add_argument("--threads", type=int, help="of each training")
    options = parser.parse_args()
    if options.step == "collect":
        collect(options.folder, options.runs, options.threads)
    else:
        {"fit": show, "ship": ship}[options.step](options.folder)


if __name__ == "__main__":
    main()
