"""The whole method, top to bottom: one labelled volume in, a segmented cohort out (after SemiSAM-O1).

    cut          where scans show much more than what is labelled: what lies around it
    plan         spacing, patch, network: computed from the pool's images and the template's label
    propagate    carry the template's label to every case
    link         register every case with those that look most like it
    answer       propagation, and the vote of linked cases                                       -> round 0
    estimate     how good each answer is, from signals that need no reference
    for each round r = 1..R:
        train    the specialist further on the template and the current pseudo-labels
        predict  every case
        judge    after the last round: do grey values lead this network away from what was drawn?
        answer   prediction, propagation, and the vote of linked cases; with uncertainty         -> round r
        estimate as above
        refine   the answers that a check does not find worse become pseudo-labels
    keep         what further scans are segmented with
    score        labelled cases, segmented as if they were further scans: what was learned of them

Every stage leaves whole files in the store; a run that is started again on the same store skips what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from .answers import answer
from .carrying import propagate
from .cases import CaseResult, EngineCase, LabelledCase
from .cohort import Cohort
from .config import TrainingConfig
from .data.store import Store
from .devices import make_fabric
from .edge_worth import judge_grey_values
from .evaluation.metrics import dice
from .evaluation.signals import cohort_signals
from .further import FinishedRun
from .inference.ensemble import predicted_where_it_fits
from .inference.uncertainty import case_scores, to_case_grid
from .learners import Learner, learner_named
from .library import keep_library
from .linking import link
from .memory import cases_at_once, usable_memory
from .observer import Observer, PartOfMore, Silent
from .planning import Plan, make_plan, plan_to_json
from .progress import Progress
from .propagation.descriptors import working_spacing
from .propagation.registry import require_generalists
from .ranks import Ranks, started_together
from .refinement import refine_cohort, write_pseudo_label
from .refinement.fusion import running_mean
from .round_training import CohortJudge, train_specialist
from .sampling import require_shares
from .specialists import make_specialist, require_specialist
from .surroundings import CUT_OFF, SHARE, find_surroundings

#: Bytes that a case's result takes on its way, for each voxel of its own grid.
_BYTES = 60


def run(
    cases: Sequence[EngineCase],
    labelled: Sequence[LabelledCase],
    classes: int,
    config: TrainingConfig,
    store: Store,
    observer: Observer,
    completed: int = -1,
    features: Path | None = None,
    judge: CohortJudge | None = None,
    together: bool = False,
) -> Iterator[CaseResult]:
    """Segment a cohort from its labelled cases.

    Args:
        cases: unlabelled scans; no label of theirs exists for the engine.
        labelled: at least one labelled case, the template first.
        classes: number of classes, background included.
        config: every parameter.
        store: folder for everything between the stages.
        observer: gets progress, and is asked whether to stop.
        completed: a resumed run does not yield the results of this round and earlier ones again.
        features: folder where a generalist's features are kept over runs; None: they are not kept.
        judge: chooses the best weights of a round on labelled scans, as the published protocol does; None: the last
            weights are used.
        together: share the work with the processes that torchrun or srun started with this one; they share the store.

    Yields:
        a result for every case and round, round 0 first; in the first process only.

    Raises:
        ValueError: no cases, no labelled case, an empty template, or a device, learner or specialist that is not there.
        Stopped: the observer asked for it.
    """
    _require_scans(cases, labelled, classes)
    require_generalists(config)
    fabric = make_fabric(config.device, "32-true", together)  # the plan knows the precision
    ranks = Ranks(fabric)
    if config.rounds:  # unknown names and absent checkpoints are refused before anything is written
        learner_named(config.learner).load_or_refuse(config, fabric.device, observer)
        require_specialist(config.specialist)
    parts = find_surroundings(cases, labelled, classes, config, store, fabric, observer)
    scans = {case.id: case.geometry for case in cases}
    whole, cases = labelled, [parts.case(case) for case in cases]
    labelled = [parts.labelled(case) for case in labelled]
    plan = plan_of(cases, labelled, classes, config, store, fabric, whole[0])
    if plan.precision != "32-true":
        fabric = make_fabric(config.device, plan.precision, together)
    if config.rounds:
        require_shares(plan, ranks.count)
        make_specialist(config.specialist, plan, learner_named(config.learner).with_distance)
    cohort = Cohort(cases, labelled, plan, store)
    done, on_gpu = SHARE if parts.boxes else 0.0, fabric.device.type != "cpu"
    progress = Progress(observer, cohort, config, done, on_gpu)

    def on_whole_scans(number: int) -> Iterator[CaseResult]:
        for found in results(cohort, number, progress):
            if number == config.rounds and parts.cuts_off(found, scans[found.case_id]):
                observer.event("warning", text=f"{found.case_id}: {CUT_OFF}")
            yield parts.in_whole(found, scans[found.case_id])

    propagate(cohort, config, fabric, progress, features)
    link(cohort, config, fabric, progress)
    answer(cohort, 0, config, fabric, progress)
    first_pseudo_labels(cohort, config, ranks, progress)
    estimate_quality(cohort, 0, config, ranks, progress)
    if completed < 0 and ranks.first:
        yield from on_whole_scans(0)

    for number in range(1, config.rounds + 1):
        trained, fabric = train_specialist(cohort, number, config, fabric, progress, judge)
        predict(cohort, number, trained, config, fabric, progress)
        judge_grey_values(cohort, number, trained, config, fabric, progress.observer)
        answer(cohort, number, config, fabric, progress)
        estimate_quality(cohort, number, config, ranks, progress)
        if number > completed and ranks.first:
            yield from on_whole_scans(number)
        if number < config.rounds:
            refine(cohort, number, config, ranks, progress)
    keep_library(cohort, config.rounds, config, observer, ranks)
    if config.rounds:
        score_labelled_cases(cohort, whole, config, fabric, progress, features)
    progress.finish()


def _require_scans(cases: Sequence[EngineCase], labelled: Sequence[LabelledCase], classes: int) -> None:
    """Raise ValueError, which says what to do, where there is nothing to segment, or nothing to learn from."""
    if not labelled:
        raise ValueError("no labelled case: label one scan, the template, before training")
    if classes < 2 or not labelled[0].label.array.any():
        raise ValueError(f"the label of the template {labelled[0].id!r} is empty: paint at least one segment")
    if not cases:
        raise ValueError("no unlabelled case to segment: add scans to the project")


def plan_of(
    cases: Sequence[EngineCase],
    labelled: Sequence[LabelledCase],
    classes: int,
    config: TrainingConfig,
    store: Store,
    fabric: Fabric,
    template: LabelledCase | None = None,
) -> Plan:
    """The plan in plan.json; computed and written down first.

    Grids are those of what is used of the scans. What grey values mean the template says as it is (None: the first
    labelled case is all of it): the air around a body, by which CT is known, may have been cut away.
    """
    template = template or labelled[0]
    geometries = [case.geometry for case in cases] + [case.image.geometry for case in labelled]

    def compute() -> object:
        spacing = working_spacing(geometries, config.registration.largest_grid)
        memory = usable_memory(fabric.device, started_together()[1] if fabric.world_size > 1 else 1)
        kind = fabric.device.type
        plan = make_plan(
            geometries, template.image, template.label.array, classes, config, spacing, kind, memory, fabric.world_size
        )
        return plan_to_json(plan)

    ranks = Ranks(fabric)
    ranks.once(lambda: store.once(compute, "plan.json"))
    return Plan.model_validate(store.json("plan.json"))


def first_pseudo_labels(cohort: Cohort, config: TrainingConfig, ranks: Ranks, progress: Progress) -> None:
    """Round 0's answers become the pseudo-labels of round 1, if there is one."""
    if not config.rounds:
        return

    def write(case_id: str) -> None:
        if not cohort.store.has("weights-of-voxels", "1", f"{case_id}.npy"):
            write_pseudo_label(cohort, 0, case_id, cohort.answer(0, case_id), config)

    for _ in ranks.each(write, cohort.ids, progress.observer, cohort.at_once()):
        pass


def predict(
    cohort: Cohort, number: int, learner: Learner, config: TrainingConfig, fabric: Fabric, progress: Progress
) -> None:
    """Class probabilities of every case by the running average; with `ensemble_rounds` averaged with earlier rounds."""
    plan, observer, passes = cohort.plan, progress.observer, config.test_time_passes
    for position, case_id in Ranks(fabric).share(cohort.ids, progress.observer):
        names = ("probabilities", str(number), f"{case_id}.npy")
        if not cohort.store.has(*names):
            image, model = cohort.image(case_id), learner.inference_model()
            seed, what = config.seed + position, f"prediction of {case_id}"
            found, agreement = predicted_where_it_fits(model, image, plan, fabric, passes, seed, observer, what)
            if config.ensemble_rounds and number > 1:
                found = running_mean(np.asarray(cohort.probabilities(number - 1, case_id)), found, number)
            cohort.store.save_json(agreement.dice, "passes", str(number), f"{case_id}.json")
            cohort.store.save_array(found, *names)
        progress.step(f"prediction {number}", position + 1, len(cohort.ids))


def estimate_quality(cohort: Cohort, number: int, config: TrainingConfig, ranks: Ranks, progress: Progress) -> None:
    """Signals of how good a round's answers are."""
    kept = ranks.first and all(cohort.store.has("signals", str(number), f"{one}.json") for one in cohort.ids)
    if not ranks.as_first(kept):
        step = partial(progress.step, f"signals {number}")
        cohort_signals(cohort, number, config, progress.observer, ranks, step)


def refine(cohort: Cohort, number: int, config: TrainingConfig, ranks: Ranks, progress: Progress) -> None:
    """Pseudo-labels of the next round; with refinement 'none' the prediction itself becomes the pseudo-label."""
    names = ("refinement", f"{number}.json")
    if not ranks.as_first(ranks.first and cohort.store.has(*names)):
        step = partial(progress.step, f"refinement {number}")
        found = refine_cohort(cohort, number, config, progress.observer, ranks, step)
        ranks.once(lambda: cohort.store.save_json(found.to_json(), *names))


def score_labelled_cases(
    cohort: Cohort,
    labelled: Sequence[LabelledCase],
    config: TrainingConfig,
    fabric: Fabric,
    progress: Progress,
    features: Path | None,
) -> None:
    """Predict the labelled cases (as they are) besides the template, to say what was learned: Dice with their labels.

    They are predicted as the others are, with what is carried over from the template, but not from themselves.
    `labelled.json` in the store: case -> Dice of the classes 1 .. C - 1; None for a class that the label says nothing
    about.
    """
    ranks, store, classes, observer = Ranks(fabric), cohort.store, cohort.plan.classes, progress.observer
    here = config.model_copy(update={"device": str(fabric.device)})  # each process has a device of its own
    run = FinishedRun(labelled[:1], classes, here, store, PartOfMore(observer), features)
    for position, case in ranks.share(labelled[1:], observer):
        if not store.has("looked-at", f"{case.id}.json"):
            answer, label = run.segment(case.image).prediction.array, case.label.array
            found = [
                None if value in case.unknown else dice(answer == value, label == value) for value in range(1, classes)
            ]
            store.save_json(found, "looked-at", f"{case.id}.json")
        progress.step("looking again", position + 1, len(labelled) - 1)

    def joined() -> dict[str, list[float | None]]:
        return {case.id: store.json("looked-at", f"{case.id}.json") for case in labelled[1:]}

    ranks.once(lambda: store.once(joined, "labelled.json"))


def results(cohort: Cohort, number: int, progress: Progress) -> Iterator[CaseResult]:
    """A round's results on every case's own grid."""

    def result(case: EngineCase) -> CaseResult:
        signals = cohort.store.json("signals", str(number), f"{case.id}.json")
        seen = np.asarray(cohort.confidence(case.id), np.float32) > 0
        probabilities = cohort.answer(number, case.id)
        prediction, uncertainty = to_case_grid(probabilities, cohort.grid(case.geometry), seen, case.geometry)
        scores = case_scores(prediction, uncertainty, cohort.plan.classes)
        for value, row in scores["classes"].items():
            row["signals"] = signals[int(value) - 1]
        return CaseResult(number, case.id, prediction, uncertainty, scores)

    doubts = []
    voxels = max((case.geometry.voxels for case in cohort.cases), default=1)
    at_once = min(cohort.at_once(), cases_at_once(_BYTES * voxels))
    for position, found in Ranks().each(result, cohort.cases, Silent(), at_once):  # a round is not left half-told
        doubt = found.scores["label_uncertainty"]
        doubts += [doubt] if doubt is not None else []
        yield found
        progress.step(f"results {number}", position + 1, len(cohort.cases))
    mean = round(float(np.mean(doubts)), 4) if doubts else None
    progress.observer.event("round", round=number, cases=len(cohort.cases), label_uncertainty=mean)
