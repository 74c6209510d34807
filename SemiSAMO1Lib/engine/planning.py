"""A plan is computed from the data, written down, then obeyed: grid, patch, network, batch, intensities.

The reasoning follows nnU-Net: target spacing is the pool's median, the patch is as large as the budget allows in the
shape of the median case, and axes are pooled as long as they are long enough and not coarser than the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..volume import Geometry, Volume
from .config import TrainingConfig
from .data.grids import canonical
from .data.intensities import IntensityPlan

#: A feature map is not pooled below this many voxels along an axis.
SMALLEST_FEATURE_MAP = 4

#: Networks whose depth is not the plan's to choose.
BUILT_IN_STRIDES = dict.fromkeys(("vnet", "unet_3d", "unet_3d_sdf"), ((1, 1, 1), *[(2, 2, 2)] * 4))

#: CPU and GPU memory that one patch voxel of a 16-filter network needs in a training step, bytes (measured).
BYTES_PER_VOXEL = 1_500


#: Why grey values are scaled in a way.
INTENSITY_REASONS = {
    "per_case": "not CT",
    "fixed": "template has values below -200 and above 100, taken as CT",
    "none": "as they are, on request",
}


class Plan(BaseModel):
    """What a training does to its data; (z, y, x) throughout, axes nearest to superior, posterior, left.

    Attributes:
        classes: of the network, background included.
        spacing: of the training grid, mm.
        registration_spacing: of the grid on which scans are registered, the same along each axis, mm.
        patch: voxels of a patch, and of a window while predicting.
        strides: by which each level is pooled, the finest first; a patch is a multiple of all of them together.
        kernels: of each level's convolutions, voxels.
        filters: channels of each level.
        batch, labelled: pseudo-labelled and labelled patches of a step, of all processes together.
        intensity: how grey values are scaled.
        precision: of the network, '32-true' or 'bf16-mixed'.
        reasons: why, for a person.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    classes: int
    spacing: tuple[float, float, float]
    registration_spacing: float
    patch: tuple[int, int, int]
    strides: tuple[tuple[int, int, int], ...]
    kernels: tuple[tuple[int, int, int], ...]
    filters: tuple[int, ...]
    batch: int
    labelled: int = 1
    intensity: IntensityPlan
    precision: str
    reasons: tuple[str, ...]


def make_plan(
    geometries: Sequence[Geometry],
    template: Volume,
    label: NDArray[Any],
    classes: int,
    config: TrainingConfig,
    registration_spacing: float,
    device_type: str,
    memory_bytes: int,
    processes: int = 1,
) -> Plan:
    """Compute the plan from the pool's grids and the template's label; no other label is looked at.

    Args:
        geometries: grids of all scans of the pool.
        template: the template's scan.
        label: its class indices on the same grid.
        classes: number of classes, background included.
        config: the training's configuration.
        registration_spacing: see `working_spacing`.
        device_type: 'cpu' or 'cuda'.
        memory_bytes: memory that training may use.
        processes: that train together; the batch is that of all of them.

    Raises:
        ValueError: the network cannot have the patch that was asked for, or `quarter_turns` has no square one.
    """
    grids = [canonical(geometry) for geometry in geometries]
    spacing, shape = target_spacing(grids, config.training_voxels)
    budget = min(config.patch_voxels, max(4_096, int(memory_bytes * 0.5 / (BYTES_PER_VOXEL * config.filters / 16) / 4)))
    fixed = BUILT_IN_STRIDES.get(config.specialist)
    allowed = budget if config.patch is None else math.prod(config.patch)
    patch, strides, kernels = network_shape(config.patch or shape, spacing, allowed, fixed)
    if config.patch is not None and patch != config.patch:
        raise ValueError(f"{config.specialist} cannot have the patch {config.patch} (z, y, x); the nearest is {patch}")
    if config.augmentation.quarter_turns and patch[1] != patch[2]:
        raise ValueError(f"quarter_turns needs a patch as wide as it is deep; the plan has {patch} (z, y, x)")
    filters = tuple(min(config.filters * 2**level, 320) for level in range(len(strides)))
    batch = config.batch or processes * batch_size(math.prod(patch), config, device_type, memory_bytes)
    intensity = intensity_plan(template, label) if config.normalise else IntensityPlan(scheme="none", low=0, high=0)
    precision = precision_for(config.precision, device_type, patch, strides)
    reasons = (
        f"target spacing {spacing} mm: median of {len(grids)} scans, at most {config.training_voxels} voxels a case",
        f"median shape on that grid {shape}; patch {patch} within {budget} voxels",
        f"precision {precision} on {device_type}",
        f"{len(strides)} levels: an axis is pooled down to {SMALLEST_FEATURE_MAP} voxels, thick slices later",
        f"intensities {intensity.scheme}: {INTENSITY_REASONS[intensity.scheme]}",
    )
    return Plan(
        classes=classes,
        spacing=spacing,
        registration_spacing=registration_spacing,
        patch=patch,
        strides=strides,
        kernels=kernels,
        filters=filters,
        batch=batch,
        labelled=config.labelled_batch or processes,
        intensity=intensity,
        precision=precision,
        reasons=reasons,
    )


def taken_over(plan: Plan, config: TrainingConfig, device_type: str, memory_bytes: int, processes: int = 1) -> Plan:
    """An earlier training's plan for one that goes on from it: the same network on the same grid, with the batch and
    the precision of this device. Arguments as of `make_plan`."""
    each = max(1, plan.batch // plan.labelled)  # a training that ran out of memory has a smaller one
    each = min(each, batch_size(math.prod(plan.patch), config, device_type, memory_bytes))
    changes = {
        "batch": config.batch or each * processes,
        "labelled": config.labelled_batch or processes,
        "precision": precision_for(config.precision, device_type, plan.patch, plan.strides),
    }
    return plan.model_copy(update=changes)


def batch_size(patch_voxels: int, config: TrainingConfig, device_type: str, memory_bytes: int) -> int:
    """Pseudo-labelled patches a step, 1 to 4: on a GPU as many as half of its memory holds; on a CPU, where time counts
    and not memory, as many small patches as make up half of the patch budget."""
    if device_type == "cuda":
        patches = 0.5 * memory_bytes / (BYTES_PER_VOXEL * config.filters / 16 * patch_voxels)
        return max(1, min(4, int((patches - 1) * 3 / 4)))  # one labelled patch; the teacher needs a third more
    return max(1, min(4, config.patch_voxels // (2 * patch_voxels)))


def precision_for(
    wanted: str, device_type: str, patch: tuple[int, int, int], strides: Sequence[tuple[int, int, int]]
) -> str:
    """bf16-mixed where the device multiplies it in hardware, else 32-true.

    On CPUs never for networks with a level two slices deep: the weight gradient of such a bfloat16 convolution is
    computed from memory that nobody wrote (torch 2.13, docs/experiments.md).
    """
    depths = patch[0] // np.cumprod([stride[0] for stride in strides])
    if device_type == "cpu" and 2 in depths:
        return "32-true"
    if wanted != "auto":
        return wanted
    able = cuda_has_bf16() if device_type == "cuda" else cpu_has_bf16()
    return "bf16-mixed" if able else "32-true"


def cuda_has_bf16() -> bool:
    """True where the GPU multiplies bfloat16 in hardware (Ampere and later); older ones would emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bf16() -> bool:
    """True where the CPU multiplies bfloat16 in hardware: a training step is then about twice as fast (measured)."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older torch
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def target_spacing(grids: Sequence[Geometry], voxels: int) -> tuple[tuple[float, float, float], tuple[int, int, int]]:
    """Median spacing, coarsened until the median case has at most `voxels` voxels, and the median shape on it.

    The finer axes are coarsened first: a scan with thick slices keeps its slices.
    """
    spacing = np.median([grid.spacing for grid in grids], axis=0)
    extent = np.median([grid.extent for grid in grids], axis=0)
    while np.prod(extent / spacing) > voxels:
        fine = spacing <= spacing.min() * 1.001
        grown = spacing.copy()
        coarser = spacing[~fine].min(initial=np.inf)
        needed = (np.prod(extent / spacing) / voxels) ** (1 / fine.sum())
        grown[fine] = min(spacing.min() * needed * 1.0001, coarser if coarser > spacing.min() * 1.001 else np.inf)
        spacing = grown
    shape = tuple(max(1, round(n)) for n in extent / spacing)
    return _floats(spacing), (shape[0], shape[1], shape[2])


def network_shape(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    budget: int,
    fixed: tuple[tuple[int, int, int], ...] | None = None,
) -> tuple[tuple[int, int, int], tuple[tuple[int, int, int], ...], tuple[tuple[int, int, int], ...]]:
    """Patch, strides and kernels (first level first) for a median shape, as nnU-Net reasons.

    The patch keeps the proportions of the median case where it has to be smaller. `fixed`: the strides of a network
    that has them built in.
    """
    size = np.array(shape, float)
    while np.prod(size) > budget:
        size[int(np.argmax(size / np.array(shape)))] *= 0.97
    current, mm = size.copy(), np.array(spacing)
    strides = [(1, 1, 1)]
    kernels = [tuple(3 if s <= 2 * min(mm) else 1 for s in mm)]
    while len(strides) < 6 and fixed is None:
        pool = (current / 2 >= SMALLEST_FEATURE_MAP) & (
            mm < 2 * mm[current / 2 >= SMALLEST_FEATURE_MAP].min(initial=np.inf)
        )
        if not pool.any():
            break
        stride = np.where(pool, 2, 1)
        current, mm = current / stride, mm * stride
        strides.append(_ints(stride))
        kernels.append(tuple(3 if s <= 2 * min(mm) else 1 for s in mm))
    while len(strides) < 3:  # fewer levels than DynUNet builds: small scans get levels that do not pool
        strides.append((1, 1, 1))
        kernels.append(kernels[-1])
    if fixed is not None:
        strides, kernels = list(fixed), [(3, 3, 3)] * len(fixed)
    total = np.prod(strides, axis=0)
    patch = np.maximum(1, np.floor(size / total + 0.5)) * total
    if not fits_network(_ints(patch), strides):
        patch[int(np.argmax(size))] *= 2
    while np.prod(patch) > 1.3 * budget:
        less = [patch - total * (np.arange(3) == axis) for axis in range(3)]
        possible = [fits_network(_ints(one), strides) for one in less]
        if not any(possible):
            break
        patch = less[int(np.argmax(np.where(possible, patch / np.array(shape), 0)))]
    return _ints(patch), tuple(strides), tuple(_ints(k) for k in kernels)


def fits_network(patch: tuple[int, int, int], strides: Sequence[tuple[int, int, int]]) -> bool:
    """Whether a network with these strides can be trained on a patch: its sides are multiples of all strides together,
    and its coarsest map has more than one voxel, which instance norm needs."""
    total = np.prod(strides, axis=0)
    return not (np.array(patch) % total).any() and bool(np.prod(np.array(patch) // total) > 1)


def require_patch(specialist: str, plan: Plan) -> None:
    """Raise ValueError where a network whose strides are built in cannot have the plan's patch."""
    if not fits_network(plan.patch, BUILT_IN_STRIDES[specialist]):
        raise ValueError(
            f"{specialist} needs patch sides that are multiples of 16, one at least 32; the plan has {plan.patch}"
        )


def smaller(plan: Plan, config: TrainingConfig, device_type: str) -> Plan | None:
    """The plan with a smaller batch or patch, for a device whose memory did not suffice; None when none is left.

    With `quarter_turns` a patch stays as wide as it is deep.
    """
    if plan.batch > 1 or plan.labelled > 1:  # several processes may have begun with many of both
        return plan.model_copy(update={"batch": max(1, plan.batch // 2), "labelled": max(1, plan.labelled // 2)})
    total, patch = np.prod(plan.strides, axis=0), np.array(plan.patch)
    for axis in np.argsort(-patch, kind="stable"):
        axes = [1, 2] if config.augmentation.quarter_turns and axis > 0 else [axis]
        less = patch.copy()
        less[axes] = (patch // 2 // total * total)[axes]
        if fits_network(_ints(less), plan.strides):
            precision = precision_for(config.precision, device_type, _ints(less), plan.strides)
            return plan.model_copy(update={"patch": _ints(less), "precision": precision})
    return None


def intensity_plan(template: Volume, label: NDArray[Any]) -> IntensityPlan:
    """CT is known by values far below 0 (air): its window comes from the template's foreground, as in nnU-Net."""
    array = template.array.astype(np.float32)
    if array.min() < -200 and array.max() > 100:
        inside = array[label > 0]
        low, high = np.percentile(inside, (0.5, 99.5))
        clipped = inside.clip(low, high)
        return IntensityPlan(
            scheme="fixed",
            low=float(low),
            high=float(max(high, low + 1)),
            mean=float(clipped.mean()),
            deviation=float(max(clipped.std(), 1e-3)),
        )
    return IntensityPlan(scheme="per_case", low=0.5, high=99.5)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    return plan.model_dump(mode="json")


def _floats(values: NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = (round(float(v), 6) for v in values)
    return a, b, c


def _ints(values: Sequence[float] | NDArray[np.generic]) -> tuple[int, int, int]:
    a, b, c = (int(v) for v in values)
    return a, b, c
