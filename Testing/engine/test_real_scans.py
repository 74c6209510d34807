"""Registration on real scans; where the cohorts are absent the output says so."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator
from SemiSAMO1Lib.image_io import read_volume

DATA = Path(os.environ.get("SEMISAMO1_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "hippocampus"

pytestmark = [
    pytest.mark.real_scans,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans in {DATA}; set SEMISAMO1_DATA to test on them"),
]


def read(name):
    return read_volume(DATA / "images" / name), read_volume(DATA / "labels" / name)


def test_a_template_is_carried_to_real_scans():
    template, *others = sorted(path.name for path in (DATA / "images").iterdir())[:5]
    propagator = RegistrationPropagator(1.0, 3, torch.device("cpu"))
    prepared = propagator.prepare([LabelledCase("template", *read(template))])
    found = []
    for name in others:
        image, truth = read(name)
        label = propagator.propagate(prepared, image, image.geometry).probabilities.argmax(0).numpy()
        for value in (1, 2):
            mine, true = label == value, truth.array == value
            found.append(2 * np.count_nonzero(mine & true) / (np.count_nonzero(mine) + np.count_nonzero(true)))
    mean = float(np.mean(found))
    assert mean > 0.72, f"a mean Dice above 0.72 over {len(others)} scans was expected, it is {mean:.3f}"
