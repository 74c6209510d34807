"""The learners beside the mean teacher: every term of their losses by hand in float64, and where gradients go."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from engine_helpers import UNCHANGED, Recorder, random_batch, tiny_config, tiny_plan
from lightning_fabric import Fabric
from scipy import ndimage, optimize
from torch import nn
from torch.nn import functional as F

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.cohort import Cohort, signed_distances
from SemiSAMO1Lib.engine.config import AugmentationConfig
from SemiSAMO1Lib.engine.data.patches import Patches, TrainingCase, collate, draw_patch
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.learners import LEARNERS, Batch, learner_named
from SemiSAMO1Lib.engine.learners.adversarial import Discriminator
from SemiSAMO1Lib.engine.learners.averaged import Outputs
from SemiSAMO1Lib.engine.learners.dual_task import as_mask, distance_loss
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.specialists import SPECIALISTS, make_specialist
from SemiSAMO1Lib.engine.specialists.heads import LogitsOnly, TwoHeads
from SemiSAMO1Lib.engine.training import train_round
from SemiSAMO1Lib.volume import Geometry, Volume

RANDOM = {"checkpoint": "random", "architecture": "small"}
PROGRESS = [0.0, 0.15, 0.5, 0.9]
TINY = (2, 2, 2)


def learner(name, classes=3, **changes):
    torch.manual_seed(1)
    one = learner_named(name)(tiny_plan(classes), tiny_config(learner=name, generalists=RANDOM, **changes))
    one.setup(Fabric(accelerator="cpu", devices=1, precision="32-true"))
    return one


def measured_batch(iteration, rank=0, classes=3):
    """A random batch whose labelled patch has distances."""
    batch = random_batch(iteration, rank, classes)
    generator = torch.Generator().manual_seed(iteration)
    batch.labelled.distance = 2 * torch.rand((1, classes - 1, 8, 8, 8), generator=generator) - 1
    return batch


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensor(array):
    return torch.tensor(array, dtype=torch.float64)


# ---------------------------------------------------------------------- the formulas again, in numpy


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cross_entropy(logits, target, weight):
    each = -(target * np.log(softmax(logits))).sum(1)
    return np.mean([(e * w[0]).sum() / w.sum() for e, w in zip(each, weight, strict=True)])


def dice(probabilities, target, weight):
    each = []
    for sample, value in itertools.product(range(len(target)), range(probabilities.shape[1])):
        p, q, w = probabilities[sample, value], target[sample, value], weight[sample, 0]
        each.append(1 - (2 * (w * p * q).sum() + 1e-5) / ((w * p * p).sum() + (w * q * q).sum() + 1e-5))
    return np.mean(each)


def half_of_both(logits, target, weight):
    return 0.5 * (cross_entropy(logits, target, weight) + dice(softmax(logits), target, weight))


class ByHand:
    """A tiny batch and a student's answers to it, as float64 arrays and as the tensors a learner gets."""

    def __init__(self, classes=3, pseudo=2, seed=0):
        self.labelled, self.pseudo = self.arrays(1, classes, seed), self.arrays(pseudo, classes, seed + 1)
        self.batch = Batch(self.patches(self.labelled), self.patches(self.pseudo))
        self.batch.labelled.distance = tensor(self.labelled["true"])
        self.leaves = {
            name: tensor(kind[what]).requires_grad_()
            for name, kind, what in (
                ("labelled", self.labelled, "logits"),
                ("pseudo", self.pseudo, "logits"),
                ("labelled_distance", self.labelled, "distance"),
                ("pseudo_distance", self.pseudo, "distance"),
            )
        }
        self.outputs = Outputs(**self.leaves)

    def arrays(self, count, classes, seed):
        generator = np.random.default_rng(seed)
        label = generator.integers(0, classes, (count, *TINY))
        return {
            "image": generator.normal(size=(count, 1, *TINY)),
            "target": np.moveaxis(np.eye(classes)[label], -1, 1),
            "weight": generator.uniform(0.2, 1, (count, 1, *TINY)),
            "logits": generator.normal(size=(count, classes, *TINY)),
            "distance": generator.normal(size=(count, classes, *TINY)) * 1e-3,  # where the sigmoid is not flat
            "true": generator.uniform(-1, 1, (count, classes - 1, *TINY)),
        }

    def patches(self, arrays):
        return Patches(*(tensor(arrays[name]) for name in ("image", "target", "weight")))

    def terms(self, one, progress=0.5):
        return one.terms(self.batch, self.outputs, progress, one.generators(self.batch, noise()))

    def gradients(self, value):
        """By the name of the output; zeros where there is none."""
        found = torch.autograd.grad(value, list(self.leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(self.leaves.items(), found, strict=True)
        }


# ---------------------------------------------------------------------- what all have in common


def with_factors(progress):
    """The factors of the terms by learner: SemiSAM-O1, λ(t) = 0.1 exp(-5 (1 - ½ t / t_max)²)."""
    learned = {"supervised": 1.0, "pseudo": min(1.0, progress / 0.3)}
    ramp = {"consistency": 0.1 * math.exp(-5 * (1 - progress / 2) ** 2)}
    return {
        "uncertainty_mean_teacher": {**learned, **ramp},
        "adversarial": {**learned, **ramp},
        "dual_task": {**learned, **ramp, "distance_mask": 1.0, "distance": 0.3},
        "pseudo_only": learned,
        "supervised_only": {"supervised": 1.0},
    }


@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize("name", sorted(with_factors(0)))
def test_factors(name, progress):
    one, batch = learner(name), measured_batch(0)
    found = {
        key: term.factor
        for key, term in one.terms(batch, one.outputs(batch), progress, one.generators(batch, noise())).items()
    }
    assert found == pytest.approx(with_factors(progress)[name], abs=1e-12), f"{name} at t / t_max = {progress}"


@pytest.mark.parametrize("name", sorted(with_factors(0)))
def test_total_is_the_sum_of_factors_times_terms(name):
    losses = learner(name).step(measured_batch(0), 0.5, noise())
    expected = sum(factor * losses[key] for key, factor in with_factors(0.5)[name].items())
    assert losses["total"] == pytest.approx(expected, rel=1e-5), f"{name}: {losses}"


@pytest.mark.parametrize("term", ["supervised", "pseudo"])
@pytest.mark.parametrize("name", ["uncertainty_mean_teacher", "adversarial", "dual_task", "pseudo_only"])
def test_labels_and_pseudo_labels_by_hand(name, term):
    """½ (cross-entropy + Dice), each on its own patches, voxels weighted."""
    case = ByHand()
    one = adversarial() if name == "adversarial" else learner(name)
    one.teacher = FixedTeacher(np.zeros((18, 3, *TINY)))  # of uncertainty_mean_teacher: 9 views of 2 patches
    kind = case.labelled if term == "supervised" else case.pseudo
    expected = half_of_both(kind["logits"], kind["target"], kind["weight"])
    assert float(case.terms(one)[term].value.detach()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_no_gradient_reaches_the_running_average(name):
    one = learner(name, classes=2)
    one.step(measured_batch(0, classes=2), 0.5, noise())
    assert all(p.grad is None for p in one.teacher.parameters()), f"{name}: the teacher learned by itself"


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_every_parameter_of_the_student_gets_a_gradient(name):
    one = learner(name, classes=2)
    one.step(measured_batch(0, classes=2), 0.5, noise())
    without = [n for n, p in one.student.named_parameters() if p.grad is None or not bool(p.grad.any())]
    wrong = [n for n in without if not n.endswith("bias")]  # a bias before instance norm has none
    assert not wrong, f"{name}: no gradient in {wrong}"


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - {"supervised_only"}))
def test_without_their_weight_pseudo_labels_do_not_reach_the_student(name):
    results = []
    for turn in (False, True):
        one, batch = learner(name, classes=2, pseudo_weight=0), measured_batch(0, classes=2)
        if turn:
            batch.pseudo.target = batch.pseudo.target.flip(1)
        torch.manual_seed(5)  # the same dropout in both
        one.step(batch, 0.9, noise())
        results.append(flat(one.student))
    assert torch.equal(*results), f"{name}: pseudo_weight is 0, and another pseudo-label gave another student"


def trained(folder, name, observer=None):
    config = tiny_config(learner=name, iterations=5, checkpoint_seconds=1000, generalists=RANDOM)
    train_round(
        1,
        lambda iteration, rank: measured_batch(iteration, rank, classes=2),
        tiny_plan(2),
        config,
        Store(folder),
        make_fabric("cpu", "32-true"),
        observer or Silent(),
    )
    state = Store(folder).tensors("weights", "round-1.pt")["learner"]
    parts = [part for part in ("student", "teacher", "discriminator") if part in state]
    return torch.cat([state[part][key].flatten() for part in parts for key in sorted(state[part])])


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_stopped_and_resumed_reaches_bitwise_the_same_weights(tmp_path, name):
    undisturbed = trained(tmp_path / "undisturbed", name)
    with pytest.raises(Stopped):
        trained(tmp_path / "stopped", name, Recorder(3))
    torch.manual_seed(4711)  # a new process has another global state
    assert torch.equal(trained(tmp_path / "stopped", name), undisturbed), f"{name} stopped after iteration 3 of 5"


# ---------------------------------------------------------------------- baselines


class Forbidden:
    """Patches that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError(f"the pseudo-labelled patches were asked for their {name}")


def test_supervised_only_does_not_look_at_pseudo_labelled_patches():
    learner("supervised_only").step(Batch(random_batch(0).labelled, Forbidden()), 0.5, noise())


def test_supervised_only_by_hand():
    case = ByHand()
    expected = half_of_both(*(case.labelled[key] for key in ("logits", "target", "weight")))
    assert float(case.terms(learner("supervised_only"))["supervised"].value.detach()) == pytest.approx(
        expected, rel=1e-10
    )


def test_supervised_only_still_predicts_with_the_running_average():
    one = learner("supervised_only", iterations=1000)
    for iteration in range(2):
        one.step(random_batch(iteration), 0.0, noise())
    image = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(one.inference_model().eval()(image), one.teacher.eval()(image))


# ---------------------------------------------------------------------- uncertainty_mean_teacher


class FixedTeacher(nn.Module):
    """Answers with given logits, whatever it sees, and remembers what it was shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(tensor(logits))
        self.shown = []

    def forward(self, image):
        self.shown.append(image.detach().clone())
        return self.logits


def with_entropy(share, classes):
    """Probabilities (C,) whose entropy is this share of ln C."""

    def excess(largest):
        p = np.array([largest, *[(1 - largest) / (classes - 1)] * (classes - 1)])
        return -(p * np.log(p)).sum() / math.log(classes) - share

    largest = optimize.brentq(excess, 1 / classes + 1e-9, 1 - 1e-9, xtol=1e-14)
    return np.array([largest, *[(1 - largest) / (classes - 1)] * (classes - 1)])


@pytest.mark.parametrize("progress", PROGRESS)
def test_uncertainty_by_hand(progress):
    """Entropy of the mean of T = 8 passes against (0.75 + 0.25 exp(-5 (1 - t)²)) ln C; the target is a ninth pass."""
    case = ByHand(classes=3, pseudo=2)
    sharpness = np.linspace(0, 6, 16).reshape(2, 1, *TINY)  # from unsure to sure
    said = normal(1, 2, 3, *TINY) * sharpness + 0.4 * normal(9, 2, 3, *TINY, seed=1)
    one = learner("uncertainty_mean_teacher")
    one.teacher = FixedTeacher(said.reshape(18, 3, *TINY))

    views = softmax(said.reshape(18, 3, *TINY)).reshape(9, 2, 3, *TINY)
    mean = views[1:].mean(0)
    entropy = -(mean * np.log(mean)).sum(1)
    sure = entropy < (0.75 + 0.25 * math.exp(-5 * (1 - progress) ** 2)) * math.log(3)
    squared = ((softmax(case.pseudo["logits"]) - views[0]) ** 2 * sure[:, None]).sum()
    value = float(case.terms(one, progress)["consistency"].value.detach())
    assert value == pytest.approx(squared / (3 * sure.sum()), rel=1e-5), f"{sure.sum()} of 16 voxels are sure"


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize(
    ("progress", "share", "counts"),
    [
        (0, 0.74, True),
        (0, 0.76, False),
        (0.5, 0.81, True),
        (0.5, 0.83, False),
        (0.95, 0.99, True),
        (0.95, 0.999, False),
    ],
)
def test_threshold_of_the_entropy(classes, progress, share, counts):
    """Student and teacher differ in one voxel only, whose entropy is a known share of ln C."""
    case = ByHand(classes, pseudo=1)
    said = np.zeros((1, classes, *TINY))
    said[:, 0] = 9  # sure
    with torch.no_grad():
        case.leaves["pseudo"].copy_(tensor(said))
    said[0, :, 0, 0, 0] = np.log(with_entropy(share, classes))
    one = learner("uncertainty_mean_teacher", classes)
    one.teacher = FixedTeacher(np.repeat(said, 9, axis=0))
    found = float(case.terms(one, progress)["consistency"].value.detach())
    assert (found > 1e-4) == counts, f"entropy {share} · ln {classes} at progress {progress}: term {found:.6f}"


def test_teacher_that_is_sure_of_another_class_in_every_pass_is_unsure():
    """The entropy is that of the mean, not the mean of the entropies."""
    case = ByHand(classes=3, pseudo=1)
    views = np.zeros((7, 3, *TINY))
    for view in range(7):
        views[view, view % 3] = 20
    one = learner("uncertainty_mean_teacher", uncertainty_passes=6)
    one.teacher = FixedTeacher(views)
    assert float(case.terms(one)["consistency"].value.detach()) == 0, "expected no sure voxel, so no term"


def test_the_pass_for_the_target_says_nothing_of_uncertainty():
    """Two passes for classes 1 and 2: entropy ln 2, sure enough; with the target's class 0 it would be ln 3."""
    case = ByHand(classes=3, pseudo=1)
    views = np.zeros((3, 3, *TINY))
    for view in range(3):
        views[view, view] = 20
    one = learner("uncertainty_mean_teacher", uncertainty_passes=2)
    one.teacher = FixedTeacher(views)
    expected = ((softmax(case.pseudo["logits"]) - softmax(views[:1])) ** 2).mean()
    assert float(case.terms(one)["consistency"].value.detach()) == pytest.approx(expected, rel=1e-5)


def test_gradient_where_no_voxel_is_sure_is_zero():
    case = ByHand(pseudo=1)
    one = learner("uncertainty_mean_teacher")
    one.teacher = FixedTeacher(np.zeros((9, 3, *TINY)))
    gradient = case.gradients(case.terms(one)["consistency"].value)["pseudo"]
    assert torch.equal(gradient, torch.zeros_like(gradient)), "all voxels unsure: expected zeros, no NaN"


def shown_to_the_teacher(**changes):
    """The image and what the teacher is shown of it."""
    one, batch = learner("uncertainty_mean_teacher", **changes), random_batch(0)
    passes = one.config.uncertainty_passes
    one.teacher = FixedTeacher(np.zeros((passes + 1, 3, 8, 8, 8)))
    one.terms(batch, one.outputs(batch), 0.5, one.generators(batch, noise()))
    return batch.pseudo.image, one.teacher.shown


@pytest.mark.parametrize("passes", [2, 8])
def test_teacher_sees_all_views_in_one_call(passes):
    shown = [len(one) for one in shown_to_the_teacher(uncertainty_passes=passes)[1]]
    assert shown == [passes + 1], f"expected T passes and one for the target in one call, got calls of {shown} views"


def test_every_view_has_its_own_noise():
    views = shown_to_the_teacher()[1][0]
    same = [(i, j) for i in range(9) for j in range(i) if torch.equal(views[i], views[j])]
    assert not same, f"views {same} are the same"


def test_noise_of_the_views_is_clamped():
    image, shown = shown_to_the_teacher()
    assert float((shown[0] - image).abs().max()) == pytest.approx(0.2, abs=1e-5), "0.1 · N(0, 1) clamped to ±0.2"


def test_dropout_of_the_uncertain_teacher_is_on():
    assert learner("uncertainty_mean_teacher").teacher.training, "passes without dropout say nothing of uncertainty"


def test_uncertainty_gives_the_labelled_patch_no_gradient():
    case = ByHand()
    one = learner("uncertainty_mean_teacher")
    one.teacher = FixedTeacher(6 * normal(18, 3, *TINY))
    gradients = case.gradients(case.terms(one)["consistency"].value)
    assert (bool(gradients["labelled"].any()), bool(gradients["pseudo"].any())) == (False, True)


# ---------------------------------------------------------------------- adversarial


def learned_from(one, case):
    """The losses of one step of the discriminator."""
    return one.after_step(case.batch, case.outputs, one.generators(case.batch, noise()))


class FixedDiscriminator(nn.Module):
    """Logits that are a known function of what it sees; it learns an offset."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        self.shown = []

    @property
    def module(self):
        """As Fabric gives the network that it wrapped."""
        return self

    def forward(self, probabilities, image):
        self.shown.append((probabilities.detach().clone(), image.clone()))
        return torch.stack([probabilities[:, 1].mean((1, 2, 3)), image[:, 0].sum((1, 2, 3))], 1) + self.offset


def logits_of(kind):
    """What FixedDiscriminator says, by hand."""
    said = softmax(kind["logits"])[:, 1].mean((1, 2, 3))
    return np.stack([said, kind["image"][:, 0].sum((1, 2, 3))], 1) + np.array([0.3, -0.2])


def adversarial():
    one = learner("adversarial")
    one.discriminator = FixedDiscriminator()
    one.discriminator_optimizer = torch.optim.Adam(one.discriminator.parameters(), lr=1e-4)
    return one


def test_deception_by_hand():
    """Cross-entropy of the discriminator on predictions of unlabelled patches, target "labelled" (1)."""
    case = ByHand()
    expected = -np.log(softmax(logits_of(case.pseudo))[:, 1]).mean()
    assert float(case.terms(adversarial())["consistency"].value.detach()) == pytest.approx(expected, rel=1e-6)


def test_only_unlabelled_predictions_are_to_deceive():
    case = ByHand()
    gradients = case.gradients(case.terms(adversarial())["consistency"].value)
    assert (bool(gradients["labelled"].any()), bool(gradients["pseudo"].any())) == (False, True)


def test_discriminator_sees_probabilities():
    case, one = ByHand(), adversarial()
    case.terms(one)
    assert np.allclose(one.discriminator.shown[0][0].numpy(), softmax(case.pseudo["logits"])), "expected the softmax"


def test_discriminator_learns_by_hand():
    """Cross-entropy over all patches: labelled ones are 1, unlabelled ones 0."""
    case = ByHand()
    right = [*softmax(logits_of(case.labelled))[:, 1], *softmax(logits_of(case.pseudo))[:, 0]]
    found = learned_from(adversarial(), case)["discriminator"]
    assert found == pytest.approx(-np.log(right).mean(), rel=1e-6)


def test_step_of_the_discriminator_gives_the_student_no_gradient():
    case = ByHand()
    learned_from(adversarial(), case)
    assert all(leaf.grad is None for leaf in case.leaves.values()), "the discriminator's step reached the student"


def test_step_of_the_student_leaves_the_discriminator():
    one = learner("adversarial")
    one.after_step = lambda *_: {}
    before = flat(one.discriminator)
    one.step(random_batch(0), 0.9, noise())
    assert torch.equal(flat(one.discriminator), before), "only the discriminator's own step may change it"


def test_step_of_the_student_gives_the_discriminator_no_gradient():
    one = learner("adversarial")
    one.after_step = lambda *_: {}
    one.step(random_batch(0), 0.9, noise())
    assert all(p.grad is None for p in one.discriminator.parameters()), "the student's loss reached the discriminator"


def test_discriminator_learns_to_tell_a_fixed_batch():
    one, batch = learner("adversarial"), random_batch(0)
    outputs = Outputs(6 * batch.labelled.target, 0.1 * batch.pseudo.target)  # sure of labelled, unsure of others

    def loss():
        one.discriminator.eval()
        with torch.no_grad():
            first = one.discriminator(F.softmax(outputs.labelled, 1), batch.labelled.image)
            second = one.discriminator(F.softmax(outputs.pseudo, 1), batch.pseudo.image)
        return -(F.log_softmax(first, 1)[0, 1] + F.log_softmax(second, 1)[0, 0]) / 2

    before = float(loss())
    for _ in range(18):
        one.after_step(batch, outputs, one.generators(batch, noise()))
    assert float(loss()) < 0.9 * before, f"18 steps brought the loss from {before:.3f} to {float(loss()):.3f}"


def test_discriminator_learns_by_adam():
    one = learner("adversarial").discriminator_optimizer
    group = one.param_groups[0]
    assert (group["lr"], group["betas"]) == (1e-4, (0.9, 0.99)), "Adam, lr 1e-4, betas 0.9 / 0.99"


def test_discriminator_by_hand():
    """Two stems added, 64-128-256-512 channels, 4³ kernels by strides of 2, leaky ReLU 0.2, mean, two outputs."""
    torch.manual_seed(0)
    network = Discriminator(3).double().eval()
    said, image = torch.softmax(tensor(normal(2, 3, 16, 16, 32)), 1), tensor(normal(2, 1, 16, 16, 32))
    weights = [p.detach() for p in network.parameters()]
    shapes = [tuple(w.shape) for w in weights[::2]]
    assert shapes == [(64, 3, 4, 4, 4), (64, 1, 4, 4, 4), *((2 * c, c, 4, 4, 4) for c in (64, 128, 256)), (2, 512)]

    def convolved(x, position):
        return F.conv3d(x, weights[2 * position], weights[2 * position + 1], stride=2, padding=1)

    x = convolved(said, 0) + convolved(image, 1)
    x = torch.where(x > 0, x, 0.2 * x)
    for position in (2, 3, 4):
        x = convolved(x, position)
        x = torch.where(x > 0, x, 0.2 * x)
    expected = x.flatten(2).mean(2) @ weights[-2].T + weights[-1]
    assert torch.allclose(network(said, image), expected, rtol=1e-10, atol=1e-12)


def test_discriminator_drops_half_of_its_channels():
    rates = {m.p for m in Discriminator(2).modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
    assert rates == {0.5}, f"dropout 0.5 as published; found {rates}"


def test_discriminator_learns_with_dropout():
    one, batch = learner("adversarial"), random_batch(0)
    outputs = Outputs(batch.labelled.target, batch.pseudo.target)
    one.terms(batch, outputs, 0.5, one.generators(batch, noise()))
    one.after_step(batch, outputs, one.generators(batch, noise()))
    assert one.discriminator.training, "after it judged it was left without dropout"


def test_discriminator_judges_the_student_without_dropout():
    one, batch = learner("adversarial"), random_batch(0)
    outputs = Outputs(batch.labelled.target, batch.pseudo.target)
    values = [
        float(one.terms(batch, outputs, 0.5, one.generators(batch, noise()))["consistency"].value) for _ in range(2)
    ]
    assert values[0] == values[1], "the same predictions were judged differently: dropout is on"


@pytest.mark.parametrize("shape", [(8, 8, 8), (1, 8, 24), (16, 9, 40)])
def test_small_patches_are_judged_in_the_middle_of_zeros(shape):
    network = Discriminator(2).eval()
    said, image = torch.rand(1, 2, *shape), torch.randn(1, 1, *shape)
    room = [(max(0, 16 - n) // 2, max(0, 16 - n) - max(0, 16 - n) // 2) for n in shape]
    padded = (torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *room])) for x in (said, image))
    with torch.no_grad():
        assert torch.allclose(network(said, image), network(*padded), atol=1e-6), f"patch of {shape}"


def test_a_state_that_is_taken_over_keeps_the_settings_of_this_training():
    """Its moments are the earlier training's; how they are used is not."""
    one, other = learner("mean_teacher", weight_decay=1e-4), learner("mean_teacher", weight_decay=0.05)
    one.step(random_batch(0), 0.5, noise())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    (group,) = other.optimizer.param_groups
    assert group["weight_decay"] == 0.05 and other.optimizer.state, "the moments were to be taken over, too"


def restored_adversarial():
    """A learner that made two steps, and another that got its state."""
    one, other = learner("adversarial"), learner("adversarial")
    for iteration in range(2):
        one.step(random_batch(iteration), 0.5, noise())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    return one, other


def test_state_holds_the_discriminator():
    one, other = restored_adversarial()
    assert torch.equal(flat(one.discriminator), flat(other.discriminator))


def test_state_holds_the_memory_of_the_discriminators_adam():
    one, other = restored_adversarial()
    for each in (one, other):
        torch.manual_seed(3)
        each.step(random_batch(2), 0.5, noise())
    assert torch.equal(flat(one.discriminator), flat(other.discriminator)), "the next step went another way"


# ---------------------------------------------------------------------- dual_task


@pytest.mark.parametrize(("distance", "inside"), [(0, 0.5), (1e-3, 1.5), (-1e-3, -1.5), (1, 1500), (-0.01, -15)])
def test_mask_of_a_distance(distance, inside):
    """sigmoid(-1500 d): the boundary is ½, the inside 1."""
    expected = 0.5 if distance == 0 else 1 / (1 + math.exp(min(inside, 700)))
    assert float(as_mask(torch.tensor(distance, dtype=torch.float64))) == pytest.approx(expected, rel=1e-9, abs=1e-290)


def test_dice_of_the_distance_masks_by_hand():
    """Dice of sigmoid(-1500 d_c) with the label over c = 1..C-1, on the labelled patch."""
    case = ByHand()
    masks = sigmoid(-1500 * case.labelled["distance"])[:, 1:]
    expected = dice(masks, case.labelled["target"][:, 1:], case.labelled["weight"])
    assert float(case.terms(learner("dual_task"))["distance_mask"].value.detach()) == pytest.approx(expected, rel=1e-10)


def test_error_of_the_distances_by_hand():
    """Weighted mean of (d_c - true d_c)² over voxels and c = 1..C-1, on the labelled patch."""
    case = ByHand()
    kind = case.labelled
    squared = (kind["distance"][:, 1:] - kind["true"]) ** 2
    expected = (squared * kind["weight"]).sum() / (2 * kind["weight"].sum())
    assert float(case.terms(learner("dual_task"))["distance"].value.detach()) == pytest.approx(expected, rel=1e-10)


def test_agreement_of_the_tasks_by_hand():
    """Mean of (sigmoid(-1500 d_c) - p_c)² over the whole batch and c = 1..C-1."""
    case = ByHand()
    squared = [
        (sigmoid(-1500 * kind["distance"]) - softmax(kind["logits"]))[:, 1:] ** 2
        for kind in (case.labelled, case.pseudo)
    ]
    expected = np.concatenate(squared).mean()
    assert float(case.terms(learner("dual_task"))["consistency"].value.detach()) == pytest.approx(expected, rel=1e-10)


def total_of_dual_task(case):
    return sum(term.factor * term.value for term in case.terms(learner("dual_task")).values())


def test_background_distance_is_not_used():
    case = ByHand()
    gradients = case.gradients(total_of_dual_task(case))
    reached = [n for n in ("labelled_distance", "pseudo_distance") if bool(gradients[n][:, 0].any())]
    assert not reached, f"channel 0 of {reached} got a gradient"


@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.parametrize("where", ["labelled_distance", "pseudo_distance"])
def test_every_class_learns_its_own_distance(where, value):
    case = ByHand()
    assert bool(case.gradients(total_of_dual_task(case))[where][:, value].any()), f"class {value} got no gradient"


@pytest.mark.parametrize("output", ["labelled", "pseudo", "labelled_distance", "pseudo_distance"])
def test_agreement_moves_both_tasks_on_all_patches(output):
    case = ByHand()
    gradients = case.gradients(case.terms(learner("dual_task"))["consistency"].value)
    assert bool(gradients[output].any()), f"the consistency term gives {output} no gradient"


def case_without_class_one():
    case = ByHand()
    case.batch.labelled.distance[:, 0] = float("nan")
    return case


def test_a_class_without_distances_gives_no_term():
    case = case_without_class_one()
    kind = case.labelled
    squared = (kind["distance"][:, 2:] - kind["true"][:, 1:]) ** 2
    expected = (squared * kind["weight"]).sum() / kind["weight"].sum()
    assert float(case.terms(learner("dual_task"))["distance"].value.detach()) == pytest.approx(expected, rel=1e-10)


def test_a_class_without_distances_gets_no_gradient_from_them():
    case = case_without_class_one()
    gradient = case.gradients(case.terms(learner("dual_task"))["distance"].value)["labelled_distance"]
    assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1])), "expected zeros, no NaN"


def test_no_class_with_distances_gives_zero():
    distance = torch.zeros(1, 2, *TINY, requires_grad=True)
    loss = distance_loss(distance, torch.full((1, 2, *TINY), float("nan")), torch.ones(1, 1, *TINY))
    assert float(loss.detach()) == 0, f"no class is there: expected 0, got {float(loss.detach())}"


def test_distances_of_unknown_voxels_do_not_count():
    weight = torch.ones(1, 1, *TINY)
    weight[..., 0] = 0
    true = torch.rand(1, 2, *TINY)
    other = torch.where(weight > 0, true, -true)
    losses = [distance_loss(torch.zeros(1, 2, *TINY), one, weight) for one in (true, other)]
    assert torch.equal(*losses), "a voxel of weight 0 changed the loss"


def test_dual_task_learns_with_a_class_that_the_template_lacks():
    one, batch = learner("dual_task"), measured_batch(0)
    batch.labelled.distance[:, 1] = float("nan")
    one.step(batch, 0.5, noise())
    assert bool(flat(one.student).isfinite().all()), "an absent class made weights that are no numbers"


def test_dual_task_predicts_with_logits():
    one, image = learner("dual_task"), torch.randn(1, 1, 8, 8, 8)
    one.teacher.eval()
    with torch.no_grad():
        assert torch.equal(one.inference_model()(image), one.teacher(image)[1])


# ---------------------------------------------------------------------- true distances


def ball(shape, centre, radius_mm, spacing=(1.0, 1.0, 1.0)):
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return (((index - centre) * spacing) ** 2).sum(-1) <= radius_mm**2


def cube(shape=(7, 7, 7), low=2, high=5):
    label = np.zeros(shape, np.uint8)
    label[low:high, low:high, low:high] = 1
    return label


def by_search(mask, spacing):
    """The signed distance in float64, every voxel against every other one."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in mask.shape), indexing="ij"), -1) * np.array(spacing)

    def distance(to):
        apart = voxels.reshape(-1, 1, 3) - voxels[to].reshape(1, -1, 3)
        return np.sqrt((apart**2).sum(-1)).min(1).reshape(mask.shape)

    outside, within = distance(mask), distance(~mask)
    signed = outside / outside.max() - within / within.max()
    around = np.pad(mask, 1, constant_values=True)  # the volume's edge is no boundary
    neighbours = [np.roll(around, step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (-1, 1)]
    signed[mask & ~np.all(neighbours, axis=0)] = 0
    return signed


@pytest.mark.parametrize(
    ("voxel", "expected"),
    [
        ((0, 0, 0), 1.0),  # the farthest: √12 from the cube
        ((0, 3, 3), 2 / math.sqrt(12)),
        ((1, 3, 3), 1 / math.sqrt(12)),
        ((2, 3, 3), 0.0),  # a face voxel lies on the inner boundary
        ((3, 3, 3), -1.0),  # the deepest
    ],
)
def test_distances_of_a_cube(voxel, expected):
    found = signed_distances(cube(), 2, (1.0, 1.0, 1.0))[0][voxel]
    assert float(found) == pytest.approx(expected, abs=1e-3), f"voxel {voxel} (z, y, x)"


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 1.0, 0.5), (0.3, 2.0, 1.0)])
def test_distances_are_measured_in_mm(spacing):
    mask = ball((7, 9, 10), (3, 4, 5), 2.1, (1.0, 1.0, 1.0))
    apart = np.abs(signed_distances(mask.astype(int), 2, spacing)[0] - by_search(mask, spacing)).max()
    assert apart < 1e-3, f"spacing {spacing} (z, y, x) mm: {apart} from a search over all voxels"


def test_every_class_has_its_own_distances():
    label = np.zeros((8, 9, 10), int)
    label[1:4, 2:6, 1:5] = 1
    label[4:7, 2:7, 5:9] = 2
    found = signed_distances(label, 3, (2.0, 1.0, 1.0))
    apart = max(np.abs(found[v - 1] - by_search(label == v, (2.0, 1.0, 1.0))).max() for v in (1, 2))
    assert apart < 1e-3


def test_a_class_at_the_edge_of_the_scan_goes_on_there():
    """The deepest voxels lie on the scan's first slice: it is no boundary."""
    label = np.zeros((6, 5, 5), int)
    label[:3] = 1
    found = signed_distances(label, 2, (1.0, 1.0, 1.0))[0]
    assert found[:, 2, 2] == pytest.approx([-1, -2 / 3, 0, 1 / 3, 2 / 3, 1], abs=1e-3)


def test_a_single_voxel_is_all_boundary():
    label = np.zeros((5, 5, 5), int)
    label[2, 2, 2] = 1
    assert float(signed_distances(label, 2, (1.0, 1.0, 1.0))[0, 2, 2, 2]) == 0


@pytest.mark.parametrize("absent", [1, 2, 3])
def test_an_absent_class_has_no_distances(absent):
    label = np.zeros((6, 6, 6), int)
    for value in {1, 2, 3} - {absent}:
        label[2 * value - 2 : 2 * value - 1] = value
    found = [bool(np.isnan(one).any()) for one in signed_distances(label, 4, (1.0, 1.0, 1.0))]
    assert found == [value == absent for value in (1, 2, 3)], f"class {absent} is absent; NaN in {found}"


def test_a_class_that_fills_the_scan_has_no_distances():
    """It has no boundary, so there is nothing to measure to."""
    assert np.isnan(signed_distances(np.ones((4, 5, 6), int), 2, (1.0, 1.0, 1.0))).all()


def random_blobs():
    return (ndimage.gaussian_filter(normal(12, 13, 14), 2) > 0).astype(int)


def test_distances_reach_from_minus_one_to_one():
    found = signed_distances(random_blobs(), 2, (1.5, 1.0, 1.0))
    assert (float(found.min()), float(found.max())) == (-1.0, 1.0)


def test_distances_are_positive_outside_and_nowhere_else():
    label = random_blobs()
    assert np.array_equal(signed_distances(label, 2, (1.5, 1.0, 1.0))[0] > 0, label == 0)


def test_distances_are_negative_inside_but_for_the_boundary():
    label = random_blobs()
    deep = ndimage.binary_erosion(label, border_value=1)
    assert np.array_equal(signed_distances(label, 2, (1.5, 1.0, 1.0))[0] < 0, deep)


class TwoCases:
    """Two labelled cases in a cohort, and how often distances are computed."""

    def __init__(self, folder, monkeypatch):
        self.count = 0
        computed = ndimage.distance_transform_edt

        def counted(*arguments, **named):
            self.count += 1
            return computed(*arguments, **named)

        monkeypatch.setattr(ndimage, "distance_transform_edt", counted)
        self.folder = folder

    def training_cases(self, with_distances=True):
        geometry = Geometry(
            (12, 12, 12), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
        )
        image = Volume(normal(12, 12, 12).astype(np.float32), geometry)
        labelled = [LabelledCase(name, image, Volume(cube((12, 12, 12), 3, 8), geometry)) for name in ("one", "two")]
        cohort = Cohort([], labelled, tiny_plan(2, spacing=(2.0, 1.0, 1.0)), Store(self.folder))
        return cohort.labelled_cases(0, with_distances)


def test_distances_are_computed_once_per_case(tmp_path, monkeypatch):
    cases = TwoCases(tmp_path, monkeypatch)
    cases.training_cases()
    first = cases.count
    cases.training_cases()
    assert (first > 0, cases.count - first) == (True, 0), "a second round must find the distances on disk"


def test_distances_are_computed_only_for_those_who_need_them(tmp_path, monkeypatch):
    cases = TwoCases(tmp_path, monkeypatch)
    found = cases.training_cases(with_distances=False)
    assert (cases.count, [one.distances for one in found]) == (0, [None, None])


def test_training_cases_have_the_distances_of_their_label(tmp_path, monkeypatch):
    one = TwoCases(tmp_path, monkeypatch).training_cases()[0]
    apart = np.abs(one.distances[0] - by_search(np.asarray(one.target) == 1, (2.0, 1.0, 1.0))).max()
    assert apart < 1e-3, f"{apart} away from the label's distances at the plan's spacing"


# ---------------------------------------------------------------------- distances of patches


def case_with_organs(side=40):
    """A scan whose voxels are numbered, with two balls."""
    label = np.zeros((side, side, side), np.uint8)
    label[ball(label.shape, (15, 17, 19), 9)] = 1
    label[ball(label.shape, (30, 28, 30), 6)] = 2
    image = np.arange(label.size, dtype=np.float32).reshape(label.shape)
    distances = signed_distances(label, 3, (1.0, 1.0, 1.0))
    return TrainingCase(image, label, np.ones(label.shape, np.float32), {}, distances=distances)


@pytest.mark.parametrize("seed", range(3))
def test_distances_of_a_patch_are_a_crop(seed):
    case, shape = case_with_organs(), (12, 10, 8)
    patch = draw_patch(case, shape, (1.0, 1.0, 1.0), 3, UNCHANGED, np.random.default_rng(seed), None)
    start = np.unravel_index(round(float(patch.image[0, 0, 0, 0, 0])), case.image.shape)
    box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
    apart = np.abs(patch.distance[0].numpy() - case.distances[:, *box].astype(np.float32)).max()
    assert apart < 1e-4, f"patch at {start}: {apart} away from the map's crop"


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("value", [1, 2])
def test_distances_of_an_augmented_patch_agree_with_its_label(value, mirror):
    settings = AugmentationConfig(rotation_degrees=30, scale=0.2, elastic_mm=3, mirror=mirror, quarter_turns=mirror)
    case, agree = case_with_organs(), []
    for seed in range(4):
        patch = draw_patch(case, (32, 32, 32), (1.0, 1.0, 1.0), 3, settings, np.random.default_rng(seed), None)
        agree.append(float(((patch.distance[0, value - 1] <= 0) == (patch.target[0, value] > 0)).float().mean()))
    assert min(agree) > 0.95, f"class {value}: sign and label agree in {np.round(agree, 3)} of the voxels"


def test_absent_class_of_a_case_is_absent_in_its_patches():
    case = case_with_organs()
    case.distances[1] = np.nan
    settings = AugmentationConfig()
    patch = draw_patch(case, (16, 16, 16), (1.0, 1.0, 1.0), 3, settings, np.random.default_rng(0), None)
    found = (
        [bool(one.isnan().all()) for one in patch.distance[0]],
        [bool(one.isnan().any()) for one in patch.distance[0]],
    )
    assert found == ([False, True], [False, True]), "NaN throughout the absent class and nowhere else"


def test_patches_without_distances_have_none():
    case = TrainingCase(*(np.zeros((8, 8, 8), np.float32),) * 3, {})
    patch = draw_patch(case, (8, 8, 8), (1.0, 1.0, 1.0), 2, UNCHANGED, np.random.default_rng(0), None)
    assert collate([patch, patch]).distance is None


def test_distances_are_collated():
    case = case_with_organs()
    patches = [
        draw_patch(case, (8, 8, 8), (1.0, 1.0, 1.0), 3, UNCHANGED, np.random.default_rng(seed), None) for seed in (0, 1)
    ]
    assert torch.equal(collate(patches).distance, torch.cat([one.distance for one in patches]))


# ---------------------------------------------------------------------- networks with a distance map

PATCH = (16, 16, 32)


class Known(nn.Module):
    """A network that answers with given channels."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, image):
        return self.channels


def test_first_half_of_the_channels_are_distances():
    channels = torch.randn(2, 6, 2, 2, 2)
    assert torch.equal(TwoHeads(Known(channels))(None)[0], torch.tanh(channels[:, :3]))


def test_second_half_of_the_channels_are_logits():
    channels = torch.randn(2, 6, 2, 2, 2)
    assert torch.equal(TwoHeads(Known(channels))(None)[1], channels[:, 3:])


def test_logits_only():
    pair = torch.randn(1, 3, 2, 2, 2), torch.randn(1, 3, 2, 2, 2)
    assert torch.equal(LogitsOnly(Known(pair))(None), pair[1])


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_specialist_with_distances_gives_two_maps(name):
    with torch.no_grad():
        found = make_specialist(name, tiny_plan(5, PATCH), with_distance=True)(torch.randn(2, 1, *PATCH))
    assert [tuple(one.shape) for one in found] == [(2, 5, *PATCH)] * 2, "expected distances and logits, (B, C, z, y, x)"


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_distances_of_a_specialist_lie_between_minus_one_and_one(name):
    with torch.no_grad():
        distances, _ = make_specialist(name, tiny_plan(3, PATCH), with_distance=True)(30 * torch.randn(1, 1, *PATCH))
    assert float(distances.abs().max()) <= 1


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_specialist_without_distances_gives_logits(name):
    with torch.no_grad():
        found = make_specialist(name, tiny_plan(5, PATCH))(torch.randn(1, 1, *PATCH))
    assert tuple(found.shape) == (1, 5, *PATCH)


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
@pytest.mark.parametrize("head", [0, 1], ids=["distances", "logits"])
def test_both_heads_reach_the_network(name, head):
    network = make_specialist(name, tiny_plan(3, PATCH), with_distance=True)
    network(torch.randn(1, 1, *PATCH))[head].square().mean().backward()
    first = next(p for p in network.parameters() if p.ndim == 5)
    assert bool(first.grad.any()), f"{name}: the head gives the first convolution no gradient"


def test_unet_3d_with_distances_has_the_published_names():
    names = [
        set(make_specialist(name, tiny_plan(3, PATCH), with_distance=True).state_dict())
        for name in ("unet_3d", "unet_3d_sdf")
    ]
    assert names[0] == names[1], f"published weights would not load: {names[0] ^ names[1]}"
