"""Deformable registration of two described scans: a discrete search, made smooth and inverse-consistent, then refined.

The discrete step follows the idea of coupled convex optimisation (Heinrich et al. 2014; Siebert et al. 2021): for every
point of a control grid the cost of every displacement in a cube is computed; a smooth field is found by alternating
between the best displacement near the smooth field and smoothing. The refinement minimises

    E(u) = sum_x w(x) |F(x) - M(x + u(x))|² + lambda |grad u|²

by Gauss-Newton steps: descriptors are linearised with the mean of both scans' gradients, the normal equations are
averaged over a small window (Lucas-Kanade), and the smoothness term is solved by a few Jacobi sweeps.

All displacements here are in voxels (x, y, z) of the grid that they live on; grids are isotropic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...volume import Geometry
from ..data.grids import index_grid, inside, sample, transform_points
from ..generalists.mind import box_mean_3
from .descriptors import Described, Features, pool


@dataclass(frozen=True)
class Search:
    """One level of the discrete search; lengths as shares of the scan's mean extent (cube root of its volume)."""

    control: float
    radius: int  # in control spacings


@dataclass(frozen=True)
class _Level:
    step: int
    radius: int


#: Growing weights that tie the discrete search to the smooth field.
COUPLING = (0.003, 0.03, 0.3, 1.0)

#: Jacobi sweeps in a Gauss-Newton step, and steps between two linearisations.
SWEEPS, LINEARISED_EVERY = 3, 3

#: Further steps on every voxel, where descriptors of every voxel exist.
FINEST_STEPS = 1


@dataclass(frozen=True)
class Settings:
    """How the deformable step works.

    Attributes:
        levels: discrete searches, coarse to fine.
        iterations: Gauss-Newton steps on the coarse descriptors.
        smoothness: lambda on the coarse descriptors' grid.
    """

    levels: tuple[Search, ...] = (Search(0.11, 2), Search(0.055, 2))
    iterations: int = 5
    smoothness: float = 0.3


@dataclass(frozen=True)
class Deformation:
    """A transform between a case and a template, both ways, and how good it is.

    A point x of the case goes to start(x + forward(x)) in the template; a template point start(y) goes back to
    y + backward(y). Displacements are in mm, (3, z, y, x) with components (x, y, z).

    Attributes:
        geometry: the control grid, in the case.
        start: 4×4 matrix from the case to the template, points (x, y, z) in mm.
        forward, backward: float32 displacement fields in mm.
        residual: mean squared difference of the descriptors where both scans have data.
        round_trip: (z, y, x) mm, how far a point ends from itself after going there and back.
        folded: share of the control grid with a negative Jacobian.
        overlap: share of the smaller scan's data, in mm³, that meets data of the other.
    """

    geometry: Geometry
    start: NDArray[np.float64]
    forward: Tensor
    backward: Tensor
    residual: float
    round_trip: Tensor
    folded: float
    overlap: float
    name: str = field(default="")

    def to_template(self, points: Tensor) -> Tensor:
        """Template points (x, y, z) of case points (3, Z, Y, X), mm."""
        return transform_points(points + sample(self.forward, self.geometry, points), self.start)

    def to_case(self, points: Tensor) -> Tensor:
        """Case points of template points (3, Z, Y, X), mm."""
        points = transform_points(points, np.linalg.inv(self.start))
        return points + sample(self.backward, self.geometry, points)


def raised(residual: float, deformation: Deformation) -> float:
    """A residual, raised by the deformation's round-trip error as a share of the extent, and by folding; inf where the
    residual is not finite."""
    extent = float(np.prod(deformation.geometry.extent)) ** (1 / 3)
    trip = float(deformation.round_trip.double().mean()) / extent
    return residual * (1 + trip + 2 * deformation.folded) if math.isfinite(residual) else math.inf


def register(case: Described, template: Described, start: NDArray[np.float64], settings: Settings) -> Deformation:
    """Find the deformation from a case to the template, and back, that follows the start transform."""
    here, there = case.coarse, _moved(template.coarse, case.coarse.geometry, start)
    forward, backward = torch.zeros_like(here.values[:3]), torch.zeros_like(here.values[:3])
    forward, backward = forward.float(), backward.float()
    side = float(np.prod(here.geometry.extent)) ** (1 / 3)
    for number, search in enumerate(settings.levels):
        level = _Level(max(1, round(search.control * side / here.geometry.spacing[0])), search.radius)
        found = _search(here, _Source(template.averaged(level.step), start), forward, level)
        back = _search(there, _Source(case.averaged(level.step), np.eye(4)), backward, level)
        forward, backward = _compose(found, forward), _compose(back, backward)
        forward, backward = _inverse_consistent(forward, backward, 8 if number == 0 else 4)
    steps, smoothness = settings.iterations, settings.smoothness
    forward = _refine(here, _Source(template.coarse, start), forward, steps, smoothness)
    backward = _refine(there, _Source(here, np.eye(4)), backward, steps, smoothness)
    geometry, fixed, source = here.geometry, here, _Source(template.coarse, start)
    if case.fine is not None and template.fine is not None:
        geometry, fixed, source = case.fine.geometry, case.fine, _Source(template.fine, start)
        forward, backward = (_to_grid(field, here.geometry, geometry) for field in (forward, backward))
        forward = _refine(fixed, source, forward, FINEST_STEPS, 2 * settings.smoothness)
    return _judged(fixed, source, forward, backward)


def _judged(fixed: Features, source: _Source, forward: Tensor, backward: Tensor) -> Deformation:
    """Put a pair of fields (voxels of the fixed grid) into a Deformation, with the figures that judge it."""
    geometry, start, voxel = fixed.geometry, source.start, fixed.geometry.spacing[0]
    warped = source.at(geometry, forward)
    both = fixed.weight * warped[-1]
    difference = (fixed.values - warped[:-1]).float().square().mean(0)
    weight = float(both.double().sum())  # in double: scores must not depend on the number of threads
    trip = (forward + _warp(backward, forward)).norm(dim=0) * voxel
    # how much data there is, in mm³ of the case's space: the start may shrink the template
    in_case = float(fixed.weight.float().sum()) * voxel**3
    in_template = float(source.features.weight.float().sum()) * source.features.geometry.spacing[0] ** 3
    in_template /= abs(float(np.linalg.det(start[:3, :3])))
    share = weight * voxel**3 / max(min(in_case, in_template), 1e-6)
    return Deformation(
        geometry=geometry,
        start=start,
        forward=(forward * voxel).contiguous(),
        backward=(backward * voxel).contiguous(),
        residual=float((difference * both).double().sum()) / weight if weight > 0 else float("inf"),
        round_trip=trip,
        folded=float((jacobian_determinant(forward) <= 0).float().mean()),
        overlap=min(share, 1.0),
    )


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Determinant of the Jacobian of x -> x + u(x); `displacement` (3, z, y, x) in voxels (x, y, z)."""
    dx, dy, dz = _gradient(displacement)
    dx, dy, dz = dx.clone(), dy.clone(), dz.clone()
    dx[0] += 1
    dy[1] += 1
    dz[2] += 1
    return (torch.linalg.cross(dx, dy, dim=0) * dz).sum(0)


# ---------------------------------------------------------------------- descriptors of the moving scan


@dataclass(frozen=True)
class _Source:
    """The moving scan: its descriptors, and where a point of the fixed grid's space lies in it."""

    features: Features
    start: NDArray[np.float64]

    def at(self, geometry: Geometry, displacement: Tensor) -> Tensor:
        """Channels at start(x + u(x)) for every voxel x of the fixed grid; u in its voxels."""
        points = index_grid(geometry, displacement.device) + displacement
        return _sample_with_weight(self.features, transform_points(points, self.start @ geometry.index_to_space))


def _moved(features: Features, geometry: Geometry, start: NDArray[np.float64]) -> Features:
    zero = torch.zeros(3, *geometry.shape, device=features.channels.device)
    return Features(geometry, _Source(features, start).at(geometry, zero))


def _sample_with_weight(features: Features, points: Tensor) -> Tensor:
    """Descriptors (border repeated) and weight (0 outside the field of view) at points."""
    channels = sample(features.channels, features.geometry, points)
    channels[-1] *= inside(features.geometry, points)
    return channels


# ---------------------------------------------------------------------- discrete search


def _search(fixed: Features, source: _Source, displacement: Tensor, level: _Level) -> Tensor:
    """The best smooth displacement (voxels of the fixed grid), beyond the one given, found by discrete search.

    Args:
        fixed: descriptors of the scan whose points move.
        source: the other scan, its descriptors averaged over a control spacing.
        displacement: where the search starts from, (3, z, y, x) voxels.
        level: control spacing in voxels, radius in control spacings.
    """
    coarse = pool(fixed, level.step)
    grown = _grown(coarse.geometry, level.radius)
    from_here = _to_grid(displacement, fixed.geometry, grown)
    moving = source.at(grown, from_here)
    cost = _cost_volume(coarse, moving[:-1], moving[-1], level.radius)
    found = _coupled_convex(cost, coarse.geometry.shape, level.radius)
    return _to_grid(found, coarse.geometry, fixed.geometry)


def _grown(geometry: Geometry, margin: int) -> Geometry:
    """The grid with `margin` more voxels on every side."""
    origin = geometry.index_to_space @ np.array([-float(margin)] * 3 + [1.0])
    z, y, x = (n + 2 * margin for n in geometry.shape)
    return Geometry((z, y, x), geometry.spacing, (origin[0], origin[1], origin[2]), geometry.direction)


def _cost_volume(fixed: Features, values: Tensor, weight: Tensor, radius: int) -> Tensor:
    """Cost (points, displacements) of every displacement in a (2 radius + 1)³ cube, z slowest.

    Where fixed or moving has no data, a displacement costs what an average one costs: neither drawn nor repelled.
    """
    z, y, x = fixed.geometry.shape
    side = 2 * radius + 1
    # The fixed scan is laid out like the grown moving one: a displacement is then an offset in flat memory.
    rows = (values.shape[2] * values.shape[3], values.shape[3], 1)
    length = (z - 1) * rows[0] + (y - 1) * rows[1] + x
    here = values.new_zeros(values.shape[0] + 1, length)
    placed = here.as_strided((here.shape[0], z, y, x), (length, *rows))
    placed.copy_(fixed.channels)
    there = torch.cat([values, weight[None]]).flatten(1)
    compare = _one_by_one if here.device.type == "cpu" else _slice_by_slice
    flat = compare(here, there, rows, side)
    cost = flat.as_strided((side**3 * 2, z, y, x), (length, *rows)).float()
    for _ in range(2):
        cost = box_mean_3(cost)
    cost = cost.reshape(side**3, 2, -1)
    seen = cost[:, 1]
    average = cost[:, 0].sum() / seen.sum().clamp(min=1e-6)
    return (cost[:, 0] + (1 - seen) * average).T.contiguous()


def _one_by_one(here: Tensor, there: Tensor, rows: tuple[int, int, int], side: int) -> Tensor:
    """Weighted squared distances and weights (side³, 2, n) of descriptors with their weight last, (c + 1, n) and
    (c + 1, m), for every offset; `rows` are the steps along z, y, x in flat memory."""
    length = here.shape[1]
    squares = (here[:-1].square().sum(0), there[:-1].square().sum(0))
    product = torch.empty_like(here)
    flat = here.new_empty(side**3, 2, length)
    for number in range(side**3):
        offset = sum(
            n * r for n, r in zip((number // side**2, number // side % side, number % side), rows, strict=True)
        )
        torch.mul(here, there[:, offset : offset + length], out=product)
        both = flat[number, 1].copy_(product[-1])
        distance = torch.sum(product[:-1], 0, out=flat[number, 0])
        distance.mul_(-2).add_(squares[0]).add_(squares[1][offset : offset + length]).mul_(both)
    return flat


def _slice_by_slice(here: Tensor, there: Tensor, rows: tuple[int, int, int], side: int) -> Tensor:
    """The same for GPUs, which starting an operation takes longer than doing a small one: all offsets along x and y at
    once."""
    length, total = here.shape[1], there.shape[1]
    squares = (here[:-1].square().sum(0), there[:-1].square().sum(0))
    flat = here.new_empty(side, side**2, 2, length)
    for number in range(side):
        begin = number * rows[0]
        moved = there.as_strided((len(there), side, side, length), (total, *rows[1:], 1), begin).flatten(1, 2)
        moved_squares = squares[1].as_strided((side, side, length), (*rows[1:], 1), begin).flatten(0, 1)
        both = torch.mul(here[-1], moved[-1], out=flat[number, :, 1])
        # in this order: half precision has few digits left for a sum of both squares
        distance = (here[:-1, None] * moved[:-1]).sum(0).mul_(-2).add_(squares[0]).add_(moved_squares)
        torch.mul(distance, both, out=flat[number, :, 0])
    return flat.flatten(0, 1)


def _coupled_convex(cost: Tensor, shape: tuple[int, int, int], radius: int) -> Tensor:
    """The smooth field (3, z, y, x), control spacings, between best displacements and smoothness."""
    line = torch.linspace(-1, 1, 2 * radius + 1, device=cost.device)
    cube = torch.stack(torch.meshgrid(line, line, line, indexing="ij")[::-1]).reshape(3, -1)
    length = cube.square().sum(0)
    field = box_mean_3(cube[:, cost.argmin(1)].reshape(3, *shape))
    for weight in COUPLING:
        # |d - u|² without |u|², which is the same for all displacements of a point
        coupled = torch.addmm(cost, field.reshape(3, -1).T, cube, alpha=-2 * weight).add_(length, alpha=weight)
        field = box_mean_3(cube[:, coupled.argmin(1)].reshape(3, *shape))
    return field * radius


def _inverse_consistent(forward: Tensor, backward: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Two fields that come close to undoing each other: each is the mean of itself and the other's inverse."""
    for _ in range(iterations):
        forward, backward = (
            0.5 * (forward - _warp(backward, forward)),
            0.5 * (backward - _warp(forward, backward)),
        )
    return forward, backward


# ---------------------------------------------------------------------- gradient refinement


def _refine(fixed: Features, source: _Source, displacement: Tensor, iterations: int, smoothness: float) -> Tensor:
    """Gauss-Newton steps on E(u), see the module's text."""
    fixed_values = fixed.values.float()
    fixed_gradient = _gradient(fixed_values)
    for iteration in range(iterations):
        moving = source.at(fixed.geometry, displacement).float()
        weight = fixed.weight.float() * moving[-1]
        difference = (fixed_values - moving[:-1]) * weight
        if iteration % LINEARISED_EVERY == 0:
            slope = [(a + b) / 2 for a, b in zip(fixed_gradient, _gradient(moving[:-1]), strict=True)]
            normal = torch.stack([(slope[i] * slope[j]).sum(0) * weight for i, j in _UPPER])
            normal = box_mean_3(normal)
            inverse = _inverse_symmetric(normal, smoothness)
        descent = box_mean_3(torch.stack([(one * difference).sum(0) for one in slope]))
        target = _product_symmetric(normal, displacement) + descent
        for _ in range(SWEEPS):
            displacement = _product_symmetric(inverse, target + smoothness * box_mean_3(displacement))
    return displacement


#: Entries of a symmetric 3×3 matrix that are kept: xx, xy, xz, yy, yz, zz.
_UPPER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def _inverse_symmetric(matrix: Tensor, ridge: float) -> Tensor:
    """Inverse of (matrix + ridge · identity) at every voxel; (6, z, y, x) entries as in _UPPER."""
    a, b, c, d, e, f = matrix
    a, d, f = a + ridge, d + ridge, f + ridge
    aa, bb, cc = d * f - e * e, c * e - b * f, b * e - c * d
    determinant = a * aa + b * bb + c * cc
    return torch.stack([aa, bb, cc, a * f - c * c, b * c - a * e, a * d - b * b]) / determinant


def _product_symmetric(matrix: Tensor, vector: Tensor) -> Tensor:
    a, b, c, d, e, f = matrix
    x, y, z = vector
    return torch.stack([a * x + b * y + c * z, b * x + d * y + e * z, c * x + e * y + f * z])


# ---------------------------------------------------------------------- fields


def _gradient(field: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Central differences along x, y, z of (c, z, y, x)."""
    p = F.pad(field[None], [1] * 6, mode="replicate")[0]
    return (
        (p[:, 1:-1, 1:-1, 2:] - p[:, 1:-1, 1:-1, :-2]) / 2,
        (p[:, 1:-1, 2:, 1:-1] - p[:, 1:-1, :-2, 1:-1]) / 2,
        (p[:, 2:, 1:-1, 1:-1] - p[:, :-2, 1:-1, 1:-1]) / 2,
    )


def _warp(field: Tensor, displacement: Tensor) -> Tensor:
    """field(x + u(x)) on the same grid, both in voxels."""
    geometry = Geometry((field.shape[1], field.shape[2], field.shape[3]))
    return sample(field, geometry, index_grid(geometry, field.device) + displacement)


def _compose(found: Tensor, before: Tensor) -> Tensor:
    """The displacement of going x -> x + found(x), then on by the field before."""
    return found + _warp(before, found)


def _to_grid(field: Tensor, coarse: Geometry, fine: Geometry) -> Tensor:
    """A displacement field in voxels of one grid on another, in the other's voxels; edges are repeated."""
    to_coarse = np.linalg.inv(coarse.index_to_space) @ fine.index_to_space
    points = transform_points(index_grid(fine, field.device), to_coarse)
    unit = Geometry(coarse.shape)
    return sample(field, unit, points) * (coarse.spacing[0] / fine.spacing[0])
