"""The training loop: what is stopped and resumed ends bitwise where the undisturbed run ends."""

import pytest
import torch
from engine_helpers import Recorder, random_batch, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.learners import learner_named
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.ranks import threads_each
from SemiSAMO1Lib.engine.specialists import make_specialist
from SemiSAMO1Lib.engine.training import hash_key, load_weights, train_round


def train(folder, observer=None, sample=random_batch, number=1, start_from=None, **changes):
    fabric = make_fabric("cpu", "32-true")
    config = tiny_config(**changes)
    observer = observer or Silent()
    return train_round(number, sample, tiny_plan(), config, Store(folder), fabric, observer, start_from)


def flat(state):
    return torch.cat([state[part][name].flatten() for part in ("student", "teacher") for name in sorted(state[part])])


def weights(folder, number=1):
    return flat(Store(folder).tensors("weights", f"round-{number}.pt")["learner"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return weights(folder)


def test_training_twice_gives_bitwise_the_same(tmp_path, undisturbed):
    torch.rand(17)  # another global state before
    train(tmp_path)
    assert torch.equal(weights(tmp_path), undisturbed), "two trainings with one seed differ"


def test_another_seed_gives_other_weights(tmp_path, undisturbed):
    train(tmp_path, seed=1)
    assert not torch.equal(weights(tmp_path), undisturbed), "the seed has no effect"


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_stopped_and_resumed_reaches_bitwise_the_same_weights(tmp_path, undisturbed, stop_after):
    with pytest.raises(Stopped):
        train(tmp_path, Recorder(stop_after), checkpoint_seconds=1000)
    torch.manual_seed(4711)  # a new process has another global state
    train(tmp_path)
    assert torch.equal(weights(tmp_path), undisturbed), f"stopped after iteration {stop_after}: other weights"


def test_killed_after_a_checkpoint_and_resumed_reaches_the_same_weights(tmp_path, undisturbed):
    def broken(iteration, rank):
        if iteration == 4:
            raise KeyboardInterrupt
        return random_batch(iteration, rank)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, sample=broken, checkpoint_seconds=0)
    train(tmp_path)
    assert torch.equal(weights(tmp_path), undisturbed), "killed in iteration 4, resumed: other weights"


def test_stopped_leaves_a_checkpoint_with_its_iteration(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, Recorder(2), checkpoint_seconds=1000)
    assert Store(tmp_path).tensors("checkpoints", "round-1.pt")["iteration"] == 2, "stopped after two iterations"


def test_resumed_training_does_not_repeat_iterations(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, Recorder(4), checkpoint_seconds=1000)
    seen = []

    def listening(iteration, rank):
        seen.append(iteration)
        return random_batch(iteration, rank)

    train(tmp_path, sample=listening)
    assert seen == [4, 5], f"four of six iterations were done; the resumed run did {seen}"


def test_resuming_is_said(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, Recorder(4), checkpoint_seconds=1000)
    observer = Recorder()
    train(tmp_path, observer)
    assert any("iteration 4" in f.get("text", "") for kind, f in observer.events if kind == "note"), observer.events


def test_finished_training_leaves_no_checkpoint(tmp_path):
    train(tmp_path, checkpoint_seconds=0)
    assert not Store(tmp_path).has("checkpoints", "round-1.pt"), "the checkpoint of a finished round is removed"


def test_finished_training_trains_nothing_again(tmp_path):
    train(tmp_path)

    def forbidden(iteration, rank):
        raise AssertionError(f"iteration {iteration} ran again")

    one = train(tmp_path, sample=forbidden)
    assert torch.equal(flat(one.state_dict()), weights(tmp_path)), "the finished weights were not loaded"


def test_batches_are_asked_for_by_iteration(tmp_path):
    seen = []

    def listening(iteration, rank):
        seen.append((iteration, rank))
        return random_batch(iteration, rank)

    train(tmp_path, sample=listening, iterations=3)
    assert seen == [(0, 0), (1, 0), (2, 0)]


def test_last_iteration_reports_its_losses(tmp_path):
    observer = Recorder()
    train(tmp_path, observer, iterations=2)
    kind, fields = observer.events[-1]
    assert (kind, fields["iteration"], fields["of"]) == ("losses", 2, 2), observer.events


def test_warm_start_begins_with_the_weights_of_the_round_before(tmp_path):
    train(tmp_path)
    before = Store(tmp_path).tensors("weights", "round-1.pt")["learner"]["student"]
    train(tmp_path, number=2, start_from="round-1.pt", iterations=1, learning_rate=1e-12, weight_decay=0)
    after = Store(tmp_path).tensors("weights", "round-2.pt")["learner"]["student"]
    far = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert far < 1e-9, f"with next to no learning rate round 2 ended {far} away from the weights it began with"


def test_without_warm_start_a_round_begins_from_scratch(tmp_path):
    train(tmp_path)
    train(tmp_path, number=2, iterations=1, learning_rate=1e-12)
    assert not torch.allclose(weights(tmp_path, 1), weights(tmp_path, 2), atol=1e-3), "round 2 took round 1's weights"


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path):
    def poisoned(iteration, rank):
        batch = random_batch(iteration, rank)
        batch.labelled.image[:] = float("nan")
        return batch

    with pytest.raises(FloatingPointError, match="learning_rate"):
        train(tmp_path, sample=poisoned, iterations=1)


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    def poisoned(iteration, rank):
        batch = random_batch(iteration, rank)
        batch.labelled.image[:] = float("nan")
        return batch

    with pytest.raises(FloatingPointError):
        train(tmp_path, sample=poisoned, iterations=1)
    assert not Store(tmp_path).has("weights", "round-1.pt"), "weights of a failed training must not count as finished"


@pytest.mark.parametrize("name", ["tpu", "cpu:1", "cuda:", "cuda:x", "auto:0", ""])
def test_unknown_device_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}'.*possible: auto, cpu, cuda"):
        make_fabric(name, "32-true")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_gpu_is_named():
    with pytest.raises(ValueError, match=r"'cuda'.*--device cpu"):
        make_fabric("cuda", "32-true")


def test_unknown_learner_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'nobody'.*mean_teacher"):
        train(tmp_path, learner="nobody")


def test_unknown_specialist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'resnet'.*dynunet"):
        train(tmp_path, specialist="resnet")


def test_unknown_specialist_is_a_value_error():
    with pytest.raises(ValueError, match="dynunet, unet_3d, unet_3d_sdf, vnet"):
        make_specialist("", tiny_plan())


def test_keys_do_not_repeat():
    keys = {hash_key(s, n, i, r) for s in range(3) for n in range(3) for i in range(20) for r in range(2)}
    assert len(keys) == 360, "two different (seed, round, iteration, rank) share a key"


def test_checkpoint_is_loaded_without_running_code(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, Recorder(2), checkpoint_seconds=1000)
    state = torch.load(tmp_path / "checkpoints" / "round-1.pt", weights_only=True)
    assert set(state) >= {"learner", "iteration", "random"}, f"the checkpoint holds {sorted(state)}"


class _Code:
    """A pickled object that would run something when it is loaded."""

    def __reduce__(self):
        return print, ("ran",)


def test_weights_with_program_code_are_refused(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "weights").mkdir()
    torch.save({"learner": _Code()}, tmp_path / "weights" / "round-1.pt")
    with pytest.raises(ValueError, match="program code"):
        store.tensors("weights", "round-1.pt")


def test_weights_of_another_architecture_are_refused(tmp_path):
    store = Store(tmp_path)
    store.save_tensors(
        {"learner": {"student": {}, "teacher": {}, "optimizer": {}, "steps": 0}}, "weights", "round-1.pt"
    )
    fabric = make_fabric("cpu", "32-true")
    learner = learner_named("mean_teacher")(tiny_plan(), tiny_config())
    learner.setup(fabric)
    with pytest.raises(ValueError, match="another network"):
        load_weights(learner, store, "round-1.pt")


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


class TestThreads:
    """Of processes that were started together on a computer of eight cores."""

    @pytest.fixture(autouse=True)
    def nobody(self, monkeypatch):
        for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_CPUS_PER_TASK"):
            monkeypatch.delenv(name, raising=False)

    def told(self, monkeypatch, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    def test_those_of_torchrun_share_the_cores(self, monkeypatch):
        self.told(monkeypatch, **TORCHRUN)
        assert threads_each(8, None) == 2

    def test_in_an_allocation_too(self, monkeypatch):
        """Its variable is of the whole script, which torchrun divides."""
        self.told(monkeypatch, **TORCHRUN, SLURM_CPUS_PER_TASK="8")
        assert threads_each(8, None) == 2

    def test_a_task_of_srun_has_cores_of_its_own(self, monkeypatch):
        self.told(monkeypatch, **SRUN, SLURM_CPUS_PER_TASK="3")
        assert threads_each(8, None) == 3

    def test_without_binding_it_sees_more_than_it_was_given(self, monkeypatch):
        self.told(monkeypatch, **SRUN, SLURM_CPUS_PER_TASK="1")
        assert threads_each(8, None) == 1

    @pytest.mark.parametrize(("wanted", "each"), [(4, 2), (1, 1), (100, 3)])
    def test_what_a_person_gave_is_for_all_of_a_computer(self, monkeypatch, wanted, each):
        self.told(monkeypatch, **SRUN, SLURM_CPUS_PER_TASK="3")
        assert threads_each(8, wanted) == each


def test_processes_that_see_fewer_gpus_than_they_are_say_what_to_ask_for(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("SemiSAMO1Lib.engine.devices.require_device", lambda _name: ("cuda", ""))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"4 processes .* sees 1 GPUs.*--gpus-per-node"):
        make_fabric("cuda", "32-true", together=True)


def test_inside_a_slurm_allocation_one_process_is_alone(monkeypatch):
    """`semisamo1 train` in a shell that was given four tasks: nobody started the other three."""
    for name, value in {"NTASKS": "4", "JOB_NAME": "study", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert make_fabric("cpu", "32-true").world_size == 1
