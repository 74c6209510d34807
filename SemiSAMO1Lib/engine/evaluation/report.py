"""The report of a training: one HTML file with pictures, scores, curves, plan and versions inside."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from numpy.typing import NDArray

from ...volume import Volume
from ..data.grids import canonical, resample_image, resample_labels
from .metrics import mean_of

matplotlib.use("Agg")

from matplotlib.figure import Figure

#: Uncertainty below this many percent is not drawn.
_SHOWN_FROM = 15


@dataclass(frozen=True)
class CasePage:
    """What the report shows of a case: scan, prediction and reference (label values), uncertainty (0-100 %), scores,
    and its likely quality in words.

    A scan that cannot be read any more has no picture, but a note that says why.
    """

    case: str
    image: Volume | None
    prediction: Volume | None
    uncertainty: Volume | None
    scores: dict[str, Any]
    note: str = ""
    reference: Volume | None = None
    quality: str = ""


def render_report(
    title: str,
    table: Sequence[dict[str, Any]],
    pages: Iterable[CasePage],
    losses: Sequence[dict[str, Any]],
    measures: dict[str, Any] | None,
    facts: dict[str, Any],
    before: dict[str, Any] | None = None,
) -> str:
    """The whole report as HTML text that needs no other file.

    Args:
        title: the project's name.
        table: label table rows (value, name, color).
        pages: cases in the order in which they are shown.
        losses: 'losses' events.
        measures: result of `compare`, or None without references.
        before: result of `compare` for round 0, before any training, or None.
        facts: training, labelled cases, what was learned of reviewed ones, whether the likely quality was checked on
            this project's scans, parameters, plan, environment, skipped cases.
    """
    by_case = {row["case"]: row for row in measures["cases"]} if measures else {}
    shown = []
    for page in pages:
        picture = _png(case_figure(page, table)) if page.image is not None else None
        row = {"case": page.case, "scores": page.scores, "picture": picture, "note": page.note, "quality": page.quality}
        shown.append({**row, "measures": by_case.get(page.case)})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html", "j2"]), trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        table=table,
        cases=shown,
        curves=_png(loss_figure(losses)) if losses else None,
        measures=measures,
        before=before,
        means=_label_means(measures["cases"]) if measures else {},
        facts=facts,
        plan=json.dumps(facts["plan"], indent=2),
        parameters=json.dumps(facts["parameters"], indent=2),
        shown_from=_SHOWN_FROM,
        names={str(row["value"]): row["name"] for row in table},
    )


def _label_means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Label value -> mean Dice and 95HD over the cases that have them."""
    values = sorted({value for row in rows for value in row["labels"]}, key=int)
    found = {}
    for value in values:
        mine = [row["labels"][value] for row in rows if value in row["labels"]]
        found[value] = {name: mean_of(one.get(name) for one in mine) for name in ("dice", "hd95_mm")}
    return found


def case_figure(page: CasePage, table: Sequence[dict[str, Any]]) -> Figure:
    """Three planes at the label's largest cross-section: above with contours, below with uncertainty as heat.

    The reference, where there is one, is drawn dashed in white.
    """
    if page.image is None or page.prediction is None or page.uncertainty is None:
        raise ValueError(f"case {page.case} has no picture: {page.note}")
    grid = canonical(page.image.geometry)
    image = resample_image(page.image, grid)
    label = resample_labels(page.prediction, grid)
    heat = np.asarray(resample_labels(page.uncertainty, grid))
    truth = resample_labels(page.reference, grid) if page.reference is not None else np.zeros_like(label)
    low, high = np.percentile(image, (1, 99))
    figure = Figure(figsize=(9, 6), layout="constrained", facecolor="#111")
    axes = figure.subplots(2, 3)
    for axis, name in enumerate(("axial", "coronal", "sagittal")):
        at = _largest_section(label > 0, axis)
        aspect = _aspect(grid.spacing, axis)
        planes = [_plane(volume, axis, at) for volume in (image, label, heat, truth)]
        for row in range(2):
            axes[row][axis].imshow(planes[0], cmap="gray", vmin=low, vmax=high, aspect=aspect, origin="upper")
            axes[row][axis].axis("off")
        axes[0][axis].set_title(name, color="white", fontsize=9)
        for entry in table:
            mine, true = planes[1] == entry["value"], planes[3] == entry["value"]
            if mine.any():
                axes[0][axis].contour(mine, [0.5], colors=[np.array(entry["color"]) / 255], linewidths=1.3)
            if true.any():
                axes[0][axis].contour(true, [0.5], colors="white", linewidths=0.9, linestyles="dashed")
        drawn = np.ma.masked_less(planes[2].astype(float), _SHOWN_FROM)
        shown = axes[1][axis].imshow(drawn, cmap="inferno", vmin=0, vmax=100, alpha=0.6, aspect=aspect, origin="upper")
    scale = figure.colorbar(shown, ax=axes[1], shrink=0.85, pad=0.01)
    scale.set_label("uncertainty, %", color="white", fontsize=8)
    scale.ax.tick_params(colors="white", labelsize=7)
    return figure


def loss_figure(losses: Sequence[dict[str, Any]]) -> Figure:
    """Loss curves, one panel a round."""
    rounds = sorted({event["round"] for event in losses})
    figure = Figure(figsize=(3.4 * len(rounds), 2.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(rounds), sharey=True))
    for panel, number in zip(panels, rounds, strict=True):
        mine = [event for event in losses if event["round"] == number]
        for name in mine[0]["losses"]:
            panel.plot([e["iteration"] for e in mine], [e["losses"][name] for e in mine], label=name, marker=".", ms=3)
        panel.set_title(f"round {number}", fontsize=9)
        panel.set_xlabel("iteration", fontsize=8)
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("loss", fontsize=8)
    panels[-1].legend(fontsize=7)
    return figure


def _largest_section(mask: NDArray[np.bool_], axis: int) -> int:
    """Index along the axis with most labelled voxels; the middle when there is none."""
    counts = mask.sum(tuple(a for a in range(3) if a != axis))
    return int(counts.argmax()) if counts.any() else mask.shape[axis] // 2


def _plane(volume: NDArray[Any], axis: int, at: int) -> NDArray[Any]:
    """A slice as radiologists see it: patient right on the left, anterior or superior above."""
    plane = np.take(volume, at, axis=axis)
    return plane if axis == 0 else plane[::-1]


def _aspect(spacing: tuple[float, float, float], axis: int) -> float:
    rows, columns = (spacing[a] for a in range(3) if a != axis)
    return rows / columns


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
