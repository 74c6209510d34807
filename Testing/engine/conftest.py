"""One thread: the tests share their cores, and results must not depend on the number of threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_random_state():
    torch.manual_seed(0)
