"""The one training loop for all learners: checkpoints, events, the wish to stop. It knows no learner by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric

from .config import TrainingConfig
from .data.store import Store
from .learners import Learner, learner_named
from .learners.generators import hash_key
from .observer import Observer, Stopped
from .planning import Plan
from .ranks import Ranks
from .sampling import Sample, drawing_threads, drawn_ahead

#: Says how good a learner's network is, larger is better.
Judge = Callable[[Learner], float]

#: What a process wishes between two iterations; the largest wish of all is done by all.
_NOTHING, _SAVE, _STOP = 0, 1, 2

#: Iterations between two judgements, as published.
JUDGED_EVERY = 200


def train_round(
    number: int,
    sample: Sample,
    plan: Plan,
    config: TrainingConfig,
    store: Store,
    fabric: Fabric,
    observer: Observer,
    start_from: str | None = None,
    judge: Judge | None = None,
    finish: Callable[[Learner], object] | None = None,
) -> Learner:
    """Train a specialist from scratch (or from weights) for one round, resuming from its checkpoint if there is one.

    Args:
        number: the round, from 1.
        sample: gives a process' part of the batch of an iteration; keyed by the iteration, so that a resumed run sees
            the same.
        plan, config: what to train, and how.
        store: holds `checkpoints/round-<n>.pt` while training and `weights/round-<n>.pt` at its end.
        fabric: device, precision, ranks.
        observer: gets 'losses' events, and is asked whether to stop.
        start_from: file below `weights` to begin with; None: from scratch.
        judge: asked every 200 iterations how good the network is; the best one is kept. It needs labels that the owner
            of one label does not have: only the published protocol asks for it. None: the last weights are the result.
        finish: called after the last iteration, before the weights are kept.

    Returns:
        the learner, trained.

    Raises:
        Stopped: the observer asked for it; the checkpoint holds everything.
    """
    fabric.seed_everything(hash_key(config.seed, number) % 2**32, workers=False, verbose=False)
    learner = learner_named(config.learner)(plan, config)
    learner.setup(fabric)
    checkpoint, weights = ("checkpoints", f"round-{number}.pt"), ("weights", f"round-{number}.pt")
    ranks = Ranks(fabric)
    if ranks.as_first(ranks.first and store.has(*weights)):
        load_weights(learner, store, weights[-1])
        return learner
    first = 0
    if ranks.as_first(ranks.first and store.has(*checkpoint)):
        with _of_this_architecture(store, *checkpoint):
            first = _restore(learner, store.tensors(*checkpoint))
        observer.event("note", text=f"round {number}: going on from iteration {first}")
    elif start_from is not None:
        begin = {**store.tensors("weights", start_from)["learner"], "steps": 0}
        begin.pop("shift", None)  # of the network then: this round's is found at its end
        learner.load_state_dict(begin)
    saved = reported = time.monotonic()
    threads = drawing_threads(fabric.device)
    with closing(drawn_ahead(sample, first, config.iterations, fabric.global_rank, threads)) as batches:
        for iteration, batch in enumerate(batches, first):
            generator = torch.Generator().manual_seed(hash_key(config.seed, number, iteration))
            losses = learner.step(batch.to(fabric.device), iteration / config.iterations, generator)
            now, done = time.monotonic(), iteration + 1
            if not all(map(math.isfinite, losses.values())):
                where = f"round {number}, iteration {done}"
                raise FloatingPointError(f"{where}: the loss is not a number; lower learning_rate")
            if now - reported >= 1 or done == config.iterations:
                reported = now
                observer.event("losses", round=number, iteration=done, of=config.iterations, losses=losses)
            if judge is not None and ranks.first and (done % JUDGED_EVERY == 0 or done == config.iterations):
                _keep_best(number, done, learner, judge, store, observer)
            if done == config.iterations:
                break
            due = now - saved >= config.checkpoint_seconds
            wish = ranks.largest(_STOP if observer.should_stop() else _SAVE if due else _NOTHING)
            if wish != _NOTHING:
                if ranks.first:
                    store.save_tensors(_snapshot(learner, done), *checkpoint)
                saved = now
            if wish == _STOP:
                ranks.wait()
                raise Stopped
    _finish(learner, finish, store, checkpoint, config, ranks)
    if ranks.first:
        store.save_tensors({"learner": learner.state_dict()}, *weights)
        store.remove(*checkpoint)
    ranks.wait()
    return learner


def _finish(
    learner: Learner,
    finish: Callable[[Learner], object] | None,
    store: Store,
    checkpoint: tuple[str, str],
    config: TrainingConfig,
    ranks: Ranks,
) -> None:
    """Do what comes after the last iteration; where that is stopped, a resumed run repeats it and no iteration."""
    if finish is None:
        return
    if ranks.first:
        store.save_tensors(_snapshot(learner, config.iterations), *checkpoint)
    finish(learner)


def _keep_best(number: int, iteration: int, learner: Learner, judge: Judge, store: Store, observer: Observer) -> None:
    """Keep the learner under `judged` when it is better than before; every value is written down."""
    names = ("judged", f"{number}.json")
    judged: dict[str, Any] = store.json(*names) if store.has(*names) else {"values": {}}
    value = judge(learner)
    if all(value > earlier for earlier in judged["values"].values()):
        store.save_tensors({"learner": learner.state_dict()}, "judged", f"{number}.pt")
        judged |= {"best": value, "iteration": iteration}
    judged["values"][str(iteration)] = value
    store.save_json(judged, *names)
    observer.event("judged", round=number, iteration=iteration, value=value)


def load_weights(learner: Learner, store: Store, name: str) -> None:
    """Load the weights of a finished round. Raises ValueError for a damaged file or another architecture."""
    with _of_this_architecture(store, "weights", name):
        learner.load_state_dict(store.tensors("weights", name)["learner"])


@contextmanager
def _of_this_architecture(store: Store, *names: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[:4]
        raise ValueError(
            f"{store.path(*names)} belongs to another network than plan.json describes. Resume with the configuration "
            f"it was made with, or start a new training. ({' '.join(reason)})"
        ) from error


def _snapshot(learner: Learner, iteration: int) -> dict[str, Any]:
    return {"learner": learner.state_dict(), "iteration": iteration, "random": torch.get_rng_state()}


def _restore(learner: Learner, state: dict[str, Any]) -> int:
    learner.load_state_dict(state["learner"])
    torch.set_rng_state(state["random"])
    return int(state["iteration"])
