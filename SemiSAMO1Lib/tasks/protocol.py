"""The published protocol on the HDF5 layout: train by `reproduce`, measure by `measure_weights` (SemiSAM-O1)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import files
from ..choices import full_name
from ..engine.cases import CaseResult, EngineCase, LabelledCase
from ..engine.config import BEFORE, TrainingConfig, make_config
from ..engine.data.store import Store
from ..engine.devices import require_device
from ..engine.evaluation.metrics import case_metrics
from ..engine.learners import learner_named
from ..engine.learners.averaged import LONGEST_GRADIENT
from ..engine.observer import Observer
from ..engine.propagation.registry import require_generalists
from ..files import atomic_path
from ..project import LabelError
from ..volume import Volume
from .curves import WithCurves
from .inputs import ClassMap
from .layout import ProtocolError, labelled_case, listed_cases, read_layout

#: Learners that were published without pseudo-labels.
WITHOUT_PSEUDO_LABELS = ("semisam", "semisam_uncertainty", "semisam_plus")

#: Voxels of the training grid: the published code never resamples.
_NO_LIMIT = 10**12


@dataclass(frozen=True)
class Protocol:
    """One run of the published protocol.

    Attributes:
        root: folder with data/<case>.h5 and train.txt.
        learner: a short or a full name.
        rounds, iterations: as published 3 and 15,000.
        patch: voxels along the file's axes, (x, y, z).
        neighbours: K of the vote between rounds.
        uncertain_quantile: volumes from this quantile of uncertainty on are refined.
        labelled: how many cases of train.txt, from the first, have a label that is read.
        seed: of everything.
        generalist: who carries the labels: sam-med3d as published, or registration, mind, fused.
        further: other parameters of the training, as in its configuration.
        validate: a list of cases with labels; None: nothing is validated.
    """

    root: Path
    learner: str = "mean_teacher"
    rounds: int = 3
    iterations: int = 15_000
    patch: tuple[int, int, int] = (128, 128, 128)
    neighbours: int = 5
    uncertain_quantile: float = 0.9
    labelled: int = 1
    seed: int = 1337
    generalist: str = "sam-med3d"
    further: dict[str, Any] = field(default_factory=dict)
    validate: Path | None = None

    def config(self) -> TrainingConfig:
        """The published settings as a training's configuration."""
        learner = full_name(str(self.further.get("learner", self.learner)))
        published: dict[str, Any] = {
            "rounds": self.rounds,
            "iterations": self.iterations,
            "learner": learner,
            "specialist": "unet_3d",
            "generalist": self.generalist,
            "generalists": {
                "preprocessing": "released",
                "coverage": "centre",
                "upsampling": "nearest",
                "label_cells": "nearest",
            },
            "optimizer": "sgd",
            "learning_rate": 0.01,
            "batch": 1,
            "patch": self.patch[::-1],
            "training_voxels": _NO_LIMIT,
            "normalise": False,
            "surroundings": False,
            "detours": False,
            "warm_start": False,
            "labels_first": False,
            "match_volumes": False,
            "certainty_around": 0.0,
            "edge_weight": 0.0,
            "ensemble_rounds": False,
            "test_time_passes": 1,
            "propagation_share": 0.0,
            "neighbour_share": 0.0,
            "neighbour_gain": 0.0,
            "pseudo_weight": 0.0 if learner in WITHOUT_PSEUDO_LABELS else 1.0,
            "refinement": "volume",
            "check_pseudo_labels": False,
            "confidence_weights": False,
            "neighbours": self.neighbours,
            "uncertain_quantile": self.uncertain_quantile,
            "augmentation": {
                "rotation_degrees": 0,
                "scale": 0,
                "elastic_mm": 0,
                "mirror": True,
                "quarter_turns": self.patch[0] == self.patch[1],
                "intensity": False,
            },
            "seed": self.seed,
        }
        config = make_config(**_merged(published, self.further))
        if config.match_volumes:
            raise ProtocolError(
                "match_volumes changes the network's answers, and published weights have no place for it"
            )
        return config

    def deviations(self, config: TrainingConfig) -> list[str]:
        """What differs from the released code, in words."""
        found = [
            "weights of the exponential moving average are used, not the best on labelled validation scans"
            if self.validate is None
            else f"the best weights on {self.validate.name} are kept, as released: those labels are read",
            "the identity is among the random turns and flips (released: one axis is always flipped)",
            "all schedules are functions of t / t_max (equal at 15,000 iterations)",
            "windows are blended with Gaussian weights, not averaged",
            "fewer than K certain volumes are refined too",
            "every other patch is centred on a labelled voxel, classes in turn (released: random crops)",
            f"gradients longer than {LONGEST_GRADIENT:g} are shortened",
            "where a patch is larger than the scan, the scan's border is continued and does not count in the loss "
            "(released: zeros, which count as background)",
        ]
        if config.generalists.preprocessing == "released" and config.generalist in ("sam-med3d", "fused"):
            found.append("what SAM-Med3D sees is z-scored over its crop (released: the file's values as they are)")
        if config.learner in WITHOUT_PSEUDO_LABELS:
            found.append(
                "network, batch, rounds and schedule are this protocol's (published for SemiSAM: V-Net, batch 1+3, "
                "6,000 iterations, learning rate / 10 each 2,500; for SemiSAM+: U-Net, batch 1+1, 30,000 iterations)"
            )
        if config.precision != "32-true":
            found.append("bfloat16 where the processor multiplies it (released: float32); precision 32-true avoids it")
        if config.generalist != "sam-med3d":
            found.insert(0, f"round 0 comes from {config.generalist}, not from SAM-Med3D's features")
        if config.learner == "dual_task":
            found.append("dual task: one true distance map per class and case, and it counts in the loss")
        if config.learner in WITHOUT_PSEUDO_LABELS and config.generalists.checkpoint == "random":
            found.append("the assisting SAM-Med3D has random weights: the mechanism runs, no accuracy is claimed")
        if not config.augmentation.quarter_turns:
            found.append("no turns by 90°: the patch is not as wide as it is deep")
        return found


def reproduce(protocol: Protocol, output: Path, observer: Observer) -> dict[str, Any]:
    """Train all rounds; weights per round, a log and a summary go to `output`. Run again, it goes on where it stopped.

    Returns:
        the summary: settings, deviations, per round the weights' file and what the refinement found out.

    Raises:
        ProtocolError: train.txt is missing or shorter than asked for, a file is missing or has no label, or `output`
            holds a run with other settings.
    """
    from ..engine.rounds import run

    config = protocol.config()
    require_generalists(config)  # what is not here is named before anything is read or written
    learner_named(config.learner).require_files(config)
    require_device(config.device)
    labelled, cases, class_map = read_layout(protocol.root, protocol.labelled)
    _same_run(output, protocol, config, labelled, cases, class_map)
    deviations = protocol.deviations(config)
    facts = f"{len(labelled)} labelled, {len(cases)} unlabelled, {class_map.classes} classes"
    observer.event("note", text=f"{config.learner}, labels carried by {config.generalist}; {facts}")
    for text in deviations:
        observer.event("note", text=f"differs from the released code: {text}")
    judge = None
    if protocol.validate is not None and config.training_voxels != _NO_LIMIT:
        raise ProtocolError("--validate measures on the voxels as stored: leave training_voxels out of --config")
    if protocol.validate is not None:
        judge = Judge(protocol.root, listed_cases(protocol.root, protocol.validate), class_map)
    store, began = Store(output / "work"), time.monotonic()
    results: dict[int, list[CaseResult]] = {}
    features = features_folder(protocol.root, output)
    with WithCurves(observer, output / "curves") as seen:
        for result in run(cases, labelled, class_map.classes, config, store, seen, features=features, judge=judge):
            results.setdefault(result.round, []).append(result)
            if len(results[result.round]) == len(cases) and result.round > 0:
                _publish_weights(store, output, result.round, judge is not None)
    summary = {
        "settings": {**asdict(protocol), "root": str(protocol.root), "validate": str(protocol.validate or "")},
        "config": config.model_dump(mode="json"),
        "label_values": list(class_map.values),
        "deviations": deviations,
        "seconds": round(time.monotonic() - began, 1),
        "rounds": [_round_facts(store, number, rows) for number, rows in sorted(results.items())],
    }
    files.write_json(output / "summary.json", summary)
    return summary


def _round_facts(store: Store, number: int, rows: list[CaseResult]) -> dict[str, Any]:
    uncertainty = float(np.mean([row.scores["uncertainty"] for row in rows]))
    facts: dict[str, Any] = {"round": number, "cases": len(rows), "mean_uncertainty": uncertainty}
    if number > 0:
        facts["weights"] = f"weights/round-{number}.pth"
    if store.has("refinement", f"{number}.json"):
        refined = store.json("refinement", f"{number}.json")
        facts["certain"] = len(refined["certain"])
    if store.has("judged", f"{number}.json"):
        facts["validation"] = store.json("judged", f"{number}.json")
    return facts


def _same_run(
    output: Path,
    protocol: Protocol,
    config: TrainingConfig,
    labelled: Sequence[LabelledCase],
    cases: Sequence[EngineCase],
    class_map: ClassMap,
) -> None:
    """A run that is started again goes on only with the same settings and the same lists."""
    now = {
        "root": str(protocol.root.resolve()),
        "labelled": [case.id for case in labelled],
        "unlabelled": [case.id for case in cases],
        "label_values": list(class_map.values),
        "validate": str(protocol.validate or ""),
        **config.model_dump(mode="json"),
    }
    path = output / "config.json"
    if not (path.exists() and (output / "work" / "plan.json").exists()):  # else nothing of a run is there
        files.write_json(path, now)
        return
    before = {**BEFORE, **files.read_json(path)}
    if differ := sorted(key for key in now if before.get(key) != now[key]):
        raise ProtocolError(
            f"{output} holds a run with other {', '.join(differ)}. Choose another --output, or remove it"
        )


def _publish_weights(store: Store, output: Path, number: int, judged: bool) -> None:
    """The network that predicts, as a bare state dict with the published names."""
    state = store.tensors("weights", f"round-{number}.pt")["learner"]
    if judged:
        state = store.tensors("judged", f"{number}.pt")["learner"]
    files.write_json(output / "plan.json", store.json("plan.json"))
    path = output / "weights" / f"round-{number}.pth"
    if path.exists():  # a run that was started again
        return
    with atomic_path(path) as temporary:
        torch.save(dict(state["teacher"]), temporary)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def features_folder(root: Path, output: Path) -> Path:
    """Where features are kept: beside the data, so that all runs share them; with the run where that is read-only."""
    return (root if os.access(root, os.W_OK) else output) / "features"


class Judge:
    """Mean Dice of a network on labelled validation cases."""

    def __init__(self, root: Path, names: Sequence[str], class_map: ClassMap) -> None:
        self.cases = [labelled_case(root, name) for name in names]
        self.labels = [_indices(name, label, class_map) for name, _, label in self.cases]

    def __call__(self, predict: Callable[[NDArray[Any]], NDArray[Any]], classes: int) -> float:
        """`predict` gives class probabilities (C, z, y, x) of an image (z, y, x)."""
        values = []
        for (_, image, _), label in zip(self.cases, self.labels, strict=True):
            found = predict(image.array.astype(np.float32)).argmax(0)
            values.append(case_metrics(found, label, range(1, classes), (1.0, 1.0, 1.0), distances=False)["mean_dice"])
        return float(np.mean(values))


def _indices(name: str, label: Volume, class_map: ClassMap) -> NDArray[Any]:
    try:
        return class_map.to_indices(label).array
    except LabelError as error:
        raise ProtocolError(f"validation case {name}: {error}; the labelled cases give the values") from error
