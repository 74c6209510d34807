"""A network's classes are shifted until it draws as much of each as it learned from."""

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, random_batch, smooth_noise, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.class_volumes import SCANS, measured_shift
from SemiSAMO1Lib.engine.data.patches import TrainingCase
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.learners import averaged, learner_named
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.training import train_round
from SemiSAMO1Lib.engine.volume_shift import FURTHEST, TOLERANCE, volume_shift

SHAPE = (16, 16, 16)


def said_of(target, shift=(0.0, 0.0, 0.0), sure=2.0, seed=0):
    """Logits (3, n) that say the target with noise, each class moved by a number."""
    noise = np.random.default_rng(seed).standard_normal((3, len(target)))
    return sure * np.eye(3)[target].T + noise + np.array(shift)[:, None]


@pytest.fixture(scope="module")
def target():
    return np.random.default_rng(1).choice(3, 20_000, p=[0.9, 0.08, 0.02])


class TestVolumeShift:
    @pytest.mark.parametrize("moved", [(0, 0, 0), (0, 1.5, 1.0), (0, -1.0, 2.0), (1.0, 0, 0)])
    def test_every_class_is_as_large_as_wanted(self, target, moved):
        logits = said_of(target, moved)
        drawn = np.bincount((logits + volume_shift(logits, target)[:, None]).argmax(0), minlength=3)
        assert drawn == pytest.approx(np.bincount(target), rel=TOLERANCE + 0.01)

    def test_what_is_nearly_as_large_is_left(self, target):
        logits = said_of(target, sure=20.0)
        logits[:, np.flatnonzero(target == 1)[:50]] = [[9.0], [0.0], [0.0]]  # 3 % of the class
        assert not volume_shift(logits, target).any()

    def test_what_all_classes_share_changes_nothing(self, target):
        logits = said_of(target)
        common = np.random.default_rng(2).normal(0, 3, len(target))
        assert volume_shift(logits + common, target) == pytest.approx(volume_shift(logits, target), abs=1e-4)

    def test_the_background_is_not_shifted(self, target):
        assert volume_shift(said_of(target, (2.0, 0, 0)), target)[0] == 0

    def test_a_class_that_the_target_lacks_is_not_shifted(self, target):
        without = np.where(target == 2, 0, target)
        assert volume_shift(said_of(without, (0, 0.5, 1.5)), without)[2] == 0

    def test_no_class_is_shifted_beyond_the_limit(self, target):
        shift = volume_shift(said_of(target, (0, 20.0, -20.0)), target)
        assert shift[1:].tolist() == [-FURTHEST, FURTHEST]


class Voiced(torch.nn.Module):
    """Says what stands in the image, a class each unit, and says one class too much."""

    def __init__(self, extra=0.0):
        super().__init__()
        self.extra, self.asked = extra, 0

    def forward(self, image):
        self.asked += 1
        classes = torch.arange(3.0).reshape(1, 3, 1, 1, 1)
        found = -2 * (image - classes).square()
        found[:, 2] += self.extra
        return found


class OneVoice:
    """A learner as far as its network is asked."""

    def __init__(self, network):
        self.network = network

    def inference_model(self):
        return self.network


def training_case(seed, noise=0.4, weight=1.0):
    field = smooth_noise(SHAPE, seed)
    label = (field > np.quantile(field, 0.8)).astype(np.uint8) + (field > np.quantile(field, 0.95))
    image = label + noise * np.random.default_rng(seed).standard_normal(SHAPE)
    return TrainingCase(image.astype(np.float32), label, np.full(SHAPE, weight, np.float32), {})


def shift_of(network, labelled, pseudo, observer=None):
    fabric, plan = make_fabric("cpu", "32-true"), tiny_plan()
    return measured_shift(OneVoice(network), labelled, pseudo, plan, tiny_config(), 1, fabric, observer or Silent())


class TestMeasuredShift:
    def test_a_class_that_is_said_too_much_is_taken_back(self):
        assert shift_of(Voiced(extra=1.5), [training_case(0)], [training_case(1)])[2] < -0.5

    def test_a_network_that_would_agree_less_is_left_alone(self):
        """Where it says the opposite of the label, more of it is worse."""
        wrong = training_case(0)
        wrong = TrainingCase(2 - wrong.image, wrong.target, wrong.weight, {})
        assert not shift_of(Voiced(), [wrong], []).any()

    def test_a_network_that_has_learned_next_to_nothing_is_left_alone(self):
        """A grey image of noise: the label is found by chance alone, also where a shift would find more of it."""
        case = training_case(0)
        noise = np.random.default_rng(5).normal(0.6, 0.5, SHAPE).astype(np.float32)
        assert not shift_of(Voiced(extra=2.5), [TrainingCase(noise, case.target, case.weight, {})], []).any()

    def test_voxels_whose_label_is_unknown_do_not_count(self):
        known, unknown = training_case(0), training_case(1, weight=0.0)
        alone = shift_of(Voiced(extra=1.5), [known], [])
        assert shift_of(Voiced(extra=1.5), [known], [unknown]) == pytest.approx(alone)

    def test_soft_pseudo_labels_count_by_their_likeliest_class(self):
        hard = training_case(0)
        soft = TrainingCase(hard.image, np.moveaxis(np.eye(3)[hard.target], 3, 0) * 0.6 + 0.1, hard.weight, {})
        assert shift_of(Voiced(1.5), [], [soft]) == pytest.approx(shift_of(Voiced(1.5), [], [hard]))

    def test_no_more_scans_are_predicted_than_needed(self):
        few, many = Voiced(), Voiced()
        shift_of(few, [training_case(0)], [])
        shift_of(many, [training_case(0)] * 20, [training_case(1)] * 20)
        assert many.asked == SCANS * few.asked

    def test_a_scan_that_knows_no_background_does_not_count(self):
        """A label was added since: what was not painted there is unknown."""
        whole = training_case(0)
        part = training_case(1)
        part = TrainingCase(part.image, part.target, (part.target > 0).astype(np.float32), {})
        alone = shift_of(Voiced(extra=1.5), [whole], [])
        assert shift_of(Voiced(extra=1.5), [whole, part], []) == pytest.approx(alone)

    def test_without_any_background_nothing_is_shifted(self):
        part = training_case(1)
        part = TrainingCase(part.image, part.target, (part.target > 0).astype(np.float32), {})
        assert not shift_of(Voiced(extra=1.5), [part], []).any()

    def test_too_little_memory_is_said_and_nothing_is_shifted(self):
        class TooLarge(Voiced):
            def forward(self, image):
                raise MemoryError("not today")

        observer = Recorder()
        assert not shift_of(TooLarge(), [training_case(0)], [], observer).any()
        assert [kind for kind, _ in observer.events] == ["warning"]

    def test_a_stop_is_heard(self):
        with pytest.raises(Stopped):
            shift_of(Voiced(), [training_case(0)], [], Stopping())


class Stopping(Silent):
    def should_stop(self):
        return True


@pytest.mark.parametrize("name", ["mean_teacher", "dual_task", "adversarial", "supervised_only"])
class TestLearners:
    @pytest.fixture
    def learner(self, name):
        torch.manual_seed(0)
        made = learner_named(name)(tiny_plan(), tiny_config(learner=name))
        made.setup(make_fabric("cpu", "32-true"))
        return made

    def test_the_shift_is_added_to_the_logits(self, learner):
        image = torch.randn(1, 1, 8, 8, 8)
        before = learner.inference_model().eval()(image)
        learner.shift_logits([0.0, -1.0, 2.0])
        difference = learner.inference_model().eval()(image) - before
        assert torch.allclose(difference, torch.tensor([0.0, -1.0, 2.0]).reshape(1, 3, 1, 1, 1), atol=1e-5)

    def test_it_is_kept_with_the_weights(self, learner, name):
        learner.shift_logits([0.0, -1.0, 2.0])
        other = learner_named(name)(tiny_plan(), tiny_config(learner=name))
        other.setup(make_fabric("cpu", "32-true"))
        other.load_state_dict(learner.state_dict())
        image = torch.randn(1, 1, 8, 8, 8)
        assert torch.equal(other.inference_model().eval()(image), learner.inference_model().eval()(image))

    def test_weights_of_an_older_program_have_none(self, learner):
        state = {key: value for key, value in learner.state_dict().items() if key != "shift"}
        learner.shift_logits([0.0, -1.0, 2.0])
        learner.load_state_dict(state)
        assert not learner.state_dict()["shift"].any()


class TooMuch(torch.nn.Module):
    """A network that draws class 2 wherever the image is bright, and too much of it; nothing to learn."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.0, 0.0, 1.5]))

    def forward(self, image):
        classes = torch.arange(3.0).reshape(1, 3, 1, 1, 1)
        return -2 * (image - classes).square() + self.bias.reshape(1, 3, 1, 1, 1)


class TestRounds:
    """Rounds that go on from the last one's weights, with a network that always draws too much."""

    @pytest.fixture
    def drawn(self, tmp_path, monkeypatch):
        monkeypatch.setattr(averaged, "make_specialist", lambda *_: TooMuch())
        labelled, pseudo = [training_case(0)], [training_case(1), training_case(2)]
        fabric, plan = make_fabric("cpu", "32-true"), tiny_plan()
        config = tiny_config(iterations=1, learning_rate=1e-9, weight_decay=0.0)

        def shifted(number, matched=True, start_from=None):
            def finish(learner):
                learner.shift_logits(measured_shift(learner, labelled, pseudo, plan, config, number, fabric, Silent()))

            store = Store(tmp_path)
            done = finish if matched else None
            train_round(number, random_batch, plan, config, store, fabric, Silent(), start_from, finish=done)
            return store.tensors("weights", f"round-{number}.pt")["learner"]["shift"]

        return shifted

    def test_a_further_round_is_shifted_as_the_first_one(self, drawn):
        """It is measured without the last round's shift, so it does not vanish every other time."""
        first = drawn(1)
        assert first[2] < -0.5 and torch.allclose(drawn(2, start_from="round-1.pt"), first, atol=0.3)

    def test_a_round_that_is_not_matched_keeps_no_earlier_shift(self, drawn):
        drawn(1)
        assert not drawn(2, matched=False, start_from="round-1.pt").any()


def test_a_stop_while_it_is_measured_loses_no_iteration(tmp_path):
    def stopped(learner):
        raise Stopped

    config, plan, fabric = tiny_config(checkpoint_seconds=1000), tiny_plan(), make_fabric("cpu", "32-true")
    with pytest.raises(Stopped):
        train_round(1, random_batch, plan, config, Store(tmp_path), fabric, Silent(), finish=stopped)

    def no_more(iteration, rank):
        raise AssertionError("an iteration was done again")

    train_round(1, no_more, plan, config, Store(tmp_path), fabric, Silent(), finish=lambda learner: None)
    assert Store(tmp_path).has("weights", "round-1.pt")
