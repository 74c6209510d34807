"""A whole training runs with the core dependencies alone: none of the extras can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from job_helpers import labelled_project, make_training

BLOCKED = ("typer", "rich", "medpy", "highdicom", "tensorboard", "slicer", "vtk", "pytest")

PROGRAM = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is not a core dependency", name=name)

sys.meta_path.insert(0, Blocker())
from SemiSAMO1Lib.worker import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_training_needs_the_core_dependencies_only(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project, rounds=1)
    command = [sys.executable, "-c", PROGRAM, str(job.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"the training was to finish without {BLOCKED}:\n{done.stdout}\n{done.stderr}"
