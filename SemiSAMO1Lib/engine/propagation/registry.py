"""Propagators by name: what `--generalist` chooses. A new one is a file, a line here and one in `choices.py`.

Every generalist that describes scans is one as well, by its prototypes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import TrainingConfig
from ..generalists.registry import FEATURES, features_named
from ..generalists.sam_med3d.checkpoint import VARIABLE, CheckpointError, find
from ..generalists.sam_med3d.generalist import RANDOM
from ..observer import Observer
from ..planning import Plan
from .base import Propagator
from .fusion import FusedPropagator
from .prototypes import PrototypePropagator
from .registration import RegistrationPropagator, RegistrationSettings


@dataclass(frozen=True)
class Request:
    """What a propagator is made from; `cache` is the folder of kept features, or None."""

    plan: Plan
    config: TrainingConfig
    device: torch.device
    observer: Observer
    cache: Path | None = None


def registration(request: Request) -> Propagator:
    """Deformable registration; needs nothing."""
    plan, config = request.plan, request.config
    settings = RegistrationSettings(
        use_affine=config.registration.use_affine,
        affine_margin=config.registration.affine_margin,
        tie=config.registration.tie,
        seed=config.seed,
        atlases=config.registration.atlases,
    )
    return RegistrationPropagator(plan.registration_spacing, plan.classes, request.device, settings)


def prototypes(name: str) -> Callable[[Request], Propagator]:
    """Prototypes of a generalist's features."""

    def make(request: Request) -> Propagator:
        plan, settings = request.plan, request.config.generalists
        generalist = features_named(name, plan, settings, request.device, request.observer, request.cache)

        def warn(text: str) -> None:
            request.observer.event("warning", text=text)

        return PrototypePropagator(generalist, plan.classes, plan.spacing, settings, request.config.seed, warn)

    return make


def fused(request: Request) -> Propagator:
    """Registration and prototypes together: of SAM-Med3D when its checkpoint is at hand, else of MIND-SSC."""
    name = "sam-med3d"
    try:
        if request.config.generalists.checkpoint != RANDOM:
            find(request.config.generalists.checkpoint)
    except CheckpointError:
        if _named(request.config):
            raise  # a file that was named and is not there is an error, not a choice
        name = "mind"
    request.observer.event("note", text=f"registration is fused with the prototypes of {name}")
    return FusedPropagator([registration(request), prototypes(name)(request)])


PROPAGATORS: dict[str, Callable[[Request], Propagator]] = {
    "registration": registration,
    "fused": fused,
}

#: Those that register cases.
REGISTERING = frozenset(("registration", "fused"))


def require_generalists(config: TrainingConfig) -> None:
    """Raise before any work when a generalist is unknown or its checkpoint is not there (ValueError)."""
    there = sorted({*PROPAGATORS, *FEATURES})  # a generalist without a line here propagates by its prototypes
    if config.generalist not in there:
        raise ValueError(f"unknown generalist {config.generalist!r}; there are: {', '.join(there)}")
    given = config.generalists.checkpoint
    if given != RANDOM and (config.generalist == "sam-med3d" or (config.generalist == "fused" and _named(config))):
        find(given)


def _named(config: TrainingConfig) -> bool:
    """Whether somebody said where SAM-Med3D's file is."""
    return config.generalists.checkpoint is not None or bool(os.environ.get(VARIABLE))


def make_propagator(request: Request) -> Propagator:
    """The configured propagator. Raises ValueError naming those there are, or CheckpointError."""
    require_generalists(request.config)
    name = request.config.generalist
    return PROPAGATORS.get(name, prototypes(name))(request)
