"""Prediction of whole scans: blocks, passes, entropy, and the way back to the scan's own grid."""

import numpy as np
import pytest
import torch
from engine_helpers import all_axis_directions, smooth_noise, tiny_plan, turned
from torch import nn

from SemiSAMO1Lib.engine.data.grids import canonical, with_spacing
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.inference import sliding, uncertainty
from SemiSAMO1Lib.engine.inference.sliding import block_depth, predict_probabilities
from SemiSAMO1Lib.engine.inference.uncertainty import case_scores, normalised_entropy, to_case_grid
from SemiSAMO1Lib.engine.specialists import make_specialist
from SemiSAMO1Lib.volume import Geometry, Volume

PLAN = tiny_plan(classes=2, patch=(8, 8, 8))


class Pointwise(nn.Module):
    """Looks at one voxel only: no window can change its answer."""

    def forward(self, x):
        return torch.cat([-x, x], 1)


def predict(model, image, passes=1, plan=PLAN):
    return predict_probabilities(model, image, plan, make_fabric("cpu", "32-true"), passes, seed=0)


def small_blocks(monkeypatch, image, classes=2, window=8, depth=8):
    """Make the memory limit so small that `depth` slices are computed at once."""
    per_slice = classes * image.shape[1] * image.shape[2] * 4
    monkeypatch.setattr(sliding, "LARGEST_MAP", (depth + window) * per_slice)
    assert block_depth(image.shape, classes, window) == depth, "the test did not reach its block size"


# ---------------------------------------------------------------------- windows and blocks


def test_pointwise_model_is_reproduced_voxel_by_voxel():
    image = smooth_noise((13, 11, 17), 0)
    found = predict(Pointwise(), image)
    expected = 1 / (1 + np.exp(-2.0 * image))
    assert np.abs(found[1].astype(np.float32) - expected).max() < 2e-3, "windows changed a voxel's own answer"


def test_probabilities_have_classes_first_and_half_precision():
    found = predict(Pointwise(), smooth_noise((9, 10, 11), 0))
    assert (found.shape, found.dtype) == ((2, 9, 10, 11), np.float16)


def test_blocks_equal_one_block_for_a_pointwise_model(monkeypatch):
    image = smooth_noise((40, 12, 12), 1)
    whole = predict(Pointwise(), image)
    small_blocks(monkeypatch, image)
    assert np.array_equal(whole, predict(Pointwise(), image)), "computing block by block changed the result"


def test_blocks_come_close_to_one_block_for_a_network(monkeypatch):
    """Stated tolerance: 0.03 at any voxel; windows lie elsewhere in a block, so equality cannot be asked for."""
    torch.manual_seed(0)
    network = make_specialist("dynunet", PLAN)
    image = smooth_noise((40, 12, 12), 1)
    whole = predict(network, image).astype(np.float32)
    small_blocks(monkeypatch, image)
    apart = np.abs(whole - predict(network, image).astype(np.float32)).max()
    assert apart < 0.03, f"block by block and at once differ by {apart:.3f}"


def test_passes_see_the_same_brightness_in_every_block(monkeypatch):
    """A constant scan must be predicted without seams between blocks, whatever the passes change."""
    image = np.zeros((40, 24, 24), np.float32)
    small_blocks(monkeypatch, image)
    slices = predict(Pointwise(), image, passes=4)[1].astype(np.float32).mean((1, 2))
    assert np.ptp(slices) < 0.02, f"mean probability differs by {np.ptp(slices):.3f} between the slices of blocks"


def test_passes_do_not_brighten_the_scan():
    """Brightness changes by 0.1 deviations, up as often as down."""
    changed = [sliding._changed(torch.zeros(1, 1, 8, 8, 8), torch.Generator().manual_seed(s)) for s in range(50)]
    shifts = [float(one.mean()) for one in changed]
    assert abs(np.mean(shifts)) < 0.06, f"on average the passes see the scan {np.mean(shifts):.2f} deviations brighter"


def test_passes_keep_the_contrast_on_average():
    image = torch.linspace(-1, 1, 512).reshape(1, 1, 8, 8, 8)
    changed = [sliding._changed(image, torch.Generator().manual_seed(s)) for s in range(50)]
    gains = [float((one * image).sum() / image.square().sum()) for one in changed]
    assert np.mean(gains) == pytest.approx(1, abs=0.06), f"on average the passes see a contrast of {np.mean(gains):.2f}"


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_memory_limit_is_kept(classes):
    depth = block_depth((600, 512, 512), classes, 64)
    held = (depth + 64) * classes * 512 * 512 * 4
    assert held <= sliding.LARGEST_MAP, f"{depth} slices with halo hold {held >> 20} MiB"


def test_half_a_window_is_computed_at_once_however_many_classes_there_are():
    assert block_depth((600, 512, 512), 10, 64) == 32


def test_a_small_scan_is_one_block():
    assert block_depth((30, 40, 50), 4, 32) == 30


def test_scan_smaller_than_the_window():
    found = predict(Pointwise(), np.ones((3, 5, 4), np.float32))
    assert np.allclose(found[1].astype(float), 1 / (1 + np.exp(-2)), atol=2e-3), "a tiny scan is predicted as it is"


def test_prediction_is_the_same_twice():
    image = smooth_noise((12, 12, 12), 2)
    assert np.array_equal(predict(Pointwise(), image, 3), predict(Pointwise(), image, 3)), "seeded passes differ"


def test_dropout_is_off():
    network = make_specialist("dynunet", PLAN)
    network.train()
    image = smooth_noise((8, 8, 8), 2)
    assert np.array_equal(predict(network, image), predict(network, image)), "dropout is on while predicting"


# ---------------------------------------------------------------------- entropy


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_entropy_of_a_sure_voxel_is_zero(classes):
    sure = torch.zeros(classes, 1)
    sure[0] = 1
    assert float(normalised_entropy(sure)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_entropy_of_a_uniform_voxel_is_one(classes):
    assert float(normalised_entropy(torch.full((classes, 1), 1 / classes))) == pytest.approx(1, abs=1e-6)


def test_entropy_by_hand():
    p = torch.tensor([[0.5], [0.25], [0.25]])
    assert float(normalised_entropy(p)) == pytest.approx(1.5 * np.log(2) / np.log(3), abs=1e-6)


# ---------------------------------------------------------------------- the scan's own grid


def one_hot(label, classes):
    return (np.arange(classes).reshape(-1, 1, 1, 1) == label[None]).astype(np.float16)


@pytest.mark.parametrize("direction", [*all_axis_directions()[::5], turned()])
def test_voxel_exact_without_resampling(direction):
    """The training grid is a permutation of the scan's: every voxel comes back where it was."""
    target = Geometry((5, 6, 7), (3.0, 2.0, 1.0), (10.0, -20.0, 30.0), direction)
    grid = canonical(target)
    label = np.random.default_rng(0).integers(0, 4, grid.shape).astype(np.uint8)
    prediction, _ = to_case_grid(one_hot(label, 4), grid, np.ones(grid.shape, bool), target)
    matrix = np.linalg.inv(grid.index_to_space) @ target.index_to_space
    for z, y, x in [(0, 0, 0), (4, 5, 6), (1, 2, 3), (3, 0, 5)]:
        i, j, k = np.rint((matrix @ [x, y, z, 1])[:3]).astype(int)
        assert prediction.array[z, y, x] == label[k, j, i], f"voxel {(z, y, x)} is not the one at its place"


def test_resampled_block_keeps_its_place():
    """A block on a grid of 2 mm comes back on 1 mm with its edges in the same mm."""
    target = Geometry((24, 24, 24))
    grid = with_spacing(target, (2.0, 2.0, 2.0))
    label = np.zeros(grid.shape, np.uint8)
    label[3:9, 2:6, 5:8] = 1
    prediction, _ = to_case_grid(one_hot(label, 2), grid, np.ones(grid.shape, bool), target)
    expected = np.zeros(target.shape, np.uint8)
    expected[6:18, 4:12, 10:16] = 1
    assert np.count_nonzero(prediction.array != expected) < 0.05 * expected.sum(), "the block moved or changed size"


def test_resampled_block_has_its_centre_in_place():
    target = Geometry((24, 24, 24))
    grid = with_spacing(target, (2.0, 2.0, 2.0))
    label = np.zeros(grid.shape, np.uint8)
    label[3:9, 2:6, 5:8] = 1
    prediction, _ = to_case_grid(one_hot(label, 2), grid, np.ones(grid.shape, bool), target)
    centre = np.argwhere(prediction.array).mean(0)
    assert np.allclose(centre, [11.5, 7.5, 12.5], atol=0.01), f"centre {centre}, expected (11.5, 7.5, 12.5)"


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0)])
def test_unseen_voxels_are_fully_uncertain(spacing):
    target = Geometry((16, 16, 16))
    grid = with_spacing(target, spacing)
    seen = np.ones(grid.shape, bool)
    seen[: grid.shape[0] // 2] = False
    sure = one_hot(np.zeros(grid.shape, np.uint8), 2)
    _, found = to_case_grid(sure, grid, seen, target)
    assert (found.array[:8] == 100).all(), "places that no template saw must be 100 % uncertain"


def test_the_last_windows_of_a_scan_in_blocks_see_the_scan(monkeypatch):
    """A few slices are left for the last block: it reaches back, where its windows went on with the border's slice."""
    monkeypatch.setattr(sliding, "block_depth", lambda *_: 20)
    seen = []

    class Watches(torch.nn.Module):
        def forward(self, windows):
            seen.extend(len(window.unique()) for window in windows)
            return torch.cat([windows, -windows], 1)

    plan = tiny_plan(2, patch=(16, 8, 8))
    image = np.broadcast_to(np.arange(42, dtype=np.float32).reshape(-1, 1, 1), (42, 8, 8))
    predict_probabilities(Watches(), image, plan, make_fabric("cpu", "32-true"), 1, 0)
    assert set(seen) == {16}, f"slices of the scan in each window: {seen}"


@pytest.mark.parametrize("target", [2.0, 1.0], ids=["on its lattice", "resampled"])
def test_a_voxel_that_was_seen_is_never_as_uncertain_as_one_that_was_not(target: float) -> None:
    """All classes alike: a person is led there, and not to where nothing was seen."""
    grid = Geometry((4, 4, 4), (2.0, 2.0, 2.0))
    shape = tuple(round(4 * 2 / target) for _ in range(3))
    finer = Geometry(shape, (target, target, target))
    seen = np.ones(grid.shape, bool)
    seen[0] = False
    _label, found = to_case_grid(np.full((2, 4, 4, 4), 0.5, np.float32), grid, seen, finer)
    assert found.array[-1].max() == 99 and found.array[0].min() == 100


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0)])
def test_sure_and_seen_voxels_are_certain(spacing):
    target = Geometry((16, 16, 16))
    grid = with_spacing(target, spacing)
    sure = one_hot(np.zeros(grid.shape, np.uint8), 2)
    _, found = to_case_grid(sure, grid, np.ones(grid.shape, bool), target)
    assert found.array.max() == 0, f"sure voxels have an uncertainty of {found.array.max()} %"


def test_border_of_a_scan_that_does_not_fill_the_last_voxel_is_certain():
    """22 voxels of 1 mm are 4 of 5 mm and a bit: the bit was seen as well."""
    target = Geometry((22, 22, 22))
    grid = with_spacing(target, (5.0, 5.0, 5.0))
    sure = one_hot(np.zeros(grid.shape, np.uint8), 2)
    _, found = to_case_grid(sure, grid, np.ones(grid.shape, bool), target)
    assert found.array.max() == 0, f"{np.count_nonzero(found.array)} seen voxels at the border count as unseen"


def test_slabs_equal_the_whole(monkeypatch):
    target = Geometry((15, 9, 10), (1.1, 1.0, 0.9), (1, 2, 3), turned())
    grid = with_spacing(canonical(target), (2.0, 2.0, 2.0))
    probabilities = torch.softmax(torch.randn(3, *grid.shape), 0).numpy()
    seen = np.ones(grid.shape, bool)
    whole = to_case_grid(probabilities, grid, seen, target)
    monkeypatch.setattr(uncertainty, "_AT_ONCE", 3 * 9 * 10 * 2)
    slabs = to_case_grid(probabilities, grid, seen, target)
    assert np.array_equal(whole[0].array, slabs[0].array) and np.array_equal(whole[1].array, slabs[1].array)


@pytest.mark.parametrize(("classes", "kind"), [(2, np.uint8), (255, np.uint8), (257, np.uint16), (300, np.uint16)])
@pytest.mark.parametrize("spacing", [1.0, 1.5])
def test_type_holds_every_class(classes, kind, spacing):
    target = Geometry((3, 3, 3))
    grid = with_spacing(target, (spacing,) * 3)
    label = np.full(grid.shape, classes - 1)
    prediction, _ = to_case_grid(one_hot(label, classes), grid, np.ones(grid.shape, bool), target)
    assert prediction.array.dtype == kind, f"{classes} classes came back as {prediction.array.dtype}"


@pytest.mark.parametrize("classes", [256, 257, 300])
@pytest.mark.parametrize("spacing", [1.0, 1.5])
def test_highest_class_survives(classes, spacing):
    target = Geometry((3, 3, 3))
    grid = with_spacing(target, (spacing,) * 3)
    label = np.full(grid.shape, classes - 1)
    prediction, _ = to_case_grid(one_hot(label, classes), grid, np.ones(grid.shape, bool), target)
    assert (prediction.array == classes - 1).all(), f"class {classes - 1} came back as {np.unique(prediction.array)}"


# ---------------------------------------------------------------------- scores


def scored():
    geometry = Geometry((2, 2, 2), (5.0, 2.0, 1.0))
    label = np.array([[[0, 0], [0, 0]], [[1, 1], [2, 0]]], np.uint8)
    entropy = np.array([[[0, 0], [0, 0]], [[40, 20], [90, 10]]], np.uint8)
    return case_scores(Volume(label, geometry), Volume(entropy, geometry), 4)


def test_volume_of_a_class_in_ml():
    assert scored()["classes"]["1"]["volume_ml"] == pytest.approx(2 * 10 / 1000), "two voxels of 10 mm³"


def test_uncertainty_of_a_scan_and_its_labels():
    found = scored()
    assert (found["uncertainty"], found["label_uncertainty"]) == (pytest.approx(0.2), pytest.approx(0.5))


def test_absent_class_has_no_uncertainty():
    assert scored()["classes"]["3"] == {"voxels": 0, "volume_ml": 0.0, "uncertainty": None}


def test_a_scan_smaller_than_a_window_is_continued_and_not_padded_with_grey():
    """A network that reports its window's mean: a constant scan has that mean, and not less, in a larger window."""

    class MeanOfWindow(torch.nn.Module):
        def forward(self, windows):
            mean = windows.mean((2, 3, 4), keepdim=True).expand(-1, -1, *windows.shape[2:])
            return torch.cat([torch.zeros_like(mean), mean], 1)

    plan = tiny_plan(2, patch=(16, 16, 16))
    fabric = make_fabric("cpu", "32-true")
    found = predict_probabilities(MeanOfWindow(), np.full((6, 7, 8), 3.0, np.float32), plan, fabric, 1, 0)
    expected = 1 / (1 + np.exp(-3.0))
    assert np.abs(found[1].astype(float) - expected).max() < 1e-3, "the padding changed what the network saw"
