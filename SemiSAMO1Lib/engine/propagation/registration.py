"""Carry labels to a case by registration, from the nearest labelled scans: several starts, judged, kept or fused.

This is the propagator that needs no checkpoint and no download.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...volume import Geometry, Volume
from ..cases import LabelledCase, Propagation
from ..data.grids import inside, sample, space_points
from ..similarity import Likeness
from .deformable import Deformation, Settings, raised, register
from .descriptors import Described, describe
from .detours import VOTE, Helper, start_through
from .near import Neighbourhood, apart, at_one_place, misfits, neighbourhood, starts_near, unrelated
from .starts import SMALLEST_OVERLAP, Start, affines, translations

#: Nodes of the coarse grid along each axis over which the fit of a labelled scan is averaged.
NEIGHBOURHOOD = 5

#: Share of a neighbourhood that both scans must show before their fit there is judged.
_LEAST_DATA = 0.01

#: Scans with fewer voxels than this on the working grid are refined on every voxel.
FINEST_BELOW = 200_000

#: Voxels of the working grid by which one may come back beside where one began until the trust has fallen to 0.61
#: (exp(-1/2)).
TRUSTED = 3.0

#: By how much of the mean local misfit a labelled scan may fit worse at a place than the best one: see
#: `RegistrationSettings.locality`.
LOCALITY = 0.3

#: Where a label's surroundings fit so well, beside what unrelated places differ by, no further start is looked for.
WELL = 0.3


@dataclass(frozen=True)
class RegistrationSettings:
    """How a case is registered.

    Attributes:
        deformable: the deformable step.
        use_affine: try every start with an affine step as well.
        affine_margin: an affine start replaces the best translation only if its score is lower by this share.
        tie: starts whose score is within this share of the best are fused, if they bring the label to its place.
        seed: of the affine step's voxel sample.
        atlases: labelled scans that vote, where there are more: those that look most like the case.
        locality: by how much of the mean local misfit a labelled scan may fit worse at a place than the best one there
            until its vote there has fallen to 0.37 (exp(-1)).
        worse: by which share a labelled scan may fit worse around its label, as a whole, than the best one until its
            vote has fallen to 0.37 everywhere (a Gaussian: hardly at all for small differences).
    """

    deformable: Settings = field(default_factory=Settings)
    use_affine: bool = True
    affine_margin: float = 0.02
    tie: float = 0.03
    seed: int = 0
    atlases: int = 3
    locality: float = LOCALITY
    worse: float = 0.3


@dataclass(frozen=True, eq=False)
class Prepared:
    """A labelled case ready to be carried to many others.

    `label` (z, y, x) class indices and `known` (1, z, y, x) lie on the labelled scan's own grid; None: all is known.
    `near`: the surroundings of the label; None where it is empty, or lies where the scan has no data.
    """

    labelled: LabelledCase
    described: Described
    label: Tensor
    known: Tensor | None
    near: Neighbourhood | None


@dataclass(frozen=True, eq=False)
class Atlas:
    """A labelled case; `signature` is what it looks like in the template's space, None where no choice between labelled
    cases is needed."""

    labelled: LabelledCase
    signature: NDArray[np.float16] | None = None


@dataclass(frozen=True, eq=False)
class _Ways:
    """How a labelled scan can be brought to a case.

    Attributes:
        transforms: those to use, the best first.
        facts: of every start that was tried, JSON-able.
        misfit: the best start's score around the label; None where all that both scans show was judged.
    """

    transforms: list[Deformation]
    facts: list[dict[str, Any]]
    misfit: float | None


class RegistrationPropagator:
    """The propagator of this module; see `propagation/base.py`."""

    def __init__(
        self,
        spacing: float,
        classes: int,
        device: torch.device,
        settings: RegistrationSettings | None = None,
    ) -> None:
        """
        Args:
            spacing: isotropic spacing of the registration, mm (see `working_spacing`).
            classes: number of classes, background included.
            device: where descriptors and fields live.
            settings: how to register.
        """
        self.spacing = spacing
        self.classes = classes
        self.device = device
        self.settings = settings or RegistrationSettings()
        self._ready: dict[str, Prepared] = {}
        self._helpers: dict[str, Prepared] = {}

    @torch.no_grad()
    def prepare(self, labelled: Sequence[LabelledCase]) -> list[Atlas]:
        """The labelled cases; where they are many, with what each looks like in the template's space."""
        self._ready.clear()
        self._helpers.clear()
        if len(labelled) <= self.settings.atlases:
            return [Atlas(case) for case in labelled]
        template = self.ready(Atlas(labelled[0]))
        others = [Atlas(case, self._seen_from(template, self.describe(case.image))) for case in labelled[1:]]
        return [Atlas(labelled[0], _own_signature(template)), *others]

    def ready(self, atlas: Atlas) -> Prepared:
        """Describe a labelled case, or take it from those used last: of many, a few are in memory."""
        case = atlas.labelled
        found = self._ready.pop(case.id, None)
        if found is None:
            label = self._on_device(case.label)
            known = torch.from_numpy(case.known_voxels()).float()[None].to(self.device) if case.unknown else None
            described = self.describe(case.image)
            found = Prepared(case, described, label, known, neighbourhood(described, case.label))
        self._ready[case.id] = found  # the one used last is the last
        while len(self._ready) > self.settings.atlases + 1:
            del self._ready[next(iter(self._ready))]
        return found

    def _ready_helpers(self, helpers: Sequence[Helper], weight: float) -> list[Prepared]:
        """Describe cases through which detours lead; those of the last time are in memory."""
        if helpers:
            self._helpers = {one.id: self._helpers.get(one.id) or self._described(one, weight) for one in helpers}
        return [self._helpers[one.id] for one in helpers]

    def _described(self, one: Helper, weight: float) -> Prepared:
        """A helper as a labelled case; its label stays on its own grid."""
        described = self.describe(one.load(), one.padded)
        label = self._on_device(one.label)
        known = torch.from_numpy(one.known).float()[None].to(self.device)
        labelled = LabelledCase(one.id, described.image, one.label, weight, "carried")
        return Prepared(labelled, described, label, known, neighbourhood(described, one.label))

    def _on_device(self, label: Volume) -> Tensor:
        kind = np.uint8 if self.classes <= 256 else np.int32
        return torch.from_numpy(label.array.astype(kind)).to(self.device)

    def template_signature(self, prepared: Sequence[Atlas]) -> NDArray[np.float16]:
        """The template's descriptors, pooled; see `signature`."""
        return _own_signature(self.ready(prepared[0]))

    @torch.no_grad()
    def propagate(
        self, prepared: Sequence[Atlas], volume: Volume, grid: Geometry, through: Sequence[Helper] = ()
    ) -> Propagation:
        """Carry all labels to a scan and fuse them on `grid`, each voxel by the confidences.

        Args:
            prepared: labelled cases, from `prepare`.
            volume: the scan.
            grid: the working grid of the result.
            through: cases through which detours lead; those to which the label could be carried near its place vote.
        """
        case, template = self.describe(volume), self.ready(prepared[0])
        helpers = self._ready_helpers(through, VOTE * min(one.labelled.weight for one in prepared))
        detours = [(one, self._best(case, one)) for one in helpers]
        to_template = self._best(case, template, _starts_by(detours, through, template))
        own = _in_template(case, to_template.transforms[0], template)
        chosen = [self.ready(one) for one in _nearest(own, prepared, self.settings.atlases)]
        voters = [(one, to_template if _same(one, template) else self._best(case, one)) for one in chosen]
        others = [way for _, way in voters if way is not to_template]
        facts = {
            "starts": [fact for way in [to_template, *others, *(way for _, way in detours)] for fact in way.facts],
            "atlases": [one.labelled.id for one in chosen],
            "misfit": min((way.misfit for _, way in voters if way.misfit is not None), default=None),
            "through": [helper.id for helper in through],
        }
        # a carried label that is empty, or that could not be looked for around its place, says nothing
        found = self._votes([*voters, *((one, way) for one, way in detours if way.misfit is not None)])
        result = self._fuse(case, found, grid, facts)
        # the first transform is always that to the template: its space is where cases are compared
        further = [deformation for one, deformation, _ in found if not _same(one, template)]
        return replace(result, signature=own, transforms=[*to_template.transforms, *further])

    def _votes(self, ways: Sequence[tuple[Prepared, _Ways]]) -> list[tuple[Prepared, Deformation, float]]:
        """Each transform with its vote: by how well its labelled scan fits as a whole and what that scan weighs.

        Many starts that come out alike are a bad sign, not more votes: a labelled scan has one.
        """
        fits = fits_of([way.misfit for _, way in ways], self.settings.worse)
        found = []
        for (one, way), fit in zip(ways, fits, strict=True):
            vote = fit * one.labelled.weight / len(way.transforms)
            found += [(one, deformation, vote) for deformation in way.transforms]
        return found

    def _seen_from(self, template: Prepared, scan: Described) -> NDArray[np.float16]:
        """What a scan looks like in the template's space."""
        return _in_template(scan, self._best(scan, template).transforms[0], template)

    def describe(self, volume: Volume, padded: bool = True) -> Described:
        """A scan on the working grid, with its descriptors; `padded` as `descriptors.describe` has it."""
        grown = [n * s / self.spacing for n, s in zip(volume.geometry.shape, volume.geometry.spacing, strict=True)]
        return describe(volume, self.spacing, self.device, math.prod(grown) < FINEST_BELOW, padded)

    def _best(self, case: Described, one: Prepared, further: Sequence[Start] = ()) -> _Ways:
        """Register from the ordinary starts and further ones, and from places near the label where none fits well."""
        translated = translations(case, one.described)
        starts = list(translated)
        if self.settings.use_affine:
            starts += affines(case, one.described, translated, self.settings.seed)
        results = self._registered(case, one, [*starts, *further])
        scores, around = _scores(case, one.near, results)
        if one.near is not None and not (around and min(scores) <= WELL * unrelated(case, one.near)):
            results += self._registered(case, one, starts_near(case, one.near, translated, self.settings.deformable))
            scores, around = _scores(case, one.near, results)
        facts = [_facts(one.labelled.id, d, s) for d, s in zip(results, scores, strict=True)]
        chosen = choose(results, scores, self.settings)
        if one.near is not None:  # a mean of two places is neither
            together = at_one_place(one.near, [results[number] for number in chosen])
            chosen = [number for number, there in zip(chosen, together, strict=True) if there]
        for number in chosen:
            facts[number]["used"] = True
        return _Ways([results[number] for number in chosen], facts, min(scores) if around else None)

    def _registered(self, case: Described, one: Prepared, starts: Sequence[Start]) -> list[Deformation]:
        found = [register(case, one.described, start.matrix, self.settings.deformable) for start in starts]
        return [replace(deformation, name=start.name) for deformation, start in zip(found, starts, strict=True)]

    def _fuse(
        self, case: Described, found: list[tuple[Prepared, Deformation, float]], grid: Geometry, facts: dict[str, Any]
    ) -> Propagation:
        """Every voxel takes the mean label of the transforms, each by its vote, its trust and its fit there."""
        pairs = [(one.described, deformation) for one, deformation, _ in found]
        fits = local_fits(case, pairs, self.settings.locality)
        points = space_points(grid, self.device)
        weight = torch.zeros(grid.shape, device=self.device)
        confidence = torch.zeros(grid.shape, device=self.device)
        scale = TRUSTED * self.spacing
        votes = []
        for (one, deformation, share), fit in zip(found, fits, strict=True):
            there = deformation.to_template(points)
            geometry = one.labelled.label.geometry
            seen = inside(geometry, there).float()
            if one.known is not None:
                seen *= sample(one.known, geometry, there)[0]
            trust = trust_of(deformation, points, scale) * seen
            # outside its field a template votes next to nothing, but a place nobody saw still has a nearest guess
            vote = share * (trust + 1e-6) * sample(fit[None], case.coarse.geometry, points)[0]
            votes.append((one, there, vote))
            weight += vote
            confidence += vote * trust
        confidence /= weight.clamp(min=1e-12)
        probabilities = torch.empty(self.classes, *grid.shape, dtype=torch.float16, device=self.device)
        background = torch.ones(grid.shape, device=self.device)  # background is what no class has
        for value in range(1, self.classes):  # one class at a time: memory does not grow with their number
            total = torch.zeros(grid.shape, device=self.device)
            for one, there, vote in votes:
                total += vote * sample((one.label == value).float()[None], one.labelled.label.geometry, there)[0]
            total /= weight.clamp(min=1e-12)
            background -= total
            probabilities[value] = total
        probabilities[0] = background.clamp(min=0)
        return Propagation(grid, probabilities, confidence, [d for _, d, _ in found], facts)


def _same(one: Prepared, other: Prepared) -> bool:
    return one.labelled.id == other.labelled.id


def _starts_by(detours: Sequence[tuple[Prepared, _Ways]], through: Sequence[Helper], template: Prepared) -> list[Start]:
    """Starts of a registration with the template to which detours lead, each place once."""
    if template.near is None:
        return []
    found = []
    for helper, (_, way) in zip(through, detours, strict=True):
        if way.misfit is not None:
            start = start_through(template.near, way.transforms[0], helper.to_template, f"through {helper.id}")
            found += [start] if start is not None else []
    return apart(template.near, found)


def trust_of(deformation: Deformation, points: Tensor, scale: float) -> Tensor:
    """How far a transform is to be believed at points (3, z, y, x) mm, in (0, 1]: 0.61 where one comes back `scale` mm
    beside where one began."""
    trip = sample(deformation.round_trip[None], deformation.geometry, points)[0]
    return torch.exp(-0.5 * (trip / scale).square())


def local_fits(case: Described, found: Sequence[tuple[Described, Deformation]], locality: float) -> list[Tensor]:
    """How well each labelled scan fits the case at a place, in (0, 1] beside the best one there (local weighting:
    Artaechevarria et al. 2009), on the case's coarse grid."""
    geometry = case.coarse.geometry
    points = space_points(geometry, case.coarse.channels.device)
    if len(found) == 1:
        return [torch.ones(geometry.shape, device=points.device)]
    differences = []
    for other, deformation in found:
        there = deformation.to_template(points)
        carried = sample(other.coarse.channels, other.coarse.geometry, there)
        both = case.coarse.weight.float() * carried[-1] * inside(other.coarse.geometry, there)
        squared = (carried[:-1] - case.coarse.values.float()).square().mean(0)
        data = _averaged(both)
        differences.append(torch.where(data > _LEAST_DATA, _averaged(squared * both) / data, torch.inf))
    best = torch.stack(differences).amin(0)
    known = best.isfinite()
    scale = (locality * float(best[known].double().mean()) if known.any() else 0.0) or 1.0
    return [torch.where(known, torch.exp(-(one - best) / scale), 1.0) for one in differences]


def _averaged(values: Tensor) -> Tensor:
    """Mean over the neighbourhood of every node; beyond the border there is nothing."""
    padded = torch.nn.functional.pad(values, [NEIGHBOURHOOD // 2] * 6)  # by hand: a scan may be smaller than that
    return torch.nn.functional.avg_pool3d(padded[None, None], NEIGHBOURHOOD, 1)[0, 0]


def _own_signature(template: Prepared) -> NDArray[np.float16]:
    return signature(template.described.coarse.values)


def _in_template(case: Described, deformation: Deformation, template: Prepared) -> NDArray[np.float16]:
    """A scan's signature, carried to the template's space."""
    space = template.described.coarse.geometry
    there = deformation.to_case(space_points(space, case.coarse.channels.device))
    return signature(sample(case.coarse.values, case.coarse.geometry, there))


def _nearest(own: NDArray[np.float16], prepared: Sequence[Atlas], count: int) -> list[Atlas]:
    """The labelled scans that look most like a case, by the cosine of their signatures; all where they are few."""
    if len(prepared) <= count:
        return list(prepared)

    known = {one.labelled.id: one for one in prepared}
    signatures = {"": own, **{name: np.asarray(one.signature) for name, one in known.items()}}
    chosen = {name for name, _ in Likeness(signatures).nearest("", list(known), count)}
    return [one for one in prepared if one.labelled.id in chosen]


def signature(values: Tensor) -> NDArray[np.float16]:
    """Descriptors (c, z, y, x) in the template's space, averaged over 3³ voxels, their mean removed."""
    width = [min(3, n) for n in values.shape[1:]]  # thin scans have fewer than three voxels along an axis
    pooled = torch.nn.functional.avg_pool3d(values.float()[None], width, ceil_mode=True)[0].cpu().numpy()
    return np.asarray(pooled - pooled.mean(), np.float16)


def score(deformation: Deformation) -> float:
    """How bad a registration is: its residual, raised by round-trip error (mm) and folding; inf if disqualified."""
    if deformation.overlap < SMALLEST_OVERLAP:
        return math.inf
    return raised(deformation.residual, deformation)


def _scores(case: Described, near: Neighbourhood | None, results: Sequence[Deformation]) -> tuple[list[float], bool]:
    """How bad registrations are around the label, and True. Where no label says where to look, or none of them brings
    its surroundings into the case: how bad they are in all that both scans show, and False."""
    if near is not None:
        scores = misfits(near, [(case, one) for one in results])
        if any(map(math.isfinite, scores)):
            return scores, True
    return [score(one) for one in results], False


def choose(results: Sequence[Deformation], scores: Sequence[float], settings: RegistrationSettings) -> list[int]:
    """Which starts to use: the best, and what comes close to it; the best first.

    An affine start replaces the best translation only when it wins by the margin. If every start is disqualified, the
    one with the largest overlap is used alone: its confidence says how little it is worth.
    """
    if not any(map(math.isfinite, scores)):
        largest = max(range(len(results)), key=lambda i: results[i].overlap)
        return [largest]
    handicap = [
        s * (1 + settings.affine_margin) if r.name.endswith("+affine") else s
        for r, s in zip(results, scores, strict=True)
    ]
    best = min(handicap)
    order = sorted(range(len(results)), key=lambda i: handicap[i])
    return [i for i in order if handicap[i] <= best * (1 + settings.tie)]


def fits_of(scores: Sequence[float | None], worse: float) -> list[float]:
    """How well labelled scans fit a case around their labels as a whole, in (0, 1] beside the best of them.

    Args:
        scores: the best score of each around its label; None for one that was not judged there: it counts as the
            median of the others, and 1 where there are none.
        worse: see `RegistrationSettings`.
    """
    judged = [one for one in scores if one is not None]
    if not judged:
        return [1.0] * len(scores)
    scale = worse * max(min(judged), 1e-6)
    fits = [None if one is None else math.exp(-(((one - min(judged)) / scale) ** 2)) for one in scores]
    usual = float(np.median([one for one in fits if one is not None]))
    return [usual if one is None else one for one in fits]


def _facts(template: str, deformation: Deformation, value: float) -> dict[str, Any]:
    return {
        "template": template,
        "start": deformation.name,
        "score": value if math.isfinite(value) else None,
        "residual": deformation.residual if math.isfinite(deformation.residual) else None,
        "round_trip_mm": float(deformation.round_trip.mean()),
        "folded": deformation.folded,
        "overlap": deformation.overlap,
        "used": False,
    }
