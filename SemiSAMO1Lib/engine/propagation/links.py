"""Labels carried between the scans of a cohort: each is registered, once, with those that look most like it; whatever
these are found to show later votes there (multi-atlas fusion with local weights: Artaechevarria et al. 2009).

One template fits some scans badly, and most of these have others like them that it fits well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...volume import Geometry, Volume
from ..data.grids import inside, sample, space_points, transform_points
from .deformable import Settings, register
from .descriptors import Described, describe
from .registration import FINEST_BELOW, LOCALITY, TRUSTED, local_fits, score, trust_of

#: Described scans in a main memory that others need too.
DESCRIBED = 12

#: Where no linked scan is trusted, or fits, they still have a nearest guess.
_LEAST = 1e-6


@dataclass(frozen=True)
class Link:
    """Where one scan's places lie in another, and how much the other is to be believed there.

    Attributes:
        other: the other scan's name.
        start: 4×4, points (x, y, z) mm of the scan to points of the other.
        forward: (3, z, y, x) float16, displacement in mm (x, y, z) before `start`.
        trust: (z, y, x) float16 in [0, 1], of the transform by its round trip.
        fit: (z, y, x) float16 in (0, 1], how well the other looks like the scan there, beside the one that does best.
        geometry: grid of all three, in the scan.
    """

    other: str
    start: NDArray[np.float64]
    forward: Tensor
    trust: Tensor
    fit: Tensor
    geometry: Geometry

    def to_file(self) -> dict[str, Any]:
        """Tensors and plain values."""
        plain = {"other": self.other, "start": self.start.tolist(), "geometry": self.geometry.to_json()}
        return {**plain, "forward": self.forward, "trust": self.trust, "fit": self.fit}

    @classmethod
    def from_file(cls, value: dict[str, Any]) -> Link:
        start, geometry = np.array(value["start"]), Geometry.from_json(value["geometry"])
        return cls(value["other"], start, value["forward"], value["trust"], value["fit"], geometry)


class Linker:
    """Registers scans on their training grids with each other; those used last stay described."""

    def __init__(
        self,
        spacing: float,
        device: torch.device,
        settings: Settings | None = None,
        kept: int = DESCRIBED,
        padded: bool = True,
    ) -> None:
        """
        Args:
            spacing: isotropic spacing of the registration, mm.
            device: where descriptors and fields live.
            settings: of the deformable step.
            kept: described scans in memory.
            padded: a border of one grey value holds no data; False for grey values that were clipped to a window.
        """
        self._spacing, self._device, self._kept, self._padded = spacing, device, kept, padded
        self._settings = settings or Settings()
        self._described: dict[str, Described] = {}

    @torch.no_grad()
    def links(
        self, name: str, others: Sequence[str], image: Callable[[str], Volume], start: Callable[[str], Any]
    ) -> list[Link]:
        """Register a scan with others.

        Args:
            name: the scan.
            others: the scans it is registered with.
            image: gives a scan's intensities.
            start: gives, for one of the others, the 4×4 matrix from the scan to it, where the registration begins.
        """
        if not others:
            return []
        case = self._ready(name, image)
        found = [(other, self._ready(other, image)) for other in others]
        results = [register(case, one, start(other), self._settings) for other, one in found]
        # one that hardly overlaps fits by chance; where all are so, the largest overlap is the least bad guess
        sound = [at for at, result in enumerate(results) if math.isfinite(score(result))]
        sound = sound or [max(range(len(results)), key=lambda at: results[at].overlap)]
        found, results = [found[at] for at in sound], [results[at] for at in sound]
        pairs = [(one, result) for (_, one), result in zip(found, results, strict=True)]
        fits = local_fits(case, pairs, LOCALITY)
        links = []
        for (other, _), result, fit in zip(found, results, fits, strict=True):
            points = space_points(result.geometry, self._device)
            trust = trust_of(result, points, TRUSTED * self._spacing)
            fitting = sample(fit[None], case.coarse.geometry, points)[0]
            forward, trust, fitting = (each.half().cpu() for each in (result.forward, trust, fitting))
            links.append(Link(other, result.start, forward, trust, fitting, result.geometry))
        return links

    def forget(self, name: str) -> None:
        """The next scan of this name is another one."""
        self._described.pop(name, None)

    def _ready(self, name: str, image: Callable[[str], Volume]) -> Described:
        found = self._described.pop(name, None)
        if found is None:
            volume = image(name)
            grown = float(np.prod(volume.geometry.extent)) / self._spacing**3
            found = describe(volume, self._spacing, self._device, finest=grown < FINEST_BELOW, padded=self._padded)
        self._described[name] = found
        while len(self._described) > self._kept:
            del self._described[next(iter(self._described))]
        return found


def carried(
    links: Sequence[Link],
    said_by: Callable[[str, int], Volume],
    known_by: Callable[[str], Volume],
    grid: Geometry,
    classes: int,
    device: torch.device,
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """What linked scans say about a scan.

    Args:
        links: who votes, at least one.
        said_by: gives a linked scan's probability of a class, (z, y, x).
        known_by: gives 1 where a linked scan knows what it shows, 0 where it only guesses, (z, y, x).
        grid: where the votes are wanted, in the scan.
        classes: C.
        device: where this is computed.

    Returns:
        class probabilities (C, z, y, x), sum 1, and the mean trust in the votes (z, y, x), in [0, 1].
    """
    points = space_points(grid, device)
    ballots: list[tuple[Link, Tensor, Tensor]] = []
    weight, trust = (torch.zeros(grid.shape, device=device) for _ in range(2))
    for link in links:
        forward = link.forward.to(device).float()
        there = transform_points(points + sample(forward, link.geometry, points), link.start)
        trusted, fit = sample(torch.stack([link.trust, link.fit]).to(device).float(), link.geometry, points)
        known = known_by(link.other)
        trusted = trusted * _values_at(known, there) * inside(known.geometry, there)
        vote = (trusted + _LEAST) * (fit + _LEAST)
        ballots.append((link, there, vote))
        weight += vote
        trust += vote * trusted
    said = np.empty((classes, *grid.shape), np.float16)
    for value in range(classes):  # one class at a time: memory does not grow with their number
        total = torch.zeros(grid.shape, device=device)
        for link, there, vote in ballots:
            total += vote * _values_at(said_by(link.other, value), there)
        said[value] = (total / weight).cpu().numpy()
    return said, (trust / weight).half().cpu().numpy()


def _values_at(volume: Volume, points: Tensor) -> Tensor:
    """Values of a volume (z, y, x) at points (3, Z, Y, X) mm, where these lie."""
    values = torch.from_numpy(np.asarray(volume.array, np.float32)).to(points.device)
    return sample(values[None], volume.geometry, points)[0]
