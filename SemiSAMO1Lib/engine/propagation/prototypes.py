"""Carry labels by features: every cell of a scan takes the class whose prototype it is most like (SemiSAM-O1).

A prototype is the mean feature of a class over the template's cells. Background has one too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from ...volume import Geometry, Volume
from ..cases import LabelledCase, Propagation
from ..config import GeneralistConfig
from ..data.grids import canonical, inside, resample_labels, sample, space_points, with_spacing
from ..generalists.base import FeatureMap, Generalist
from ..inference.uncertainty import voxel_entropy
from ..refinement.acceptance import mean_dice
from .detours import Helper


@dataclass(frozen=True)
class Prototypes:
    """What the classes look like.

    Attributes:
        vectors: for each class (k, c), L2-normalised; k differs, and is 0 for a class that the template lacks.
        reliability: Dice with which the template's own label is found again, 0 to 1: how far these features and
            cells can tell the classes apart at all.
        signature: f_g of the template.
    """

    vectors: list[NDArray[np.float32]]
    reliability: float
    signature: NDArray[np.float16]


class PrototypePropagator:
    """Propagation by prototypes of a generalist's features."""

    def __init__(
        self,
        generalist: Generalist,
        classes: int,
        spacing: tuple[float, float, float],
        settings: GeneralistConfig,
        seed: int,
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
            generalist: gives the features.
            classes: number of classes, background included.
            spacing: of the training grid, (z, y, x) mm; the reliability is measured on it.
            settings: number of prototypes, upsampling, how labels become cells.
            seed: of k-means.
            warn: gets a sentence where a class is too small for the cells.
        """
        self.generalist = generalist
        self.classes = classes
        self.spacing = spacing
        self.settings = settings
        self.seed = seed
        self.warn = warn

    def prepare(self, labelled: Sequence[LabelledCase]) -> Prototypes:
        """The prototypes of all labelled cases. Raises ValueError when none of them shows a foreground class."""
        maps = [self.generalist.features(case.image) for case in labelled]
        cells = [self._cells(case, found) for case, found in zip(labelled, maps, strict=True)]
        features = [found.channels.reshape(len(found.channels), -1).T.astype(np.float32) for found in maps]
        vectors = []
        for value in range(self.classes):
            members = [one[label.ravel() == value] for one, label in zip(features, cells, strict=True)]
            vectors.append(self._prototypes(members, [case.weight for case in labelled]))
        if not any(len(one) for one in vectors[1:]):
            raise ValueError(
                "the labelled cases show no foreground class in any cell of the features: the structures are smaller "
                "than the cells. Use label_cells 'share', coverage 'full', or --generalist registration"
            )
        signature = maps[0].global_feature().astype(np.float16)
        unproven = Prototypes(vectors, 1.0, signature)
        return Prototypes(vectors, self._reliability(unproven, labelled[0], maps[0]), signature)

    def template_signature(self, prepared: Prototypes) -> NDArray[np.float16]:
        return prepared.signature

    def propagate(
        self, prepared: Prototypes, volume: Volume, grid: Geometry, through: Sequence[Helper] = ()
    ) -> Propagation:
        """Carry the labels to a scan; see `Propagator`. Other cases do not help: what a feature means is known."""
        found = self.generalist.features(volume)
        facts = {"prototypes": [len(one) for one in prepared.vectors], "reliability": prepared.reliability}
        probabilities, seen = self._probabilities(prepared, found, grid)
        confidence = prepared.reliability * (1 - voxel_entropy(probabilities)) * seen
        signature = found.global_feature().astype(np.float16)
        return Propagation(
            grid,
            torch.from_numpy(probabilities),
            torch.from_numpy(confidence),
            (),
            facts,
            signature,
            prepared.reliability,
        )

    def _probabilities(
        self, prepared: Prototypes, found: FeatureMap, grid: Geometry
    ) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """Softmax over the classes of cosine / temperature, (C, z, y, x), and where the features saw anything."""
        points = space_points(grid)
        features = _unit(found.channels.reshape(len(found.channels), -1).T)
        mode = "nearest" if self.settings.upsampling == "nearest" else "bilinear"
        there = [value for value, vectors in enumerate(prepared.vectors) if len(vectors)]
        cosines = np.stack([(features @ prepared.vectors[value].T).max(1) for value in there])
        cosines -= cosines.max(0)  # the same for all classes of a cell: near 0, half precision tells them apart
        logits = np.full((self.classes, *grid.shape), -np.inf, np.float16)
        total = np.full(grid.shape, -np.inf, np.float32)
        for value, cosine in zip(there, cosines, strict=True):  # one class at a time: memory does not grow with them
            cells = torch.from_numpy(cosine.reshape(1, *found.geometry.shape))
            logits[value] = sample(cells, found.geometry, points, mode)[0].numpy() / self.settings.temperature
            total = np.logaddexp(total, logits[value].astype(np.float32))
        for value in range(self.classes):
            logits[value] = np.exp(logits[value].astype(np.float32) - total)
        weight = torch.from_numpy(found.weight)[None]
        seen = (sample(weight, found.geometry, points, "nearest")[0] > 0) & inside(found.geometry, points)
        outside = ~seen.numpy()
        logits[:, outside] = 0  # as published: background beyond the features; its confidence of 0 says "unknown"
        logits[0, outside] = 1
        return logits, seen.numpy().astype(np.float32)

    def _cells(self, case: LabelledCase, found: FeatureMap) -> NDArray[np.intp]:
        """The class of every cell, (z, y, x); -1 where nothing was seen or the label does not say."""
        if self.settings.label_cells == "nearest":
            label = _first_voxels(case.label, found.geometry)
            return np.where(label > 0, label, -1) if case.unknown else label
        shares = cell_shares(case, found.geometry, self.classes)
        shares[:, found.weight <= 0] = 0
        label = np.where(shares.sum(0) > 0.5, shares.argmax(0), -1)
        for value in range(1, self.classes):
            if value in case.unknown or (label == value).any():
                continue
            if not shares[value].any():
                self.warn(f"class {value} is not in the label of {case.id}, or lies outside of what was seen")
                continue
            free = np.where(_last_of_a_class(label), 0, shares[value])  # no class may lose its only cell to another
            if not free.any():
                self.warn(f"class {value} of {case.id} has no cell of the features to itself; it is not carried")
                continue
            label[np.unravel_index(int(free.argmax()), label.shape)] = value
            self.warn(
                f"class {value} of {case.id} fills no cell of the features (largest share {free.max():.0%}); "
                "its prototype is that one cell"
            )
        return label

    def _prototypes(self, members: list[NDArray[np.float32]], weights: list[float]) -> NDArray[np.float32]:
        """k prototypes of a class from its cells in each labelled case; k = 1: their means, averaged (the paper).

        Cells keep their length in a mean, as published; clusters are found among directions.
        """
        there = [(one, weight) for one, weight in zip(members, weights, strict=True) if len(one)]
        if not there:
            return np.zeros((0, 0), np.float32)
        if self.settings.prototypes == 1:
            means = np.stack([_unit(one.mean(0, keepdims=True))[0] for one, _ in there])
            return _unit(np.average(means, axis=0, weights=[weight for _, weight in there])[None])
        cells = _unit(np.concatenate([one for one, _ in there]))
        count = min(self.settings.prototypes, len(np.unique(cells, axis=0)))
        if count == 1:
            return _unit(cells.mean(0, keepdims=True))
        centres, _ = kmeans2(cells.astype(np.float64), count, minit="++", seed=self.seed, missing="warn")
        return _unit(centres.astype(np.float32))

    def _reliability(self, prepared: Prototypes, template: LabelledCase, features: FeatureMap) -> float:
        grid = with_spacing(canonical(template.image.geometry), self.spacing)
        found, _ = self._probabilities(prepared, features, grid)
        return mean_dice(found.argmax(0), resample_labels(template.label, grid), self.classes)


def _last_of_a_class(label: NDArray[np.intp]) -> NDArray[np.bool_]:
    """True in cells that are the only one of their foreground class."""
    values, counts = np.unique(label, return_counts=True)
    return np.isin(label, values[(counts == 1) & (values > 0)])


def cell_shares(case: LabelledCase, cells: Geometry, classes: int) -> NDArray[np.float32]:
    """The share of every cell that each class fills, (C, z, y, x); what the label does not say counts for none.

    A cell without a voxel's centre (voxels larger than cells) takes the nearest voxel.
    """
    counts = np.zeros((classes, cells.voxels), np.float32)
    voxels = np.zeros(cells.voxels, np.float32)
    known, array = case.known_voxels(), case.label.array
    for z in range(case.label.geometry.shape[0]):  # slice by slice: the places of a whole scan take much memory
        within, flat = _cells_of_slice(case.label.geometry, z, cells)
        voxels += np.bincount(flat, minlength=cells.voxels)
        label = np.where(known[z], array[z].astype(np.intp), -1).ravel()[within]
        for value in range(classes):
            counts[value] += np.bincount(flat[label == value], minlength=cells.voxels)
    shares: NDArray[np.float32] = (counts / voxels.clip(1)).reshape(classes, *cells.shape)
    empty = voxels.reshape(cells.shape) == 0
    if empty.any():
        centres = space_points(cells)[:, torch.from_numpy(empty)][:, None, None, :]
        here = inside(case.label.geometry, centres)[0, 0].numpy()
        for value in range(classes):
            one = torch.from_numpy(((array == value) & known).astype(np.float32))[None]
            shares[value][empty] = sample(one, case.label.geometry, centres, "nearest")[0, 0, 0].numpy() * here
    return shares


def _cells_of_slice(geometry: Geometry, z: int, cells: Geometry) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which voxels (y·x) of a slice lie in a cell, and in which (flat)."""
    y, x = np.indices(geometry.shape[1:]).reshape(2, -1)
    matrix = np.linalg.inv(cells.index_to_space) @ geometry.index_to_space
    place = matrix[:3, :3] @ np.stack([x, y, np.full_like(x, z)]) + matrix[:3, 3:]
    index = np.floor(place[::-1] + 0.5 + 1e-6).astype(np.intp)
    within = ((index >= 0) & (index < np.array(cells.shape)[:, None])).all(0)
    return within, np.ravel_multi_index(tuple(index[:, within]), cells.shape)


def _first_voxels(label: Volume, cells: Geometry) -> NDArray[np.intp]:
    """As released: a cell takes the label of its first voxel along each axis; 0 beyond the label."""
    first = [-0.5 + 0.5 * s / c for s, c in zip(label.geometry.spacing, cells.spacing, strict=True)]
    corner = cells.index_to_space @ np.array([*first[::-1], 1.0])
    grid = Geometry(cells.shape, cells.spacing, (float(corner[0]), float(corner[1]), float(corner[2])), cells.direction)
    values = torch.from_numpy(label.array.astype(np.float32))[None]
    points = space_points(grid)
    found = sample(values, label.geometry, points, "nearest")[0] * inside(label.geometry, points)
    return found.numpy().astype(np.intp)


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of length 1."""
    rows = vectors.astype(np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)
