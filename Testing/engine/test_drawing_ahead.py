"""Batches are drawn by a thread while the one before is learned from."""

import threading

import pytest
from engine_helpers import random_batch

from SemiSAMO1Lib.engine.sampling import drawn_ahead

WAIT_S = 20


def drawing_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("patches")]


def test_the_batches_are_those_of_the_iterations_in_order():
    found = list(drawn_ahead(lambda iteration, rank: (iteration, rank), 3, 8, 2))
    assert found == [(3, 2), (4, 2), (5, 2), (6, 2), (7, 2)], "batches were left out, repeated or in another order"


def test_the_next_batch_is_drawn_while_one_is_learned_from():
    drawn = threading.Event()

    def sample(iteration, rank):
        if iteration == 1:
            drawn.set()
        return random_batch(iteration, rank)

    batches = drawn_ahead(sample, 0, 3, 0)
    next(batches)
    assert drawn.wait(WAIT_S), "the second batch is drawn only when it is asked for"
    batches.close()


def test_no_more_than_one_batch_is_drawn_ahead():
    asked = []
    batches = drawn_ahead(lambda iteration, rank: asked.append(iteration), 0, 10, 0)
    for _ in range(3):
        next(batches)
    batches.close()  # waits for what is being drawn
    assert asked == [0, 1, 2, 3], "batches pile up in memory"


def test_what_the_drawing_raises_comes_out_of_its_iteration():
    def sample(iteration, rank):
        if iteration == 2:
            raise OSError("the scan is gone")
        return iteration

    batches = drawn_ahead(sample, 0, 5, 0)
    assert [next(batches), next(batches)] == [0, 1], "iterations before the failure are lost"
    with pytest.raises(OSError, match="the scan is gone"):
        next(batches)


def test_leaving_early_ends_the_thread():
    batches = drawn_ahead(random_batch, 0, 10, 0)
    next(batches)
    batches.close()
    assert not drawing_threads(), "a thread is left behind"


def test_nothing_to_do_draws_nothing():
    assert not list(drawn_ahead(lambda iteration, rank: 1 / 0, 5, 5, 0)), "a finished round drew a batch"
