"""What the panel offers without the engine is what the engine has."""

from SemiSAMO1Lib.choices import GENERALISTS, LEARNERS, PRESETS, STANDARD, preset_values
from SemiSAMO1Lib.engine.config import make_config
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
