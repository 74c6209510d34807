"""Grey values have a say beside a network only where they do not lead it away from what a person drew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, tiny_config, tiny_plan
from scipy import ndimage
from torch import Tensor, nn

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.edge_worth import TOLERANCE, edge_weight_of, judge_grey_values
from SemiSAMO1Lib.volume import Geometry, Volume

SHAPE = (32, 32, 32)
CONFIG = tiny_config(edge_weight=1.0)


def ball(radius: float) -> np.ndarray[Any, Any]:
    away = np.indices(SHAPE) - 15.5
    found: np.ndarray[Any, Any] = np.square(away).sum(0) <= radius**2
    return found


class Drawn(nn.Module):
    """A network that draws one label wherever it looks, as unsure near the border as trained ones are."""

    def __init__(self, label: np.ndarray[Any, Any]) -> None:
        super().__init__()
        sure = ndimage.gaussian_filter(label.astype(np.float32), 1.0).clip(0.02, 0.98)
        self.logits = torch.from_numpy(np.log(np.stack([1 - sure, sure])))

    def forward(self, image: Tensor) -> Tensor:
        return self.logits[None].expand(len(image), -1, -1, -1, -1)


def weight_beside(network: Drawn, seen: float, drawn: float, store: Store) -> float:
    """What grey values count beside a network: the image shows a ball of one size, a person drew one of another."""
    grey = 100.0 * ball(seen) + np.random.default_rng(0).normal(0, 5, SHAPE)
    label = ball(drawn).astype(np.uint8)
    template = LabelledCase("t", *(Volume(one, Geometry(SHAPE)) for one in (grey.astype(np.float32), label)))
    cohort = Cohort([], [template], tiny_plan(2, SHAPE), store)
    learner = SimpleNamespace(inference_model=lambda: network)
    fabric = make_fabric("cpu", "32-true")
    judge_grey_values(cohort, 1, learner, CONFIG, fabric, Recorder())  # type: ignore[arg-type]
    return edge_weight_of(store, 1, CONFIG)


def test_where_people_draw_along_the_grey_values_they_count(tmp_path: Any) -> None:
    assert weight_beside(Drawn(ndimage.shift(ball(9), (0, 0, 1.5), order=0)), 9, 9, Store(tmp_path)) == 1.0


def test_where_people_draw_beside_them_and_the_network_has_learned_it_they_do_not(tmp_path: Any) -> None:
    assert weight_beside(Drawn(ball(9)), 7, 9, Store(tmp_path)) == 0.0


@pytest.mark.parametrize(
    ("found", "weight"),
    [
        ({"without": 0.95, "with": 0.96}, 1.0),
        ({"without": 0.95, "with": 0.95 - TOLERANCE / 2}, 1.0),
        ({"without": 0.95, "with": 0.94}, 0.0),
    ],
)
def test_a_small_loss_is_chance(tmp_path: Any, found: dict[str, float], weight: float) -> None:
    store = Store(tmp_path)
    store.save_json(found, "edges", "1.json")
    assert edge_weight_of(store, 1, CONFIG) == weight


def test_pseudo_labels_of_rounds_before_the_last_keep_them(tmp_path: Any) -> None:
    store, config = Store(tmp_path), CONFIG.model_copy(update={"rounds": 2})
    cohort = Cohort([], [], tiny_plan(2, SHAPE), store)
    judge_grey_values(cohort, 1, None, config, make_fabric("cpu", "32-true"), Recorder())  # type: ignore[arg-type]
    assert not store.has("edges", "1.json") and edge_weight_of(store, 1, config) == 1.0


def test_before_the_last_round_nobody_looks_for_what_another_computer_writes_then(tmp_path: Any) -> None:
    """A folder that several computers mount remembers for a while that something was not there."""
    store, config = Store(tmp_path), CONFIG.model_copy(update={"rounds": 2})
    store.save_json({"without": 0.9, "with": 0.5}, "edges", "1.json")
    assert (edge_weight_of(store, 1, config), edge_weight_of(store, 1, CONFIG)) == (1.0, 0.0)


def test_before_a_network_they_count(tmp_path: Any) -> None:
    assert edge_weight_of(Store(tmp_path), 0, CONFIG) == 1.0


def test_where_they_are_switched_off_nobody_looks(tmp_path: Any) -> None:
    store, config = Store(tmp_path), CONFIG.model_copy(update={"edge_weight": 0.0})
    judge_grey_values(
        Cohort([], [], tiny_plan(2, SHAPE), store), 1, None, config, make_fabric("cpu", "32-true"), Recorder()
    )  # type: ignore[arg-type]
    assert not store.has("edges", "1.json") and edge_weight_of(store, 1, config) == 0.0
