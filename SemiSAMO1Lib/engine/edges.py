"""What a scan's own grey values say about where a class ends.

Propagation is as smooth as its deformations, votes are means, and a network that learned from both draws borders as
blurred as theirs. Near a border the grey values of what is surely inside and surely outside are known, there and in
this very scan. So a voxel that looks like the outside loses probability. One that looks like the inside gains none:
other tissue may look alike (the veins of an atrium do). Each class then gets its volume back by one shift of its logit:
borders move, volumes stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .class_volumes import volume_shift

#: Lengths in units of the finest spacing. Voxels nearer to a border than `BAND` are looked at; those further inside or
#: outside than `SURE` tell how it looks there, the outside ones up to `WIDE` beyond, each by a Gaussian of `NEAR`.
BAND, SURE, WIDE, NEAR = 2.5, 1.5, 8.0, 4.0

#: An answer of which less would be left (Dice) stays as it was, as those of a network that has learned next to nothing;
#: of useful ones 0.89 and more is left (docs/benchmarks.md).
LEAST_KEPT = 0.8

#: A class with fewer sure voxels is described by the innermost share of its own.
_FEW, _INNERMOST = 30, 0.6

#: The variance of a neighbourhood is mixed with that of the whole class by this share: a few voxels vary by chance.
_COMMON = 0.3

#: A voxel is at most e⁴ times as likely outside as inside.
_MOST = 4.0

#: Weight of sure voxels in the neighbourhood from which on they are believed in full.
_ENOUGH = 0.02

#: Probabilities are kept this far from 0 before their logarithm is taken.
_SMALLEST = 1e-4


def by_edges(
    probabilities: NDArray[Any], image: NDArray[Any], spacing: Sequence[float], weight: float
) -> NDArray[np.float16]:
    """Class probabilities after the grey values near the borders have had their say.

    Args:
        probabilities: (C, z, y, x), any float type.
        image: (z, y, x) grey values, in any unit.
        spacing: (z, y, x) in mm.
        weight: factor of the evidence beside the logarithm of the probabilities; 0: nothing is changed.

    Returns:
        (C, z, y, x): changed near borders alone; there each class has as many voxels as before.
    """
    given = np.asarray(probabilities, np.float16)
    if weight <= 0 or image.size == 0:
        return given
    label, classes = given.argmax(0), len(given)
    grey = np.asarray(image, np.float32)
    unlike = {value: _unlike(label == value, grey, spacing) for value in range(1, classes) if (label == value).any()}
    near = np.zeros(label.shape, bool)
    for box, _, band in unlike.values():
        near[box] |= band
    if not near.any():
        return given

    evidence = np.zeros((classes, int(near.sum())), np.float32)
    for value, (box, unlikely, _) in unlike.items():
        everywhere = np.zeros(label.shape, np.float32)
        everywhere[box] = unlikely
        evidence[value] = weight * everywhere[near]
    logs = np.log(np.maximum(given[:, near].astype(np.float32), _SMALLEST))
    before = label[near]
    moved = _moved(logs, evidence, before)
    if odd := [value for value in unlike if _changed(label, near, moved.argmax(0), value)]:
        evidence[odd] = 0.0
        moved = _moved(logs, evidence, before)
        if any(_changed(label, near, moved.argmax(0), value) for value in unlike):
            return given
    odds = np.exp(moved - moved.max(0))
    found = given.copy()
    found[:, near] = odds / odds.sum(0)
    return found


def _moved(
    logs: NDArray[np.float32], evidence: NDArray[np.float32], before: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Log odds (C, n) with the evidence, each class with as many voxels as `before`."""
    found = logs + evidence
    return np.asarray(found + volume_shift(found, before, tolerance=0.0)[:, None], np.float32)


def _changed(label: NDArray[np.integer], near: NDArray[np.bool_], after: NDArray[np.integer], value: int) -> bool:
    """Whether a class is hardly itself any more: what is changed so much was no answer with a blurred border."""
    mine, before, now = label == value, label[near] == value, after == value
    kept = int(np.count_nonzero(mine)) - int(np.count_nonzero(before & ~now))
    total = 2 * int(np.count_nonzero(mine)) - int(np.count_nonzero(before)) + int(np.count_nonzero(now))
    return 2 * kept < LEAST_KEPT * total


def _unlike(
    mine: NDArray[np.bool_], grey: NDArray[np.float32], spacing: Sequence[float]
) -> tuple[tuple[slice, ...], NDArray[np.float32], NDArray[np.bool_]]:
    """How much more a voxel near a class's border looks like its outside than like its inside.

    Returns:
        the box that holds the class and what is near it; in it the log likelihood ratio, 0 where it looks more like the
        inside and away from the border; and the voxels that are near.
    """
    finest = min(spacing)
    relative = [one / finest for one in spacing]
    reach = [int(np.ceil((SURE + WIDE + 2 * NEAR) / one)) for one in relative]
    box = tuple(
        slice(max(0, side.start - margin), side.stop + margin)
        for side, margin in zip(ndimage.find_objects(mine.astype(np.uint8))[0], reach, strict=True)
    )
    here, values = mine[box], grey[box]
    if here.all():
        return box, np.zeros(here.shape, np.float32), np.zeros(here.shape, bool)
    inward = ndimage.distance_transform_edt(here, sampling=relative)
    outward = ndimage.distance_transform_edt(~here, sampling=relative)
    inside = inward > SURE
    if np.count_nonzero(inside) < _FEW:
        inside = inward >= _INNERMOST * inward.max()
    outside = (outward > SURE) & (outward <= SURE + WIDE)
    band = inward + outward <= BAND
    evidence = np.zeros(here.shape, np.float32)
    if outside.any():
        common = (float(values[inside].var()) + float(values[outside].var())) / 2
        like_inside, trust_inside = _likelihood(values, inside, common, relative)
        like_outside, trust_outside = _likelihood(values, outside, common, relative)
        ratio = np.clip(like_inside - like_outside, -_MOST, 0) * np.minimum(trust_inside, trust_outside)
        evidence[band] = ratio[band]
    return box, evidence, band


def _likelihood(
    values: NDArray[np.float32], sure: NDArray[np.bool_], common: float, relative: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log density of each voxel's value in the normal distribution of the sure voxels round it, and how far these are
    to be believed (0 to 1)."""

    def blurred(array: NDArray[np.float32]) -> NDArray[np.float32]:
        found = ndimage.gaussian_filter(array, [NEAR / one for one in relative], mode="nearest", truncate=3.0)
        return np.asarray(found, np.float32)

    weight = sure.astype(np.float32)
    middle = float(values[sure].mean())  # squares of what lies round 0 lose no digits
    centred = values - middle
    amount = blurred(weight)
    mean = blurred(weight * centred) / np.maximum(amount, 1e-6)
    variance = np.maximum(blurred(weight * centred**2) / np.maximum(amount, 1e-6) - mean**2, 0)
    variance = (1 - _COMMON) * variance + _COMMON * common + 1e-12
    density = -0.5 * (centred - mean) ** 2 / variance - 0.5 * np.log(variance)
    return np.asarray(density, np.float32), np.minimum(amount / _ENOUGH, 1.0).astype(np.float32)
