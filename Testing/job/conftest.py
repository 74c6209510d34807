"""Fixtures of the background job's tests: no worker outlives its test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_helpers import labelled_project, make_training, run_to_end

from SemiSAMO1Lib.job import JobFolder, kill, observe

os.environ["OMP_NUM_THREADS"] = "1"  # the same number of threads in every worker


@pytest.fixture(autouse=True)
def no_worker_left(tmp_path: Path) -> Iterator[None]:
    """End the workers that a test (a failed one, too) left behind."""
    yield
    for spec in tmp_path.rglob("job.json"):
        job = JobFolder(spec.parent)
        with contextlib.suppress(ValueError):  # a status that a test damaged
            if job.status.exists() and observe(job).pid != os.getpid():  # some tests play the worker themselves
                kill(job)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """A training that a worker finished undisturbed; read only. Its project is two folders up."""
    project, _ = labelled_project(tmp_path_factory.mktemp("finished"))
    job = make_training(project)
    run_to_end(job)
    return job


@pytest.fixture
def torch_left_alone() -> Iterator[None]:
    """Give torch its settings back after a test that runs a training in this process."""
    import torch

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
