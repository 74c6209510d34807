"""A network that learned from the surroundings of labels alone looks for them in a whole scan."""

import json

import numpy as np
import pytest
import torch

from SemiSAMO1Lib.engine.data.boxes import Box
from SemiSAMO1Lib.engine.inference.portable import PortableModel, most_within
from SemiSAMO1Lib.volume import Geometry, Volume

GRID = Geometry((20, 24, 28), (2.0, 2.0, 2.0))


def seen_at(*boxes):
    seen = np.zeros(GRID.shape, np.float32)
    for box in boxes:
        seen[tuple(slice(a, b) for a, b in box)] = 1
    return seen


LARGE, SMALL = ((5, 9), (14, 20), (18, 24)), ((14, 17), (3, 6), (3, 6))


def test_it_looks_where_it_sees_most():
    found = most_within(seen_at(LARGE, SMALL), GRID, (16.0, 20.0, 20.0))
    assert found == Box((3, 12, 16), (11, 22, 26)), "eight by ten by ten voxels with what it sees in their middle"


def test_near_an_edge_the_part_is_as_large():
    found = most_within(seen_at(((0, 3), (20, 24), (0, 4))), GRID, (16.0, 20.0, 20.0))
    assert found == Box((0, 14, 0), (8, 24, 10))


def test_a_scan_that_is_smaller_is_looked_at_as_a_whole():
    assert most_within(seen_at(LARGE), GRID, (100.0, 100.0, 100.0)) == Box((0, 0, 0), GRID.shape)


def test_where_it_sees_nothing_it_looks_anywhere():
    found = most_within(seen_at(), GRID, (16.0, 20.0, 20.0))
    assert tuple(b - a for a, b in zip(found.start, found.stop, strict=True)) == (8, 10, 10)


class Bright(torch.nn.Module):
    """A network that knows bright voxels."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        logit = 20 * (windows - 1.0)
        return torch.cat([torch.zeros_like(logit), logit], 1)


@pytest.fixture(params=[None, [16.0, 20.0, 20.0]], ids=["whole scans", "surroundings"])
def model(request, tmp_path):
    plan = {"spacing": [2.0, 2.0, 2.0], "patch": [8, 8, 8], "classes": 2, "label_values": [0, 5], "seed": 0}
    plan |= {"test_time_passes": 1, "surroundings_mm": request.param}
    plan |= {"intensity": {"scheme": "none", "low": 0, "high": 0}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "models").mkdir()
    torch.jit.script(Bright()).save(str(tmp_path / "models" / "model.ts"))
    return PortableModel(tmp_path), request.param


def test_elsewhere_it_sees_nothing(model):
    portable, extent = model
    both, one = seen_at(LARGE, SMALL), seen_at(LARGE)
    labels, uncertainty = portable.segment(Volume(2 * both, GRID))
    assert np.array_equal(labels.array, 5 * (both if extent is None else one))
    assert labels.geometry == uncertainty.geometry == GRID


def test_where_it_sees_nothing_at_all_it_does_not_say_that_it_is_sure(model):
    portable, extent = model
    labels, uncertainty = portable.segment(Volume(seen_at(), GRID))
    assert not labels.array.any() and uncertainty.array[-1, -1, -1] == (0 if extent is None else 100)
