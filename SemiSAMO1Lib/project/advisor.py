"""Which scan to label: the one that looks most like the others. Before anything is labelled, without registration.

Every scan is sketched: resampled on a coarse grid of one size in mm about the centre of its field of view, along the
patient's axes, grey values replaced by their ranks. Two sketches are compared by correlation, at the best of small
shifts. A scan's centrality is its mean correlation with the others; the most central one is recommended (measured:
docs/benchmarks.md). Scans that hardly resemble any other, or are broken, are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ..image_io import to_sitk
from ..volume import Geometry, Volume

#: Nodes of a sketch along each axis, and how many of them two sketches may be shifted against each other.
NODES, SHIFT = 24, 2

#: A scan is compared with at most this many others, so that the cost of a large cohort stays linear.
MOST_COMPARED = 100

#: A centrality this many robust deviations below the median marks an outlier, if it is that much lower as well.
OUTLIER, LOWER_BY = 4.0, 0.15

#: A field of view that many times larger or smaller than the median one is another kind of scan.
EXTENT_RATIO = 3.0

#: Neighbouring voxels of a real scan correlate at least this much; below, it is noise.
LEAST_SMOOTH = 0.3

#: Share of slices without any content from which on a scan counts as broken.
MOST_EMPTY = 0.4


@dataclass(frozen=True)
class Sketch:
    """What a scan looks like, coarsely.

    Attributes:
        values: (z, y, x) ranks of the grey values, mean 0 and deviation 1.
        edges: the same of the size of their gradient, which other modalities share.
        extent: of the field of view along the patient's axes (x, y, z), mm.
        fault: why the scan looks broken; empty where it does not.
    """

    values: NDArray[np.float32]
    edges: NDArray[np.float32]
    extent: tuple[float, float, float]
    fault: str = ""


@dataclass(frozen=True)
class Ranked:
    """A scan's place among the templates that are possible.

    Attributes:
        case: its id.
        centrality: mean correlation with the other scans, -1 to 1.
        reason: why it stands where it stands.
        warning: why it does not fit to the others; empty where it does.
    """

    case: str
    centrality: float
    reason: str
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Frame:
    """The box in which all scans of a cohort are sketched: its extent (x, y, z) in mm, the median of theirs."""

    extent: tuple[float, float, float] = field(default=(100.0, 100.0, 100.0))

    @classmethod
    def of(cls, geometries: Sequence[Geometry]) -> Frame:
        x, y, z = np.median([patient_extent(one) for one in geometries], axis=0)
        return cls((float(x), float(y), float(z)))


def patient_extent(geometry: Geometry) -> tuple[float, float, float]:
    """Size of a field of view along the patient's axes (x, y, z), mm."""
    turned = np.abs(np.reshape(geometry.direction, (3, 3))) @ np.array(geometry.extent[::-1])
    return float(turned[0]), float(turned[1]), float(turned[2])


def sketch(volume: Volume, frame: Frame) -> Sketch:
    """Sketch a scan; a constant or broken one has a fault."""
    image = sitk.Cast(to_sitk(volume), sitk.sitkFloat32)
    spacing = [mm / NODES for mm in frame.extent]
    smooth = sitk.SmoothingRecursiveGaussian(image, [0.5 * mm for mm in spacing])
    origin = [c - (NODES - 1) / 2 * mm for c, mm in zip(volume.geometry.centre, spacing, strict=True)]
    resample = sitk.ResampleImageFilter()
    resample.SetSize([NODES] * 3)
    resample.SetOutputSpacing(spacing)
    resample.SetOutputOrigin(origin)
    resample.SetUseNearestNeighborExtrapolator(True)  # what lies outside of a scan must not look like an edge
    coarse = sitk.GetArrayFromImage(resample.Execute(smooth)).astype(np.float64)
    edges = np.sqrt(sum(np.square(one) for one in np.gradient(coarse)))
    return Sketch(_ranks(coarse), _ranks(edges), patient_extent(volume.geometry), _fault(volume.array))


def rank(sketches: Mapping[str, Sketch]) -> list[Ranked]:
    """Order scans by how well their label will serve the others, the best first; outliers at the end.

    Args:
        sketches: case id -> sketch.
    """
    names = sorted(sketches)
    alike = _centralities([sketches[name].values for name in names])
    same_edges = _centralities([sketches[name].edges for name in names])
    extents = np.array([np.prod(sketches[name].extent) for name in names])
    middle, spread = _robust(alike)
    edge_middle, edge_spread = _robust(same_edges)
    found = []
    for position, name in enumerate(names):
        far = alike[position] < middle - max(OUTLIER * spread, LOWER_BY)
        edges_far = same_edges[position] < edge_middle - max(OUTLIER * edge_spread, LOWER_BY)
        ratio = extents[position] / np.median(extents)
        warning = sketches[name].fault
        if not warning and not 1 / EXTENT_RATIO <= ratio <= EXTENT_RATIO:
            warning = f"its field of view is {ratio:.2g} times the usual one: another body part or protocol?"
        if not warning and far:
            kind = "another body part, orientation or modality?" if edges_far else "another modality or contrast?"
            warning = f"it hardly resembles the others (similarity {alike[position]:.2f}, usually {middle:.2f}): {kind}"
        reason = f"similarity to the other scans {alike[position]:.2f}, usually {middle:.2f}"
        found.append(Ranked(name, round(float(alike[position]), 4), reason, warning))
    return sorted(found, key=lambda one: (bool(one.warning), -one.centrality, one.case))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Ranks with mean 0 and deviation 1; equal values share a rank, a constant array is 0 everywhere."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    ranks = middle[inverse].reshape(values.shape)
    spread = float(ranks.std())
    return np.asarray((ranks - ranks.mean()) / (spread if spread > 0 else 1.0), np.float32)


def _centralities(sketches: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Mean correlation of each sketch with the others, at the best shift of each pair."""
    count = len(sketches)
    if count < 2:
        return np.ones(count)
    others = np.unique(np.linspace(0, count - 1, min(count, MOST_COMPARED)).round().astype(int))
    shape, axes = (NODES + SHIFT,) * 3, (0, 1, 2)
    shifts = np.r_[0 : SHIFT + 1, -SHIFT:0]
    window = np.ix_(shifts, shifts, shifts)
    spectra = [np.fft.rfftn(one, shape, axes).astype(np.complex64) for one in sketches]
    full = np.fft.rfftn(np.ones((NODES,) * 3), shape, axes)
    shared = np.fft.irfftn(full * full.conj(), shape, axes)[window]
    found = np.empty(count)
    for position in range(count):
        compared = [
            float((np.fft.irfftn(spectra[position] * spectra[other].conj(), shape, axes)[window] / shared).max())
            for other in others
            if other != position
        ]
        found[position] = np.mean(compared)
    return found


def _robust(values: NDArray[np.float64]) -> tuple[float, float]:
    """Median, and the deviation as the median absolute difference tells it."""
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))


def _fault(array: NDArray[Any]) -> str:
    """Why a scan looks broken."""
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        empty = float(np.mean(array.max(others) == array.min(others)))
        if empty > MOST_EMPTY:
            return f"{100 * empty:.0f} % of its slices along one axis are empty"
    middle = array[array.shape[0] // 2].astype(np.float64)
    first, second = middle[:, :-1].ravel(), middle[:, 1:].ravel()
    if first.std() > 0 and second.std() > 0 and np.corrcoef(first, second)[0, 1] < LEAST_SMOOTH:
        return "its voxels do not resemble their neighbours: noise, or a damaged file"
    return ""
