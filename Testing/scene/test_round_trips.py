"""Voxels, places, names, colours and codes survive the way into Slicer's scene and back, on every kind of grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import slicer
import vtk
from scene_helpers import GRIDS, TABLE, labels_on, scan_on, uncertainty_on

from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.project.label_reader import VALUE_TAG, read_labels
from SemiSAMO1Lib.project.label_table import Label, LabelTable
from SemiSAMO1Lib.project.label_writer import terminology_entry, write_segmentation
from SemiSAMO1Lib.scene.case_view import CaseFiles
from SemiSAMO1Lib.scene.segmentations import (
    drawn,
    load_segmentation,
    new_segmentation,
    snapshot,
    terminology_of,
    value_of,
)
from SemiSAMO1Lib.scene.volumes import SceneError, geometry_of, load_scan, volume_of
from SemiSAMO1Lib.volume import Geometry, Volume, copy_on_lattice


def back_on(volume: Volume, grid: Geometry) -> np.ndarray:
    """The voxels of a volume at the places of a grid; the two must share a lattice exactly."""
    copied = copy_on_lattice(volume, grid)
    assert copied is not None, f"{volume.geometry} does not lie on the lattice of {grid}"
    return copied.array


def test_a_scan_keeps_every_voxel_at_its_place(case_files: CaseFiles, grid: Geometry) -> None:
    node = load_scan(case_files.scan, "scan")
    assert np.array_equal(back_on(volume_of(node), grid), scan_on(grid).array)


def test_a_prediction_keeps_every_voxel_at_its_place(case_files: CaseFiles, grid: Geometry) -> None:
    scan = load_scan(case_files.scan, "scan")
    node = load_segmentation(case_files.prediction, TABLE, scan, "prediction")
    found = drawn(node, scan, TABLE)
    assert np.array_equal(back_on(found.labels, grid), labels_on(grid, 2, 7).array)


def test_what_was_drawn_comes_back_from_its_file(case_files: CaseFiles, grid: Geometry, tmp_path: Path) -> None:
    scan = load_scan(case_files.scan, "scan")
    node = load_segmentation(case_files.prediction, TABLE, scan, "prediction")
    found = drawn(node, scan, TABLE)
    write_segmentation(tmp_path / "again.seg.nrrd", found.labels, found.table)
    reading = read_labels(tmp_path / "again.seg.nrrd", grid)
    assert reading.exact, "the labels were resampled"
    assert np.array_equal(reading.volume.array, labels_on(grid, 2, 7).array)


def test_uncertainty_keeps_every_voxel_at_its_place(case_files: CaseFiles, grid: Geometry) -> None:
    node = load_scan(case_files.uncertainty, "uncertainty")
    assert np.array_equal(back_on(volume_of(node), grid), uncertainty_on(grid).array)


class TestSegments:
    @pytest.fixture
    def scan(self, case_files: CaseFiles):
        return load_scan(case_files.scan, "scan")

    @pytest.fixture
    def segments(self, case_files: CaseFiles, scan):
        node = load_segmentation(case_files.prediction, TABLE, scan, "prediction")
        segmentation = node.GetSegmentation()
        return [segmentation.GetNthSegment(n) for n in range(segmentation.GetNumberOfSegments())]

    @pytest.fixture
    def grid(self) -> Geometry:
        return GRIDS["oblique"]

    def test_names_are_those_of_the_table_in_its_order(self, segments) -> None:
        assert [one.GetName() for one in segments] == ["liver", "tumour", "vessel"]

    def test_colours_are_those_of_the_table(self, segments) -> None:
        shown = [tuple(round(255 * c) for c in one.GetColor()) for one in segments]
        assert shown == [label.color for label in TABLE]

    def test_a_label_that_the_prediction_lacks_is_an_empty_segment(self, segments) -> None:
        assert value_of(segments[2]) == 300

    def test_values_with_gaps_are_kept(self, segments) -> None:
        assert [value_of(one) for one in segments] == [2, 7, 300]

    def test_terminology_is_kept(self, segments) -> None:
        assert terminology_of(segments[0]) == TABLE.labels[0].terminology

    def test_a_region_and_the_lists_are_kept(self, segments) -> None:
        """As Slicer's selector writes them."""
        text = (
            "General Anatomy~SCT^49755003^Morphologically Altered Structure~SCT^4147007^Mass~^^~"
            "Anatomic codes - mine~SCT^64033007^Kidney~SCT^7771000^Left"
        )
        tag = slicer.vtkSegment.GetTerminologyEntryTagName()
        segments[0].SetTag(tag, text)
        codes = terminology_of(segments[0])
        assert (codes["region"]["meaning"], codes["region_modifier"]["meaning"]) == ("Kidney", "Left")
        assert terminology_entry(Label(1, "tumour", terminology=codes)) == text

    def test_a_region_alone_is_something_that_was_chosen(self, segments) -> None:
        text = "~".join(["list", "SCT^85756007^Tissue", "SCT^85756007^Tissue", "^^", "", "SCT^64033007^Kidney", "^^"])
        segments[0].SetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), text)
        assert terminology_of(segments[0])["region"]["value"] == "64033007"

    def test_segments_of_one_layer_are_copied_once(self, case_files: CaseFiles, scan) -> None:
        """Of a body with ten labels a copy for each would hold up the window."""
        node = load_segmentation(case_files.prediction, TABLE, scan, "prediction")
        copied = snapshot(node, scan, TABLE)
        assert len(copied.layers) == 1 < len(copied.segments)
        assert np.array_equal(back_on(copied.labels()[0], GRIDS["oblique"]), labels_on(GRIDS["oblique"], 2, 7).array)

    def test_no_terminology_is_none(self, segments) -> None:
        assert terminology_of(segments[1]) is None

    def test_names_of_the_table_win_over_those_of_the_file(self, case_files: CaseFiles, scan) -> None:
        renamed = LabelTable(tuple(Label(one.value, f"new {one.name}", one.color) for one in TABLE))
        node = load_segmentation(case_files.prediction, renamed, scan, "prediction")
        assert node.GetSegmentation().GetNthSegment(0).GetName() == "new liver"

    def test_one_single_label_keeps_its_name(self, tmp_path: Path, scan, grid: Geometry) -> None:
        one = LabelTable((Label(5, "atrium", (10, 20, 30)),))
        write_segmentation(tmp_path / "one.seg.nrrd", labels_on(grid, 5), one)
        node = load_segmentation(tmp_path / "one.seg.nrrd", one, scan, "one")
        assert [node.GetSegmentation().GetNthSegment(0).GetName(), node.GetName()] == ["atrium", "one"]

    def test_the_reference_grid_is_the_scan_s(self, case_files: CaseFiles, scan) -> None:
        node = load_segmentation(case_files.prediction, TABLE, scan, "prediction")
        role = slicer.vtkMRMLSegmentationNode.GetReferenceImageGeometryReferenceRole()
        assert node.GetNodeReference(role) is scan


class TestDrawing:
    """What a person draws in Slicer, by the arrays that the Segment Editor leaves behind."""

    @pytest.fixture
    def grid(self) -> Geometry:
        return GRIDS["left-handed oblique"]

    @pytest.fixture
    def scan(self, case_files: CaseFiles):
        return load_scan(case_files.scan, "scan")

    def paint(self, node, scan, number: int, box: tuple[slice, slice, slice]) -> None:
        identity = node.GetSegmentation().GetNthSegmentID(number)
        array = np.zeros(volume_of(scan).array.shape, np.uint8)
        array[box] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, node, identity, scan)

    def test_an_empty_segmentation_has_a_segment_for_every_label(self, scan) -> None:
        node = new_segmentation(TABLE, scan, "template")
        assert [value_of(node.GetSegmentation().GetNthSegment(n)) for n in range(3)] == [2, 7, 300]

    def test_counts_are_those_of_the_painted_voxels(self, scan) -> None:
        node = new_segmentation(TABLE, scan, "template")
        self.paint(node, scan, 1, np.s_[2:5, 3:7, 4:9])
        assert drawn(node, scan, TABLE).counts == {2: 0, 7: 60, 300: 0}

    def test_overlapping_segments_are_reported(self, scan) -> None:
        node = new_segmentation(TABLE, scan, "template")
        self.paint(node, scan, 0, np.s_[2:5, 3:7, 4:9])
        self.paint(node, scan, 1, np.s_[4:6, 3:7, 4:9])
        assert drawn(node, scan, TABLE).overlaps == (("liver", "tumour", 20),)

    def test_a_segment_that_a_person_adds_gets_the_next_free_value(self, scan) -> None:
        node = new_segmentation(TABLE, scan, "template")
        node.GetSegmentation().AddEmptySegment("", "cyst")
        assert [(one.value, one.name) for one in drawn(node, scan, TABLE).table][-1] == (301, "cyst")

    def test_a_segment_of_another_program_is_known_by_its_name(self, scan) -> None:
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "theirs")
        node.GetSegmentation().AddEmptySegment("", "Tumour")
        assert drawn(node, scan, TABLE).table.values == [7]

    def test_a_copied_segment_does_not_take_the_value_of_its_original(self, scan) -> None:
        node = new_segmentation(TABLE, scan, "template")
        copy = node.GetSegmentation().GetSegment(node.GetSegmentation().AddEmptySegment("", "liver copy"))
        copy.SetTag(VALUE_TAG, "2")
        assert sorted(drawn(node, scan, TABLE).table.values) == [2, 7, 300, 301]

    def test_a_segmentation_without_segments_says_what_to_do(self, scan) -> None:
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "empty")
        with pytest.raises(SceneError, match="no segment"):
            drawn(node, scan, TABLE)


class TestTransforms:
    """A person's volume may lie under a transform."""

    @pytest.fixture
    def volume(self):
        return slicer.util.addVolumeFromArray(scan_on(GRIDS["straight"]).array, name="theirs")

    def test_a_shift_counts(self, volume) -> None:
        transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
        matrix = vtk.vtkMatrix4x4()
        matrix.SetElement(0, 3, 12.5)
        transform.SetMatrixTransformToParent(matrix)
        before = geometry_of(volume).origin
        volume.SetAndObserveTransformNodeID(transform.GetID())
        assert geometry_of(volume).origin[0] == pytest.approx(before[0] - 12.5), "RAS +x is LPS -x"

    def test_shear_is_refused(self, volume) -> None:
        transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
        matrix = vtk.vtkMatrix4x4()
        matrix.SetElement(0, 1, 0.4)
        transform.SetMatrixTransformToParent(matrix)
        volume.SetAndObserveTransformNodeID(transform.GetID())
        with pytest.raises(SceneError, match="sheared"):
            geometry_of(volume)

    def test_a_bending_transform_is_refused(self, volume) -> None:
        transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLBSplineTransformNode")
        transform.SetAndObserveTransformToParent(vtk.vtkThinPlateSplineTransform())
        volume.SetAndObserveTransformNodeID(transform.GetID())
        with pytest.raises(SceneError, match="bends"):
            geometry_of(volume)

    def test_a_volume_without_voxels_is_refused(self) -> None:
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "nothing")
        with pytest.raises(SceneError, match="no voxels"):
            volume_of(node)

    def test_colour_is_refused(self) -> None:
        node = slicer.util.addVolumeFromArray(np.zeros((4, 5, 6, 3), np.uint8), nodeClassName="vtkMRMLVectorVolumeNode")
        with pytest.raises(SceneError, match="colour"):
            volume_of(node)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"NRRD0005\ntype: float\n"], ids=["empty", "text", "cut short"])
def test_a_damaged_scan_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.nrrd").write_bytes(content)
    with pytest.raises(SceneError, match=r"bad\.nrrd"):
        load_scan(tmp_path / "bad.nrrd", "bad")


def test_a_damaged_prediction_is_named(tmp_path: Path) -> None:
    write_volume(tmp_path / "scan.nrrd", scan_on(GRIDS["straight"]))
    scan = load_scan(tmp_path / "scan.nrrd", "scan")
    (tmp_path / "bad.seg.nrrd").write_bytes(b"nonsense")
    with pytest.raises(SceneError, match=r"bad\.seg\.nrrd"):
        load_segmentation(tmp_path / "bad.seg.nrrd", TABLE, scan, "bad")
