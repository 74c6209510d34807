"""The effort curve: what corrections are worth to the cases that nobody touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")

#: Order -> how it is called and drawn.
_STYLE = {
    "queue": ("worst first, every fifth at random", "#1b6ca8", "-"),
    "random": ("at random", "#888888", "--"),
    "entropy": ("least certain first", "#c4661f", ":"),
}


def effort_figure(curves: Mapping[str, Sequence[Mapping[str, Any]]], common: int) -> Figure:
    """Mean Dice against corrected cases, one line for each order.

    Args:
        curves: order -> rows with `corrected`, `untouched` and `common`.
        common: number of the cases that no order corrects.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    titles = (f"the {common} cases that no order corrects", "the cases not corrected so far")
    for panel, key, title in zip(panels, ("common", "untouched"), titles, strict=True):
        for order, rows in curves.items():
            name, colour, line = _STYLE[order]
            panel.plot(
                [row["corrected"] for row in rows],
                [row[key] for row in rows],
                color=colour,
                linestyle=line,
                marker="o",
                markersize=4,
                label=name,
            )
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("cases corrected", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean Dice", fontsize=9)
    panels[0].legend(fontsize=8)
    return figure
