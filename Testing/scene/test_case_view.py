"""An open case: its layers, what it leaves in a person's scene (nothing), and memory over many cases."""

from __future__ import annotations

import gc
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import slicer
import vtk
from scene_helpers import GRIDS, TABLE, own_nodes, uncertainty_on, write_case
from vtkmodules.vtkCommonCore import vtkCollection

from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.scene import overlay
from SemiSAMO1Lib.scene.case_view import CaseFiles, CaseView
from SemiSAMO1Lib.scene.nodes import sweep_hierarchy
from SemiSAMO1Lib.volume import Geometry, Volume


@pytest.fixture
def grid() -> Geometry:
    return GRIDS["oblique"]


@pytest.fixture
def view(case_files: CaseFiles) -> CaseView:
    return CaseView(case_files, TABLE)


def item_names() -> list[str]:
    """Names of all items of the subject hierarchy."""
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    found = vtk.vtkIdList()
    hierarchy.GetItemChildren(hierarchy.GetSceneItemID(), found, True)
    return [hierarchy.GetItemName(found.GetId(n)) for n in range(found.GetNumberOfIds())]


def file_of(node) -> str | None:
    """The file that a node would be written to."""
    storage = node.GetStorageNode()
    return (storage.GetFileName() or None) if storage is not None else None


def composites() -> list:
    layout = slicer.app.layoutManager()
    return [layout.sliceWidget(name).mrmlSliceCompositeNode() for name in layout.sliceViewNames()]


def all_nodes() -> set[str]:
    scene = slicer.mrmlScene
    return {scene.GetNthNode(n).GetID() for n in range(scene.GetNumberOfNodes())}


class TestLayers:
    def test_the_scan_is_behind_in_all_views(self, view: CaseView) -> None:
        assert {one.GetBackgroundVolumeID() for one in composites()} == {view.scan.GetID()}

    def test_the_uncertainty_is_in_front_in_all_views(self, view: CaseView) -> None:
        view.show_uncertainty(True, 0.6, 20)
        assert {one.GetForegroundVolumeID() for one in composites()} == {view.uncertainty.GetID()}

    def test_its_opacity_is_the_one_asked_for(self, view: CaseView) -> None:
        view.show_uncertainty(True, 0.6, 20)
        assert {one.GetForegroundOpacity() for one in composites()} == {0.6}

    def test_its_window_is_0_to_100_whatever_it_holds(self, view: CaseView) -> None:
        display = view.uncertainty.GetDisplayNode()
        assert (display.GetWindowLevelMin(), display.GetWindowLevelMax()) == (0, 100)

    def test_below_the_threshold_nothing_is_drawn(self, view: CaseView) -> None:
        view.show_uncertainty(True, 0.6, 35)
        display = view.uncertainty.GetDisplayNode()
        assert (display.GetApplyThreshold(), display.GetLowerThreshold()) == (1, 35)

    def test_switched_off_it_is_gone(self, view: CaseView) -> None:
        view.show_uncertainty(True, 0.6, 20)
        view.show_uncertainty(False, 0.6, 20)
        assert {one.GetForegroundVolumeID() for one in composites()} == {None}

    def test_a_foreground_of_the_person_stays_when_it_is_switched_off(self, view: CaseView) -> None:
        theirs = slicer.util.addVolumeFromArray(np.zeros((4, 4, 4)), name="theirs")
        composites()[0].SetForegroundVolumeID(theirs.GetID())
        view.show_uncertainty(False, 0.6, 20)
        assert composites()[0].GetForegroundVolumeID() == theirs.GetID()

    def test_a_legend_says_what_the_colours_mean(self, view: CaseView) -> None:
        view.show_uncertainty(True, 0.6, 20)
        legend = slicer.modules.colors.logic().GetColorLegendDisplayNode(view.uncertainty)
        assert (legend.GetTitleText(), bool(legend.GetVisibility())) == ("uncertainty, %", True)

    def test_the_colour_table_is_made_once(self, view: CaseView) -> None:
        assert overlay.color_table() is overlay.color_table()

    def test_the_views_lie_in_the_planes_of_the_scan(self, view: CaseView, grid: Geometry) -> None:
        normals = [np.array([c.GetSliceToRAS().GetElement(r, 2) for r in range(3)]) for c in slice_nodes()]
        axes = np.reshape(grid.direction, (3, 3)) * np.array([[-1], [-1], [1]])
        aligned = [np.abs(axes.T @ normal).max() for normal in normals]
        assert aligned == pytest.approx([1, 1, 1], abs=1e-6), "a voxel is not a square on the screen"

    def test_nodes_are_named_by_case_and_training(self, view: CaseView) -> None:
        assert [node.GetName() for node in view.nodes] == [
            "case_001 (0002-train)",
            "case_001 (0002-train) prediction",
            "case_001 (0002-train) uncertainty",
        ]

    def test_nodes_are_in_a_folder_of_the_case(self, view: CaseView) -> None:
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
        parents = {hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node)) for node in view.nodes}
        assert [hierarchy.GetItemName(one) for one in parents] == ["case_001 (0002-train)"]


def slice_nodes() -> list:
    layout = slicer.app.layoutManager()
    return [layout.sliceWidget(name).mrmlSliceNode() for name in layout.sliceViewNames()]


class TestJumping:
    def test_the_views_go_to_the_slice_with_most_uncertainty(self, view: CaseView, grid: Geometry) -> None:
        assert view.jump_to_most_uncertain(30)
        place = overlay.most_uncertain_place(view.uncertainty, 30)
        index = np.linalg.inv(grid.index_to_space) @ [-place[0], -place[1], place[2], 1]
        z, y, x = np.rint(index[2::-1]).astype(int)
        assert (z, uncertainty_on(grid).array[z, y, x]) == (5, 80), "many voxels of 80 % count more than one of 97 %"

    def test_a_high_threshold_leaves_the_single_voxel(self, view: CaseView, grid: Geometry) -> None:
        place = overlay.most_uncertain_place(view.uncertainty, 90)
        index = np.linalg.inv(grid.index_to_space) @ [-place[0], -place[1], place[2], 1]
        assert np.rint(index[:3]).astype(int).tolist() == [20, 12, 9]

    def test_of_several_regions_in_the_slice_it_is_the_largest_sum(
        self, view: CaseView, grid: Geometry, tmp_path: Path
    ) -> None:
        """What lies between two regions is no place to look at: a voxel there is hardly uncertain."""
        array = np.zeros(grid.shape, np.uint8)
        array[4, 2:5, 2:5] = 80
        array[4, 2:5, 12:15] = 75
        array[4, 3, 8] = 40
        write_volume(tmp_path / "regions.nrrd", Volume(array, grid))
        place = overlay.most_uncertain_place(overlay.load_uncertainty(tmp_path / "regions.nrrd", "regions"), 30)
        index = np.linalg.inv(grid.index_to_space) @ [-place[0], -place[1], place[2], 1]
        assert np.rint(index[:3]).astype(int).tolist() == [3, 3, 4]

    def test_where_nothing_is_uncertain_the_views_stay(self, case_files: CaseFiles, tmp_path: Path) -> None:
        sure = CaseFiles("sure", "", case_files.scan, case_files.prediction)
        assert CaseView(sure, TABLE).jump_to_most_uncertain(10) is False


class TestAPersonsScene:
    def test_nothing_of_ours_is_saved_with_it(self, view: CaseView, tmp_path: Path) -> None:
        slicer.app.coreIOManager().saveNodes("SceneFile", {"fileName": str(tmp_path / "scene.mrml")})
        nodes = ElementTree.parse(tmp_path / "scene.mrml").getroot()
        assert [node.get("name") for node in nodes if "case_001" in (node.get("name") or "")] == []

    def test_saving_it_writes_no_file_of_the_project(self, view: CaseView) -> None:
        nodes = vtkCollection()
        slicer.mrmlScene.GetStorableNodesModifiedSinceRead(nodes)
        found = [nodes.GetItemAsObject(n) for n in range(nodes.GetNumberOfItems())]
        ours = [node for node in found if node.GetName().startswith("case_001")]
        kept = [(one.GetName(), file_of(one)) for one in ours if one.GetSaveWithScene() or file_of(one)]
        assert kept == [], "Slicer would write these"

    def test_nobody_is_asked_to_save_a_scan_that_was_only_looked_at(self, view: CaseView) -> None:
        assert not view.scan.GetModifiedSinceRead() and not view.uncertainty.GetModifiedSinceRead()

    def test_no_node_knows_a_file_of_the_project(self, view: CaseView) -> None:
        assert [file_of(node) for node in view.nodes] == [None, None, None]

    def test_of_a_scene_that_is_opened_again_our_empty_folder_is_taken_away(
        self, view: CaseView, tmp_path: Path
    ) -> None:
        files = slicer.app.coreIOManager()
        files.saveNodes("SceneFile", {"fileName": str(tmp_path / "scene.mrml")})
        slicer.mrmlScene.Clear(False)
        files.loadNodes("SceneFile", {"fileName": str(tmp_path / "scene.mrml")})
        assert "case_001 (0002-train)" in item_names(), "Slicer keeps the folder's name"
        sweep_hierarchy()
        assert not [name for name in item_names() if name.startswith("case_001")]

    def test_sweeping_leaves_an_open_case_alone(self, view: CaseView) -> None:
        before = item_names()
        sweep_hierarchy()
        assert item_names() == before

    def test_closing_leaves_what_was_there_before(self, case_files: CaseFiles) -> None:
        overlay.color_table()
        before = all_nodes()
        one = CaseView(case_files, TABLE)
        one.show_uncertainty(True, 0.5, 10)
        one.close()
        left = {slicer.mrmlScene.GetNodeByID(each).GetName() for each in all_nodes() - before}
        assert left == set(), f"left behind: {left}"

    def test_a_node_of_the_person_is_not_removed(self, view: CaseView) -> None:
        theirs = slicer.util.addVolumeFromArray(np.zeros((4, 4, 4)), name="case_001 (0002-train)")
        view.close()
        assert theirs.GetScene() is slicer.mrmlScene

    def test_a_node_of_the_person_in_our_folder_is_kept(self, view: CaseView) -> None:
        theirs = slicer.util.addVolumeFromArray(np.zeros((4, 4, 4)), name="theirs")
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
        folder = hierarchy.GetItemParent(hierarchy.GetItemByDataNode(view.scan))
        item = hierarchy.CreateItem(folder, theirs)
        view.close()
        assert hierarchy.GetItemDataNode(item) is theirs

    def test_closing_twice_does_no_harm(self, view: CaseView) -> None:
        view.close()
        view.close()
        assert own_nodes() in ([], ["Uncertainty"])

    def test_closing_after_the_scene_was_closed_does_no_harm(self, view: CaseView) -> None:
        slicer.mrmlScene.Clear(False)
        view.close()
        assert "case_001" not in " ".join(own_nodes())

    def test_a_case_that_cannot_be_loaded_leaves_nothing(self, case_files: CaseFiles) -> None:
        before = all_nodes()
        case_files.prediction.write_bytes(b"nonsense")
        with pytest.raises(RuntimeError, match="cannot be loaded"):
            CaseView(case_files, TABLE)
        assert all_nodes() == before


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_fifty_cases_one_after_the_other_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    big = Geometry((96, 128, 128), (2.0, 1.5, 1.5))
    files = [write_case(tmp_path, big, name) for name in ("first", "second")]
    for number in range(4):
        show_and_close(files[number % 2])
    gc.collect()
    before = resident_mb()
    for number in range(50):
        show_and_close(files[number % 2])
    gc.collect()
    grown = resident_mb() - before
    assert grown < 100, f"50 case changes grew the memory by {grown:.0f} MB"


def show_and_close(files: CaseFiles) -> None:
    view = CaseView(files, TABLE)
    view.show_uncertainty(True, 0.5, 20)
    view.close()
