"""The mean teacher: what it averages, where gradients go, how the total is put together."""

import math

import pytest
import torch
from engine_helpers import random_batch, tiny_config, tiny_plan
from lightning_fabric import Fabric
from torch import nn

from SemiSAMO1Lib.engine.learners import LEARNERS, Batch, MeanTeacher, learner_named
from SemiSAMO1Lib.engine.learners.averaged import update_average
from SemiSAMO1Lib.engine.learners.mean_teacher import with_noise


def learner(**changes):
    torch.manual_seed(1)
    one = MeanTeacher(tiny_plan(), tiny_config(**changes))
    one.setup(Fabric(accelerator="cpu", devices=1, precision="32-true"))
    return one


def parameters(network):
    return [p.detach().clone() for p in network.parameters()]


def steps(one, count, progress=0.5):
    for iteration in range(count):
        torch.manual_seed(iteration)  # of dropout
        one.step(random_batch(iteration), progress, torch.Generator().manual_seed(iteration))


class WithBuffer(nn.Module):
    def __init__(self, weight, buffer):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("count", torch.tensor(buffer))


def test_average_of_parameters():
    average, model = WithBuffer([1.0, 2.0], 3), WithBuffer([3.0, 6.0], 8)
    update_average(average, model, 0.75)
    assert torch.allclose(average.weight, torch.tensor([1.5, 3.0])), "expected 0.75 · average + 0.25 · model"


def test_buffers_are_copied():
    average, model = WithBuffer([1.0, 2.0], 3), WithBuffer([3.0, 6.0], 8)
    update_average(average, model, 0.75)
    assert int(average.count) == 8, "buffers are copied, not averaged"


def test_first_update_makes_the_teacher_the_student():
    one = learner()
    steps(one, 1)
    pairs = zip(one.teacher.parameters(), one.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the decay of update 0 is 0: the teacher is the student"


def test_second_update_is_the_mean_of_two():
    one = learner(iterations=1000)
    steps(one, 1)
    first = parameters(one.student)
    steps(one, 1)
    expected = [(a + b) / 2 for a, b in zip(first, parameters(one.student), strict=True)]
    apart = max(float((a - b).abs().max()) for a, b in zip(expected, one.teacher.parameters(), strict=True))
    assert apart < 1e-6, "the decay of update 1 is 1/2: the teacher is the mean of two students"


def test_teacher_has_no_gradient():
    one = learner()
    steps(one, 1)
    assert all(p.grad is None and not p.requires_grad for p in one.teacher.parameters()), (
        "the teacher learned by itself"
    )


def test_teacher_is_not_in_the_optimizer():
    one = learner()
    own = {id(p) for p in one.teacher.parameters()}
    known = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
    assert not own & known, "the optimizer must not hold the teacher's parameters"


def test_teacher_keeps_dropout_on_while_training():
    assert learner().teacher.training, "the method's teacher stays in train mode"


def test_step_changes_the_student():
    one = learner()
    before = parameters(one.student)
    steps(one, 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, one.student.parameters(), strict=True)), "nothing learned"


def test_total_is_the_weighted_sum():
    """L = L_sup + λ L_cons + w L_pseudo at t / t_max = 0.15: w = ½, λ = 0.1 · exp(-5 · 0.925²)."""
    losses = learner().step(random_batch(0), 0.15, torch.Generator().manual_seed(0))
    expected = losses["supervised"] + 0.1 * math.exp(-5 * 0.925**2) * losses["consistency"] + 0.5 * losses["pseudo"]
    assert losses["total"] == pytest.approx(expected, rel=1e-5)


def moved(changed_batch, progress, **changes):
    """Does the student end elsewhere when a part of the batch is changed?"""
    results = []
    for batch in (random_batch(0), changed_batch(random_batch(0))):
        one = learner(**changes)
        torch.manual_seed(5)  # the same dropout in both
        one.step(batch, progress, torch.Generator().manual_seed(0))
        results.append(torch.cat([p.flatten() for p in parameters(one.student)]))
    return not torch.equal(*results)


def other_target(patches):
    patches.target = patches.target.flip(1)
    return patches


def test_supervised_term_reaches_the_student():
    assert moved(lambda b: Batch(other_target(b.labelled), b.pseudo), 0.0), "another label must give another student"


def test_pseudo_term_reaches_the_student():
    assert moved(lambda b: Batch(b.labelled, other_target(b.pseudo)), 0.5), "another pseudo-label, another student"


def test_pseudo_term_is_off_at_the_beginning():
    assert not moved(lambda b: Batch(b.labelled, other_target(b.pseudo)), 0.0), "w(0) = 0: pseudo-labels do not count"


def test_consistency_term_reaches_the_student():
    def students(consistency):
        one = learner(consistency=consistency)
        torch.manual_seed(5)
        one.step(random_batch(0), 0.9, torch.Generator().manual_seed(0))
        return torch.cat([p.flatten() for p in parameters(one.student)])

    assert not torch.equal(students(0.0), students(10.0)), "the consistency term does not reach the student"


@pytest.mark.parametrize("part", ["labelled", "pseudo"])
def test_targets_of_voxels_without_weight_do_not_matter(part):
    """No patch voxel has weight: its label, whatever it is, must not reach the student."""

    def without(batch, flip):
        patches = getattr(batch, part)
        patches.weight = torch.zeros_like(patches.weight)
        if flip:
            other_target(patches)
        return batch

    results = []
    for flip in (False, True):
        one = learner()
        torch.manual_seed(5)
        one.step(without(random_batch(0), flip), 0.5, torch.Generator().manual_seed(0))
        results.append(torch.cat([p.flatten() for p in parameters(one.student)]))
    assert torch.equal(*results), f"the unknown label of the {part} patch changed the student"


def test_noise_is_clamped():
    image = torch.zeros(1, 1, 32, 32, 32)
    noise = with_noise(image, [torch.Generator().manual_seed(0)])
    assert float(noise.abs().max()) == pytest.approx(0.2, abs=1e-6), "clamp(0.1 · N(0, 1), ±0.2)"


def test_noise_has_the_published_deviation():
    noise = with_noise(torch.zeros(1, 1, 32, 32, 32), [torch.Generator().manual_seed(0)])
    assert float(noise.std()) == pytest.approx(0.1 * 0.9595, abs=0.003), "0.1 · N(0, 1), cut at two deviations"


def test_noise_comes_from_the_generator_alone():
    image = torch.zeros(1, 1, 8, 8, 8)
    first = with_noise(image, [torch.Generator().manual_seed(3)])
    torch.rand(5)
    assert torch.equal(first, with_noise(image, [torch.Generator().manual_seed(3)])), (
        "noise depends on the global state"
    )


def test_learning_rate_decays():
    one = learner(learning_rate=0.01)
    steps(one, 1, progress=0.5)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**0.9)


def test_a_few_steps_fit_one_batch():
    one = learner(learning_rate=0.02, iterations=30)
    batch = random_batch(0)
    first = one.step(batch, 0.0, torch.Generator().manual_seed(0))["supervised"]
    for _ in range(30):
        last = one.step(batch, 0.0, torch.Generator().manual_seed(0))["supervised"]
    assert last < 0.8 * first, f"30 steps on one batch brought the loss from {first:.3f} to {last:.3f} only"


def test_unknown_learner_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'meen_teacher'.*mean_teacher"):
        learner_named("meen_teacher")


def test_every_learner_gives_a_network_for_inference():
    for name, kind in LEARNERS.items():
        one = kind(
            tiny_plan(), tiny_config(learner=name, generalists={"checkpoint": "random", "architecture": "small"})
        )
        one.setup(Fabric(accelerator="cpu", devices=1, precision="32-true"))
        with torch.no_grad():
            logits = one.inference_model()(torch.zeros(1, 1, 8, 8, 8))
        assert logits.shape == (1, 3, 8, 8, 8), f"{name}: expected (B, C, z, y, x) logits, got {tuple(logits.shape)}"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_state_goes_on_where_it_was(optimizer):
    undisturbed, stopped, resumed = (learner(optimizer=optimizer) for _ in range(3))
    steps(undisturbed, 2)
    steps(stopped, 2)
    resumed.load_state_dict(stopped.state_dict())
    steps(undisturbed, 1)
    steps(resumed, 1)
    pairs = zip(undisturbed.teacher.parameters(), resumed.teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "a learner restored from its state went another way"
