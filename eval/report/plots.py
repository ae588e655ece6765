"""The report's plots, as SVG that takes its colours from the page: matplotlib draws, CSS variables paint."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from statistics import mean
from typing import Any

from pmpd.eval.measure.examiner import FP
from pmpd.eval.metrics.base import Metric
from pmpd.eval.report.results import QualityResults, QualityRow
from pmpd.runtime.errors import MissingExtraError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise MissingExtraError("matplotlib", "eval") from None

__all__ = ["quality_plots", "row_colors", "speed_plot"]

SERIES = 8
# matplotlib writes these colours, and the page's variables replace them: so plots follow light and dark.
_STAND_INS = {
    "#000001": "var(--ink)",
    "#000002": "var(--muted)",
    "#000003": "var(--line)",
    "#000004": "var(--panel)",
    **{f"#00010{i}": f"var(--row-{i})" for i in range(SERIES + 1)},
}
_NAMES = {variable[4:-1]: color for color, variable in _STAND_INS.items()}
_STYLE = {
    "axes.edgecolor": _NAMES["--line"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _NAMES["--muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _NAMES["--ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "font.size": 10.5,
    "grid.color": _NAMES["--line"],
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "text.color": _NAMES["--ink"],
    "xtick.color": _NAMES["--muted"],
    "ytick.color": _NAMES["--muted"],
    "ytick.major.size": 0,
}
_LABEL_PIXELS = 14.0


def row_colors(results: QualityResults) -> dict[str, str]:
    """Return the CSS variable that each row is drawn in; the floating-point row has number 0."""
    return {row.name: f"--row-{0 if i == 0 else (i - 1) % SERIES + 1}" for i, row in enumerate(results.rows)}


def quality_plots(results: QualityResults) -> list[str]:
    """Return an SVG per metric: each schedule at its average bits, the floating-point model as a line.

    Uniform schedules are joined, so that a mixed one shows above or below what mixing alone would give.
    """
    return [_quality_plot(metric, results.rows, row_colors(results)) for metric in results.metrics]


def _quality_plot(metric: Metric, rows: Sequence[QualityRow], colors: Mapping[str, str]) -> str:
    with matplotlib.rc_context(_STYLE):
        # At 72 dots per inch a pixel is a point, as in SVG: labels are placed by pixels.
        figure = Figure(figsize=(5.2, 4.0), dpi=72, layout="constrained")
        axes = figure.subplots()
        _draw_quality(axes, metric, rows, colors)
        figure.draw_without_rendering()
        _label_points(axes, metric, _scheduled(rows), colors)
        return _svg(figure, metric.name, f"{metric.label} against average bits")


def _scheduled(rows: Sequence[QualityRow]) -> list[tuple[QualityRow, float]]:
    """Return the rows that have a place on the axis of bits."""
    return [(row, row.average_bits) for row in rows if row.name != FP and row.average_bits is not None]


def _draw_quality(axes: Any, metric: Metric, rows: Sequence[QualityRow], colors: Mapping[str, str]) -> None:
    points = _scheduled(rows)
    lines: dict[str | None, list[tuple[float, float]]] = defaultdict(list)
    for row, bits in points:
        if row.name.startswith("uniform:"):
            lines[row.accuracy].append((bits, row.metrics[metric.name].value))
    for line in lines.values():
        axes.plot(*zip(*sorted(line), strict=True), color=_NAMES["--muted"], alpha=0.45, zorder=1)
    for row, bits in points:
        estimate = row.metrics[metric.name]
        axes.errorbar(
            bits,
            estimate.value,
            yerr=estimate.ci95 or 0.0,
            marker="o",
            markersize=7,
            markeredgecolor=_NAMES["--panel"],
            color=_NAMES[colors[row.name]],
            elinewidth=1.2,
            zorder=3,
        )
    fp = next((row.metrics[metric.name].value for row in rows if row.name == FP), None)
    values = [row.metrics[metric.name].value for row, _ in points]
    if fp is not None:
        axes.axhline(fp, color=_NAMES["--row-0"], linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)
        place = axes.get_yaxis_transform()
        axes.text(0, fp, FP, transform=place, ha="left", va="bottom", color=_NAMES["--row-0"], fontweight="bold")
        values.append(fp)
    if min(values, default=0) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
    axes.margins(x=0.12, y=0.16)
    _bound(axes, metric, lowest=min(values, default=0.0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("average bits per decode step")
    axes.set_title(f"{metric.label}  {metric.arrow}")


def _bound(axes: Any, metric: Metric, *, lowest: float) -> None:
    """Show no values that a metric cannot have: below 0, or above its highest (with room for a label)."""
    bottom, top = axes.get_ylim()
    if lowest >= 0:
        axes.set_ylim(bottom=max(bottom, 0.0))
    if metric.highest is not None and top > metric.highest:
        ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= metric.highest]
        axes.set_ylim(top=metric.highest + 0.06 * (metric.highest - bottom))
        axes.set_yticks(ticks)


def _label_points(
    axes: Any, metric: Metric, points: Sequence[tuple[QualityRow, float]], colors: Mapping[str, str]
) -> None:
    """Name each point on its free side, and push names apart that would overlap."""
    middle = sum(axes.get_xlim()) / 2
    for right in (False, True):
        side = [(row, bits) for row, bits in points if bool(bits > middle) is right]
        places = [(axes.transData.transform((bits, row.metrics[metric.name].value)), row, bits) for row, bits in side]
        above = float("-inf")
        for (_, pixel), row, bits in sorted(places, key=lambda place: float(place[0][1])):
            above = max(float(pixel), above + _LABEL_PIXELS)
            axes.annotate(
                row.name,
                (bits, row.metrics[metric.name].value),
                xytext=(-8 if right else 8, above - float(pixel)),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=10,
                color=_NAMES[colors[row.name]],
            )


def speed_plot(results: QualityResults, name: str, *, width: float) -> str | None:
    """Return an SVG of decode tokens per second against the token's position, with the switches marked.

    A speed is a number of tokens over all their seconds: those of all repetitions at one position, and its neighbours
    at the same precision (thin: without neighbours). None if no speed was measured.

    Args:
        results: what was measured; the floating-point model is left out.
        name: makes the ids of the SVG unique.
        width: in inches of 72 pixels.
    """
    colors = row_colors(results)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, 3.8), layout="constrained")
        axes = figure.subplots()
        for row in results.schedules:
            seconds = row.step_seconds
            if not seconds:
                continue
            color = _NAMES[colors[row.name]]
            longest = max((turn for sample in row.samples for turn in sample.turns), key=lambda turn: turn.tokens)
            bits = longest.precisions[1 : len(seconds) + 1]
            seconds = seconds[: len(bits)]
            positions = range(2, len(seconds) + 2)
            smooth = [1 / value for value in _smooth(seconds, bits)]
            axes.plot(positions, [1 / value for value in seconds], color=color, linewidth=0.8, alpha=0.3)
            axes.plot(positions, smooth, color=color, linewidth=2, label=row.name)
            for index, (before, after) in enumerate(pairwise(bits), start=1):
                if after != before:
                    axes.plot(index + 2, smooth[index], "D", color=color, markersize=6, zorder=4)
                    axes.axvline(index + 2, color=color, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
                    axes.annotate(
                        f"{after} bits",
                        (index + 2, smooth[index]),
                        xytext=(5, 6),
                        textcoords="offset points",
                        fontsize=9.5,
                        color=color,
                    )
        if not axes.lines:
            return None
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("position of the token in the answer")
        axes.set_title("decode tokens/s  ↑")
        columns = max(1, int(width // 1.6))
        figure.legend(frameon=False, ncols=columns, loc="outside lower left", labelcolor="linecolor")
        return _svg(figure, name, "Decode speed against position")


def _smooth(seconds: Sequence[float], bits: Sequence[float]) -> list[float]:
    """Return at each step the mean of the nine steps around it that have its precision: a switch stays sharp."""
    smooth: list[float] = []
    for _, run in groupby(range(len(seconds)), key=bits.__getitem__):
        steps = list(run)
        first, last = steps[0], steps[-1] + 1
        for step in steps:
            start = max(first, min(step - 4, last - 9))
            smooth.append(mean(seconds[start : min(start + 9, last)]))
    return smooth


def _svg(figure: Any, name: str, title: str) -> str:
    """Return a figure as an SVG element: ids made unique by `name`, colours left to the page, scaled by it."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    return re.sub("|".join(_STAND_INS), lambda match: _STAND_INS[match[0]], svg)
