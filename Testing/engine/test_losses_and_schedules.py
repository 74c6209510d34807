"""Losses and schedules against values worked out by hand in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from SemiSAMO1Lib.engine.learners.losses import consistency_loss, cross_entropy, dice_loss, supervised_loss
from SemiSAMO1Lib.engine.learners.schedules import consistency_ramp, ema_decay, poly, pseudo_ramp

SMOOTH = 1e-5


def volume(rows):
    """(1, C, 1, 1, n) float64 from C rows of n values."""
    return torch.tensor(rows, dtype=torch.float64).reshape(1, len(rows), 1, 1, -1)


# two voxels, two classes: logits chosen so that softmax is (0.75, 0.25) and (0.2, 0.8)
LOGITS = volume([[math.log(3), 0.0], [0.0, math.log(4)]])
TARGET = volume([[1.0, 1.0], [0.0, 0.0]])
ONES = torch.ones(1, 1, 1, 1, 2, dtype=torch.float64)


def test_cross_entropy_by_hand():
    expected = -(math.log(0.75) + math.log(0.2)) / 2
    assert float(cross_entropy(LOGITS, TARGET, ONES)) == pytest.approx(expected, abs=1e-12)


def test_cross_entropy_with_soft_target_by_hand():
    target = volume([[0.6, 0.5], [0.4, 0.5]])
    expected = -(0.6 * math.log(0.75) + 0.4 * math.log(0.25) + 0.5 * math.log(0.2) + 0.5 * math.log(0.8)) / 2
    assert float(cross_entropy(LOGITS, target, ONES)) == pytest.approx(expected, abs=1e-12)


def test_cross_entropy_with_weights_is_the_weighted_mean():
    weight = volume([[1.0, 0.5]])
    expected = -(math.log(0.75) + 0.5 * math.log(0.2)) / 1.5
    assert float(cross_entropy(LOGITS, TARGET, weight)) == pytest.approx(expected, abs=1e-12)


def test_dice_by_hand():
    """Squares in the denominator, smooth 1e-5, mean over both classes."""
    background = 1 - (2 * (0.75 + 0.2) + SMOOTH) / (0.75**2 + 0.2**2 + 2 + SMOOTH)
    foreground = 1 - SMOOTH / (0.25**2 + 0.8**2 + SMOOTH)
    found = float(dice_loss(torch.softmax(LOGITS, 1), TARGET, ONES))
    assert found == pytest.approx((background + foreground) / 2, abs=1e-12)


def test_dice_with_weights_by_hand():
    weight = volume([[1.0, 0.5]])
    background = 1 - (2 * (0.75 + 0.5 * 0.2) + SMOOTH) / (0.75**2 + 0.5 * 0.2**2 + 1.5 + SMOOTH)
    foreground = 1 - SMOOTH / (0.25**2 + 0.5 * 0.8**2 + SMOOTH)
    found = float(dice_loss(torch.softmax(LOGITS, 1), TARGET, weight))
    assert found == pytest.approx((background + foreground) / 2, abs=1e-12)


def test_dice_of_a_perfect_prediction_is_zero():
    target = volume([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert float(dice_loss(target, target, torch.ones(1, 1, 1, 1, 3, dtype=torch.float64))) == pytest.approx(
        0, abs=1e-12
    )


def test_dice_of_a_class_absent_from_both_is_zero_not_nan():
    target = volume([[1.0, 1.0], [0.0, 0.0]])
    assert float(dice_loss(target, target, ONES)) == pytest.approx(0, abs=1e-12)


def test_supervised_loss_is_half_of_both():
    expected = 0.5 * (cross_entropy(LOGITS, TARGET, ONES) + dice_loss(torch.softmax(LOGITS, 1), TARGET, ONES))
    assert float(supervised_loss(LOGITS, TARGET, ONES)) == pytest.approx(float(expected), abs=1e-12)


def test_consistency_by_hand():
    a, b = volume([[0.75, 0.2], [0.25, 0.8]]), volume([[0.5, 0.6], [0.5, 0.4]])
    expected = (0.25**2 + 0.4**2 + 0.25**2 + 0.4**2) / 4
    assert float(consistency_loss(a, b)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", [cross_entropy, lambda x, t, w: dice_loss(torch.softmax(x, 1), t, w), supervised_loss])
@pytest.mark.parametrize("changed", ["logits", "target"])
def test_voxels_of_weight_zero_change_nothing(loss, changed):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    target = torch.softmax(torch.randn(2, 3, 4, 4, 4, generator=generator, dtype=torch.float64), 1)
    weight = (torch.rand(2, 1, 4, 4, 4, generator=generator) > 0.5).double()
    before = float(loss(logits, target, weight))
    other = torch.randn(2, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    if changed == "logits":
        logits = torch.where(weight > 0, logits, 5 * other)
    else:
        target = torch.where(weight > 0, target, torch.softmax(5 * other, 1))
    assert float(loss(logits, target, weight)) == pytest.approx(before, abs=1e-12), "an unknown voxel changed the loss"


@pytest.mark.parametrize("loss", [cross_entropy, supervised_loss])
def test_no_gradient_from_voxels_of_weight_zero(loss):
    logits = LOGITS.clone().requires_grad_()
    loss(logits, TARGET, volume([[1.0, 0.0]])).backward()
    assert float(logits.grad[..., 1].abs().max()) == 0, "the second voxel has weight 0 and must get no gradient"


def test_all_weights_zero_gives_zero():
    assert float(supervised_loss(LOGITS, TARGET, 0 * ONES)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: cross_entropy(x, TARGET, ONES),
        lambda x: dice_loss(torch.softmax(x, 1), TARGET, ONES),
        lambda x: consistency_loss(torch.softmax(x, 1), TARGET),
    ],
    ids=["cross entropy", "dice", "consistency"],
)
def test_every_loss_has_a_correct_gradient(loss):
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, logits), "gradient and finite differences differ"


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_consistency_weight(share):
    """λ(t) = 0.1 · exp(-5 (1 - t / (2 t_max))²)."""
    assert 0.1 * consistency_ramp(share) == pytest.approx(0.1 * math.exp(-5 * (1 - share / 2) ** 2), abs=1e-15)


def test_consistency_weight_equals_the_published_one_at_15000_iterations():
    """Published: 0.1 · exp(-5 (1 - min(e, 200) / 200)²), e = t // 150."""
    for t in range(0, 15_000, 1_500):
        published = math.exp(-5 * (1 - min(t // 150, 200) / 200) ** 2)
        assert consistency_ramp(t / 15_000) == pytest.approx(published, abs=1e-12), f"iteration {t}"


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.15, 0.5), (0.3, 1.0), (0.9, 1.0)])
def test_pseudo_label_weight(share, expected):
    """w(t) = min(1, t / (0.3 t_max))."""
    assert pseudo_ramp(share, 0.3) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (1, 0.5), (9, 0.9), (98, 98 / 99), (100_000, 0.99)])
def test_ema_decay(step, expected):
    """min(1 - 1 / (t + 1), 0.99)."""
    assert ema_decay(step, 0.99) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 0.5**0.9), (1.0, 0.0)])
def test_poly_decay(share, expected):
    assert poly(share) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", [consistency_ramp, lambda t: pseudo_ramp(t, 0.3), lambda t: -poly(t)])
def test_schedules_are_monotonic(schedule):
    values = [schedule(t) for t in np.linspace(0, 1, 101)]
    assert all(b >= a for a, b in itertools.pairwise(values)), "a ramp went back"
