"""The estimate of quality: what a fit finds, what missing signals do, how reviews move it, and what is shipped."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from SemiSAMO1Lib.engine.evaluation.quality_fit import fit
from SemiSAMO1Lib.quality import DOUBTS, ENOUGH, HIGH, MEDIUM, QualityModel, Reviewed, level, logit, refitted, shipped

NAMES = ("expected_dice", "boundary_entropy")


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def data(
    seed: int = 0, count: int = 300, noise: float = 0.05
) -> tuple[list[dict[str, float | None]], list[float], list[str]]:
    """Signals whose effect on the Dice is known: + 0.8 per unit of logit(expected_dice), - 2 per unit of entropy.

    One of two groups is harder and, against the rule, more certain: a fit over all would turn the signal round.
    """
    rng = np.random.default_rng(seed)
    signals: list[dict[str, float | None]] = []
    dice, groups = [], []
    for number in range(count):
        hard = number % 2
        expected, entropy = float(rng.normal(1.0 + 2.0 * hard, 0.5)), float(rng.uniform(0.2, 0.8))
        signals.append({"expected_dice": sigmoid(expected), "boundary_entropy": entropy})
        dice.append(sigmoid(0.8 * expected - 2 * entropy + 2 - 4.0 * hard + float(rng.normal(0, noise))))
        groups.append("hard" if hard else "easy")
    return signals, dice, groups


def model_of(seed: int = 0) -> QualityModel:
    return fitted(*data(seed))


def fitted(signals: list[dict[str, float | None]], dice: list[float], groups: list[str]) -> QualityModel:
    """Every group is a cohort with one training."""
    return fit(signals, dice, groups, groups, NAMES, {"cohorts": ["made up"]})


def test_effects_are_those_within_a_cohort_not_between_cohorts() -> None:
    """Over all data certainty goes with bad predictions, inside each cohort with good ones."""
    signals, dice, groups = data()
    model = model_of()
    assert model.names == NAMES and model.coefficients[0] > 0 > model.coefficients[1]
    hard = [number for number, group in enumerate(groups) if group == "hard"]
    likely = model.likely([signals[number] for number in hard])
    assert np.corrcoef(likely, [dice[number] for number in hard])[0, 1] > 0.9


def test_signs_count_by_how_much_they_tell() -> None:
    """Both effects are known: 0.8 × 0.5 (deviation) of the one, 2 × 0.17 of the other."""
    model = model_of()
    assert model.coefficients[0] / -model.coefficients[1] == pytest.approx(0.8 * 0.5 / (2 * 0.173), rel=0.15)


def test_half_of_the_estimate_is_what_the_network_is_unsure_of() -> None:
    """Everything else agrees with a template that is drawn badly."""
    signals, dice, groups = data()
    named: list[dict[str, float | None]] = [
        {"expected_dice": one["expected_dice"], "inside_entropy": one["boundary_entropy"]} for one in signals
    ]
    both, alone = (
        fit(named, dice, groups, groups, names, {})
        for names in (("expected_dice", "inside_entropy"), ("inside_entropy",))
    )
    other = fit(signals, dice, groups, groups, NAMES, {})  # the same signals, none of which is that one
    assert both.coefficients[0] == pytest.approx(other.coefficients[0] / 2)
    assert both.coefficients[1] == pytest.approx((other.coefficients[1] + alone.coefficients[0]) / 2)


def test_no_sign_counts_against_its_meaning() -> None:
    """Data in which certainty goes with bad predictions: the signal is left out, not turned round."""
    signals, dice, groups = data()
    turned = [{**one, "boundary_entropy": 1 - float(one["boundary_entropy"] or 0)} for one in signals]
    assert fitted(turned, dice, groups).names == ("expected_dice",)


def test_a_sign_that_tells_nothing_in_one_cohort_is_not_used() -> None:
    """What holds in one anatomy alone may not hold in the next one."""
    signals, dice, groups = data()
    rng = np.random.default_rng(1)
    entropy = [
        one["boundary_entropy"] if group == "easy" else float(rng.uniform(0.2, 0.8))
        for one, group in zip(signals, groups, strict=True)
    ]
    told = [{**one, "boundary_entropy": value} for one, value in zip(signals, entropy, strict=True)]
    assert fitted(told, dice, groups).names == ("expected_dice",)


def test_a_sign_that_is_missing_in_half_of_a_cohort_tells_as_much_by_the_other_half() -> None:
    """Filled with the mean of all cohorts it would look like a large deviation inside a cohort of another level."""
    signals, dice, groups = data()
    half = [{**one, "expected_dice": None} if number % 4 == 3 else one for number, one in enumerate(signals)]
    whole, with_gaps = fitted(signals, dice, groups), fitted(half, dice, groups)
    assert with_gaps.scales[0] == pytest.approx(whole.scales[0], rel=0.1)
    assert with_gaps.coefficients[0] == pytest.approx(whole.coefficients[0], rel=0.25)


@pytest.mark.parametrize("kind", ["a single case", "constant truth", "a sign that nobody computed"])
def test_a_cohort_that_tells_nothing_takes_no_sign_away(kind: str) -> None:
    signals, dice, groups = data()
    third = [number for number, group in enumerate(groups) if group == "easy"][: 1 if kind == "a single case" else 40]
    truth = [0.8 if kind == "constant truth" else dice[number] for number in third]
    seen = [{**signals[number]} for number in third]
    if kind == "a sign that nobody computed":
        seen = [{**one, "boundary_entropy": None} for one in seen]
    assert fitted([*signals, *seen], [*dice, *truth], [*groups, *["third"] * len(third)]).names == NAMES


def test_without_predictions_there_is_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        fitted([], [], [])


def test_signs_that_tell_nothing_give_no_estimate() -> None:
    """A model without signals would call all cases equally good."""
    signals, dice, groups = data()
    shuffled = [float(value) for value in np.random.default_rng(3).permutation(dice)]
    with pytest.raises(ValueError, match="none of the 2 signals"):
        fitted(signals, shuffled, groups)


def test_a_template_that_is_worse_than_another_of_its_cohort_shows() -> None:
    """Two trainings of one cohort, the second half of which is worse in sign and truth: inside each nothing is told."""
    rng = np.random.default_rng(2)
    good = [float(value) for value in rng.normal(2.0, 0.3, 100)]
    bad = [float(value) for value in rng.normal(0.0, 0.3, 100)]
    signals: list[dict[str, float | None]] = [{"expected_dice": sigmoid(value)} for value in [*good, *bad]]
    dice = [sigmoid(value + float(rng.normal(0, 0.3))) for value in [2.0] * 100 + [0.0] * 100]
    model = fit(signals, dice, ["first"] * 100 + ["second"] * 100, ["one kind"] * 200, ("expected_dice",), {})
    likely = model.likely([{"expected_dice": sigmoid(value)} for value in (2.0, 0.0)])
    assert likely[0] - likely[1] > 0.25, f"a likely Dice of {likely} for trainings of 0.88 and 0.5"


def test_groups_count_alike_whatever_their_size() -> None:
    signals, dice, groups = data()
    easy = [number for number, group in enumerate(groups) if group == "easy"]
    many = [*range(len(signals)), *easy * 5]
    larger = fitted([signals[n] for n in many], [dice[n] for n in many], [groups[n] for n in many])
    likely = [model.likely([signals[1]])[0] for model in (larger, model_of())]
    assert likely[0] == pytest.approx(likely[1], abs=0.05)


def test_a_missing_sign_counts_as_average() -> None:
    model = model_of()
    average = {"expected_dice": None, "boundary_entropy": None}
    assert model.likely([average]) == [pytest.approx(sigmoid(model.intercept))]


def test_a_likely_dice_is_a_dice() -> None:
    model = model_of()
    wild = [{"expected_dice": value, "boundary_entropy": 100 * value} for value in (-5.0, 0.0, 1.0, 7.0)]
    assert all(0 <= value <= 1 for value in model.likely(wild))


def test_nothing_in_nothing_out() -> None:
    assert model_of().likely([]) == []


def test_it_survives_its_file() -> None:
    model = replace(model_of(), error=0.04)
    assert QualityModel.from_json(model.to_json()) == model


@pytest.mark.parametrize(
    ("likely", "word"), [(HIGH, "high"), (HIGH - 0.01, "medium"), (MEDIUM, "medium"), (0.1, "low")]
)
def test_levels(likely: float, word: str) -> None:
    assert level(likely) == word


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_the_logit_of_the_ends_is_finite(dice: float) -> None:
    assert math.isfinite(logit(dice))


class TestRefit:
    def reviewed(self, count: int, shift: float) -> list[Reviewed]:
        """Cases whose Dice is what the model says, moved by `shift` in logits."""
        signals, _, _ = data(seed=7, count=count)
        model = model_of()
        return [Reviewed((one,), (sigmoid(logit(model.likely([one])[0]) + shift),)) for one in signals]

    def test_too_few_reviews_change_nothing(self) -> None:
        model = model_of()
        assert refitted(model, self.reviewed(ENOUGH - 1, 1.0)) is model

    def test_the_level_is_learned(self) -> None:
        model = refitted(model_of(), self.reviewed(ENOUGH, 1.0))
        assert model.intercept - model_of().intercept == pytest.approx(1.0, abs=0.3)

    def test_reviews_that_agree_change_little(self) -> None:
        model = refitted(model_of(), self.reviewed(20, 0.0))
        assert model.intercept == pytest.approx(model_of().intercept, abs=0.01)
        assert model.coefficients == pytest.approx(model_of().coefficients, abs=0.01)

    def test_its_error_is_measured_on_cases_that_were_left_out(self) -> None:
        """Noise that nobody can predict stays as error, however many coefficients there are."""
        rng = np.random.default_rng(0)
        noisy = [Reviewed(one.signals, (float(rng.uniform(0.4, 1.0)),)) for one in self.reviewed(12, 0.0)]
        start = replace(model_of(), error=0.05)
        assert refitted(start, noisy).error > start.error + 0.03

    def test_a_small_error_elsewhere_does_not_make_ones_own_look_smaller(self) -> None:
        """From ten measured cases on what was found here counts, if it is worse."""
        rng = np.random.default_rng(0)
        noisy = [Reviewed(one.signals, (float(rng.uniform(0.2, 1.0)),)) for one in self.reviewed(20, 0.0)]
        far, near = (refitted(replace(model_of(), error=error), noisy).error for error in (0.01, 0.1))
        assert far == pytest.approx(near, abs=1e-6) and far > 0.15

    def test_what_nobody_measured_does_not_make_it_smaller(self) -> None:
        """Accepted cases are taught what was expected of them: that it comes true says nothing."""
        start = replace(model_of(), error=0.05)
        accepted = [replace(one, measured=False) for one in self.reviewed(12, 0.0)]
        assert refitted(start, accepted).error == start.error


class TestShipped:
    def test_it_says_what_it_was_fitted_on(self) -> None:
        assert {"cohorts", "trainings", "rows", "commits", "command"} <= set(shipped().origin)

    def test_its_error_was_measured(self) -> None:
        assert 0 < shipped().error < 0.2

    def test_a_prediction_that_agrees_with_everything_is_better_than_one_that_does_not(self) -> None:
        good = {name: 0.1 if name in DOUBTS else 0.95 for name in shipped().names}
        bad = {name: 0.8 if name in DOUBTS else 0.4 for name in shipped().names}
        assert shipped().likely([good])[0] > shipped().likely([bad])[0] + 0.1
