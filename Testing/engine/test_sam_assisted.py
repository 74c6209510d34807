"""SemiSAM and SemiSAM+: prompts come from the student's prediction alone, and answers of frozen models teach it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, pseudo_generators, random_batch, tiny_config, tiny_plan
from lightning_fabric import Fabric
from torch import nn

from SemiSAMO1Lib.engine import rounds
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.config import AssistanceConfig
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.generalists import registry
from SemiSAMO1Lib.engine.generalists.base import Promptable
from SemiSAMO1Lib.engine.learners import Batch, learner_named
from SemiSAMO1Lib.engine.learners.sam_assisted import (
    binary_entropy,
    confident_difference,
    confident_places,
    questions_of,
)
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.phantoms import PhantomSettings, make_phantom
from SemiSAMO1Lib.volume import Volume

ASSISTED = ["semisam", "semisam_plus", "semisam_uncertainty"]
RANDOM = {"checkpoint": "random", "architecture": "small"}
PROGRESS = [0.0, 0.2, 0.5, 0.9]
CPU = torch.device("cpu")


class Fake(nn.Module):
    """A promptable generalist that answers by a rule, and remembers what it was asked.

    It has a parameter and takes no care of gradients.
    """

    def __init__(self, answer):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.answer = answer
        self.asked = []

    def segment(self, image, questions):
        self.asked.append((image.clone(), list(questions)))
        answers = [self.answer(image, question, n) for n, question in enumerate(questions)]
        return torch.cat([answer.expand(image.shape) for answer in answers]) * self.one

    @property
    def questions(self):
        return [question for _, questions in self.asked for question in questions]


def says(*values):
    """The first question is answered with the first value throughout, and so on, over and over."""
    return lambda image, question, number: torch.tensor(values[number % len(values)], dtype=torch.float64)


def echo(image, question, number):
    """The mask prompt itself."""
    return torch.sigmoid(question.mask)


@pytest.fixture
def register(monkeypatch):
    def add(name, answer):
        fake = Fake(answer)
        monkeypatch.setitem(registry.PROMPTABLE, name, lambda settings, device, observer: fake)
        return fake

    return add


@pytest.fixture
def forget():
    """Weights that other tests have loaded are forgotten, and those of this test after it."""
    registry._loaded_once.cache_clear()
    yield
    registry._loaded_once.cache_clear()


def configured(name, generalists=("fake",), random=RANDOM, pseudo_weight=1.0, **assistance):
    settings = {"generalists": generalists, **assistance}
    return tiny_config(learner=name, generalists=random, assistance=settings, pseudo_weight=pseudo_weight)


def learner(name, generalists=("fake",), classes=2, **changes):
    torch.manual_seed(1)
    one = learner_named(name)(tiny_plan(classes), configured(name, generalists, **changes))
    one.setup(Fabric(accelerator="cpu", devices=1, precision="32-true"))
    return one


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def prediction(seen=((1, 2),), classes=3, side=4, seed=0):
    """The student's probabilities (B, C, z, y, x) float64: each patch shows the given classes above ½, and no other."""
    generator = np.random.default_rng(seed)
    foreground = generator.uniform(0.05, 0.9 / (2 * classes), (len(seen), classes - 1, side, side, side))
    for patch, values in enumerate(seen):
        for value in values:  # each in a slab of its own
            foreground[patch, value - 1, value - 1] = generator.uniform(0.55, 0.7, (side, side))
    background = 1 - foreground.sum(1, keepdims=True)
    return torch.tensor(np.concatenate([background, foreground], 1)).requires_grad_()


def asked_of(one, said, seed=0):
    image = torch.zeros(len(said), 1, *said.shape[2:])
    return one.assisted(said, image, pseudo_generators(len(image), seed))


def value_of(one, said):
    return float(asked_of(one, said).detach())


# ---------------------------------------------------------------------- factors


@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize(
    ("name", "phase"),
    [("semisam", lambda t: t), ("semisam_uncertainty", lambda t: t), ("semisam_plus", lambda t: t**2)],
)
def test_factor_of_the_masks(register, name, phase, progress):
    """SemiSAM: 0.1 exp(-5 t); SemiSAM+: 0.1 ramp(t_max - t) = 0.1 exp(-5 t²); t from 0 to 1."""
    register("fake", says(0.5))
    one, batch = learner(name), random_batch(0, classes=2)
    found = one.terms(batch, one.outputs(batch), progress, one.generators(batch, noise()))["assisted"].factor
    assert found == pytest.approx(0.1 * math.exp(-5 * phase(progress)), abs=1e-12), f"t / t_max = {progress}"


@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize(
    ("name", "phase"),
    [("semisam", lambda t: 1 - t), ("semisam_uncertainty", lambda t: 1 - t), ("semisam_plus", lambda t: (1 - t) ** 2)],
)
def test_factor_of_the_consistency(register, name, phase, progress):
    """SemiSAM: 0.1 exp(-5 (1 - t)), SemiSAM; SemiSAM+: the sigmoid ramp, 0.1 exp(-5 (1 - t)²)."""
    register("fake", says(0.5))
    one, batch = learner(name), random_batch(0, classes=2)
    found = one.terms(batch, one.outputs(batch), progress, one.generators(batch, noise()))["consistency"].factor
    assert found == pytest.approx(0.1 * math.exp(-5 * phase(progress)), abs=1e-12), f"t / t_max = {progress}"


@pytest.mark.parametrize("name", ASSISTED)
def test_weight_of_the_masks_is_configured(register, name):
    register("fake", says(0.5))
    one, batch = learner(name, weight=0.7), random_batch(0, classes=2)
    assert one.terms(batch, one.outputs(batch), 0.0, one.generators(batch, noise()))[
        "assisted"
    ].factor == pytest.approx(0.7)


@pytest.mark.parametrize("name", ASSISTED)
def test_total_is_the_sum_of_factors_times_terms(register, name):
    register("fake", says(0.9, 0.4))
    losses = learner(name).step(random_batch(0, classes=2), 0.15, noise())
    power = 2 if name == "semisam_plus" else 1
    falling, rising = math.exp(-5 * 0.15**power), math.exp(-5 * 0.85**power)
    expected = losses["supervised"] + 0.5 * losses["pseudo"]
    expected += 0.1 * rising * losses["consistency"] + 0.1 * falling * losses["assisted"]
    assert losses["total"] == pytest.approx(expected, rel=1e-5), f"{losses}"


@pytest.mark.parametrize(("name", "counts"), [("semisam", True), ("semisam_uncertainty", False)])
def test_consistency_with_a_teacher_that_is_sure_of_nothing(register, name, counts):
    """Only the uncertainty-aware one leaves out what the teacher is unsure of."""

    class Unsure(nn.Module):
        def forward(self, image):
            return torch.zeros(len(image), 2, *image.shape[2:])

    register("fake", says(0.5))
    one, batch = learner(name), random_batch(0, classes=2)
    one.teacher = Unsure()
    found = float(
        one.terms(batch, one.outputs(batch), 0.5, one.generators(batch, noise()))["consistency"].value.detach()
    )
    assert (found > 0) == counts, f"consistency term {found}"


# ---------------------------------------------------------------------- the masks' term by hand


@pytest.mark.parametrize("name", ["semisam", "semisam_uncertainty"])
def test_difference_by_hand(register, name):
    """Mean of (p_c - 0.7)² over voxels, classes that the student sees, and patches."""
    register("fake", says(0.7))
    said = prediction(seen=((1, 2), (2,)))
    p = said.detach().numpy()
    expected = np.mean([((p[patch, value] - 0.7) ** 2).mean() for patch, value in ((0, 1), (0, 2), (1, 2))])
    assert value_of(learner(name, classes=3), said) == pytest.approx(expected, rel=1e-10)


def test_answers_of_two_generalists_are_averaged(register):
    register("fake", says(0.2))
    register("other", says(0.7))
    said = prediction(seen=((1,),))
    expected = ((said.detach().numpy()[0, 1] - 0.45) ** 2).mean()
    found = value_of(learner("semisam", ("fake", "other"), classes=3), said)
    assert found == pytest.approx(expected, rel=1e-10), "expected the difference from the mean of 0.2 and 0.7"


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def test_several_answers_are_averaged_by_hand(register):
    """SemiSAM+: per class Σ (p - m)² e^-U / Σ e^-U + mean U, m the mean of all answers, U its entropy."""
    register("fake", says(0.9, 0.3))
    register("other", says(0.8, 0.8))
    said = prediction(seen=((1, 2),))
    mean = (0.9 + 0.3 + 0.8 + 0.8) / 4
    p = said.detach().numpy()[0]
    expected = np.mean([((p[value] - mean) ** 2).mean() + entropy(mean) for value in (1, 2)])
    assert value_of(learner("semisam_plus", ("fake", "other"), classes=3), said) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("answers", "mean"), [((0.9, 0.9), 0.9), ((0.9, 0.1), 0.5)], ids=["agree", "disagree"])
def test_disagreement_of_two_generalists_is_doubt(register, answers, mean):
    """A voxel on which they disagree has more entropy."""
    for name, answer in zip(("fake", "other"), answers, strict=True):
        register(name, says(answer))
    one, said = learner("semisam_plus", ("fake", "other"), classes=3), prediction(seen=((1,),))
    doubt = one.answers(said, torch.zeros(1, 1, 4, 4, 4), pseudo_generators(1))[0][2]
    assert float(doubt.mean()) == pytest.approx(entropy(mean), rel=1e-10), f"answers {answers}"


def test_a_generalist_that_says_the_same_has_nothing_to_teach(register):
    register("fake", echo)
    assert value_of(learner("semisam", classes=3, prompts="mask"), prediction()) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("name", ["semisam", "semisam_plus"])
def test_a_class_that_the_student_does_not_see_is_not_asked_for(register, name):
    fake = register("fake", says(0.5))
    asked_of(learner(name, classes=3, prompts="mask"), prediction(seen=((2,),)))
    assert len(fake.questions) == 1, f"the student sees one class; {len(fake.questions)} questions were asked"


@pytest.mark.parametrize("name", ASSISTED)
def test_a_student_that_sees_nothing_asks_nothing(register, name):
    fake = register("fake", says(0.5))
    asked_of(learner(name, classes=3), prediction(seen=((),)))
    assert not fake.asked


@pytest.mark.parametrize("name", ASSISTED)
def test_without_prompts_the_term_is_zero(register, name):
    register("fake", says(0.5))
    assert value_of(learner(name, classes=3), prediction(seen=((),))) == 0


@pytest.mark.parametrize("name", ASSISTED)
def test_a_student_that_sees_nothing_learns_from_the_rest(register, name):
    register("fake", says(0.5))
    one = learner(name)
    with torch.no_grad():
        for parameter in one.student.parameters():
            parameter.zero_()  # both classes have probability ½ everywhere
    losses = one.step(random_batch(0, classes=2), 0.5, noise())
    assert losses["assisted"] == 0 and math.isfinite(losses["total"]), f"{losses}"


# ---------------------------------------------------------------------- confidence


def test_confident_difference_by_hand():
    generator = np.random.default_rng(0)
    said, mean, doubt = (generator.uniform(0, 1, (3, 4, 5)) for _ in range(3))
    trust = np.exp(-doubt)
    expected = ((said - mean) ** 2 * trust).sum() / trust.sum() + doubt.mean()
    found = confident_difference(*(torch.tensor(x) for x in (said, mean, doubt)))
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_without_doubt_it_is_the_mean_squared_difference():
    said, mean = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    found = float(confident_difference(said, mean, torch.zeros_like(said)))
    assert found == pytest.approx(float((said - mean).square().mean()), rel=1e-12)


def test_a_voxel_of_huge_doubt_has_next_to_no_weight():
    said = torch.tensor([0.9, 0.4], dtype=torch.float64)
    mean, doubt = torch.tensor([0.0, 0.5], dtype=torch.float64), torch.tensor([40.0, 0.0], dtype=torch.float64)
    found = float(confident_difference(said, mean, doubt)) - 20
    assert found == pytest.approx(0.1**2, rel=1e-6), "only the sure voxel's difference, 0.1, counts"


def test_gradient_of_the_confident_difference():
    """2 (p - m) e^-U / Σ e^-U: the term is not divided by itself."""
    said, mean, doubt = torch.rand(3, 4, 5, dtype=torch.float64)
    leaf = said.clone().requires_grad_()
    confident_difference(leaf, mean, doubt).backward()
    trust = np.exp(-doubt.numpy())
    expected = 2 * (said - mean).numpy() * trust / trust.sum()
    assert np.allclose(leaf.grad.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.5, math.log(2)), (0.25, 0.5623351446188083), (0.75, 0.5623351446188083)]
)
def test_entropy_of_an_answer(p, expected):
    assert float(binary_entropy(torch.tensor(p, dtype=torch.float64))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_entropy_of_a_sure_answer_is_zero(p):
    assert float(binary_entropy(torch.tensor(p))) == pytest.approx(0, abs=1e-4)


# ---------------------------------------------------------------------- where gradients go


@pytest.mark.parametrize("name", ASSISTED)
def test_masks_have_a_gradient_in_the_student(register, name):
    register("fake", says(0.9))
    one, batch = learner(name), random_batch(0, classes=2)
    one.terms(batch, one.outputs(batch), 0.5, one.generators(batch, noise()))["assisted"].value.backward()
    reached = [bool(p.grad is not None and p.grad.any()) for p in one.student.parameters() if p.ndim == 5]
    assert all(reached), f"the masks' term reaches {sum(reached)} of {len(reached)} convolutions"


@pytest.mark.parametrize("name", ASSISTED)
@pytest.mark.parametrize("prompts", ["points", "mask", "both"])
def test_no_gradient_reaches_the_generalist(register, name, prompts):
    """Even one that takes no care of it stays as it is."""
    fake = register("fake", echo if prompts != "points" else says(0.9))
    learner(name, prompts=prompts).step(random_batch(0, classes=2), 0.5, noise())
    assert fake.one.grad is None, "the generalist learned"


@pytest.mark.parametrize("name", ASSISTED)
def test_generalists_are_not_in_the_optimizer(register, name):
    fake = register("fake", says(0.9))
    one = learner(name)
    one.step(random_batch(0, classes=2), 0.5, noise())
    known = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
    assert not {id(p) for p in fake.parameters()} & known


def test_generalists_are_not_in_the_state(register):
    register("fake", says(0.9))
    one = learner("semisam")
    one.step(random_batch(0, classes=2), 0.5, noise())
    kept = set(one.state_dict())
    assert kept == {"student", "teacher", "optimizer", "steps", "shift"}, "100 million frozen weights a round"


def test_gradient_by_hand(register):
    """d/dp mean (p - 0.7)² = 2 (p - 0.7) / n: nothing flows through the prompts."""
    register("fake", says(0.7))
    said = prediction(seen=((1,),))
    asked_of(learner("semisam", classes=3), said).backward()
    expected = 2 * (said.detach()[0, 1] - 0.7) / said[0, 1].numel()
    assert torch.allclose(said.grad[0, 1], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prompts", ["mask", "both"])
def test_no_gradient_through_a_mask_prompt(register, prompts):
    """The generalist echoes the prompt: with a gradient through it, the term would have none."""

    def inverse(image, question, number):
        return 1 - torch.sigmoid(question.mask)

    register("fake", inverse)
    said = prediction(seen=((1,),))
    asked_of(learner("semisam", classes=3, prompts=prompts), said).backward()
    p = said.detach()[0, 1]
    assert torch.allclose(said.grad[0, 1], 2 * (p - (1 - p)) / p.numel(), rtol=1e-8, atol=0)


def test_masks_change_what_the_student_learns(register):
    results = []
    for answer in (0.0, 1.0):
        register("fake", says(answer))
        one = learner("semisam", weight=10)
        torch.manual_seed(5)
        one.step(random_batch(0, classes=2), 0.0, noise())
        results.append(torch.cat([p.detach().flatten() for p in one.student.parameters()]))
    assert not torch.equal(*results), "opposite answers gave the same student"


# ---------------------------------------------------------------------- prompts


def blob(side=20, radius=5.0, centre=(9, 8, 10)):
    """A probability that falls from 0.99 in the middle of a ball to 0.01 outside."""
    index = torch.stack(torch.meshgrid(*(torch.arange(side),) * 3, indexing="ij"), -1).double()
    distance = (index - torch.tensor(centre)).square().sum(-1).sqrt()
    return torch.sigmoid(1.5 * (radius - distance)).clamp(0.01, 0.99)


def asked(probability, seed=0, count=1, **settings):
    return questions_of(probability, AssistanceConfig(**settings), count, noise(seed))


def test_points_inside_lie_in_the_surer_half():
    p = blob()
    inside = asked(p, points=50)[0]
    values = p[tuple(inside.points[inside.inside].T)]
    assert float(values.min()) >= float(np.median(p[p > 0.5])) - 1e-3, f"least probable point inside: {values.min()}"


def test_points_outside_surely_are():
    p = blob()
    question = asked(p, points=50)[0]
    assert float(p[tuple(question.points[~question.inside].T)].max()) < 0.1


def test_points_outside_lie_near():
    """Within the box of the sure voxels grown by a quarter."""
    p = blob()
    question = asked(p, points=50)[0]
    sure = torch.nonzero(p >= p[p > 0.5].median())
    low, high = sure.amin(0), sure.amax(0)
    margin = torch.ceil((high - low + 1) / 4)
    outside = question.points[~question.inside]
    assert bool(((outside >= low - margin) & (outside <= high + margin)).all()), "a point lies far from the structure"


@pytest.mark.parametrize("centre", [(0, 0, 0), (19, 19, 19), (0, 10, 19)])
def test_points_of_a_structure_at_the_edge_lie_on_the_patch(centre):
    points = asked(blob(centre=centre), points=50)[0].points
    assert bool(((points >= 0) & (points < 20)).all())


def test_points_outside_lie_anywhere_when_none_is_near():
    p = torch.full((20, 20, 20), 0.3)
    p[8:12, 8:12, 8:12] = 0.9
    p[0, 0, 0] = 0.05
    question = asked(p)[0]
    assert question.points[~question.inside].unique(dim=0).tolist() == [[0, 0, 0]], "one voxel only is surely outside"


def test_a_structure_that_is_everywhere_has_no_points_outside():
    question = asked(torch.full((4, 4, 4), 0.9), points=3)[0]
    assert question.inside.tolist() == [True] * 3


@pytest.mark.parametrize("points", [1, 5])
def test_as_many_points_inside_as_outside(points):
    assert asked(blob(), points=points)[0].inside.tolist() == [True] * points + [False] * points


def test_one_voxel_above_a_half_is_enough():
    p = torch.full((4, 4, 4), 0.05)
    p[1, 2, 3] = 0.51
    inside = confident_places(p)[0]
    assert inside.tolist() == [[1, 2, 3]], "places are (z, y, x)"


@pytest.mark.parametrize("prompts", ["points", "mask", "both"])
def test_a_half_is_not_enough(prompts):
    assert asked(torch.full((4, 4, 4), 0.5), prompts=prompts) == []


@pytest.mark.parametrize(("prompts", "expected"), [("points", (10, False)), ("mask", (0, True)), ("both", (10, True))])
def test_kinds_of_prompts(prompts, expected):
    question = asked(blob(), prompts=prompts)[0]
    found = len(question.points), question.mask is not None
    assert found == expected, f"{prompts}: expected (points, has a mask) {expected}, got {found}"


def test_a_mask_prompt_is_the_students_logit():
    p = blob()
    mask = asked(p, prompts="mask")[0].mask
    assert torch.allclose(mask[0, 0], torch.log(p / (1 - p)), atol=1e-9)


def test_a_mask_prompt_is_bounded():
    mask = asked(torch.tensor([[[0.0, 1.0]]]), prompts="mask")[0].mask
    assert mask.flatten().tolist() == [-10.0, 10.0]


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_sets_of_points_as_asked_for(count):
    assert len(asked(blob(), count=count)) == count


def test_sets_of_points_differ():
    first, second = asked(blob(), count=2)
    assert not torch.equal(first.points, second.points)


def test_the_same_generator_gives_the_same_points():
    pairs = zip(asked(blob(), seed=3, count=2), asked(blob(), seed=3, count=2), strict=True)
    assert all(torch.equal(a.points, b.points) for a, b in pairs)


def test_points_do_not_depend_on_the_global_state():
    first = asked(blob(), seed=3)[0].points
    torch.rand(7)
    assert torch.equal(first, asked(blob(), seed=3)[0].points)


def test_another_generator_gives_other_points():
    assert not torch.equal(asked(blob(), seed=3)[0].points, asked(blob(), seed=4)[0].points)


def test_every_class_is_asked_for_where_it_is(register):
    fake = register("fake", says(0.5))
    asked_of(learner("semisam", classes=4, points=3), prediction(seen=((1, 3),), classes=4))
    slabs = [set(q.points[q.inside][:, 0].tolist()) for q in fake.questions]
    assert slabs == [{0}, {2}], f"classes 1 and 3 are seen in slices 0 and 2; points inside lie in {slabs}"


@pytest.mark.parametrize(("name", "expected"), [("semisam", 2), ("semisam_uncertainty", 2), ("semisam_plus", 6)])
def test_questions_of_a_patch_with_two_classes(register, name, expected):
    """One a class; SemiSAM+ as many sets of points a class as configured."""
    fake = register("fake", says(0.5))
    asked_of(learner(name, classes=3, answers=3), prediction())
    assert len(fake.questions) == expected


def test_every_generalist_gets_the_same_questions(register):
    fakes = [register(name, says(0.5)) for name in ("fake", "other")]
    asked_of(learner("semisam_plus", ("fake", "other"), classes=3), prediction())
    pairs = zip(*(fake.questions for fake in fakes), strict=True)
    assert all(torch.equal(a.points, b.points) for a, b in pairs)


def test_generalists_see_the_patch_that_is_asked_about(register):
    fake = register("fake", says(0.5))
    image = torch.randn(2, 1, 4, 4, 4)
    learner("semisam", classes=3).assisted(prediction(seen=((1,), (2,))), image, pseudo_generators(len(image)))
    assert torch.equal(torch.cat([seen for seen, _ in fake.asked]), image), "one call per patch, with its own image"


# ---------------------------------------------------------------------- no label of an unlabelled scan


class NoTarget:
    """Patches without labels: asking for them is an error."""

    def __init__(self, image):
        self.image = image

    def __getattr__(self, name):
        raise AssertionError(f"the unlabelled patches were asked for their {name}")


@pytest.mark.parametrize("name", ASSISTED)
def test_the_assisted_term_needs_no_targets(register, name):
    """All it gets is what the student says, the image, and a source of noise."""
    register("fake", says(0.5))
    one, batch = learner(name), random_batch(0, classes=2)
    one.learned = lambda *arguments: {}  # L_sup and L_pseudo, the only readers of labels and pseudo-labels
    blind = Batch(NoTarget(batch.labelled.image), NoTarget(batch.pseudo.image))
    one.terms(blind, one.outputs(batch), 0.5, one.generators(batch, noise()))


@pytest.mark.parametrize("name", ASSISTED)
@pytest.mark.parametrize("prompts", ["points", "both"])
def test_prompts_do_not_depend_on_targets(register, name, prompts):
    found = []
    for turn in (False, True):
        fake = register("fake", says(0.5))
        batch = random_batch(0, classes=2)
        if turn:
            batch.pseudo.target = batch.pseudo.target.flip(1)
            batch.labelled.target = batch.labelled.target.flip(1)
        one = learner(name, prompts=prompts)
        torch.manual_seed(5)  # the same dropout in both
        one.step(batch, 0.5, noise())
        found.append(
            [torch.cat([q.points.flatten(), *([] if q.mask is None else [q.mask.flatten()])]) for q in fake.questions]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "other targets gave other prompts"


@pytest.mark.parametrize("name", ASSISTED)
def test_without_pseudo_labels_the_published_form_learns_from_images_alone(register, name):
    """pseudo_weight 0, as in SemiSAM and SemiSAM+: nothing that is known of the unlabelled patch but its image."""
    results = []
    for turn in (False, True):
        register("fake", says(0.9))
        batch = random_batch(0, classes=2)
        if turn:
            batch.pseudo.target = batch.pseudo.target.flip(1)
        one = learner(name, pseudo_weight=0.0)
        torch.manual_seed(5)
        one.step(batch, 0.5, noise())
        results.append(torch.cat([p.detach().flatten() for p in one.student.parameters()]))
    assert torch.equal(*results), "another target of the unlabelled patch gave another student"


# ---------------------------------------------------------------------- the registry


def test_a_further_generalist_plugs_in(register):
    assert isinstance(register("tiny", says(0.5)), Promptable)


def test_a_further_generalist_is_asked_by_its_name(register):
    fake = register("tiny", says(0.5))
    learner("semisam", ("tiny",)).step(random_batch(0, classes=2), 0.5, noise())
    assert len(fake.asked) == 1


@pytest.mark.parametrize("name", ASSISTED)
def test_unknown_generalist_is_named_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"'segment-everything'.*sam-med3d"):
        learner_named(name).load_or_refuse(configured(name, ("segment-everything",)), CPU, Silent())


@pytest.mark.parametrize("name", ASSISTED)
def test_missing_checkpoint_is_named(tmp_path, name):
    missing = {"checkpoint": str(tmp_path / "absent.pth")}
    with pytest.raises(ValueError, match=r"absent\.pth.*semisamo1 checkpoint fetch"):
        learner_named(name).load_or_refuse(configured(name, ("sam-med3d",), missing), CPU, Silent())


@pytest.mark.parametrize("name", ["mean_teacher", "dual_task", "supervised_only"])
def test_other_learners_need_no_checkpoint(tmp_path, name):
    learner_named(name).load_or_refuse(
        configured(name, ("sam-med3d",), {"checkpoint": str(tmp_path / "absent.pth")}), CPU, Silent()
    )


def test_check_tells_which_weights_are_used():
    observer = Recorder()
    learner_named("semisam").load_or_refuse(configured("semisam", ("sam-med3d",)), CPU, observer)
    assert any("random small" in fields["text"] for kind, fields in observer.events if kind == "note")


@pytest.mark.parametrize("name", ASSISTED)
def test_a_finished_student_predicts_without_the_generalist(tmp_path, name):
    """Another scan is segmented on another computer, where there is no checkpoint."""
    one = learner(name, ("sam-med3d",), random={"checkpoint": str(tmp_path / "absent.pth")})
    with torch.no_grad():
        assert one.inference_model()(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)


def counted_loads(monkeypatch):
    """Every loading of a model's weights."""
    loads, load = [], registry.load_model

    def counted(*arguments):
        loads.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(registry, "load_model", counted)
    return loads


def test_weights_are_loaded_once_for_several_learners(forget, monkeypatch):
    loads = counted_loads(monkeypatch)
    for name in ASSISTED:
        learner(name, ("sam-med3d",)).step(random_batch(0, classes=2), 0.5, noise())
    assert len(loads) == 1, f"three learners loaded the weights {len(loads)} times"


# ---------------------------------------------------------------------- with SAM-Med3D itself, random weights


def encodings(one):
    """What the image encoder of a learner's SAM-Med3D is shown from now on."""
    shown = []
    encoder = one.assistants[0].model.image_encoder
    return shown, encoder.register_forward_pre_hook(lambda module, given: shown.append(given[0]))


@pytest.mark.parametrize("name", ["semisam", "semisam_plus"])
@pytest.mark.parametrize("prompts", ["points", "mask", "both"])
def test_an_image_is_encoded_once(name, prompts):
    """Two patches, two classes each, several sets of points: two encodings."""
    one = learner(name, ("sam-med3d",), classes=3, prompts=prompts, answers=3)
    shown, hook = encodings(one)
    said = prediction(seen=((1, 2), (1, 2))).float()
    one.assisted(said, torch.randn(2, 1, 4, 4, 4), pseudo_generators(2))
    hook.remove()
    assert len(shown) == 2, f"two patches were encoded {len(shown)} times"


def test_a_patch_without_prompts_is_not_encoded():
    one = learner("semisam", ("sam-med3d",), classes=3)
    shown, hook = encodings(one)
    one.assisted(prediction(seen=((), (1,))).float(), torch.randn(2, 1, 4, 4, 4), pseudo_generators(2))
    hook.remove()
    assert len(shown) == 1


@pytest.mark.parametrize("prompts", ["points", "mask", "both"])
def test_answers_of_sam_med3d_lie_between_zero_and_one(prompts):
    one = learner("semisam", ("sam-med3d",), classes=3, prompts=prompts)
    answers = one.answers(prediction().float(), torch.randn(1, 1, 4, 4, 4), pseudo_generators(1))
    assert all(0 <= float(mean.min()) <= float(mean.max()) <= 1 for _, mean, _ in answers)


@pytest.mark.parametrize("name", ASSISTED)
def test_masks_of_sam_med3d_have_a_gradient_in_the_student(name):
    one, batch = learner(name, ("sam-med3d",)), random_batch(0, classes=2)
    one.terms(batch, one.outputs(batch), 0.5, one.generators(batch, noise()))["assisted"].value.backward()
    assert any(bool(p.grad is not None and p.grad.any()) for p in one.student.parameters())


def test_sam_med3d_does_not_learn():
    one = learner("semisam", ("sam-med3d",))
    before = torch.cat([p.flatten() for p in one.assistants[0].model.parameters()]).clone()
    one.step(random_batch(0, classes=2), 0.0, noise())
    assert torch.equal(torch.cat([p.flatten() for p in one.assistants[0].model.parameters()]), before)


def test_sam_med3d_beside_another_generalist(register):
    """One patch, one class, SemiSAM: the answer is the mean of both."""
    register("fake", says(1.0))
    said, image = prediction(seen=((1,),)).float(), torch.randn(1, 1, 4, 4, 4)
    means = [
        learner("semisam", names, classes=3).answers(said, image, pseudo_generators(len(image)))[0][1]
        for names in (("sam-med3d",), ("sam-med3d", "fake"))
    ]
    assert torch.allclose(means[1], ((means[0] + 1) / 2).to(means[1].dtype), atol=1e-6)


# ---------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def phantoms():
    """A template with one structure, and one scan without any label."""
    template, other = (make_phantom(n, 1, PhantomSettings(spacing_mm=(5.0, 5.0, 5.0))) for n in range(2))
    label = Volume((template.label.array == 1).astype(np.uint8), template.label.geometry)
    scan = other.image
    return LabelledCase("template", template.image, label), EngineCase("scan", scan.geometry, lambda: scan)


def run_config(name, generalists=("sam-med3d",), random=RANDOM, **changes):
    config = configured(name, generalists, random)
    registration = config.registration.model_copy(update={"use_affine": False})
    return config.model_copy(update={"iterations": 2, "registration": registration, **changes})


@pytest.fixture(scope="module", params=["semisam", "semisam_plus"])
def finished(request, phantoms, tmp_path_factory):
    """A run of two rounds: results, events, loadings of the weights."""
    template, case = phantoms
    registry._loaded_once.cache_clear()
    observer, store = Recorder(), Store(tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as monkeypatch:
        loads = counted_loads(monkeypatch)
        results = list(rounds.run([case], [template], 2, run_config(request.param, rounds=2), store, observer))
    return results, observer.events, loads


def test_a_run_segments_every_scan_in_every_round(finished):
    assert [(one.round, one.case_id) for one in finished[0]] == [(0, "scan"), (1, "scan"), (2, "scan")]


def test_generalists_teach_in_every_round(finished):
    taught = [fields["losses"]["assisted"] for kind, fields in finished[1] if kind == "losses"]
    assert len(taught) == 2 and all(math.isfinite(one) and one > 0 for one in taught), f"terms of the masks: {taught}"


def test_a_run_loads_the_weights_once(finished):
    assert len(finished[2]) == 1, f"two rounds loaded the weights {len(finished[2])} times"


def test_a_run_tells_its_weights_once(finished):
    told = [fields["text"] for kind, fields in finished[1] if "random small" in fields.get("text", "")]
    assert len(told) == 1, f"{told}"


def test_an_unlabelled_case_has_no_label_to_read(phantoms):
    """What `run` is given of it: its name, its grid, a door to its scan, and whether it may be trained on."""
    names = [field.name for field in dataclasses.fields(phantoms[1])]
    assert names == ["id", "geometry", "load", "trainable"]


@pytest.mark.parametrize("name", ["semisam", "semisam_plus"])
def test_a_further_generalist_is_asked_in_a_run(register, phantoms, tmp_path, name):
    template, case = phantoms
    fake = register("tiny", says(0.9))
    config = run_config(name, ("tiny",), rounds=1)
    list(rounds.run([case], [template], 2, config, Store(tmp_path), Recorder()))
    assert 1 <= len(fake.asked) <= 2 * 2, f"two iterations asked about {len(fake.asked)} patches"


@pytest.mark.parametrize(
    ("generalists", "random", "message"),
    [
        (("nobody",), RANDOM, "'nobody'.*sam-med3d"),
        (("sam-med3d",), {"checkpoint": "/nowhere/absent.pth"}, "absent.pth"),
    ],
    ids=["unknown generalist", "missing checkpoint"],
)
@pytest.mark.parametrize("name", ASSISTED)
def test_a_run_without_its_generalist_is_refused_at_once(
    phantoms, tmp_path, monkeypatch, name, generalists, random, message
):
    template, case = phantoms

    def too_late(*arguments):
        raise AssertionError("the propagation began before the generalist was looked for")

    monkeypatch.setattr(rounds, "propagate", too_late)
    config = run_config(name, generalists, random, rounds=1)
    with pytest.raises(ValueError, match=message):
        list(rounds.run([case], [template], 2, config, Store(tmp_path), Recorder()))
