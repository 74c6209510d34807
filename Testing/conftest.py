"""Shared by the tests: one thread, and the folder of this file on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

#: Files that share what takes long to make, and so run one after the other in the same process.
TOGETHER = {"test_kill_and_resume": "test_worker_runs", "test_measure": "test_protocol"}


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes each file stays in one."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(item.path.stem, item.path.stem)))
