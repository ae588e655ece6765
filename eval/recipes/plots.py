"""A figure of a recipe: scores of each row with their intervals, a panel a task; an SVG."""

from __future__ import annotations

import io
from typing import Any

from pmpd.eval.recipes.tables import Part, RecipeResults
from pmpd.runtime.errors import MissingExtraError

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    raise MissingExtraError("matplotlib", "eval") from None

__all__ = ["recipe_plot"]

_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "font.size": 12,
    "grid.color": "#dddddd",
    "svg.fonttype": "none",
    "svg.hashsalt": "pmpd",
    "ytick.left": False,
}
_HIGH, _OTHER, _FP = "#1f5fa8", "#e08a3c", "#555555"


def recipe_plot(results: RecipeResults) -> str:
    """Return an SVG: a panel for each task, a bar for each row, its first metric with a 95 % interval and its bits."""
    with matplotlib.rc_context(_STYLE):
        rows = max(len(part.labels) for part in results.parts)
        width, height = 2.5 + 4.2 * len(results.parts), 1.4 + 0.5 * rows
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, len(results.parts), squeeze=False)[0]
        for axes, part in zip(panels, results.parts, strict=True):
            _draw(axes, part)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": f"{results.recipe}: {results.title}"})
        return buffer.getvalue()


def _draw(axes: Any, part: Part) -> None:
    metric = part.results.metrics[0]
    labels = list(part.labels)
    rows = [part.row(label) for label in labels]
    estimates = [row.metrics[metric.name] for row in rows]
    colors = [_HIGH if label == part.high else _OTHER for label in labels]
    spread = [estimate.ci95 or 0.0 for estimate in estimates]
    bars = {"elinewidth": 1.4, "capsize": 3}
    axes.barh(labels, [e.value for e in estimates], xerr=spread, color=colors, height=0.62, error_kw=bars)
    fp = part.results.fp
    # A metric that compares with fp has its own best score there, which says nothing.
    if fp is not None and fp.metrics[metric.name].value != metric.highest:
        value = fp.metrics[metric.name].value
        axes.axvline(value, color=_FP, linestyle=(0, (5, 3)))
        axes.text(value, 1, "fp", transform=axes.get_xaxis_transform(), va="bottom", ha="center", color=_FP)
    for place, row in enumerate(rows):
        bits = "" if row.average_bits is None else f" {row.average_bits:.2f} bits"
        axes.text(0, place, bits, va="center", ha="left", color="white", fontweight="bold", fontsize=10.5)
    axes.invert_yaxis()
    axes.set_title(part.task)
    axes.set_xlabel(f"{metric.label} {metric.arrow}")
