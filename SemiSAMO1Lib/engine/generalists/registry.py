"""Generalists by name. A new one is a file, a line here and one in `choices.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from ..config import GeneralistConfig
from ..observer import Observer, Silent
from ..planning import Plan
from . import mind_features
from .base import Card, Generalist, Promptable
from .feature_cache import CachedFeatures
from .mind_features import MindFeatures
from .sam_med3d import checkpoint
from .sam_med3d.generalist import Loaded, SamMed3DFeatures, SamMed3DPrompts, load_encoder, load_model
from .sam_med3d.model import SamMed3D

#: What a person should know of each.
CARDS: dict[str, Card] = {"mind": mind_features.CARD, "sam-med3d": checkpoint.CARD}


def _mind(plan: Plan, settings: GeneralistConfig, device: torch.device, observer: Observer) -> Generalist:
    del settings, observer
    return MindFeatures(plan.registration_spacing, device)


def _sam_med3d(plan: Plan, settings: GeneralistConfig, device: torch.device, observer: Observer) -> Generalist:
    del plan
    loaded = load_encoder(settings.checkpoint, settings.architecture, settings.random_seed)
    _tell(observer, loaded.notes, loaded.identity)
    return SamMed3DFeatures(loaded, device, settings.preprocessing, settings.coverage)


#: Generalists that describe scans.
FEATURES: dict[str, Callable[[Plan, GeneralistConfig, torch.device, Observer], Generalist]] = {
    "mind": _mind,
    "sam-med3d": _sam_med3d,
}


def _sam_med3d_prompts(settings: GeneralistConfig, device: torch.device, observer: Observer) -> Promptable:
    loaded = _loaded_once(settings.checkpoint, settings.architecture, settings.random_seed)
    _tell(observer, loaded.notes, loaded.identity)
    return SamMed3DPrompts(loaded.model.to(device))


@lru_cache(maxsize=1)
def _loaded_once(given: str | None, architecture: str, seed: int) -> Loaded[SamMed3D]:
    return load_model(given, architecture, seed)


#: Generalists that answer prompts.
PROMPTABLE: dict[str, Callable[[GeneralistConfig, torch.device, Observer], Promptable]] = {
    "sam-med3d": _sam_med3d_prompts
}


def features_named(
    name: str, plan: Plan, settings: GeneralistConfig, device: torch.device, observer: Observer, cache: Path | None
) -> CachedFeatures:
    """The generalist with this name, its features kept in `cache`. Raises ValueError naming those there are."""
    if name not in FEATURES:
        raise ValueError(f"unknown generalist {name!r}; there are: {', '.join(sorted(FEATURES))}")
    return CachedFeatures(FEATURES[name](plan, settings, device, observer), cache)


def promptable_named(
    name: str, settings: GeneralistConfig, device: torch.device, observer: Observer | None = None
) -> Promptable:
    """The promptable generalist with this name. Raises ValueError naming those there are."""
    if name not in PROMPTABLE:
        raise ValueError(f"unknown promptable generalist {name!r}; there are: {', '.join(sorted(PROMPTABLE))}")
    return PROMPTABLE[name](settings, device, observer or Silent())


def _tell(observer: Observer, notes: tuple[str, ...], identity: str) -> None:
    observer.event("note", text=f"SAM-Med3D weights: {identity}")
    for note in notes:
        observer.event("warning", text=note)
