"""Measure weights on the cases of a list, as the published code does: `semisamo1 test`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from .. import files
from ..engine.config import BEFORE, TrainingConfig, make_config
from ..engine.data.grids import resample_image, with_spacing
from ..engine.data.intensities import IntensityPlan, scale_intensities
from ..engine.devices import make_fabric
from ..engine.evaluation.metrics import case_metrics
from ..engine.generalists.sam_med3d.checkpoint import read_weights
from ..engine.inference.sliding import predict_probabilities
from ..engine.inference.uncertainty import to_case_grid
from ..engine.learners import learner_named
from ..engine.observer import Observer
from ..engine.planning import BUILT_IN_STRIDES, Plan
from ..engine.specialists import make_specialist
from ..engine.specialists.heads import LogitsOnly
from ..image_io import write_volume
from ..volume import Geometry, Volume
from .inputs import ClassMap
from .layout import ProtocolError, listed_cases, read_labelled

#: The published convention for empty masks: both empty; one of them empty (Dice, Jaccard, 95HD, ASD).
BOTH_EMPTY, ONE_EMPTY = (1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 200.0, 100.0)


def measure_weights(
    root: Path,
    weights: Path,
    listing: str,
    device: str,
    patch: tuple[int, int, int] | None,
    save_to: Path | None,
    observer: Observer,
) -> dict[str, Any]:
    """Segment the cases of a list and compare with their labels, as published: voxels, and millimetres beside.

    Args:
        root: folder of the layout.
        weights: a state dict, of `reproduce` (its plan.json lies above) or published.
        listing: 'test', 'val', 'train' or a file.
        device: auto, cpu, cuda, cuda:0.
        patch: window (x, y, z); None: that of the plan, or 128³.
        save_to: folder for the predictions, NRRD with geometry; None: they are not kept.
        observer: gets progress.

    Returns:
        for every measure mean and standard deviation over cases and classes, and a row per case.
    """
    names = listed_cases(root, Path(listing) if listing.endswith(".txt") else root / f"{listing}.txt")
    plan, config, values, ours = _plan_of(weights, patch)
    network = network_of(weights, plan, config)
    fabric = make_fabric(device, plan.precision)
    network = fabric.to_device(network)
    rows: list[dict[str, Any]] = []
    for position, name in enumerate(names):
        volume, label = read_labelled(root, name)
        if strange := sorted(set(np.unique(label.array).tolist()) - set(values)):
            observer.event("warning", text=f"{name}: label values {strange} are unknown to the weights; not measured")
        found = _segmented(network, volume, plan, fabric, ours)
        prediction = ClassMap(tuple(values)).to_values(found)
        for value in values[1:]:
            rows.append(_row(name, value, prediction.array, label.array, volume.geometry.spacing))
        if save_to is not None:
            write_volume(save_to / f"{name}.nrrd", prediction)
        done = position + 1
        observer.event("progress", stage="testing", done=done, of=len(names), fraction=done / len(names))
    measures = ("dice", "jaccard", "hd95_voxels", "asd_voxels", "hd95_mm", "asd_mm")
    summary = {name: _spread(row[name] for row in rows) for name in measures}
    return {"weights": str(weights), "cases": len(names), **summary, "rows": rows}


def _segmented(network: torch.nn.Module, volume: Volume, plan: Plan, fabric: Fabric, ours: bool) -> Volume:
    """Class indices of a scan's voxels. A run of ours saw voxels of 1 mm, as stored, on the spacing of its plan."""
    image = scale_intensities(volume, plan.intensity)
    if not ours:  # padded as published
        found = predict_probabilities(network, image, plan, fabric, 1, 0, "constant").argmax(0)
        return Volume(found, volume.geometry)
    stored = Geometry(image.shape)
    grid = with_spacing(stored, plan.spacing)
    scaled = resample_image(Volume(image, stored), grid).astype(np.float32)
    probabilities = predict_probabilities(network, scaled, plan, fabric, 1, 0, "replicate")
    prediction, _ = to_case_grid(probabilities, grid, np.ones(grid.shape, bool), stored)
    return Volume(prediction.array, volume.geometry)


def network_of(weights: Path, plan: Plan, config: TrainingConfig) -> torch.nn.Module:
    """The network with its weights. Raises ProtocolError for a file of another network."""
    state, _ = read_weights(weights, published=False)
    with_distance = "final2.weight" in state or learner_named(config.learner).with_distance
    network = make_specialist(config.specialist, plan, with_distance)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ProtocolError(f"{weights} are not weights of {config.specialist}: {error}") from error
    return LogitsOnly(network) if with_distance else network


def _plan_of(weights: Path, patch: tuple[int, int, int] | None) -> tuple[Plan, TrainingConfig, list[int], bool]:
    """Plan, configuration and label values of a run of ours (True); of the published networks for a file alone."""
    folder = weights.resolve().parent.parent
    if (folder / "plan.json").is_file() and (folder / "config.json").is_file():
        plan = Plan.model_validate(files.read_json(folder / "plan.json"))
        run = {**BEFORE, **files.read_json(folder / "config.json")}
        if patch is not None:
            plan = plan.model_copy(update={"patch": patch[::-1]})
        config = TrainingConfig.model_validate({key: run[key] for key in TrainingConfig.model_fields})
        return plan, config, list(run["label_values"]), True
    state, _ = read_weights(weights, published=False)
    if "final.weight" not in state:
        raise ProtocolError(
            f"{weights} is neither of a run of `semisamo1 reproduce` (plan.json and config.json above it) nor of the "
            "published unet_3D, whose last layer is called final"
        )
    classes = int(state["final.weight"].shape[0])
    config = make_config(specialist="unet_3d", normalise=False, patch=(patch or (128, 128, 128))[::-1])
    return _published_plan(classes, config), config, list(range(classes)), False


def _published_plan(classes: int, config: TrainingConfig) -> Plan:
    assert config.patch is not None, "given"
    strides = BUILT_IN_STRIDES["unet_3d"]
    return Plan(
        classes=classes,
        spacing=(1.0, 1.0, 1.0),
        registration_spacing=1.0,
        patch=config.patch,
        strides=strides,
        kernels=((3, 3, 3),) * len(strides),
        filters=(16, 32, 64, 128, 256),
        batch=1,
        intensity=IntensityPlan(scheme="none", low=0, high=0),
        precision="32-true",
        reasons=("published network",),
    )


def _row(
    name: str, value: int, prediction: NDArray[Any], label: NDArray[Any], spacing: tuple[float, float, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": name, "label": value}
    mine, true = prediction == value, label == value
    for unit, sides in (("voxels", (1.0, 1.0, 1.0)), ("mm", spacing)):
        if mine.any() and true.any():
            found = case_metrics(mine, true, [1], sides)["labels"]["1"]
            measured = (found["dice"], found["jaccard"], found["hd95_mm"], found["asd_mm"])
        else:
            measured = ONE_EMPTY if mine.any() or true.any() else BOTH_EMPTY
        row |= dict(zip(("dice", "jaccard", f"hd95_{unit}", f"asd_{unit}"), measured, strict=True))
    return row


def _spread(values: Iterable[float]) -> dict[str, float]:
    found = np.array(list(values), float)
    return {"mean": float(found.mean()), "std": float(found.std())}
