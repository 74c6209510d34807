"""What the panel offers without the engine is what the engine has; and what a person reads about parameters."""

import pytest
from pydantic import BaseModel

from SemiSAMO1Lib.choices import GENERALISTS, LEARNERS, PRESETS, SHORT_NAMES, STANDARD, preset_values
from SemiSAMO1Lib.engine.config import TrainingConfig, make_config
from SemiSAMO1Lib.engine.generalists.registry import FEATURES
from SemiSAMO1Lib.engine.learners import LEARNERS as REGISTERED
from SemiSAMO1Lib.engine.propagation.registry import PROPAGATORS


def test_every_learner_is_offered():
    assert set(LEARNERS) == set(REGISTERED)


def test_every_generalist_is_offered():
    assert set(GENERALISTS) == {*PROPAGATORS, *FEATURES}


def test_the_presets_are_what_the_engine_makes_of_them():
    for preset in PRESETS:
        config = make_config(preset).model_dump()
        config["registration"] = {"largest_grid": config["registration"]["largest_grid"]}
        offered = preset_values(preset)
        assert {key: config[key] for key in STANDARD} == offered, preset


@pytest.mark.parametrize(("short", "full"), SHORT_NAMES.items())
def test_a_published_name_is_the_learner_of_that_name(short, full):
    assert make_config(learner=short).learner == full and full in REGISTERED


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="unknown preset 'sloppy'; there are: quick"):
        make_config("sloppy")


def described(kind: type[BaseModel], before: str = "") -> dict[str, str | None]:
    """Parameter, with those of the groups below it -> its meaning."""
    found: dict[str, str | None] = {}
    for name, one in kind.model_fields.items():
        found[before + name] = one.description
        if isinstance(one.annotation, type) and issubclass(one.annotation, BaseModel):
            found |= described(one.annotation, f"{name}.")
    return found


@pytest.mark.parametrize(("parameter", "meaning"), described(TrainingConfig).items())
def test_every_parameter_says_what_it_means(parameter, meaning):
    assert meaning, f"{parameter} has no description"
