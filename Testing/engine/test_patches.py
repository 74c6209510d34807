"""Training patches: where they come from, that image and label stay together, that the key decides everything."""

import numpy as np
import pytest
import torch
from engine_helpers import UNCHANGED, smooth_noise, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.config import AugmentationConfig
from SemiSAMO1Lib.engine.data.patches import TrainingCase, collate, draw_case, draw_patch, find_centres
from SemiSAMO1Lib.engine.sampling import PatchSource

SHAPE = (20, 22, 24)
SPACING = (1.0, 1.0, 1.0)
MOVING = AugmentationConfig(intensity=False)


def rng(*key):
    return np.random.default_rng(list(key) or 0)


def case(classes=3, seed=0, shape=SHAPE, image=None, label=None, weight=None):
    """A case with one block of every foreground class; the image shows ten times the class."""
    if label is None:
        label = np.zeros(shape, np.uint8)
        for value in range(1, classes):
            low = 2 + 3 * (value - 1)
            label[low : low + 3, 4 : 4 + 6, 4:12] = value
    image = (10.0 * label).astype(np.float32) if image is None else image
    weight = np.ones(label.shape, np.float32) if weight is None else weight
    return TrainingCase(image, label, weight, find_centres(label, classes, rng(seed)))


def draw(one, settings=UNCHANGED, patch=(8, 8, 8), classes=3, foreground=None, key=(0,), spacing=SPACING):
    return draw_patch(one, patch, spacing, classes, settings, rng(*key), foreground)


def same(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.target, b.target) and torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("settings", [AugmentationConfig(), AugmentationConfig(mirror=True, quarter_turns=True)])
def test_one_key_gives_one_patch(settings):
    one = case(image=smooth_noise(SHAPE, 0))
    first = draw(one, settings, key=(3, 1, 7))
    torch.rand(3), np.random.rand(3)  # the global state must not matter
    draw(one, settings, key=(9,))
    assert same(first, draw(one, settings, key=(3, 1, 7))), "the same key gave another patch"


def test_another_key_gives_another_patch():
    one = case(image=smooth_noise(SHAPE, 0))
    assert not same(draw(one, key=(0, 0)), draw(one, key=(0, 1))), "two keys gave the same patch"


@pytest.mark.parametrize("patch", [(8, 8, 8), (7, 8, 9), (20, 22, 24)])
@pytest.mark.parametrize("foreground", [None, 1])
def test_unchanged_patch_is_a_part_of_the_scan(patch, foreground):
    """Without augmentation the voxels are those of the scan, not interpolated ones."""
    image = rng(1).normal(size=SHAPE).astype(np.float32)
    for key in range(4):
        found = draw(case(image=image), patch=patch, foreground=foreground, key=(key,))
        there = found.weight[0, 0].numpy() > 0
        known = np.sort(image.ravel())
        values = found.image[0, 0].numpy()[there]
        nearest = known[np.clip(np.searchsorted(known, values), 1, len(known) - 1)]
        before = known[np.clip(np.searchsorted(known, values) - 1, 0, None)]
        apart = np.minimum(abs(values - nearest), abs(values - before)).max()
        assert apart < 1e-4, f"a voxel of the patch is {apart:.4f} away from every voxel of the scan"


def test_unchanged_patch_has_steps_of_one_voxel():
    """On a ramp, neighbours in the patch differ by exactly one voxel: no scale, no turn, no mirror."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    for axis, ramp in enumerate((z, y, x)):
        found = draw(case(image=ramp.astype(np.float32)), patch=(6, 6, 6), key=(axis,)).image[0, 0].numpy()
        assert np.allclose(np.diff(found, axis=axis), 1, atol=1e-3), f"axis {axis} of the patch is not that of the scan"


def test_patch_that_covers_the_scan_leaves_nothing_out():
    image = rng(1).normal(size=(8, 8, 8)).astype(np.float32)
    label = np.zeros((8, 8, 8), np.uint8)
    found = draw(case(image=image, label=label), patch=(10, 10, 10)).weight
    assert float(found.sum()) >= 7**3, "a patch larger than the scan must show nearly all of it"


@pytest.mark.parametrize("settings", [UNCHANGED, MOVING, AugmentationConfig(intensity=False, mirror=True)])
def test_image_and_label_move_together(settings):
    """A painted block stays on its intensity: where the image is 10 the label is 1, where 0 it is background."""
    wrong = total = 0
    for key in range(12):
        found = draw(case(classes=2), settings, classes=2, foreground=1, key=(key,), patch=(12, 12, 12))
        label, image = found.target[0].argmax(0), found.image[0, 0]
        clear = (image < 1) | (image > 9)
        wrong += int(((image > 5) != (label == 1))[clear].sum())
        total += int(clear.sum())
    assert wrong == 0, f"{wrong} of {total} clear voxels have the label of another place"


def test_soft_target_moves_with_the_image():
    one = case(classes=2)
    soft = TrainingCase(
        one.image, np.stack([one.target == 0, one.target == 1]).astype(np.float16), one.weight, one.centres
    )
    found = draw(soft, MOVING, classes=2, foreground=1, key=(5,), patch=(12, 12, 12))
    apart = (found.target[0, 1] - found.image[0, 0] / 10).abs().max()
    assert apart < 1e-3, f"probabilities and grey values are interpolated differently ({apart:.4f})"


def test_target_sums_to_one():
    found = draw(case(), MOVING, foreground=1)
    assert torch.allclose(found.target.sum(1), torch.ones(1, 8, 8, 8)), "a voxel's target must sum to 1"


def test_weight_moves_with_the_label():
    one = case(classes=2)
    known = TrainingCase(one.image, one.target, (one.target == 0).astype(np.float32), one.centres)
    found = draw(known, MOVING, classes=2, foreground=1, key=(2,), patch=(12, 12, 12))
    assert float(found.weight[found.target[:, 1:2] == 1].max()) == 0, "labelled voxels were given weight 0"


def test_outside_the_scan_has_no_weight():
    small = case(shape=(16, 16, 16), classes=2)
    found = draw(small, patch=(24, 24, 24), classes=2)
    assert float(found.weight[0, 0, 0].max()) == 0, "what lies beyond the scan must not count"


def handedness(settings, keys=24, axis=2):
    """How often the patch shows an axis (z, y, x) running backwards."""
    steps = np.arange(SHAPE[axis], dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    ramp = np.broadcast_to(steps, SHAPE).copy()
    found = [draw(case(image=ramp), settings, key=(k,)).image[0, 0].numpy() for k in range(keys)]
    return sum(np.diff(one, axis=axis).mean() < 0 for one in found)


def test_no_mirroring_by_default():
    settings = AugmentationConfig(intensity=False)
    assert handedness(settings) == 0, "left and right changed places though mirroring is off"


def test_mirroring_never_turns_a_scan_upside_down():
    """As published: flips along the first two of the file's axes (x, y), never along the slices."""
    assert handedness(AugmentationConfig(intensity=False, mirror=True), axis=0) == 0


@pytest.mark.parametrize("axis", [1, 2])
def test_mirroring_on_request_includes_the_unmirrored(axis):
    backwards = handedness(AugmentationConfig(intensity=False, mirror=True), axis=axis)
    assert 4 <= backwards <= 20, f"{backwards} of 24 patches were mirrored; about half were expected"


def test_turns_stay_within_their_limit():
    ramp = np.broadcast_to(np.arange(SHAPE[2], dtype=np.float32), SHAPE).copy()
    settings = AugmentationConfig(rotation_degrees=15, scale=0, elastic_mm=0, intensity=False)
    slopes = [
        np.diff(draw(case(image=ramp), settings, key=(k,), patch=(6, 6, 6)).image[0, 0].numpy(), axis=2)
        for k in range(20)
    ]
    least = min(float(s[2:4, 2:4, 2:4].mean()) for s in slopes)
    assert least > np.cos(np.radians(15)) ** 2 - 0.01, (
        f"the x axis was turned further than twice 15° (cosine {least:.3f})"
    )


def test_anisotropic_turn_happens_in_mm():
    """Turning by 15° with slices of 10 mm must not sweep across slices as if they were 1 mm."""
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32).reshape(-1, 1, 1), (20, 40, 40)).copy()
    settings = AugmentationConfig(rotation_degrees=15, scale=0, elastic_mm=0, intensity=False)
    one = case(image=ramp, label=np.zeros((20, 40, 40), np.uint8))
    found = [
        draw(one, settings, patch=(4, 16, 16), key=(k,), spacing=(10.0, 1.0, 1.0)).image[0, 0].numpy()
        for k in range(10)
    ]
    spread = max(np.ptp(f[1]) for f in found)
    assert spread < 1.0, f"one slice of the patch spans {spread:.2f} slices; 16 mm at 15° are at most 0.6"


def test_intensity_changes_come_from_the_key():
    one = case(image=smooth_noise(SHAPE, 3))
    settings = AugmentationConfig(rotation_degrees=0, scale=0, elastic_mm=0)
    first = [draw(one, settings, key=(k,)).image for k in range(6)]
    again = [draw(one, settings, key=(k,)).image for k in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "grey values changed by chance"


def test_intensity_changes_keep_the_label():
    one = case(image=smooth_noise(SHAPE, 3))
    with_changes = AugmentationConfig(rotation_degrees=0, scale=0, elastic_mm=0)
    assert torch.equal(draw(one, with_changes, key=(4,)).target, draw(one, UNCHANGED, key=(4,)).target)


# ---------------------------------------------------------------------- which patches


def test_centres_lie_on_their_class():
    label = rng(0).integers(0, 4, SHAPE)
    centres = find_centres(label, 4, rng(1))
    assert all((label[tuple(voxels.T)] == value).all() for value, voxels in centres.items()), "a centre off its class"


def test_absent_class_has_no_centres():
    assert set(find_centres(np.ones(SHAPE, np.uint8), 4, rng(1))) == {1}


def test_patch_of_an_absent_class_comes_from_anywhere():
    found = draw(case(classes=3), classes=4, foreground=3)
    assert torch.isfinite(found.image).all(), "asking for an absent class must still give a patch"


def test_foreground_patch_shows_its_class():
    label = np.zeros((40, 40, 40), np.uint8)
    label[30:32, 5:7, 20:22] = 1
    one = case(label=label, classes=2)
    shown = [float(draw(one, classes=2, foreground=1, key=(k,)).target[:, 1].sum()) > 0 for k in range(20)]
    assert all(shown), f"{shown.count(False)} of 20 foreground patches miss the class"


class Listening(PatchSource):
    """A source that tells which class each patch was asked to lie on."""

    def __init__(self, batch, classes):
        one = case(classes=classes)
        super().__init__([one], [one], tiny_plan(classes, batch=batch), tiny_config(augmentation=UNCHANGED), 1)

    def asked(self, iterations, monkeypatch):
        rows = []
        monkeypatch.setattr("SemiSAMO1Lib.engine.sampling.draw_patch", lambda *a: rows.append(a[-1]))
        monkeypatch.setattr("SemiSAMO1Lib.engine.sampling.collate", lambda patches: patches)
        for iteration in range(iterations):
            self(iteration, 0)
        return np.array([-1 if r is None else r for r in rows]).reshape(iterations, -1)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_a_third_of_the_patches_lies_on_foreground(batch, classes, monkeypatch):
    """In every place of the batch: the labelled patches, and each of the pseudo-labelled ones."""
    share = (Listening(batch, classes).asked(60, monkeypatch) > 0).mean(0)
    assert share.min() >= 1 / 3, f"shares on foreground by place in the batch: {share.round(2)}"


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("classes", [3, 4, 6])
def test_classes_come_in_turn(batch, classes, monkeypatch):
    """In every place of the batch each class is visited equally often."""
    asked = Listening(batch, classes).asked(120, monkeypatch)
    for place in range(batch + 1):
        counts = [int((asked[:, place] == value).sum()) for value in range(1, classes)]
        assert max(counts) - min(counts) <= 1, f"place {place} of the batch lies on the classes {counts} times"


def test_source_is_keyed_by_iteration_and_place():
    one = case(image=smooth_noise(SHAPE, 0))
    source = PatchSource([one], [one], tiny_plan(), tiny_config(), 1)
    source(4, 0)
    assert same(source(7, 0).pseudo, PatchSource([one], [one], tiny_plan(), tiny_config(), 1)(7, 0).pseudo)


def test_iterations_differ():
    one = case(image=smooth_noise(SHAPE, 0))
    source = PatchSource([one], [one], tiny_plan(), tiny_config(), 1)
    assert not same(source(7, 0).pseudo, source(8, 0).pseudo), "another iteration saw the same patch"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_processes_share_one_batch(ranks):
    """Together they draw what one alone draws, each patch once."""
    one, plan = case(image=smooth_noise(SHAPE, 0)), tiny_plan(batch=5, labelled=4)
    whole = PatchSource([one], [one], plan, tiny_config(), 1)(7, 0)
    parts = [PatchSource([one], [one], plan, tiny_config(), 1, ranks)(7, rank) for rank in range(ranks)]
    assert sorted(place for part in parts for place in part.places) == sorted(whole.places)
    for part in parts:
        both = torch.cat([part.labelled.image, part.pseudo.image])
        of_whole = torch.cat([whole.labelled.image, whole.pseudo.image])
        wanted = of_whole[[list(whole.places).index(place) for place in part.places]]
        assert torch.equal(both, wanted), "a process sees other patches than one alone would see"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_averages_over_the_processes_are_means_over_the_batch(ranks):
    one, plan = case(), tiny_plan(batch=5, labelled=4)
    parts = [PatchSource([one], [one], plan, tiny_config(), 1, ranks)(0, rank) for rank in range(ranks)]
    values = {place: float(place) ** 2 for place in range(9)}

    def average(of_labelled):
        means = []
        for part in parts:
            count = len(part.labelled.image)
            places, share = part.places[:count], part.labelled_share
            if not of_labelled:
                places, share = part.places[count:], part.pseudo_share
            means.append(share * np.mean([values[place] for place in places]))
        return np.mean(means)

    labelled, pseudo = average(True), average(False)
    assert labelled == pytest.approx(np.mean([values[p] for p in (0, 6, 7, 8)]))
    assert pseudo == pytest.approx(np.mean([values[p] for p in range(1, 6)]))


def test_more_processes_than_patches_are_refused():
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"):
        PatchSource([case()], [case()], tiny_plan(batch=4, labelled=2), tiny_config(), 1, ranks=3)


def test_batch_has_one_labelled_and_the_planned_pseudo_patches():
    one = case()
    batch = PatchSource([one], [one], tiny_plan(batch=3), tiny_config(), 1)(0, 0)
    assert (len(batch.labelled.image), len(batch.pseudo.image)) == (1, 3)


def test_cases_are_drawn_by_their_chances():
    often, rarely = case(), TrainingCase(*(getattr(case(), f) for f in ("image", "target", "weight", "centres")), 0.1)
    drawn = [draw_case([often, rarely], rng(k)) is rarely for k in range(300)]
    assert 0.03 < np.mean(drawn) < 0.17, (
        f"a case of weight 0.1 beside one of 1 was drawn in {np.mean(drawn):.2f} of all"
    )


def test_collate_keeps_the_order():
    a, b = draw(case(), key=(0,)), draw(case(), key=(1,))
    assert torch.equal(collate([a, b]).image[1], b.image[0])
