"""What a round says in the end: the network, what was propagated, and the cases that look alike, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from numpy.typing import NDArray
from scipy import ndimage

from ..costs import TRIED
from ..volume import Volume
from .cases import LabelledCase
from .cohort import Cohort
from .config import TrainingConfig
from .data.store import Store
from .edge_worth import edge_weight_of
from .edges import by_edges
from .evaluation.metrics import dice
from .inference.uncertainty import voxel_entropy
from .linking import has_links
from .memory import or_on_cpu
from .observer import Observer
from .progress import Progress
from .propagation.links import Link, carried
from .ranks import Ranks
from .refinement.check import Check, believed, check_of, checks_of
from .refinement.fusion import weighted_mean

#: Least weight of what is there in any case.
_LEAST = 1e-2

#: The votes' share beside a network, as a part of `neighbour_share`: the smallest and the largest.
_SMALLEST_PART, _LARGEST_PART = 1 / 3, 8 / 3

#: A network whose check is behind that of the votes by no more than this has learned: where it departs from them it is
#: as likely to be right.
_KEEPS_UP = 0.045

#: Class probabilities (C, z, y, x), and the trust in them (z, y, x).
Votes = tuple[NDArray[np.float16], NDArray[np.float16]]


@dataclass(frozen=True)
class _Judged:
    """The networks of a round and how far they can be believed.

    Attributes:
        number: the round.
        check: what judges them.
        values: case -> its network's check value.
        voters: cases that have a vote on others.
    """

    number: int
    check: Check
    values: Mapping[str, float]
    voters: frozenset[str]


def answer(cohort: Cohort, number: int, config: TrainingConfig, fabric: Fabric, progress: Progress) -> None:
    """Class probabilities that a round gives for every case: a weighted mean, voxel by voxel, of

    - the networks' prediction, by its certainty (`certainty_of`); by 1 where there is nobody else than the template;
      not in round 0;
    - what linked cases show there (prediction and propagation), by their share (`share_of`) times the trust in the
      links, over the number of labelled scans that were propagated;
    - the propagation, by `propagation_share` times its confidence: in full for each labelled scan besides the first,
      and for that one as far as the links are not to be trusted.

    So what linked cases guess stands in for a template that is alone, and steps back as a person labels more. In the
    end the scan's own grey values have their say about where the classes end (`edges.py`), unless they lead this
    round's network away from what was drawn (`edge_worth.py`).
    """
    ranks = Ranks(fabric)
    linked, observer = ranks.as_first(has_links(cohort, config)), progress.observer
    judged = None
    if linked and number > 0:
        values = checks_of(cohort, number, "checks", partial(cohort.probabilities, number), observer, ranks)
        judged = _Judged(number, check_of(cohort), values, frozenset(believed(cohort, values)))
        if config.neighbour_gain > 0:
            _find_how_far_behind(cohort, config, judged, fabric, progress)
    for _, case_id in ranks.share(cohort.ids, observer):
        cohort.image(case_id)  # made one by one: whole scans are larger than what is looked at side by side

    def save(case_id: str) -> None:
        if not cohort.has_answer(number, case_id):
            links = _voting(cohort, case_id, judged) if linked else []
            votes = _votes(cohort, number, case_id, links, config, fabric, observer) if links else None
            cohort.save_answer(number, case_id, _answer(cohort, number, case_id, votes, config, judged))

    for position, _ in ranks.each(save, cohort.ids, observer, cohort.at_once()):
        progress.step(f"answer {number}", position + 1, len(cohort.ids))


def _voting(cohort: Cohort, case_id: str, judged: _Judged | None) -> list[Link]:
    """The links of a case that have a vote in a round; all where none has, and before there is a network."""
    links = cohort.links(case_id)
    return links if judged is None else [one for one in links if one.other in judged.voters] or links


def _answer(
    cohort: Cohort, number: int, case_id: str, votes: Votes | None, config: TrainingConfig, judged: _Judged | None
) -> NDArray[np.float16]:
    """The weighted mean of a case; how far linked cases agree with it is kept beside (`Cohort.with_neighbours`)."""
    predicted = cohort.probabilities(number, case_id) if number > 0 else None
    propagated, confidence = cohort.probabilities(0, case_id), cohort.confidence(case_id)
    atlases = atlases_of(cohort.labelled, config, cohort.is_registered(case_id))
    behind = None
    if votes is not None and judged is not None and config.neighbour_gain > 0:
        behind = _behind(cohort, case_id, votes[0], judged)
    said = Said(predicted, propagated, confidence, votes, atlases, behind)
    found = combined(said, cohort.image(case_id), number, config, cohort.plan.spacing, cohort.store)
    if votes is not None:
        alone = joined(predicted, propagated, confidence, None, config, cohort.plan.spacing, atlases)
        cohort.save_with_neighbours(number, case_id, agreement(votes[0], alone, found))
    return found


@dataclass(frozen=True)
class Said:
    """What is said about a scan, on the training grid.

    Attributes:
        predicted, propagated: class probabilities (C, z, y, x); `predicted` is None where no network was trained.
        confidence: of the propagation, (z, y, x), 0 to 1.
        votes: of like cases (`carried`); None where nobody votes.
        atlases: labelled scans that were propagated.
        behind: how far the network's check is behind that of the votes; None before there is a network.
    """

    predicted: NDArray[Any] | None
    propagated: NDArray[Any]
    confidence: NDArray[Any]
    votes: Votes | None
    atlases: int
    behind: float | None


def combined(
    said: Said,
    image: NDArray[Any],
    number: int,
    config: TrainingConfig,
    spacing: Sequence[float],
    store: Store,
) -> NDArray[np.float16]:
    """A round's class probabilities (C, z, y, x) of a scan from all that is said about it, as `answer` describes: the
    same for the cohort's cases and for further scans.

    Args:
        said: by network, propagation and like cases.
        image: scaled grey values (z, y, x).
        number: the round.
        config: the shares.
        spacing: of the grid, (z, y, x) mm.
        store: knows what was found out about the round's networks in the whole cohort.
    """
    share = None if said.behind is None else share_of(behind_of(store, number), said.behind, config)
    found = joined(said.predicted, said.propagated, said.confidence, said.votes, config, spacing, said.atlases, share)
    return by_edges(found, image, spacing, edge_weight_of(store, number, config))


def _votes(
    cohort: Cohort,
    number: int,
    case_id: str,
    links: list[Link],
    config: TrainingConfig,
    fabric: Fabric,
    observer: Observer,
) -> Votes:
    """What linked cases say about a case, and the trust in it: see `carried`."""

    def said_by(other: str, value: int) -> Volume:
        return _own(cohort, number, config, other, value)

    grid = cohort.grid(cohort.case(case_id).geometry)
    known_by = partial(_known, cohort)
    vote = partial(carried, links, said_by, known_by, grid, cohort.plan.classes)
    return or_on_cpu(vote, fabric.device, observer, f"votes on {case_id}")


def _behind(cohort: Cohort, case_id: str, said: NDArray[np.float16], judged: _Judged) -> float:
    """How far the check value of a case's network is behind that of its votes, which say `said`: class probabilities
    (C, z, y, x)."""
    names = ("behind-by-case", str(judged.number), f"{case_id}.json")
    if cohort.store.has(*names):  # it was asked for the cohort's sake
        return float(cohort.store.json(*names))
    grid, field = cohort.grid(cohort.case(case_id).geometry), cohort.deformation(case_id)
    return judged.check.of(said, cohort.probabilities(0, case_id), grid, field) - judged.values[case_id]


def _find_how_far_behind(
    cohort: Cohort, config: TrainingConfig, judged: _Judged, fabric: Fabric, progress: Progress
) -> None:
    """Keep how far the networks' check values are behind those of the votes: the median of some cases, evenly spread.
    Rejected predictions do not count, as long as there are others; 0 where nobody has a vote."""
    number, store, ranks, observer = judged.number, cohort.store, Ranks(fabric), progress.observer
    useful = cohort.trainable_ids or cohort.ids
    chosen = useful[:: -(-len(useful) // TRIED)]

    def save(case_id: str) -> None:
        names = ("behind-by-case", str(number), f"{case_id}.json")
        if not store.has(*names):
            links = _voting(cohort, case_id, judged)
            said = _votes(cohort, number, case_id, links, config, fabric, observer)[0] if links else None
            store.save_json(None if said is None else _behind(cohort, case_id, said, judged), *names)

    for position, _ in ranks.each(save, chosen, observer, cohort.at_once()):
        progress.step(f"votes {number}", position + 1, len(chosen))

    def middle() -> float:
        found = [store.json("behind-by-case", str(number), f"{case_id}.json") for case_id in chosen]
        known = [one for one in found if one is not None]
        return float(np.median(known)) if known else 0.0

    ranks.once(lambda: store.once(middle, "behind", f"{number}.json"))


def behind_of(store: Store, number: int) -> float | None:
    """How far a round's networks are behind the votes in the cohort's middle; None where that was not found out."""
    names = ("behind", f"{number}.json")
    return float(store.json(*names)) if store.has(*names) else None


def agreement(said: NDArray[Any], alone: NDArray[Any], found: NDArray[Any]) -> list[dict[str, float]]:
    """How far linked cases agree with a case, for the classes 1 .. C - 1: signals of its quality.

    - *with_neighbours*: Dice of what they say and what the case says without them;
    - *neighbours_inside*: their mean probability inside the answer, 0 where it is empty;
    - *neighbours_expected*: Dice of the answer with their probabilities as a soft label.

    Args:
        said: what they say, class probabilities (C, z, y, x), as are the others.
        alone: what network and propagation say without them.
        found: the answer.
    """
    labels = [np.asarray(one).argmax(0) for one in (said, alone, found)]
    rows = []
    for value in range(1, len(said)):
        probability, mine = said[value].astype(np.float32), labels[2] == value
        inside, size = float(probability[mine].sum()), int(mine.sum())
        rows.append(
            {
                "with_neighbours": dice(labels[0] == value, labels[1] == value),
                "neighbours_inside": inside / max(size, 1),
                "neighbours_expected": 2 * inside / max(float(probability.sum()) + size, 1e-6),
            }
        )
    return rows


def share_of(behind: float | None, own: float, config: TrainingConfig) -> float:
    """What linked cases' votes weigh beside a network: the more, the further its check is behind theirs.

    Votes mend a network that fails, and hold back one that has learned. Both are judged by the same registration, which
    likes what is as smooth as itself; so it is the cohort that tells whether the network keeps up. A single case tells
    only when it is behind by twice as much.

    Args:
        behind: the votes' check value (`refinement/check.py`) less the network's, in the cohort's middle; None: it was
            not found out, and the share is that of round 0.
        own: that of the case.
        config: `neighbour_share`, which is the share in round 0, and `neighbour_gain`.
    """
    if behind is None or config.neighbour_gain == 0:
        return config.neighbour_share
    part = _SMALLEST_PART + config.neighbour_gain * (max(behind, own / 2) - _KEEPS_UP)
    return config.neighbour_share * min(max(part, _SMALLEST_PART), _LARGEST_PART)


def joined(
    predicted: NDArray[Any] | None,
    propagated: NDArray[Any],
    confidence: NDArray[Any],
    votes: Votes | None,
    config: TrainingConfig,
    spacing: Sequence[float],
    atlases: int = 1,
    share: float | None = None,
) -> NDArray[np.float16]:
    """The weighted mean that `answer` describes, (C, z, y, x).

    Args:
        predicted, propagated: class probabilities (C, z, y, x); `predicted` is None where no network was trained.
        confidence: of the propagation, (z, y, x).
        votes: from `carried`; None where nobody votes.
        config: the shares.
        spacing: of the grid, (z, y, x) mm.
        atlases: labelled scans that were propagated.
        share: of the votes (`share_of`); None: `neighbour_share`.
    """
    share = config.neighbour_share if share is None else share
    by_propagation = config.propagation_share * np.asarray(confidence, np.float32)
    further = (atlases - 1) * by_propagation
    parts: list[tuple[NDArray[Any], NDArray[np.float32]]] = []
    if votes is not None:
        said, trust = votes[0], votes[1].astype(np.float32)
        parts.append((said, share / atlases * trust))
        by_propagation = by_propagation * (1 - trust)
    by_propagation = by_propagation + further
    if predicted is None:
        return weighted_mean([*parts, (propagated, np.maximum(by_propagation, _LEAST))])
    alone = votes is None and atlases == 1
    certainty = np.ones_like(by_propagation) if alone else certainty_of(predicted, config.certainty_around, spacing)
    return weighted_mean([*parts, (predicted, np.maximum(certainty, _LEAST)), (propagated, by_propagation)])


def certainty_of(predicted: NDArray[Any], around: float, spacing: Sequence[float]) -> NDArray[np.float32]:
    """How sure a network is: 1 less the entropy, of each voxel, or on average around it, where that is more.

    A border that was drawn well is unsure for a voxel or two and no more; where a network does not know, it is unsure
    all around.

    Args:
        predicted: class probabilities (C, z, y, x).
        around: standard deviation of the surroundings, in voxels of the finest axis; 0: each voxel by itself.
        spacing: (z, y, x) mm.
    """
    own = 1 - voxel_entropy(predicted)
    sigma = [around * min(spacing) / mm for mm in spacing]
    return np.maximum(own, ndimage.gaussian_filter(own, sigma, mode="nearest", truncate=3.0))


def _own(cohort: Cohort, number: int, config: TrainingConfig, case_id: str, value: int) -> Volume:
    """What a round says of a case without asking others: the probability of a class by network and propagation."""
    own: NDArray[Any] = cohort.probabilities(number, case_id)[value]
    if number > 0:
        share = config.propagation_share * np.asarray(cohort.confidence(case_id), np.float32)
        share *= atlases_of(cohort.labelled, config)
        own = (own + share * cohort.probabilities(0, case_id)[value]) / (1 + share)
    return Volume(own, cohort.grid(cohort.case(case_id).geometry))


def atlases_of(labelled: Sequence[LabelledCase], config: TrainingConfig, registered: bool = True) -> int:
    """How many labelled scans are registered with a case; 1 where none is: prototypes do not get better by numbers."""
    return min(len(labelled), config.registration.atlases) if registered else 1


def _known(cohort: Cohort, case_id: str) -> Volume:
    """Where the propagation to a case had something to say: elsewhere its label is unknown, not background."""
    return Volume(np.asarray(cohort.confidence(case_id)) > 0, cohort.grid(cohort.case(case_id).geometry))
