"""Batches are drawn by threads while the ones before are learned from."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from engine_helpers import random_batch

from SemiSAMO1Lib.engine.data.intensity_augmentation import change_intensities
from SemiSAMO1Lib.engine.sampling import drawing_threads, drawn_ahead

WAIT_S = 20


def threads_left():
    return [thread for thread in threading.enumerate() if thread.name.startswith("patches")]


@pytest.mark.parametrize("threads", [1, 3, 9])
def test_the_batches_are_those_of_the_iterations_in_order(threads):
    def sample(iteration, rank):
        time.sleep(0.02 * (iteration % 3))  # a later one may be ready sooner
        return iteration, rank

    found = list(drawn_ahead(sample, 3, 8, 2, threads))
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


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_batches_are_drawn_ahead_than_threads_draw(threads):
    asked = []
    batches = drawn_ahead(lambda iteration, rank: asked.append(iteration), 0, 10, 0, threads)
    for _ in range(3):
        next(batches)
    batches.close()  # waits for what is being drawn
    assert sorted(asked) == list(range(3 + threads)), "batches pile up in memory"


def test_several_threads_draw_the_patches_that_one_draws():
    """The transforms of grey values keep a state: each thread has its own."""

    def sample(iteration, rank):
        generator = np.random.default_rng([iteration, rank])
        patch = torch.from_numpy(generator.normal(size=(1, 12, 12, 12)).astype(np.float32))
        return torch.stack([change_intensities(patch, generator) for _ in range(3)])

    alone, together = (list(drawn_ahead(sample, 0, 24, 0, threads)) for threads in (1, 6))
    assert torch.equal(torch.stack(alone), torch.stack(together))


def test_each_of_several_threads_works_alone_and_torch_has_its_own_back():
    """What a thread sets is what threads that are started later have."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inside = list(drawn_ahead(lambda iteration, rank: torch.get_num_threads(), 0, 6, 0, threads=3))
        with ThreadPoolExecutor(1) as later:
            after = later.submit(torch.get_num_threads).result()
        assert (set(inside), after) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_the_processor_that_trains_spares_one_thread_alone():
    assert drawing_threads(torch.device("cpu")) == 1
    assert 1 <= drawing_threads(torch.device("cuda", 0)) <= 12


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
    assert not threads_left(), "a thread is left behind"


def test_nothing_to_do_draws_nothing():
    assert not list(drawn_ahead(lambda iteration, rank: 1 / 0, 5, 5, 0)), "a finished round drew a batch"
