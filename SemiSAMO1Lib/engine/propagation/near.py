"""What a labelled scan shows around its label: where in another scan that lies, and how well a registration fits there.

A scan shows much that the label does not need: a start that brings the largest part of two scans together may leave the
labelled organ elsewhere. So the neighbourhood of the label is looked for in the case by itself: it is tried everywhere,
as it is and turned (`places`); the places found are made better by a similarity transform A that minimises

    E(A) = 1/n sum_y |T(y) - C(A y)|² / c

over the n points y of the template near its label, T and C being the c descriptors of both scans, by Gauss-Newton steps
from coarse to fine (`settled`). A point that A brings to where the case shows nothing costs what two places that have
nothing to do with each other differ by on average (`unrelated`). Registrations are judged by what they make of the
neighbourhood, too (`misfits`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from ...volume import Geometry, Volume
from ..data.grids import inside, sample, space_points, transform_points
from ..generalists.mind import mind_ssc
from .deformable import Deformation, Settings, raised, register
from .descriptors import DESCRIPTOR_REACH, LARGEST_GRID, Described, Features, pool
from .starts import Start, best_translation

#: How far the neighbourhood reaches beyond the label, as a share of the cube root of the label's volume.
REACH = 0.25

#: The template is tried as it is; turned by this about each of the patient's axes, both ways; and turned by as much
#: about all three of them at once (the rotation vector's components).
TURN_DEGREES = 20.0

#: Voxels of the search for places, as a share of the neighbourhood's mean extent.
SEARCH = 0.1

#: Turned neighbourhoods of more voxels than this are not described: memory. Such a label fills most of its scan.
LARGEST_TURNED = 2 * LARGEST_GRID

#: Places that are looked at further: those that fit best.
PLACES = 8

#: Share that must lie inside of the case for a translation to be considered, of as much of it as can.
LEAST_INSIDE = 0.9

#: Share of the neighbourhood that must lie inside of the case for anything else to be considered.
LEAST_SEEN = 0.25

#: Points of the neighbourhood that a similarity transform is fitted to, at most.
POINTS = 2_000

#: Widths of averaging, in coarse voxels, at which it is fitted one after the other: beginning from starts that may be
#: far off, and from places that were searched for.
FROM_AFAR, FROM_PLACES = (6, 3, 1), (1,)

#: Starts that are kept in the end, at most.
KEPT = 3

#: To find out which starts fit best the neighbourhood is registered, with so many coarse voxels around it, by one
#: search and few steps.
MARGIN, PROBED_LEVELS, PROBED_STEPS = 3, 1, 2

#: Gauss-Newton steps at each width.
STEPS = 8

#: A step turns by at most this many radians, and scales by at most this much (natural logarithm).
LARGEST_TURN, LARGEST_GROWTH = 0.3, 0.1

#: A similarity transform that scales lengths by more than this factor is thrown away as a failure.
LARGEST_SCALE = 1.6

#: Two starts closer than this (mean distance of the neighbourhood's points, in coarse voxels) are one.
SAME = 1.5

#: Registrations that bring the neighbourhood's points further apart than this on average are not of one place: a share
#: of the cube root of its volume.
ELSEWHERE = 0.35


@dataclass(frozen=True, eq=False)
class Turned:
    """The neighbourhood turned about its middle.

    Attributes:
        matrix: 4×4, from turned to true places, mm.
        features: its descriptors, pooled for the search over translations; the weight is 0 outside of it.
    """

    matrix: NDArray[np.float64]
    features: Features


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """The surroundings of a label.

    Attributes:
        described: the labelled scan.
        weight: (z, y, x) float32 on its coarse grid, 0 outside of the neighbourhood.
        points: (3, n) places in it, mm, at most `POINTS`.
        stride: coarse voxels that are pooled for the search over translations.
    """

    described: Described
    weight: Tensor
    points: Tensor
    stride: int

    @property
    def size(self) -> float:
        """Cube root of its volume, mm."""
        return float(self.weight.double().sum()) ** (1 / 3) * self.described.coarse.geometry.spacing[0]

    @functools.cached_property
    def turned(self) -> list[Turned]:
        """As it is, and turned; described when they are first asked for."""
        near = Features(
            self.described.coarse.geometry, torch.cat([self.described.coarse.values.float(), self.weight[None]])
        )
        found = [Turned(np.eye(4), _trimmed(pool(near, self.stride)))]
        return found + [one for matrix in _turns(self.points) if (one := _turned(self, matrix)) is not None]


def neighbourhood(described: Described, label: Volume) -> Neighbourhood | None:
    """The neighbourhood of whatever is labelled; None where nothing is, or where nothing of it has data.

    Args:
        described: the labelled scan.
        label: (z, y, x) class indices on the scan's own grid.
    """
    coarse = described.coarse
    weight = coarse.weight.float() * torch.from_numpy(_around(label, coarse.geometry)).to(coarse.weight.device)
    # not 0.5: at borders and in thin scans a coarse voxel is a part of one
    picked = torch.nonzero((weight > 0.5 * weight.max()).flatten())[:, 0]
    if not len(picked):
        return None
    order = torch.randperm(len(picked), generator=torch.Generator().manual_seed(0))[:POINTS].sort().values
    points = space_points(coarse.geometry, weight.device).flatten(1)[:, picked[order.to(picked.device)]]
    wide = (points.amax(1) - points.amin(1)).clamp(min=coarse.geometry.spacing[0])
    stride = max(1, round(SEARCH * float(wide.prod()) ** (1 / 3) / coarse.geometry.spacing[0]))
    return Neighbourhood(described, weight, points, stride)


def places(case: Described, near: Neighbourhood) -> list[Start]:
    """Translations of the neighbourhood, as it is and turned, that fit the case best; one for each turn at most."""
    pooled = pool(case.coarse.in_float32(), near.stride)
    found = []
    for number, turned in enumerate(near.turned):
        best = best_translation(pooled, turned.features, of_most=LEAST_INSIDE)
        if best is not None:
            move = np.eye(4)
            move[:3, 3] = best[0]
            found.append((best[1], Start(f"near, turn {number}" if number else "near", turned.matrix @ move)))
    return [start for _, start in sorted(found, key=lambda one: one[0])[:PLACES]]


def starts_near(case: Described, near: Neighbourhood, starts: Sequence[Start], settings: Settings) -> list[Start]:
    """Starts and `places` made better by similarity transforms (7 degrees of freedom): those that fit best after a
    registration of the neighbourhood alone, best first; each place once, and none to which a given start leads already.

    Left out are those under which hardly anything of the neighbourhood lies in the case, and those that scale too much.
    """
    found = apart(near, settled(case, near, starts), starts)
    quick = replace(settings, levels=settings.levels[:PROBED_LEVELS], iterations=PROBED_STEPS)
    costs = misfits(near, [_probed(case, near, start, quick) for start in found])
    judged = sorted(zip(costs, found, strict=True), key=lambda one: one[0])
    return [start for cost, start in judged if math.isfinite(cost)][:KEPT]


def settled(case: Described, near: Neighbourhood, starts: Sequence[Start]) -> list[Start]:
    """Starts and `places` after Gauss-Newton steps of a similarity transform, those that fit best first."""
    ways: list[tuple[float, str, NDArray[np.float64]]] = []
    for begin, widths in ((starts, FROM_AFAR), (places(case, near), FROM_PLACES)):
        fits = [_Fit(case, near, width) for width in widths] if begin else []
        for start in begin:
            matrix, cost = np.asarray(np.linalg.inv(start.matrix)), math.inf
            for fit in fits:
                matrix, cost = fit.improved(matrix)
            if math.isfinite(cost):
                ways.append((cost, start.name, matrix))
    ways.sort(key=lambda way: way[0])
    return [Start(f"{name}, settled", np.asarray(np.linalg.inv(matrix))) for _, name, matrix in ways]


def _probed(case: Described, near: Neighbourhood, start: Start, settings: Settings) -> tuple[Described, Deformation]:
    """The part of a case where the neighbourhood comes to lie, and its registration."""
    geometry = case.coarse.geometry
    here = transform_points(near.points, np.linalg.inv(geometry.index_to_space) @ np.linalg.inv(start.matrix))
    last = torch.tensor(geometry.shape[::-1], device=here.device) - 1
    low = (here.amin(1).floor().int() - MARGIN).clamp(min=0).minimum(last).tolist()[::-1]
    high = (here.amax(1).ceil().int() + MARGIN + 1).minimum(last + 1).tolist()[::-1]
    box = [(a, max(b, a + 1)) for a, b in zip(low, high, strict=True)]
    part = case.coarse_part(box)
    return part, register(part, near.described, start.matrix, settings)


def apart(near: Neighbourhood, starts: Sequence[Start], others: Sequence[Start] = ()) -> list[Start]:
    """Starts without those that bring the neighbourhood to where an earlier one, or one of the others, does."""
    same = SAME * near.described.coarse.geometry.spacing[0]
    taken = [transform_points(near.points, np.asarray(np.linalg.inv(one.matrix))) for one in others]
    kept = []
    for start in starts:
        here = transform_points(near.points, np.asarray(np.linalg.inv(start.matrix)))
        if all(float((here - there).norm(dim=0).mean()) > same for there in taken):
            taken.append(here)
            kept.append(start)
    return kept


def at_one_place(near: Neighbourhood, found: Sequence[Deformation]) -> list[bool]:
    """Whether each registration brings the neighbourhood to where the first of them does."""
    ways = [deformation.to_case(near.points[:, None, None])[:, 0, 0] for deformation in found]
    return [float((way - ways[0]).norm(dim=0).mean()) <= ELSEWHERE * near.size for way in ways]


def misfits(near: Neighbourhood, found: Sequence[tuple[Described, Deformation]]) -> list[float]:
    """How badly registrations fit around the label, raised by round-trip error and folding.

    Mean squared difference of the descriptors where the neighbourhood comes to lie in the case. What would lie outside
    of it costs what all of these registrations reach on average: a case may show a part of the organ alone, and a
    registration makes places alike that have nothing to do with each other (`unrelated` would be too much).

    Args:
        near: the label's neighbourhood.
        found: cases (or their parts) and their registrations with the labelled scan.

    Returns:
        a cost for each; inf where hardly anything of the neighbourhood lies in the case.
    """
    fits = [_seen(case, near, deformation) for case, deformation in found]
    known = [cost for cost, share in fits if share >= LEAST_SEEN and math.isfinite(cost)]
    usual = float(np.mean(known)) if known else math.inf
    costs = [share * cost + (1 - share) * usual if share >= LEAST_SEEN else math.inf for cost, share in fits]
    return [raised(cost, deformation) for cost, (_, deformation) in zip(costs, found, strict=True)]


def _seen(case: Described, near: Neighbourhood, deformation: Deformation) -> tuple[float, float]:
    """Mean squared difference of the descriptors in what the case shows of the neighbourhood, and the share that it
    shows; inf and 0 for nothing."""
    coarse, other = case.coarse, near.described.coarse
    there = deformation.to_template(space_points(coarse.geometry, coarse.channels.device))
    weight = sample(near.weight[None], other.geometry, there, padding="zeros")[0] * coarse.weight.float()
    difference = (coarse.values.float() - sample(other.values, other.geometry, there)).square().mean(0)
    seen = _shown(coarse, deformation.to_case(near.points[:, None, None])[:, 0, 0]).double()
    total = float(weight.double().sum())  # in double: scores must not depend on the number of threads
    if total <= 0:
        return math.inf, 0.0
    return float((difference * weight).double().sum()) / total, float(seen.mean())


def _shown(features: Features, places: Tensor) -> Tensor:
    """1 where a scan shows something at places (3, n), between 0 and 1 at the border of its data, 0 outside: (n,)."""
    data = (features.weight > 0).float()[None]
    return _at(data, features.geometry, places)[0] * inside(features.geometry, places[:, None, None])[0, 0]


class _Fit:
    """E(A) at one width of averaging: its value, and Gauss-Newton steps that lower it."""

    def __init__(self, case: Described, near: Neighbourhood, width: int) -> None:
        template, self._case = near.described.averaged(width), case.averaged(width)
        self._coarse, self._voxel = case.coarse, case.coarse.geometry.spacing[0]
        self._width = width
        self._points = near.points
        self._wanted = _at(template.values.float(), template.geometry, near.points)
        self._by_chance = _by_chance(self._case, self._wanted)
        self._spread = max(float((near.points - near.points.mean(1, keepdim=True)).square().sum(0).mean().sqrt()), 1e-3)

    def improved(self, matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """The matrix (template to case) after some steps, and its cost; inf for failures."""
        best, least = matrix, math.inf
        for _ in range(STEPS + 1):
            cost, step = self._step(matrix)
            if not cost < 0.9995 * least:
                break
            best, least, matrix = matrix, cost, step @ matrix
        scale = abs(float(np.linalg.det(best[:3, :3]))) ** (1 / 3)
        return best, least if 1 / LARGEST_SCALE < scale < LARGEST_SCALE else math.inf

    def _step(self, matrix: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """The cost of a matrix, inf where too few points lie in the case, and the step that lowers it: a 4×4 matrix to
        multiply with from the left."""
        places = transform_points(self._points, matrix)
        weight = _shown(self._coarse, places).double()
        residual = (self._wanted - _at(self._case.values.float(), self._case.geometry, places)).double()
        total = weight.sum()
        difference = (residual.square().mean(0) * weight).sum() / total
        slope = self._slope(places).double()
        centre = places.mean(1, keepdim=True)
        x, y, z = ((places - centre) / self._spread).double()
        # what a shift along x, y, z, a turn about them, and a growth do to the descriptors, each in units of the spread
        turn = (slope[2] * y - slope[1] * z, slope[0] * z - slope[2] * x, slope[1] * x - slope[0] * y)
        growth = slope[0] * x + slope[1] * y + slope[2] * z
        moves = torch.stack([*slope, *turn, growth])
        weighted = (moves * weight).flatten(1)
        found = [weighted @ moves.flatten(1).T / total, weighted @ residual.flatten() / total, centre.double()]
        sums = torch.cat([weight.mean()[None], difference[None], *(one.flatten() for one in found)]).cpu().numpy()
        share, mean = float(sums[0]), float(sums[1])  # one copy: each would wait for the GPU
        if share < LEAST_SEEN:
            return math.inf, np.eye(4)
        cost = share * mean + (1 - share) * self._by_chance
        normal, descent, middle = sums[2:51].reshape(7, 7), sums[51:58], sums[58:]
        ridge = max(1e-3 * float(np.trace(normal)) / 7, 1e-12)
        # rounded: the sums' last digits depend on the number of threads
        wish = np.round(np.linalg.solve(normal + ridge * np.eye(7), descent), 6)
        shift, turn_by = wish[:3], wish[3:6] / self._spread
        shift *= min(1.0, 4 * self._voxel * self._width / max(float(np.linalg.norm(shift)), 1e-9))
        turn_by *= min(1.0, LARGEST_TURN / max(float(np.linalg.norm(turn_by)), 1e-9))
        grown = np.exp(np.clip(wish[6] / self._spread, -LARGEST_GROWTH, LARGEST_GROWTH))
        step, about = np.eye(4), np.round(middle, 3)
        step[:3, :3] = Rotation.from_rotvec(turn_by).as_matrix() * grown
        step[:3, 3] = about + shift - step[:3, :3] @ about
        return cost, step

    def _slope(self, places: Tensor) -> Tensor:
        """Change of the case's descriptors per mm along x, y, z: (3, channels, n), by central differences."""
        reach = 0.5 * self._voxel * max(self._width, 2)
        shifts = reach * torch.eye(3, device=places.device)[:, :, None]
        both = [
            _at(self._case.values.float(), self._case.geometry, torch.cat([*(places + s * shifts)], 1)) for s in (1, -1)
        ]
        along = (both[0] - both[1]) / (2 * reach)
        return along.reshape(len(along), 3, -1).transpose(0, 1)


def unrelated(case: Described, near: Neighbourhood) -> float:
    """By how much the neighbourhood differs from places that have nothing to do with it: mean squared difference of its
    descriptors and the case's anywhere."""
    other = near.described.coarse
    return _by_chance(case.coarse, _at(other.values.float(), other.geometry, near.points))


def _by_chance(case: Features, wanted: Tensor) -> float:
    """Mean squared difference of descriptors (channels, n) and those of a place anywhere in a scan."""
    weight = case.weight.double()
    total = weight.sum().clamp(min=1e-6)
    values = case.values.double()
    mean, square = (values * weight).sum((1, 2, 3)) / total, (values.square().mean(0) * weight).sum() / total
    wanted = wanted.double()
    return float(square + wanted.square().mean() - 2 * (mean * wanted.mean(1)).mean())


def _around(label: Volume, grid: Geometry) -> NDArray[np.float32]:
    """1 on a coarse isotropic grid within reach of a labelled voxel, else 0."""
    region, count = np.zeros(grid.shape, bool), 0
    to_grid = np.linalg.inv(grid.index_to_space) @ label.geometry.index_to_space
    for z, drawn in enumerate(np.asarray(label.array) > 0):  # slice by slice: indices of a large organ fill memory
        y, x = np.nonzero(drawn)
        index = np.rint(to_grid[:3, :3] @ np.stack([x, y, np.full(len(x), z)]) + to_grid[:3, 3:]).astype(int)[::-1]
        index = index[:, ((index >= 0) & (index < np.array(grid.shape)[:, None])).all(0)]
        region[tuple(index)] = True
        count += len(x)
    if not region.any():
        return region.astype(np.float32)
    reach = max(REACH * (count * float(np.prod(label.geometry.spacing))) ** (1 / 3), grid.spacing[0])
    return (ndimage.distance_transform_edt(~region) * grid.spacing[0] <= reach).astype(np.float32)


def _turns(points: Tensor) -> list[NDArray[np.float64]]:
    """Turns about the middle of the points, from turned to true places."""
    centre = points.double().mean(1).cpu().numpy()
    vectors = [v for v in itertools.product((0, -1, 1), repeat=3) if sum(map(abs, v)) in (1, 3)]
    matrices = []
    for vector in vectors:
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_rotvec(np.radians(TURN_DEGREES) * np.array(vector)).as_matrix()
        matrix[:3, 3] = centre - matrix[:3, :3] @ centre
        matrices.append(matrix)
    return matrices


def _turned(near: Neighbourhood, matrix: NDArray[np.float64]) -> Turned | None:
    """The neighbourhood described anew after a turn, as descriptors know directions; None where that takes too much
    memory."""
    described, weight = near.described, near.weight
    image, device = described.image, weight.device
    grid = _box(described.coarse.geometry, weight, np.asarray(np.linalg.inv(matrix)), image.geometry)
    if grid.voxels > LARGEST_TURNED:
        return None
    true = transform_points(space_points(grid, device), matrix)
    has_data = sample(described.weight.float()[None], image.geometry, true, padding="zeros")[0]
    grey = sample(torch.from_numpy(image.array).to(device)[None], image.geometry, true)[0]
    low, high = described.window
    values = mind_ssc((grey.clamp(low, high) - low) / max(high - low, 1e-6), mask=has_data > 0.5)
    coarse = pool(Features(grid, torch.cat([values, has_data[None]])), 2)
    there = transform_points(space_points(coarse.geometry, device), matrix)
    within = sample(weight[None], described.coarse.geometry, there, padding="zeros") * (coarse.weight > 0)
    return Turned(matrix, pool(Features(coarse.geometry, torch.cat([coarse.values, within])), near.stride))


def _box(coarse: Geometry, weight: Tensor, matrix: NDArray[np.float64], fine: Geometry) -> Geometry:
    """The part of the fine grid's lattice that holds the weighted places after a matrix, and what descriptors need."""
    index = torch.nonzero(weight > 0)[:, [2, 1, 0]].double().cpu().numpy()
    moved = index @ (matrix @ coarse.index_to_space)[:3, :3].T + (matrix @ coarse.index_to_space)[:3, 3]
    back = np.linalg.inv(fine.index_to_space)
    there = moved @ back[:3, :3].T + back[:3, 3]
    low = np.floor(there.min(0)).astype(int) - 2 - DESCRIPTOR_REACH
    high = np.ceil(there.max(0)).astype(int) + 2 + DESCRIPTOR_REACH
    origin = (fine.index_to_space @ np.array([*low, 1.0]))[:3]
    x, y, z = (int(n) for n in high - low + 1)
    return Geometry((z, y, x), fine.spacing, (float(origin[0]), float(origin[1]), float(origin[2])), fine.direction)


def _trimmed(features: Features) -> Features:
    """Without the outer voxels that weigh nothing."""
    index = torch.nonzero(features.weight > 0)
    return features.part(list(zip(index.amin(0).tolist(), (index.amax(0) + 1).tolist(), strict=True)))


def _at(values: Tensor, geometry: Geometry, places: Tensor) -> Tensor:
    """Values (c, z, y, x) at places (3, n): (c, n)."""
    return sample(values, geometry, places[:, None, None])[:, 0, 0]
