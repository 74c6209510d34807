"""Cases that are looked at side by side: in order, no more at once than asked for, and with the same result."""

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, tiny_config, tiny_plan

from SemiSAMO1Lib.engine import memory
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.phantoms import LABELS, Phantom, PhantomSettings, make_phantom
from SemiSAMO1Lib.volume import Geometry, Volume

SMALL = PhantomSettings(spacing_mm=(3.5, 3.5, 3.5))
CONFIG = tiny_config(rounds=2, iterations=6, registration={"use_affine": False}, neighbours=2)


class TestEach:
    @pytest.mark.parametrize("at_once", [1, 2, 5, 20])
    def test_what_was_found_comes_in_order(self, at_once: int) -> None:
        def squared(number: int) -> int:
            time.sleep(0.001 * (number % 3))
            return number**2

        found = list(Ranks().each(squared, range(12), Silent(), at_once))
        assert found == [(number, number**2) for number in range(12)]

    def test_as_many_as_asked_for_are_done_at_once(self) -> None:
        meeting = threading.Barrier(3, timeout=30)  # none goes on before there are three
        assert len(list(Ranks().each(lambda _: meeting.wait(), range(6), Silent(), 3))) == 6

    def test_and_no_more_are_begun_before_the_first_is_taken(self) -> None:
        """What was found and not taken yet is in memory."""
        begun: list[int] = []
        found = Ranks().each(begun.append, range(20), Silent(), 3)
        next(found)
        time.sleep(0.05)  # for more to begin, if more could
        assert begun == [0, 1, 2]

    def test_what_went_wrong_is_raised(self) -> None:
        def failing(number: int) -> int:
            if number == 2:
                raise ValueError("the third")
            return number

        with pytest.raises(ValueError, match="the third"):
            list(Ranks().each(failing, range(9), Silent(), 2))

    @pytest.mark.parametrize("at_once", [1, 3])
    def test_when_asked_to_stop_it_finishes_what_it_began(self, at_once: int) -> None:
        begun: list[int] = []
        told: list[int] = []

        class After(Silent):
            def should_stop(self) -> bool:
                return len(begun) >= 4

        with pytest.raises(Stopped):
            for position, _ in Ranks().each(begun.append, range(99), After(), at_once):
                told.append(position)
        assert 4 <= len(begun) <= 4 + at_once and told == list(range(len(begun)))


class TestHowMany:
    @pytest.mark.parametrize(("threads", "megabytes", "expected"), [(1, 1, 1), (4, 1, 4), (64, 1, 8), (64, 200, 2)])
    def test_a_thread_each_within_the_memory(
        self, monkeypatch: pytest.MonkeyPatch, threads: int, megabytes: int, expected: int
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        assert memory.cases_at_once(megabytes << 20) == expected

    @pytest.mark.parametrize(("side", "classes", "expected"), [(40, 2, 8), (70, 2, 3), (100, 2, 1), (40, 300, 2)])
    def test_by_the_largest_training_grid_and_its_classes(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, side: int, classes: int, expected: int
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
        cases = [EngineCase(str(n), Geometry((n, n, n)), lambda: None) for n in (10, side)]  # type: ignore[arg-type]
        cohort = Cohort(cases, [], tiny_plan(classes, (8, 8, 8)), Store(tmp_path))
        assert cohort.at_once() == expected

    def test_one_that_needs_more_than_there_is_room_for_is_done_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
        assert memory.cases_at_once(8 << 30) == 1


def test_a_run_finds_the_same_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Answers, signals, checks, pseudo-labels and results, to the last bit."""
    phantoms = [make_phantom(number, 1, SMALL) for number in range(5)]
    template = LabelledCase("template", phantoms[0].image, phantoms[0].label)
    cases = [EngineCase(one.name, one.image.geometry, lambda one=one: one.image) for one in phantoms[1:]]

    def found(folder, at_once: int):
        monkeypatch.setattr(Cohort, "at_once", lambda _: at_once)
        monkeypatch.setattr("SemiSAMO1Lib.engine.rounds.cases_at_once", lambda _: at_once)
        return list(run(cases, [template], 1 + len(LABELS), CONFIG, Store(folder), Recorder()))

    one_by_one, side_by_side = found(tmp_path / "one", 1), found(tmp_path / "four", 4)
    made = ("answers", "neighbours", "behind-by-case", "behind", "signals", "checks", "checks-of-answers")
    made += ("uncertainty", "refinement", "pseudo", "weights-of-voxels")
    files = [path.relative_to(tmp_path / "one") for name in made for path in (tmp_path / "one" / name).rglob("*.*")]
    other = [
        str(one) for one in files if (tmp_path / "one" / one).read_bytes() != (tmp_path / "four" / one).read_bytes()
    ]
    assert len(files) > 40 and other == []
    assert [(one.round, one.case_id, one.scores) for one in one_by_one] == [
        (one.round, one.case_id, one.scores) for one in side_by_side
    ]
    pairs = zip(one_by_one, side_by_side, strict=True)
    assert all(np.array_equal(a.prediction.array, b.prediction.array) for a, b in pairs)


def test_whole_scans_are_loaded_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may be many times as large as what is looked at side by side."""
    phantoms = [make_phantom(number, 1, SMALL) for number in range(6)]
    lock, now, most = threading.Lock(), [0], [0]

    def loaded(one: Phantom) -> Volume:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return one.image

    monkeypatch.setattr(Cohort, "at_once", lambda _: 5)
    template = LabelledCase("template", phantoms[0].image, phantoms[0].label)
    cases = [EngineCase(one.name, one.image.geometry, partial(loaded, one)) for one in phantoms[1:]]
    config = CONFIG.model_copy(update={"neighbour_share": 0.0, "rounds": 0})  # with links images are made for these
    list(run(cases, [template], 1 + len(LABELS), config, Store(tmp_path), Recorder()))
    assert most[0] == 1
