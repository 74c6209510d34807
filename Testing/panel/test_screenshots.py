"""The pictures of the documentation are made from this version; they are kept in build/screenshots to be looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PICTURES = ("project", "template", "train", "results")


@pytest.fixture(scope="module")
def made() -> Path:
    folder = ROOT / "build" / "screenshots"
    command = [sys.executable, str(ROOT / "Testing" / "make_screenshots.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_something(made: Path, name: str) -> None:
    pixels = np.asarray(Image.open(made / f"{name}.png").convert("L"), float)
    assert pixels.std() > 10, "the picture is blank"
