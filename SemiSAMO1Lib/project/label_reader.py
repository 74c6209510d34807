"""The one reader for labels: a segmentation or label map from any program, brought to a case's own grid.

A .seg.nrrd is mapped by its segments (`SegmentN_LabelValue`, `SegmentN_Layer`), never by raw voxels. Its extent may be
smaller or larger than the image's. On the same lattice (up to an integer offset, axis flips and permutation) voxels
are copied exactly; otherwise they are resampled by nearest neighbour, and the reading says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ..image_io import UnreadableImage, from_sitk, read_image, suffix_of, to_sitk
from ..volume import Geometry, Volume, copy_on_lattice, values_in
from .label_table import LARGEST_VALUE

#: The tag in which a segment carries the value of the project's label table.
VALUE_TAG = "SemiSAMO1.LabelValue"

#: A label map without names with more values than this is looked at more closely: it may be a scan.
MANY_VALUES = 16


class LabelError(ValueError):
    """A label file that cannot be used as it is; the message says what to do."""


class DoubtfulLabel(LabelError):
    """A label file that can be used, but looks like another scan's; a person who is sure may take it all the same."""


@dataclass(frozen=True)
class Segment:
    """One entry of a segmentation file: where its voxels are, and its value in the project."""

    value: int
    name: str
    layer: int
    voxel_value: int
    tagged: bool = False


@dataclass(frozen=True)
class LabelReading:
    """Labels on a case's grid.

    Attributes:
        volume: uint8 or uint16 (z, y, x), values of the project's label table, 0 = background.
        names: value -> name in the file, for every label that the file declares, present or not.
        empty: declared values without a voxel inside the image.
        exact: True when voxels were copied; False when they had to be resampled.
        notes: what a person should know (cropped, resampled, painted outside the image...).
        guessed: values of segments without the project's tag in a file where others have it: added in another program.
    """

    volume: Volume
    names: dict[int, str]
    empty: tuple[int, ...]
    exact: bool
    notes: tuple[str, ...] = field(default=())
    guessed: tuple[int, ...] = field(default=())


def read_labels(
    path: Path, reference: Geometry, priority: Sequence[int] | None = None, allow_empty: bool = False
) -> LabelReading:
    """Read a label file onto the grid `reference`.

    Args:
        path: .seg.nrrd, or an integer label map in any volume format.
        reference: the grid of the case's image.
        priority: values from strongest to weakest, for voxels that several segments claim. None: refuse them.
        allow_empty: a file without a labelled voxel is no error (a prediction that found nothing).

    Raises:
        LabelError: not a label file, no voxel inside the image, or overlapping segments without a priority.
    """
    path = Path(path)
    try:
        image = read_image(path)
    except UnreadableImage as error:
        raise LabelError(f"{path.name} {error}") from error
    layers, segments = _layers_and_segments(path, image)
    names = {segment.value: segment.name for segment in segments}
    merged, notes = _merge(layers, segments, priority, path)
    if len(layers) > 1 and any(segment.value != segment.voxel_value for segment in segments):
        given = ", ".join(f"{segment.value} {segment.name}" for segment in segments)
        notes.append(f"{path.name}: values repeat between its layers; taken as {given}")
    if not merged.array.any() and not allow_empty:
        raise LabelError(f"{path.name} has no labelled voxel. Paint it, or choose another file.")
    volume, exact, moved = to_grid(merged, reference, path.name)
    present = values_in(volume.array)
    if present == {0} and not allow_empty:
        raise LabelError(f"{path.name}: no labelled voxel lies inside the image. Is it the label of another scan?")
    empty = tuple(sorted(set(names) - present))
    some_tagged = any(segment.tagged for segment in segments)
    guessed = tuple(sorted(segment.value for segment in segments if some_tagged and not segment.tagged))
    return LabelReading(volume, names, empty, exact, (*notes, *moved), guessed)


def to_grid(labels: Volume, reference: Geometry, name: str = "labels") -> tuple[Volume, bool, list[str]]:
    """Bring a label map to `reference`: (volume, copied exactly?, notes)."""
    if labels.geometry.same_grid(reference):
        return Volume(labels.array, reference), True, []
    copied = copy_on_lattice(labels, reference)
    if copied is not None:
        before, after = int(np.count_nonzero(labels.array)), int(np.count_nonzero(copied.array))
        lost = before - after
        notes = [f"{name}: {lost} of {before} labelled voxels lie outside the image and were left out"] if lost else []
        return copied, True, notes
    resampled = sitk.Resample(
        to_sitk(labels),
        reference.shape[::-1],
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
        reference.origin,
        reference.spacing[::-1],
        reference.direction,
        0,
    )
    notes = [f"{name}: drawn on another grid than the image; resampled by nearest neighbour"]
    lost, of = _outside(labels, reference)
    if lost:
        notes.append(f"{name}: {lost} of {of} labelled voxels lie outside the image and were left out")
    return Volume(sitk.GetArrayFromImage(resampled), reference), False, notes


def _outside(labels: Volume, reference: Geometry) -> tuple[int, int]:
    """Labelled voxels whose middle lies in no voxel of `reference`, and all labelled voxels."""
    to_reference = np.linalg.inv(reference.index_to_space) @ labels.geometry.index_to_space
    size, outside, every = np.array(reference.shape[::-1])[:, None], 0, 0
    for z, layer in enumerate(labels.array):  # by slices: a whole body has a hundred million labelled voxels
        y, x = np.nonzero(layer)
        index = to_reference[:3] @ np.stack([x, y, np.full_like(x, z), np.ones_like(x)])
        outside += int(np.count_nonzero(~((index >= -0.5) & (index <= size - 0.5)).all(0)))
        every += len(x)
    return outside, every


def _layers_and_segments(path: Path, image: sitk.Image) -> tuple[list[Volume], list[Segment]]:
    metadata = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    if image.GetDimension() != 3:
        raise LabelError(f"{path.name} is a {image.GetDimension()}D image; labels are 3D")
    count = image.GetNumberOfComponentsPerPixel()
    components = [sitk.VectorIndexSelectionCast(image, i) for i in range(count)] if count > 1 else [image]
    layers = [from_sitk(component) for component in components]
    for layer in layers:
        _require_integers(path, layer.array)
    segments = _declared_segments(path, metadata)
    if segments is not None:
        return layers, segments
    if suffix_of(path) == ".seg.nrrd" or count > 1:
        raise LabelError(f"{path.name} names no segments, though it has {count} layers. Save it again from Slicer.")
    values = sorted(values_in(layers[0].array.astype(np.uint16, copy=False)) - {0})
    if len(values) > MANY_VALUES and not _in_one_piece(layers[0].array):
        raise LabelError(
            f"{path.name} has {len(values)} different values that change from voxel to voxel: it looks like a scan, "
            "not like labels. Give the file that holds the labels."
        )
    return layers, [Segment(value, f"label {value}", 0, value) for value in values]


def _declared_segments(path: Path, metadata: dict[str, str]) -> list[Segment] | None:
    numbers = sorted(int(m[1]) for key in metadata if (m := re.fullmatch(r"Segment(\d+)_ID", key)))
    if not numbers:
        return None
    segments = []
    for number in numbers:
        prefix = f"Segment{number}_"
        if prefix + "LabelValue" not in metadata:
            raise LabelError(
                f"{path.name}: segment {number} has no label value (a file of Slicer before 4.11). Resave."
            )
        tags = dict(tag.partition(":")[::2] for tag in metadata.get(prefix + "Tags", "").split("|") if ":" in tag)
        try:
            voxel_value = int(metadata[prefix + "LabelValue"])
            value = int(tags.get(VALUE_TAG, voxel_value))
            layer = int(metadata.get(prefix + "Layer", 0))
        except ValueError as error:
            raise LabelError(f"{path.name}: the header of segment {number} is damaged ({error})") from error
        if not 1 <= value <= LARGEST_VALUE:
            raise LabelError(f"{path.name}: segment {number} has value {value}; 1 to {LARGEST_VALUE} are possible")
        name = metadata.get(prefix + "Name", f"label {value}")
        segments.append(Segment(value, name, layer, voxel_value, VALUE_TAG in tags))
    values = [segment.value for segment in segments]
    twice = sorted({value for value in values if values.count(value) > 1})
    if not twice:
        return segments
    # Slicer gives every layer its own values, so two segments may both be "1"
    if any(VALUE_TAG in metadata.get(f"Segment{n}_Tags", "") for n in numbers):
        names = ", ".join(repr(segment.name) for segment in segments if segment.value in twice)
        raise LabelError(
            f"{path.name}: the segments {names} stand for one label value {twice}. A segment added in another program "
            f"needs a value of its own (tag {VALUE_TAG}); or merge them."
        )
    return [Segment(order + 1, one.name, one.layer, one.voxel_value) for order, one in enumerate(segments)]


def _in_one_piece(array: NDArray[np.generic]) -> bool:
    """Whether neighbouring voxels are mostly equal, as in labels; in a scan noise makes them differ."""
    first, second = array[..., :-1], array[..., 1:]
    inside = (first != 0) & (second != 0)
    pairs = int(np.count_nonzero(inside))
    return pairs == 0 or int(np.count_nonzero(inside & (first == second))) >= 0.5 * pairs


def _require_integers(path: Path, array: NDArray[np.generic]) -> None:
    if array.dtype.kind == "c":
        raise LabelError(f"{path.name} holds complex numbers, not labels")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and np.array_equal(array, np.rint(array))):
        raise LabelError(f"{path.name} holds fractions or NaN: a scan or probability map, not labels")
    if array.dtype == np.uint8:
        return
    if array.size and (array.min() < 0 or array.max() > LARGEST_VALUE):
        raise LabelError(
            f"{path.name} has label values from {array.min()} to {array.max()}; 0 to {LARGEST_VALUE} are possible"
        )


def _merge(
    layers: list[Volume], segments: list[Segment], priority: Sequence[int] | None, path: Path
) -> tuple[Volume, list[str]]:
    """All layers as one label map in the project's values; voxels that no segment declares are left out."""
    for segment in segments:
        if segment.layer >= len(layers):
            raise LabelError(f"{path.name}: segment {segment.name!r} is in layer {segment.layer}, which is missing")
    largest = max([segment.value for segment in segments], default=0)
    kind = np.uint8 if largest <= 255 else np.uint16
    if len(layers) == 1 and len({segment.voxel_value for segment in segments}) == len(segments):
        return _renumbered(layers[0], segments, kind, path)
    merged = np.zeros(layers[0].array.shape, kind)
    order = list(segments)
    if priority is not None:
        rank = {value: position for position, value in enumerate(priority)}
        order.sort(key=lambda segment: -rank.get(segment.value, len(rank)))
    names = {segment.value: segment.name for segment in segments}
    overlaps: dict[tuple[str, str], int] = {}
    for segment in order:
        where = layers[segment.layer].array == segment.voxel_value
        taken, shared = np.unique(merged[where], return_counts=True)
        for value, count in zip(taken.tolist(), shared.tolist(), strict=True):
            if value:
                overlaps[names[value], segment.name] = count
        merged[where] = segment.value
    claims = "; ".join(f"{a!r} and {b!r} share {n} voxels" for (a, b), n in overlaps.items())
    if overlaps and priority is None:
        raise LabelError(f"{path.name}: {claims}. A voxel has one label: correct it, or say which label wins.")
    notes = [f"{path.name}: {claims}; resolved by the stated priority"] if overlaps else []
    if len(layers) == 1:
        notes += _stray(layers[0], merged, path)
    return Volume(merged, layers[0].geometry), notes


def _renumbered(
    layer: Volume, segments: list[Segment], kind: type[np.uint8 | np.uint16], path: Path
) -> tuple[Volume, list[str]]:
    """One layer of segments that share no voxel: only its values change, where they do."""
    values = {segment.voxel_value: segment.value for segment in segments}
    found = layer.array.astype(np.uint16 if layer.array.dtype != np.uint8 else np.uint8, copy=False)
    if all(values.get(value) == value for value in values_in(found) - {0}):
        return Volume(found.astype(kind, copy=False), layer.geometry), []
    table = np.zeros(256 if found.dtype == np.uint8 else LARGEST_VALUE + 1, kind)
    for voxel_value, value in values.items():
        if 0 < voxel_value < len(table):
            table[voxel_value] = value
    merged = table[found]
    return Volume(merged, layer.geometry), _stray(layer, merged, path)


def _stray(layer: Volume, merged: NDArray[Any], path: Path) -> list[str]:
    """What to say of voxels that have a value, and no segment has it."""
    stray = int(np.count_nonzero(layer.array)) - int(np.count_nonzero(merged))
    return [f"{path.name}: {stray} voxels have a value that no segment declares; left out"] if stray > 0 else []
