"""The time that a training will take: known runs within a factor of two, and how it follows what is asked for."""

from __future__ import annotations

import pytest

from SemiSAMO1Lib.costs import REFERENCE_STEP_S
from SemiSAMO1Lib.project.estimate import estimate_seconds, in_words
from SemiSAMO1Lib.volume import Geometry

HIPPOCAMPUS = Geometry((36, 50, 35), (1.0, 1.0, 1.0))
LEFT_ATRIUM = Geometry((88, 140, 180), (0.625, 0.625, 0.625))


@pytest.mark.parametrize(
    ("scan", "count", "preset", "minutes"),
    [(HIPPOCAMPUS, 100, "standard", 24.8), (LEFT_ATRIUM, 20, "quick", 12.0), (LEFT_ATRIUM, 60, "quick", 27.7)],
)
def test_measured_runs_are_met_within_a_factor_of_two(scan: Geometry, count: int, preset: str, minutes: float) -> None:
    """docs/benchmarks.md, on the machine of the reference."""
    found = estimate_seconds([scan] * count, preset, REFERENCE_STEP_S)
    assert found is not None and 0.5 < found / 60 / minutes < 2, f"estimated {found / 60:.1f}, measured {minutes}"


def test_small_scans_make_larger_batches() -> None:
    """As the plan has it: up to four patches a step."""
    small, large = (Geometry((n, n, n), (1.0, 1.0, 1.0)) for n in (28, 56))
    times = [estimate_seconds([scan] * 20, "thorough", REFERENCE_STEP_S, rounds=3) for scan in (small, large)]
    assert times[0] is not None and times[1] is not None
    assert times[0] > times[1] / 4, "an eighth of the voxels, and four times the patches"


def test_a_run_on_a_gpu_is_met_too() -> None:
    """docs/performance.md, On a GPU: the network is fast, what is around it is not."""
    found = estimate_seconds([LEFT_ATRIUM] * 17, "quick", 0.0005, rounds=3, on_gpu=True)
    assert found is not None and 0.5 < found / 199 < 2, f"estimated {found:.0f} s, measured 199 s"


def test_a_machine_of_half_the_speed_takes_twice_as_long() -> None:
    one, two = (estimate_seconds([LEFT_ATRIUM] * 20, "quick", step) for step in (0.1, 0.2))
    assert one is not None and two is not None and two / one == pytest.approx(2, rel=0.1)


def test_more_rounds_take_longer() -> None:
    one, two = (estimate_seconds([LEFT_ATRIUM] * 20, "quick", 0.1, rounds) for rounds in (1, 4))
    assert one is not None and two is not None and two > 1.5 * one


def test_no_rounds_are_the_registration_alone() -> None:
    found = estimate_seconds([LEFT_ATRIUM] * 20, "quick", 0.1, rounds=0)
    assert found is not None and found < estimate_seconds([LEFT_ATRIUM] * 20, "quick", 0.1, rounds=1)


@pytest.mark.parametrize(("scans", "step"), [([], 0.1), ([HIPPOCAMPUS], None)])
def test_without_scans_or_a_measured_machine_nothing_is_promised(scans: list[Geometry], step: float | None) -> None:
    assert estimate_seconds(scans, "quick", step) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "unknown before set-up"), (20, "about a minute"), (200, "about 3 minutes"), (7300, "about 2 hours")],
)
def test_in_words(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words
