"""Who does what of a run by several processes, and that it does not matter how a batch is shared."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from together_helpers import ROOT, done

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.learners import LEARNERS
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.ranks import Ranks, lost_another
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.tasks.together import PATIENCE_S, _wait_for_the_first


@pytest.fixture(scope="module")
def steps() -> dict[int, Any]:
    """Some steps of every learner by one and by three processes."""
    script, found = str(ROOT / "Testing" / "engine" / "steps_together.py"), {}
    for count in (1, 3):
        run = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3", script]
        ended = done([sys.executable, "-m", *run] if count > 1 else [sys.executable, script])
        assert ended.returncode == 0, ended.stderr[-4000:]
        found[count] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learners_losses_do_not_depend_on_how_the_batch_is_shared(steps: dict[int, Any], learner: str) -> None:
    for alone, shared in zip(steps[1][learner]["losses"], steps[3][learner]["losses"], strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_same_is_learned_however_the_batch_is_shared(steps: dict[int, Any], learner: str) -> None:
    """With SGD a wrong scale of the gradients would show: the average moves by far more than it may differ."""
    moved = steps[1][learner]["moved"]
    assert steps[3][learner]["average"] == pytest.approx(steps[1][learner]["average"], abs=0.02 * moved) and moved > 0


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_process_has_the_same_average(steps: dict[int, Any], learner: str) -> None:
    assert steps[3][learner]["averages_apart"] == 0, "the running averages of the processes have gone apart"


def test_the_same_is_cut_out_of_whole_scans_and_found_there(tmp_path: Path) -> None:
    script, found = str(ROOT / "Testing" / "engine" / "parts_together.py"), []
    for count in (1, 2):
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if count > 1 else []
        ended = done([sys.executable, *run, script, str(tmp_path / str(count))])
        assert ended.returncode == 0, ended.stderr[-4000:]
        found.append(json.loads(ended.stdout.strip().splitlines()[-1]))
    assert len(found[0]["parts"]["boxes"]) == 4 and found[0] == found[1]


# ---------------------------------------------------------------------- who does what

#: What is made of each case, by the process whose share the case is.
OF_A_CASE = (
    *("propagation", "transforms", "confidence", "signatures", "links", "images", "uncertainty/1"),
    *(f"{kind}/{number}" for number in (1, 2) for kind in ("pseudo", "weights-of-voxels")),
    *(f"{kind}/{number}" for number in range(3) for kind in ("probabilities", "answers", "neighbours")),
    *(f"{kind}/{number}" for number in (1, 2) for kind in ("passes", "behind-by-case", "checks", "checks-of-answers")),
    *(f"signals/{number}" for number in range(3)),
)

#: What is written once more of a case that is carried again.
OF_A_DETOUR = ("propagation", "transforms", "confidence", "signatures", "probabilities/0")

SHARING = 3


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run by three processes: what each of them wrote, and how often."""
    script, folder = str(ROOT / "Testing" / "engine" / "shares_together.py"), tmp_path_factory.mktemp("shares")
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(SHARING), script, str(folder / "store")]
    ended = done([sys.executable, "-m", *run])
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return {**found, "again": json.loads((folder / "store" / "detours.json").read_text())["again"]}


def of_a_case(name: str) -> bool:
    return any(name.startswith(f"{kind}/phantom_") for kind in OF_A_CASE)


@pytest.mark.parametrize("kind", OF_A_CASE)
def test_every_case_is_done_by_the_process_whose_share_it_is(shares: dict[str, Any], kind: str) -> None:
    done_by: dict[str, list[int]] = {}
    for number, written in enumerate(shares["written"]):
        for name in written:
            if name.startswith(f"{kind}/phantom_"):
                done_by.setdefault(Path(name).stem, []).append(number)
    expected = {f"phantom_{n + 2:03d}": {n % SHARING} for n in range(5)}
    if kind in OF_A_DETOUR:  # dealt out anew
        again = [case for case in expected if case in shares["again"]]
        expected = {
            case: one | ({again.index(case) % SHARING} if case in again else set()) for case, one in expected.items()
        }
    assert {case: set(processes) for case, processes in done_by.items()} == expected, f"{kind}: who did which case"


def test_nothing_is_written_twice_but_what_is_carried_again(shares: dict[str, Any]) -> None:
    times: dict[str, int] = {}
    for written in shares["written"]:
        for name, count in written.items():
            times[name] = times.get(name, 0) + count
    again = {name for name in times if str(Path(name).parent) in OF_A_DETOUR and Path(name).stem in shares["again"]}
    assert {name: count for name, count in times.items() if count != 1} == dict.fromkeys(again, 2)


def test_what_each_counted_of_its_cases_is_written_by_itself(shares: dict[str, Any]) -> None:
    """For the signals of quality: what its cases show in the template's space, and their volumes, in each round."""
    for process, written in enumerate(shares["written"]):
        counted = sorted(name for name in written if name.startswith("votes/"))
        assert counted == sorted(f"votes/{n}/{process}.{kind}" for n in (0, 1, 2) for kind in ("json", "npy"))


def test_all_else_is_written_by_the_first_alone(shares: dict[str, Any]) -> None:
    others = [name for written in shares["written"][1:] for name in written]
    assert [name for name in others if not of_a_case(name) and not name.startswith("votes/")] == []


def test_results_are_given_by_the_first_alone(shares: dict[str, Any]) -> None:
    """Five cases in rounds 0, 1 and 2."""
    assert shares["yielded"] == [15, 0, 0]


def test_an_error_of_gloo_is_known_for_what_it_is() -> None:
    """As torch words it when the other end is gone; the errors of our own work are none of these."""
    text = "[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:51896."
    assert lost_another(RuntimeError(text)) and lost_another(torch.distributed.DistBackendError("NCCL error"))
    assert not lost_another(RuntimeError("round 1: the loss is not a number"))


class OneOf:
    """A Fabric as one of several processes sees it, which are asked one after the other."""

    def __init__(self, number: int, count: int) -> None:
        self.global_rank, self.world_size, self.is_global_zero = number, count, number == 0
        self.device = torch.device("cpu")

    def all_gather(self, value: torch.Tensor) -> torch.Tensor:
        return value.expand(self.world_size)

    def barrier(self) -> None: ...


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("at_once", [1, 3])
def test_every_case_is_done_exactly_once(count: int, at_once: int) -> None:
    cases = [f"case_{number}" for number in range(5)]
    ranks = [Ranks(OneOf(number, count)) for number in range(count)]  # type: ignore[arg-type]
    shares = [list(one.each(str, cases, Silent(), at_once)) for one in ranks]
    assert sorted(one for share in shares for one in share) == list(enumerate(cases))


def test_all_go_by_what_the_first_one_finds() -> None:
    """A stale view of a network folder must not send one process where the others do not wait for it."""

    class Apart(OneOf):
        def all_gather(self, value: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1, 0]) if value.item() in (0, 1) else value

    found = [Ranks(Apart(number, 2)).as_first(number == 0) for number in range(2)]  # type: ignore[arg-type]
    assert found == [True, True]


# ---------------------------------------------------------------------- the end of a follower


@pytest.fixture
def first_is(tmp_path: Path) -> Any:
    """Writes down how the first process' job stands."""
    job = JobFolder.create(tmp_path / "jobs", JobKind.TRAIN, {}, [])

    def stands(state: str, silent_s: float = 0.0) -> JobFolder:
        files.write_json(job.status, {"state": state, "heartbeat": time.time() - silent_s})
        return job

    return stands


def waited(job: JobFolder, seconds: float) -> bool:
    """Whether a follower that is done with its share still waits for the first process after some seconds."""
    thread = threading.Thread(target=_wait_for_the_first, args=(job,), daemon=True)
    thread.start()
    thread.join(seconds)
    return thread.is_alive()


def test_a_follower_waits_until_the_first_has_ended(first_is: Any) -> None:
    job = first_is("running")
    assert waited(job, 1.0)
    first_is("finished")
    assert not waited(job, 5.0)


def test_a_follower_does_not_wait_for_a_first_that_is_silent_for_long(first_is: Any) -> None:
    assert not waited(first_is("running", silent_s=PATIENCE_S + 1), 5.0)
    first_is("failed")  # ends what else might wait


def test_without_a_status_there_is_nobody_to_wait_for(first_is: Any) -> None:
    job = first_is("running")
    job.status.unlink()
    assert not waited(job, 5.0)
