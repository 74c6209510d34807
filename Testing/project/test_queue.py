"""The queue: what is offered next, the random fifth, the honest mean and its interval, the advice, and its speed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from review_lines import write_line
from scans import OBLIQUE

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.project import Project, Review, Role, reviews
from SemiSAMO1Lib.project.cases import Case
from SemiSAMO1Lib.project.queue import EVERY, FEWEST, Advice, advice, queue, random_order, score
from SemiSAMO1Lib.project.results import predictions, quality
from SemiSAMO1Lib.project.session import Session
from SemiSAMO1Lib.project.training import reasons_against_training
from SemiSAMO1Lib.quality import ENOUGH, shipped


def predicted(folder: Path, scores: dict[str, dict[str, Any]]) -> Project:
    """A project whose cases have these scores in the results of a finished training; there are no images."""
    project = Project.create(folder)
    cases = tuple(Case(name, f"{name}.nrrd", f"/{name}.nrrd", name, OBLIQUE) for name in scores)
    project.change(lambda state: replace(state, cases=cases))
    job = JobFolder.create(project.jobs, JobKind.TRAIN, {}, [])
    rows = [{"case": case, "scores": one, "prediction": f"{case}.seg.nrrd"} for case, one in scores.items()]
    files.write_json(job.index, {"round": 1, "cases": rows, "skipped": []})
    reviews.finish_training(project, job.id)
    return project


def found(quality_of_it: float) -> dict[str, Any]:
    """Scores of a case whose one label has these signals; the larger the better."""
    signals = {"expected_dice": quality_of_it, "boundary_entropy": 1 - quality_of_it}
    return {"label_uncertainty": 0.3, "labels": {"1": {"signals": signals}}}


@pytest.fixture
def few(tmp_path: Path) -> Project:
    """Nothing found in e, then c and d alike, b the best."""
    nothing = {"label_uncertainty": None, "labels": {"1": {"signals": {"expected_dice": 0.0}}}}
    return predicted(tmp_path / "few", {"b": found(0.9), "c": found(0.5), "d": found(0.5), "e": nothing})


@pytest.fixture
def forty(tmp_path: Path) -> Project:
    """Forty cases, case_00 the worst."""
    return predicted(tmp_path / "forty", {f"case_{n:02d}": found(0.3 + n / 100) for n in range(40)})


def decide(project: Project, case: str, dice: float | None, after: str = "corrected") -> None:
    """A decision as the review writes it, without a label file."""
    before = project.refresh().case(case)
    has_label = after in ("accepted", "corrected")
    project.restore(case, Review(after), Role.LABELLED if has_label else before.role, 1 if has_label else None)
    facts: dict[str, Any] = {"training": project.state.current_training}
    if dice is not None:
        row = predictions(project)[case]["scores"]["labels"]["1"]
        facts |= {"dice": {"1": dice}, "signals": {"1": row["signals"]}}
    write_line(project, case, before.review, after, **facts)


def reject_with_signals(project: Project, case: str) -> None:
    """A rejection as the review writes it."""
    before = project.refresh().case(case)
    project.restore(case, Review.REJECTED, before.role, None)
    signals = {"1": predictions(project)[case]["scores"]["labels"]["1"]["signals"]}
    facts = {"training": project.state.current_training, "signals": signals}
    write_line(project, case, before.review, "rejected", **facts)


def pretend_decided(project: Project, training: str, dice: Mapping[str, float]) -> None:
    """A new training whose cases were all corrected, in this order: the lines of the history alone."""
    project.change(lambda state: replace(state, current_training=training))
    files.write_text(project.reviews, "")
    for case, value in dice.items():
        facts: dict[str, Any] = {"training": training, "dice": {"1": value}}
        write_line(project, case, "not_seen", "corrected", **facts)


def names(project: Project) -> list[str]:
    return [one.case for one in queue(project)]


class TestOrder:
    def test_the_worst_comes_first_ties_by_name(self, few: Project) -> None:
        assert names(few) == ["e", "c", "d", "b"], "nothing found is the worst"

    def test_skipped_cases_are_at_its_end(self, few: Project) -> None:
        reviews.skip(few, "e")
        assert names(few) == ["c", "d", "b", "e"]

    def test_decided_cases_are_not_in_it(self, few: Project) -> None:
        decide(few, "c", 0.9, "accepted")
        reviews.reject(few, "d")
        assert names(few) == ["e", "b"]

    def test_drafts_wait_for_their_end(self, few: Project) -> None:
        reviews.begin_draft(few, "e")
        assert names(few) == ["e", "c", "d", "b"]

    def test_excluded_cases_are_not_in_it(self, few: Project) -> None:
        few.change(
            lambda s: replace(s, cases=tuple(replace(c, role=Role.EXCLUDED) if c.id == "e" else c for c in s.cases))
        )
        assert names(few) == ["c", "d", "b"]

    def test_cases_that_were_labelled_without_a_review_do_not_wait(self, few: Project) -> None:
        def labelled(state: Any) -> Any:
            cases = (replace(case, role=Role.LABELLED) if case.id == "e" else case for case in state.cases)
            return replace(state, cases=tuple(cases))

        few.change(labelled)
        assert names(few) == ["c", "d", "b"]

    def test_before_a_training_it_is_empty(self, tmp_path: Path) -> None:
        assert queue(Project.create(tmp_path / "new")) == []

    def test_results_of_an_older_program_are_ranked_by_certainty(self, tmp_path: Path) -> None:
        old = {"a": {"label_uncertainty": 0.1}, "b": {"label_uncertainty": 0.6, "labels": {"1": {"volume_ml": 1.0}}}}
        assert names(predicted(tmp_path / "old", old)) == ["b", "a"]


class TestOfASession:
    """What an open project shows is made once, and anew when something changed."""

    @pytest.fixture
    def session(self, few: Project) -> Session:
        session = Session()
        session.open(few.folder)
        return session

    def waiting(self, session: Session) -> list[str]:
        session.poll()
        return [one.case for one in session.waiting()]

    def test_it_is_the_projects_queue(self, session: Session, few: Project) -> None:
        assert self.waiting(session) == [one.case for one in queue(few)]

    def test_somebody_elses_decision_takes_a_case_out(self, session: Session, few: Project) -> None:
        before = self.waiting(session)
        decide(few, "c", 0.8)
        assert self.waiting(session) == [case for case in before if case != "c"]

    def test_a_skipped_case_comes_last(self, session: Session, few: Project) -> None:
        before = self.waiting(session)
        reviews.skip(few, before[0])
        assert self.waiting(session) == [*before[1:], before[0]]

    def test_an_excluded_case_is_out_and_an_included_one_in_again(self, session: Session, few: Project) -> None:
        before = self.waiting(session)
        few.exclude("d")
        without = self.waiting(session)
        few.include("d")
        assert (without, self.waiting(session)) == ([case for case in before if case != "d"], before)

    def test_another_project_has_its_own(self, session: Session, forty: Project) -> None:
        self.waiting(session)
        session.open(forty.folder)
        assert self.waiting(session) == [one.case for one in queue(forty)]


def test_predictions_that_were_written_anew_are_read_anew(few: Project) -> None:
    predictions(few)
    index = few.jobs / str(few.state.current_training) / "results" / "index.json"
    rows = files.read_json(index)
    files.write_json(index, {**rows, "cases": rows["cases"][:1]})
    assert len(predictions(few)) == 1


class TestRandomFifth:
    def test_every_fifth_is_drawn_and_marked(self, forty: Project) -> None:
        """... unless chance drew a case that was offered before, as one of the worst: then that one is marked."""
        offered = queue(forty)
        names_in_order = [one.case for one in offered]
        draws = random_order(names_in_order, forty.state.current_training)
        for rank, place in enumerate(range(EVERY - 1, len(offered), EVERY)):
            before = names_in_order[: place + 1]
            assert draws[rank] in before, f"the draw of place {place} was not offered by then"
            fresh = draws[rank] not in before[:-1]
            assert offered[place].random or not fresh, f"{offered[place].case} is offered by chance and not marked"

    def test_the_others_are_the_worst_first(self, forty: Project) -> None:
        others = [one.case for one in queue(forty) if not one.random]
        assert others == sorted(others)

    def test_the_order_stays_while_it_is_worked_off(self, forty: Project) -> None:
        planned = names(forty)
        for place in range(12):
            assert names(forty) == planned[place:], f"after {place} decisions the rest is offered in another order"
            decide(forty, planned[place], 0.8)

    def test_the_draw_does_not_look_at_quality(self, tmp_path: Path) -> None:
        """Over many cohorts the cases drawn first have the mean quality of all."""
        ids = [f"case_{n:02d}" for n in range(40)]
        drawn = [int(case[-2:]) for seed in range(400) for case in random_order(ids, str(seed))[:5]]
        assert np.mean(drawn) == pytest.approx(19.5, abs=1.0)

    def test_another_training_draws_others(self) -> None:
        ids = [f"case_{n:02d}" for n in range(40)]
        assert random_order(ids, "0002-train") != random_order(ids, "0003-train")


class TestScore:
    def review(self, project: Project, count: int, dice: Any) -> None:
        for case in names(project)[:count]:
            decide(project, case, dice(case))

    def test_a_few_say_nothing(self, forty: Project) -> None:
        self.review(forty, EVERY * FEWEST - 1, lambda _: 0.8)
        assert score(forty) is None

    def test_the_worst_first_do_not_pull_it_down(self, forty: Project) -> None:
        """Cases that were offered because they are bad have Dice 0.2, drawn ones 0.9: the mean is 0.9."""
        drawn = {one.case for one in queue(forty)[: EVERY * FEWEST] if one.random}
        self.review(forty, EVERY * FEWEST, lambda case: 0.9 if case in drawn else 0.2)
        result = score(forty)
        assert result is not None and result.mean == pytest.approx(0.9) and result.reviewed == FEWEST

    def test_the_interval_holds_the_truth_as_often_as_it_says(self, tmp_path: Path) -> None:
        """Over 60 orders of chance at least 52 of the 95 % intervals hold the true mean."""
        rng = np.random.default_rng(0)
        truth = {f"case_{n:02d}": float(rng.normal(0.8, 0.08)) for n in range(40)}
        project = predicted(tmp_path / "p", {case: found(0.5) for case in truth})
        rated = quality(project, predictions(project))
        held = 0
        for seed in range(60):
            training = f"{seed:04d}-train"
            chosen = random_order(truth, training)[:8] + sorted(truth)[:32]
            pretend_decided(project, training, {case: truth[case] for case in chosen})
            result = score(project, rated)
            assert result is not None
            held += result.low <= np.mean(list(truth.values())) <= result.high
        assert held >= 52, f"{held} of 60 intervals hold the mean"

    @pytest.mark.parametrize("draws", [3, 5, 8])
    def test_the_interval_holds_also_where_some_predictions_fail(self, tmp_path: Path, draws: int) -> None:
        """Three of ten predictions have Dice 0.6, the others were accepted: 85 of 100 intervals hold the mean."""
        truth = {f"case_{n:02d}": 0.6 if n % 10 < 3 else 1.0 for n in range(60)}
        project = predicted(tmp_path / "p", {case: found(0.5) for case in truth})
        rated = quality(project, predictions(project))
        held = 0
        for seed in range(100):
            training = f"{seed:04d}-train"
            chosen = random_order(truth, training)[:draws]
            others = [case for case in truth if case not in chosen][: draws * (EVERY - 1)]
            pretend_decided(project, training, {case: truth[case] for case in (*chosen, *others)})
            result = score(project, rated)
            assert result is not None and result.reviewed == draws
            held += result.low <= 0.88 <= result.high
        assert held >= 85, f"{held} of 100 intervals hold the mean"

    def test_rare_failures_are_not_called_good(self, tmp_path: Path) -> None:
        """One of ten predictions failed, the others were accepted: what eight drawn ones show is seldom too good."""
        truth = {f"case_{n:02d}": 0.3 if n % 10 == 0 else 1.0 for n in range(60)}
        project = predicted(tmp_path / "p", {case: found(0.5) for case in truth})
        rated = quality(project, predictions(project))
        too_good = 0
        for seed in range(100):
            training = f"{seed:04d}-train"
            chosen = random_order(truth, training)[:8]
            others = [case for case in truth if case not in chosen][: 8 * (EVERY - 1)]
            pretend_decided(project, training, {case: truth[case] for case in (*chosen, *others)})
            result = score(project, rated)
            assert result is not None and result.reviewed == 8
            too_good += result.low > np.mean(list(truth.values()))
        assert too_good <= 5, f"{too_good} of 100 intervals lie above the mean"

    def test_a_drawn_case_that_is_skipped_is_not_passed_over(self, forty: Project) -> None:
        """The mean waits for it: leaving out the hard ones would raise it."""
        drawn = random_order((case.id for case in forty.state.cases), forty.state.current_training)[0]
        for case in names(forty)[: EVERY * (FEWEST + 1)]:
            if case != drawn:
                decide(forty, case, 0.9)
        assert score(forty) is None

    def test_a_drawn_case_that_somebody_labelled_without_a_review_is_none_of_them(self, forty: Project) -> None:
        """Nobody can decide about it any more: the mean must not wait for it."""
        first = random_order((case.id for case in forty.state.cases), forty.state.current_training)[0]

        def labelled(state: Any) -> Any:
            cases = (replace(case, role=Role.LABELLED) if case.id == first else case for case in state.cases)
            return replace(state, cases=tuple(cases))

        forty.change(labelled)
        self.review(forty, EVERY * FEWEST, lambda _: 0.8)
        known = score(forty)
        assert known is not None and known.cases == 39 and first not in advice(forty).reason

    def test_nor_is_one_that_was_decided_by_an_earlier_prediction(self, forty: Project) -> None:
        """Accepted while the training ran that predicted it again."""
        first = random_order((case.id for case in forty.state.cases), forty.state.current_training)[0]
        before = forty.state.case(first)
        forty.restore(first, Review.ACCEPTED, Role.LABELLED, None)
        write_line(forty, first, before.review, "accepted", training="0000-train", dice={"1": 1.0})
        self.review(forty, EVERY * FEWEST, lambda _: 0.8)
        known = score(forty)
        assert known is not None and known.cases == 39 and first not in advice(forty).reason

    def test_a_rejected_prediction_counts_nothing(self, forty: Project) -> None:
        for one in queue(forty)[: EVERY * FEWEST]:
            decide(forty, one.case, None if one.random else 0.9, "rejected" if one.random else "corrected")
        result = score(forty)
        assert result is not None and result.mean == 0

    def test_when_all_are_reviewed_nothing_is_uncertain(self, tmp_path: Path) -> None:
        project = predicted(tmp_path / "p", {f"case_{n:02d}": found(0.5) for n in range(8)})
        for number in range(8):
            decide(project, f"case_{number:02d}", 0.5 + number / 100)
        result = score(project)
        assert result is not None and result.reviewed == 8
        assert result.low == result.mean == result.high == pytest.approx(0.535)


class TestAdvice:
    def verdict(self, project: Project) -> Advice:
        return advice(project)

    def test_before_a_training_there_is_nothing_to_say(self, tmp_path: Path) -> None:
        assert self.verdict(Project.create(tmp_path / "new")) == Advice("train", "there are no predictions yet")

    def test_first_one_reviews(self, forty: Project) -> None:
        assert self.verdict(forty).verdict == "review"

    def test_three_corrections_are_worth_a_training(self, forty: Project) -> None:
        for case in names(forty)[:3]:
            decide(forty, case, 0.7)
        assert self.verdict(forty).verdict == "train"

    def test_good_random_cases_are_enough(self, forty: Project) -> None:
        for case in names(forty):
            decide(forty, case, 0.97, "accepted")
        assert self.verdict(forty).verdict == "enough"

    def test_of_all_cases_the_mean_is_known(self, few: Project) -> None:
        for case in names(few):
            decide(few, case, 0.97, "accepted")
        found = self.verdict(few)
        assert (found.verdict, found.reason) == ("enough", "the mean Dice of all 4 predictions is 0.97; 0.90 is enough")

    def test_it_says_how_many_decisions_show_how_good_they_are(self, forty: Project) -> None:
        for case in names(forty)[:3]:
            decide(forty, case, 0.7)
        found = self.verdict(forty)
        assert found.verdict == "train" and f"a mean is shown after {FEWEST * EVERY - 3} more decisions" in found.reason

    def test_three_that_were_accepted_are_not_enough(self, forty: Project) -> None:
        """Accepted means Dice 1: three of them are alike by nature and know nothing of the others."""
        for case in names(forty)[: EVERY * FEWEST]:
            decide(forty, case, 1.0, "accepted")
        assert self.verdict(forty).verdict == "review"

    def test_rejections_alone_are_not_enough(self, few: Project) -> None:
        for case in ("b", "c", "d", "e"):
            decide(few, case, None, "rejected")
        assert advice(few).verdict == "train" and "4 predictions were rejected" in advice(few).reason

    def test_it_says_which_drawn_case_the_mean_waits_for(self, forty: Project) -> None:
        drawn = random_order(predictions(forty), forty.state.current_training)[0]
        others = [case for case in names(forty) if case != drawn]
        for case in others[: FEWEST * EVERY]:
            decide(forty, case, 0.5, "accepted")
        assert f"{drawn}, drawn at random, is decided" in advice(forty).reason

    def train_again(self, project: Project, known: list[str]) -> None:
        """A further training that learned from the labels of these cases, and predicted what the one before did."""
        current = project.state.current_training
        job = JobFolder.create(project.jobs, JobKind.TRAIN, {}, [])
        files.write_json(job.index, files.read_json(project.jobs / str(current) / "results" / "index.json"))
        files.write_json(job.inputs / "cases.json", {"labelled": [{"id": case, "version": 1} for case in known]})
        reviews.finish_training(project, job.id)

    def test_corrections_that_the_training_learned_from_count_no_more(self, forty: Project) -> None:
        corrected = names(forty)[:3]
        for case in corrected:
            decide(forty, case, 0.7)
        self.train_again(forty, corrected)
        assert self.verdict(forty).verdict == "review"

    def test_corrections_made_while_it_trained_count_still(self, forty: Project) -> None:
        """They were decided about the training before, and the new one does not know them."""
        for case in names(forty)[:3]:
            decide(forty, case, 0.7)
        self.train_again(forty, [])
        assert self.verdict(forty).verdict == "train"

    def test_where_every_scan_has_a_label_no_training_is_advised(self, few: Project) -> None:
        """There is nothing left to segment: a training would be refused."""
        for case in ("b", "c", "d", "e"):
            decide(few, case, 0.7)
        assert any("no unlabelled scan" in one for one in reasons_against_training(few, thorough=False))
        assert self.verdict(few).verdict == "enough" and "add scans" in self.verdict(few).reason


class TestLikelyQuality:
    def test_it_is_not_checked_until_enough_are_reviewed(self, forty: Project) -> None:
        checked = []
        for case in names(forty)[:ENOUGH]:
            decide(forty, case, 0.9)
            checked.append(quality(forty, predictions(forty)).checked)
        assert checked == [False] * (ENOUGH - 1) + [True]

    def test_reviews_move_it_to_what_was_found(self, forty: Project) -> None:
        """Every prediction was better than it looked: after enough reviews the rest is believed to be, too."""
        before = quality(forty, predictions(forty)).estimates["case_39"].likely
        for case in names(forty)[:ENOUGH]:
            decide(forty, case, 0.97)
        after = quality(forty, predictions(forty)).estimates["case_39"].likely
        assert before is not None and after is not None and after > before

    def test_accepting_teaches_no_more_than_that_it_was_good_enough(self, forty: Project) -> None:
        for case in names(forty)[: 2 * ENOUGH]:
            decide(forty, case, 1.0, "accepted")
        likely = [one.likely for one in quality(forty, predictions(forty)).estimates.values()]
        assert max(value for value in likely if value is not None) < 0.95, "accepted was taken for perfect"

    def test_ten_accepted_cases_do_not_make_it_exact(self, forty: Project) -> None:
        before = quality(forty, predictions(forty)).error
        for case in names(forty)[:ENOUGH]:
            decide(forty, case, 1.0, "accepted")
        found = quality(forty, predictions(forty))
        assert found.checked and found.error == pytest.approx(before), "nobody measured anything"

    def test_rejections_lower_it(self, forty: Project) -> None:
        best = list(reversed(names(forty)))
        before = quality(forty, predictions(forty)).estimates
        for case in best[:ENOUGH]:
            reject_with_signals(forty, case)
        found = quality(forty, predictions(forty))
        assert found.reviewed == ENOUGH
        assert found.estimates[best[-1]].likely < before[best[-1]].likely  # type: ignore[operator]

    def test_a_case_teaches_once(self, forty: Project) -> None:
        for case in names(forty)[:5]:
            for after in ("accepted", "draft", "corrected"):
                decide(forty, case, 0.8 if after != "draft" else None, after)
        assert quality(forty, predictions(forty)).reviewed == 5

    def test_a_decision_that_was_taken_back_teaches_nothing(self, forty: Project) -> None:
        for case in names(forty)[:ENOUGH]:
            decide(forty, case, 0.9)
        reviews.undo(forty, next(iter(forty.state.cases)).id)
        assert quality(forty, predictions(forty)).reviewed == ENOUGH - 1


@pytest.mark.alone
class TestFiveHundredCases:
    """Each below 50 ms, project.json below 100 ms: the best of some, as other work runs on shared machines; time of the
    processor where nothing is written."""

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Four labels each, with all signals that a training writes; the worst four hundred are decided. Read only."""
        signals = dict.fromkeys(shipped().names, 0.5)
        labels = {str(value): {"signals": signals, "volume_ml": 1.0, "uncertainty": 0.2} for value in (2, 3, 4)}

        def scores(quality_of_it: float) -> dict[str, Any]:
            first = {"signals": {**signals, "expected_dice": quality_of_it}}
            return {"label_uncertainty": 0.3, "labels": {"1": first, **labels}}

        folder = tmp_path_factory.mktemp("many") / "project"
        project = predicted(folder, {f"case_{n:03d}": scores(0.3 + n / 1000) for n in range(500)})
        for case in names(project)[:400]:
            decide(project, case, 0.8)
        return folder

    @pytest.fixture
    def many(self, made: Path, tmp_path: Path) -> Project:
        shutil.copytree(made, tmp_path / "project")
        return Project(tmp_path / "project")

    def best(self, act: Any, clock: Any = time.process_time, of: int = 5) -> float:
        times = []
        for _ in range(of):
            began = clock()
            act()
            times.append(clock() - began)
        return 1000 * min(times)

    def test_the_queue(self, many: Project) -> None:
        rated = quality(many, predictions(many))
        assert self.best(lambda: queue(many, rated)) < 50

    def test_the_estimates(self, many: Project) -> None:
        rows = predictions(many)
        assert self.best(lambda: quality(many, rows)) < 50

    def test_the_list_after_a_decision(self, many: Project) -> None:
        """What the panel does: the results are not read again, the estimates are made anew, and the queue."""
        session = Session()
        session.open(many.folder)
        waiting = [one.case for one in session.waiting()]
        times = []
        for case in waiting[:5]:
            decide(many, case, 0.8)
            session.poll()
            began = time.process_time()
            session.waiting()
            times.append(1000 * (time.process_time() - began))
        assert min(times) < 50

    def test_a_change_of_state(self, many: Project) -> None:
        waiting = iter(names(many))
        assert self.best(lambda: reviews.skip(many, next(waiting)), time.perf_counter, 20) < 50

    def test_writing_the_project(self, many: Project) -> None:
        assert self.best(lambda: many.change(lambda state: state), time.perf_counter, 20) < 100
