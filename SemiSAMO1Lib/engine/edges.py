"""What a scan's own grey values say about where a class ends.

Propagation is as smooth as its deformations, votes are means, and a network that learned from both draws borders as
blurred as theirs. Near a border the grey values of what is surely inside and surely outside are known, there and in
this very scan. So the odds of a class fall where a voxel looks like its outside. They do not rise where it looks like
its inside: other tissue may look alike (the veins of an atrium do). Each class then gets its volume back by one shift
of its logit: borders move, volumes stay. That decides which class a voxel has; how sure the answer was is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .volume_shift import volume_shift

#: Lengths in units of the finest spacing. Voxels nearer to a border than `BAND` are looked at; those further inside or
#: outside than `SURE` tell how it looks there, the outside ones up to `WIDE` beyond, each by a Gaussian of `NEAR`.
BAND, SURE, WIDE, NEAR = 2.5, 1.5, 8.0, 4.0

#: An answer of which less would be left (Dice) stays as it was, as those of a network that has learned next to nothing;
#: of useful ones 0.89 and more is left (docs/experiments.md).
LEAST_KEPT = 0.8

#: A class with fewer sure voxels is described by the innermost share of its own.
_FEW, _INNERMOST = 30, 0.6

#: The variance of a neighbourhood is mixed with that of the whole class by this share: a few voxels vary by chance.
_COMMON = 0.3

#: A voxel is at most e⁴ times as likely outside as inside.
_MOST = 4.0

#: Weight of sure voxels in the neighbourhood from which on they are believed in full.
_ENOUGH = 0.02

#: Probabilities are kept this far from 0 before their logarithm is taken; what a voxel cannot be has this one.
_SMALLEST, _NEVER = 1e-4, np.float32(-1e3)


@dataclass(frozen=True)
class _Border:
    """What is near a class's border.

    Attributes:
        box: holds all of it.
        band: (z, y, x) of the box, the voxels that are near.
        unlike: of these, in order, how much more each looks like the outside than like the inside: log likelihood
            ratio, 0 where it looks more like the inside.
    """

    box: tuple[slice, ...]
    band: NDArray[np.bool_]
    unlike: NDArray[np.float32]


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
        (C, z, y, x): where a voxel goes to another class its two probabilities change places, so that it is as unsure
        as before; all other voxels are as they were. Each class has about as many voxels as before, all of them near
        those it had, and none that was not there appears.
    """
    given = np.asarray(probabilities, np.float16)
    if weight <= 0 or image.size == 0:
        return given
    label, grey = given.argmax(0), np.asarray(image, np.float32)
    borders = {
        value: _border(label == value, grey, spacing) for value in range(1, len(given)) if (label == value).any()
    }
    near = np.zeros(label.shape, bool)
    for border in borders.values():
        near[border.box] |= border.band
    if not near.any():
        return given

    before = label[near]
    place = np.full(label.shape, -1, np.int32)
    place[near] = np.arange(len(before), dtype=np.int32)
    logs = np.log(np.maximum(given[:, near].astype(np.float32), _SMALLEST))
    may = np.zeros(logs.shape, bool)  # be a voxel's class: what it was, the background, and classes that are near
    may[0] = True
    may[before, np.arange(len(before))] = True
    evidence = np.zeros_like(logs)
    for value, border in borders.items():
        here = place[border.box][border.band]
        may[value, here] = True
        evidence[value, here] = weight * border.unlike
    after = _moved(np.where(may, logs + evidence, _NEVER), before)
    if odd := [value for value in borders if _is_lost(label, before, after, value)]:
        evidence[odd] = 0.0
        after = _moved(np.where(may, logs + evidence, _NEVER), before)
        if any(_is_lost(label, before, after, value) for value in borders):
            return given
    return _relabelled(given, near, before, after)


def _moved(logs: NDArray[np.float32], before: NDArray[np.integer]) -> NDArray[np.integer]:
    """The best class of each voxel (n,), about as many of each class as `before`; logs are (C, n)."""
    found = logs + volume_shift(logs, before, tolerance=0.0)[:, None]
    return np.asarray(found.argmax(0))


def _is_lost(label: NDArray[np.integer], before: NDArray[Any], after: NDArray[Any], value: int) -> bool:
    """Whether a class is hardly itself any more: what is changed so much was no answer with a blurred border."""
    mine = int(np.count_nonzero(label == value))
    was, now = before == value, after == value
    kept = mine - int(np.count_nonzero(was & ~now))
    return 2 * kept < LEAST_KEPT * (2 * mine - int(np.count_nonzero(was)) + int(np.count_nonzero(now)))


def _relabelled(
    given: NDArray[np.float16], near: NDArray[np.bool_], before: NDArray[np.integer], after: NDArray[np.integer]
) -> NDArray[np.float16]:
    """Probabilities in which the voxels near a border have the classes `after`: two of each change places."""
    changed = np.flatnonzero(before != after)
    there = given[:, near]
    old, new = there[before[changed], changed], there[after[changed], changed]
    there[before[changed], changed] = new
    # where both were alike the first of them would win
    there[after[changed], changed] = np.maximum(old, np.nextafter(new, np.float16(2)))
    found = given.copy()
    found[:, near] = there
    return found


def _border(mine: NDArray[np.bool_], grey: NDArray[np.float32], spacing: Sequence[float]) -> _Border:
    finest = min(spacing)
    relative = [one / finest for one in spacing]
    reach = [int(np.ceil((SURE + WIDE + 2 * NEAR) / one)) for one in relative]
    box = tuple(
        slice(max(0, side.start - margin), side.stop + margin)
        for side, margin in zip(ndimage.find_objects(mine.astype(np.uint8))[0], reach, strict=True)
    )
    here, values = mine[box], grey[box]
    if here.all():
        return _Border(box, np.zeros(here.shape, bool), np.zeros(0, np.float32))
    inward = ndimage.distance_transform_edt(here, sampling=relative)
    outward = ndimage.distance_transform_edt(~here, sampling=relative)
    inside = inward > SURE
    if np.count_nonzero(inside) < _FEW:
        inside = inward >= _INNERMOST * inward.max()
    outside = (outward > SURE) & (outward <= SURE + WIDE)
    band = inward + outward <= BAND
    if not outside.any():
        return _Border(box, band, np.zeros(int(band.sum()), np.float32))
    common = (float(values[inside].var()) + float(values[outside].var())) / 2
    like_inside, trust_inside = _likelihood(values, inside, common, relative)
    like_outside, trust_outside = _likelihood(values, outside, common, relative)
    ratio = np.clip(like_inside - like_outside, -_MOST, 0) * np.minimum(trust_inside, trust_outside)
    return _Border(box, band, ratio[band])


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
