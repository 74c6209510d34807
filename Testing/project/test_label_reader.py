"""The one reader for labels: files saved by Slicer, our own .seg.nrrd, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import slicer_files
from scans import OBLIQUE, box, left_handed, places, two_labels, within, write_scan

from SemiSAMO1Lib.image_io import to_sitk, write_image, write_volume
from SemiSAMO1Lib.project import Label, LabelError, LabelTable, read_labels
from SemiSAMO1Lib.project.label_reader import VALUE_TAG
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.volume import Geometry, Volume

LEFT = left_handed(OBLIQUE)
TABLE = LabelTable(
    (
        Label(2, "Leber, groß", (230, 159, 0)),
        Label(5, "kidney: left", (0, 114, 178)),
        Label(9, "empty one"),
        Label(300, "vessel", (10, 20, 30)),
    )
)
OWN = Volume(two_labels(OBLIQUE, 2, 300, np.uint16).array + 5 * (two_labels(LEFT).array[::-1] == 2), OBLIQUE)

#: Boxes in offsets from the scan's centre, mm: two apart, one that overlaps the first, one that leaves the scan.
BOXES = {
    "liver": ((-6.1, -6.2, -9.3), (0.7, 0.8, 0.9)),
    "spleen": ((2.2, 1.3, 1.1), (6.9, 7.7, 11.2)),
    "tumour": ((-2.3, -2.2, -4.1), (2.1, 3.3, 4.4)),
    "outside": ((1.2, 2.1, 3.3), (60.0, 60.0, 60.0)),
}


def segment(name: str, value: int, geometry: Geometry, tags: dict[str, str] | None = None) -> dict[str, Any]:
    limits = box(geometry, *BOXES[name])
    return {"id": name, "name": name, "color": [0.2, 0.4, 0.6], "value": value, "box": limits, "tags": tags or {}}


def truth(name: str, geometry: Geometry) -> np.ndarray[Any, Any]:
    """Which voxels of the scan a segment covers, from its box in mm."""
    return within(geometry, box(geometry, *BOXES[name]))


@dataclass(frozen=True)
class Saved:
    """Files that Slicer saved, and what it said when it loaded ours."""

    folder: Path
    loaded: list[dict[str, Any]]

    def __getitem__(self, name: str) -> Path:
        return self.folder / f"{name}.seg.nrrd"

    def loaded_as(self, name: str) -> dict[str, Any]:
        return next(one for one in self.loaded if one["id"] == name)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("slicer")
    image = write_scan(folder / "image.nrrd", OBLIQUE)
    left = write_scan(folder / "left.nrrd", LEFT)
    write_segmentation(folder / "ours.seg.nrrd", OWN, TABLE)

    def one(name: str, value: int) -> dict[str, Any]:
        return segment(name, value, OBLIQUE)

    def file(name: str) -> Path:
        return folder / f"{name}.seg.nrrd"

    lefts = [segment("liver", 1, LEFT), segment("spleen", 2, LEFT)]
    tagged = [
        segment("liver", 1, OBLIQUE, {VALUE_TAG: "7"}),
        segment("tumour", 1, OBLIQUE, {VALUE_TAG: "4"}),
    ]
    jobs = [
        slicer_files.save_job(image, file("whole"), [[one("liver", 1), one("spleen", 2)]]),
        slicer_files.save_job(image, file("cropped"), [[one("liver", 1), one("spleen", 2)]], crop=True),
        slicer_files.save_job(image, file("outside"), [[one("liver", 1), one("outside", 2)]], margin=9),
        slicer_files.save_job(image, file("gaps"), [[one("liver", 3), one("spleen", 300)]]),
        slicer_files.save_job(image, file("overlapping"), [[one("liver", 1)], [one("tumour", 1)], [one("spleen", 1)]]),
        slicer_files.save_job(image, file("tagged"), [[tagged[0]], [tagged[1]]]),
        slicer_files.save_job(image, file("twice"), [[{**tagged[0]}], [{**tagged[1], "tags": {VALUE_TAG: "7"}}]]),
        slicer_files.save_job(left, file("left"), [lefts]),
        slicer_files.save_job(left, file("left-cropped"), [lefts], crop=True),
        slicer_files.load_job(file("ours"), folder / "ours.json"),
    ]
    slicer_files.run(jobs, folder)
    return Saved(folder, slicer_files.loaded(folder / "ours.json"))


# ---------------------------------------------------------------------- files saved by Slicer


@pytest.mark.parametrize(
    ("file", "names", "geometry"),
    [
        ("whole", {1: "liver", 2: "spleen"}, OBLIQUE),
        ("cropped", {1: "liver", 2: "spleen"}, OBLIQUE),
        ("outside", {1: "liver", 2: "outside"}, OBLIQUE),
        ("gaps", {3: "liver", 300: "spleen"}, OBLIQUE),
        ("left", {1: "liver", 2: "spleen"}, LEFT),
        ("left-cropped", {1: "liver", 2: "spleen"}, LEFT),
    ],
)
class TestSavedBySlicer:
    def test_every_segment_covers_the_voxels_it_was_painted_on(
        self, saved: Saved, file: str, names: dict[int, str], geometry: Geometry
    ) -> None:
        read = read_labels(saved[file], geometry).volume.array
        wrong = {n: int(np.count_nonzero((read == v) != truth(n, geometry))) for v, n in names.items()}
        assert not any(wrong.values()), f"{file}: voxels at the wrong place: {wrong}"

    def test_values_and_names_are_the_file_s(
        self, saved: Saved, file: str, names: dict[int, str], geometry: Geometry
    ) -> None:
        assert read_labels(saved[file], geometry).names == names, f"{file}: segments were read under other values"

    def test_voxels_are_copied_not_resampled(
        self, saved: Saved, file: str, names: dict[int, str], geometry: Geometry
    ) -> None:
        assert read_labels(saved[file], geometry).exact, f"{file} lies on the scan's lattice"


def test_the_cropped_file_is_smaller_than_the_scan(saved: Saved) -> None:
    size = sitk.ReadImage(str(saved["cropped"])).GetSize()
    assert np.prod(size) < OBLIQUE.voxels, f"Slicer did not crop, so the test of cropped files says nothing: {size}"


def test_paint_outside_the_scan_is_counted_in_a_note(saved: Saved) -> None:
    reading = read_labels(saved["outside"], OBLIQUE)
    inside = int(np.count_nonzero(truth("outside", OBLIQUE) | truth("liver", OBLIQUE)))
    painted = int(np.count_nonzero(sitk.GetArrayFromImage(sitk.ReadImage(str(saved["outside"])))))
    assert f"{painted - inside} of {painted}" in " ".join(reading.notes), f"the loss must be said: {reading.notes}"


@pytest.mark.parametrize("name", ["liver", "tumour"])
def test_overlapping_segments_are_refused_by_name(saved: Saved, name: str) -> None:
    with pytest.raises(LabelError, match=f"'{name}'"):
        read_labels(saved["overlapping"], OBLIQUE)


def test_the_refusal_counts_the_shared_voxels(saved: Saved) -> None:
    shared = int(np.count_nonzero(truth("liver", OBLIQUE) & truth("tumour", OBLIQUE)))
    with pytest.raises(LabelError, match=f"share {shared} voxels"):
        read_labels(saved["overlapping"], OBLIQUE)


@pytest.mark.parametrize("winner", ["liver", "tumour"])
def test_a_stated_priority_decides_who_gets_shared_voxels(saved: Saved, winner: str) -> None:
    names = {1: "liver", 2: "tumour", 3: "spleen"}
    priority = sorted(names, key=lambda value: names[value] != winner)
    read = read_labels(saved["overlapping"], OBLIQUE, priority)
    won = read.volume.array == next(value for value, name in names.items() if name == winner)
    assert np.array_equal(won, truth(winner, OBLIQUE)), f"{winner} should keep every voxel that it was painted on"


def test_resolving_by_priority_is_said(saved: Saved) -> None:
    notes = read_labels(saved["overlapping"], OBLIQUE, [2, 1, 3]).notes
    assert "priority" in " ".join(notes), f"that voxels were given away must be noted: {notes}"


def test_layers_that_repeat_a_value_are_told_apart(saved: Saved) -> None:
    names = read_labels(saved["overlapping"], OBLIQUE, [2, 1, 3]).names
    assert names == {1: "liver", 2: "tumour", 3: "spleen"}, f"three segments in three layers were expected: {names}"


def test_a_segment_alone_in_a_layer_of_its_own_keeps_its_voxels(saved: Saved) -> None:
    read = read_labels(saved["overlapping"], OBLIQUE, [2, 1, 3]).volume.array == 3
    assert np.array_equal(read, truth("spleen", OBLIQUE)), "the spleen shares no voxel and should be whole"


def test_the_value_in_the_tag_counts_not_the_voxels(saved: Saved) -> None:
    read = read_labels(saved["tagged"], OBLIQUE, [4, 7])
    assert np.array_equal(read.volume.array == 4, truth("tumour", OBLIQUE)), "the tumour's tag says 4"


def test_two_segments_with_one_tag_are_refused(saved: Saved) -> None:
    with pytest.raises(LabelError, match=r"\[7\]"):
        read_labels(saved["twice"], OBLIQUE, [7])


# ---------------------------------------------------------------------- our files in Slicer, and back


@pytest.mark.parametrize("label", TABLE, ids=lambda label: str(label.value))
class TestOursInSlicer:
    def test_the_name_is_kept(self, saved: Saved, label: Label) -> None:
        name = saved.loaded_as(f"label_{label.value}")["name"]
        assert name == label.name, f"Slicer shows {name!r} for {label.name!r}"

    def test_the_colour_is_kept(self, saved: Saved, label: Label) -> None:
        color = np.array(saved.loaded_as(f"label_{label.value}")["color"]) * 255
        assert np.allclose(color, label.color, atol=0.01), f"Slicer shows {color} for {label.color}"

    def test_the_value_is_kept(self, saved: Saved, label: Label) -> None:
        one = saved.loaded_as(f"label_{label.value}")
        assert (one["value"], one["tag"]) == (label.value, str(label.value)), f"value or tag changed: {one}"

    def test_the_voxels_are_kept(self, saved: Saved, label: Label) -> None:
        points = saved.loaded_as(f"label_{label.value}")["points"]
        expected = places(OBLIQUE)[OWN.array == label.value]
        same = set(map(tuple, points.round(2).tolist())) == set(map(tuple, expected.round(2).tolist()))
        assert same, f"Slicer has {len(points)} voxels elsewhere than our {len(expected)}"


def test_our_file_reads_back_exactly(saved: Saved) -> None:
    read = read_labels(saved["ours"], OBLIQUE)
    assert np.array_equal(read.volume.array, OWN.array), "a label should come back voxel by voxel"


def test_our_file_keeps_names_of_empty_labels_too(saved: Saved) -> None:
    read = read_labels(saved["ours"], OBLIQUE)
    assert read.names == {label.value: label.name for label in TABLE}, f"names changed: {read.names}"


def test_an_empty_declared_segment_is_listed(saved: Saved) -> None:
    assert read_labels(saved["ours"], OBLIQUE).empty == (9,), "label 9 is declared and has no voxel"


@pytest.mark.parametrize("geometry", [OBLIQUE, LEFT], ids=["right", "left"])
def test_written_and_read_on_the_same_grid(tmp_path: Path, geometry: Geometry) -> None:
    labels = two_labels(geometry, 2, 5)
    write_segmentation(tmp_path / "x.seg.nrrd", labels, TABLE)
    read = read_labels(tmp_path / "x.seg.nrrd", geometry)
    assert np.array_equal(read.volume.array, labels.array), "a label should come back voxel by voxel"


def test_the_writer_refuses_values_that_the_table_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[77\]"):
        write_segmentation(tmp_path / "x.seg.nrrd", two_labels(OBLIQUE, 2, 77), TABLE)


# ---------------------------------------------------------------------- plain label maps


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize(
    ("first", "second", "kind"), [(1, 2, np.uint8), (4, 9, np.int16), (256, 65535, np.uint16), (3, 700, np.float32)]
)
def test_label_maps_keep_their_values(tmp_path: Path, suffix: str, first: int, second: int, kind: type) -> None:
    labels = two_labels(OBLIQUE, first, second, kind)
    write_volume(tmp_path / f"x{suffix}", labels)
    read = read_labels(tmp_path / f"x{suffix}", OBLIQUE).volume.array
    assert np.array_equal(read, labels.array), f"values {first} and {second} changed to {np.unique(read)}"


def test_a_label_map_on_a_shifted_grid_says_that_it_was_resampled(tmp_path: Path) -> None:
    origin = tuple((OBLIQUE.index_to_space @ np.array([0.5, 0.5, 0.5, 1]))[:3].tolist())
    write_volume(tmp_path / "x.nrrd", two_labels(Geometry(OBLIQUE.shape, OBLIQUE.spacing, origin, OBLIQUE.direction)))
    read = read_labels(tmp_path / "x.nrrd", OBLIQUE)
    assert (read.exact, "resampled" in " ".join(read.notes)) == (False, True), f"not said: {read.notes}"


def spoilt(value: float, kind: type = np.float32) -> Callable[[], sitk.Image]:
    def make() -> sitk.Image:
        labels = two_labels(OBLIQUE, kind=kind)
        labels.array[0, 0, 0] = value
        return to_sitk(labels)

    return make


def without_segments() -> sitk.Image:
    return sitk.Compose([to_sitk(two_labels(OBLIQUE))] * 2)


def elsewhere() -> sitk.Image:
    return to_sitk(two_labels(Geometry(OBLIQUE.shape, OBLIQUE.spacing, (900.0, 0.0, 0.0), OBLIQUE.direction)))


REFUSED: dict[str, tuple[Callable[[], sitk.Image], str]] = {
    "negative": (spoilt(-1, np.int16), "from -1"),
    "fraction": (spoilt(1.5), "fractions or NaN"),
    "NaN": (spoilt(np.nan), "fractions or NaN"),
    "infinite": (spoilt(np.inf), "fractions or NaN"),
    "too large": (spoilt(65536, np.int32), "65536"),
    "empty": (lambda: to_sitk(Volume(np.zeros(OBLIQUE.shape, np.uint8), OBLIQUE)), "no labelled voxel"),
    "elsewhere": (elsewhere, "inside the image"),
    "complex": (
        lambda: sitk.RealAndImaginaryToComplex(*[to_sitk(two_labels(OBLIQUE, kind=np.float32))] * 2),
        "complex",
    ),
    "layers without segments": (without_segments, "names no segments"),
    "2D": (lambda: sitk.Image([8, 8], sitk.sitkUInt8), "2D"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_a_label_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    make, reason = REFUSED[kind]
    sitk.WriteImage(make(), str(tmp_path / "x.nrrd"))
    with pytest.raises(LabelError, match=reason):
        read_labels(tmp_path / "x.nrrd", OBLIQUE)


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.nrrd").write_text("not an image")
    with pytest.raises(LabelError, match=r"x\.nrrd"):
        read_labels(tmp_path / "x.nrrd", OBLIQUE)


def header(**fields: str) -> dict[str, str]:
    return {f"Segment0_{key}": text for key, text in fields.items()}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (header(ID="a", Name="a"), "no label value"),
        (header(ID="a", LabelValue="one"), "segment 0"),
        (header(ID="a", LabelValue="1", Tags=f"{VALUE_TAG}:x"), "segment 0"),
        (header(ID="a", LabelValue="1", Tags=f"{VALUE_TAG}:0"), "segment 0"),
        (header(ID="a", LabelValue="1", Tags=f"{VALUE_TAG}:70000"), "segment 0"),
        (header(ID="a", LabelValue="1", Layer="3"), "layer 3"),
        ({}, "names no segments"),
    ],
)
def test_a_segmentation_with_a_damaged_header_is_refused(tmp_path: Path, fields: dict[str, str], reason: str) -> None:
    write_image(tmp_path / "x.seg.nrrd", to_sitk(two_labels(OBLIQUE)), fields)
    with pytest.raises(LabelError, match=reason):
        read_labels(tmp_path / "x.seg.nrrd", OBLIQUE)


def test_voxels_that_no_segment_declares_are_left_out_and_counted(tmp_path: Path) -> None:
    labels = two_labels(OBLIQUE, 1, 2)
    write_image(tmp_path / "x.seg.nrrd", to_sitk(labels), header(ID="a", Name="a", LabelValue="1"))
    stray = int(np.count_nonzero(labels.array == 2))
    notes = " ".join(read_labels(tmp_path / "x.seg.nrrd", OBLIQUE).notes)
    assert f"{stray} voxels" in notes, f"{stray} stray voxels should be mentioned: {notes!r}"
