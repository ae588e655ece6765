"""The report's plots, as SVG that takes its colours from the page: matplotlib draws, CSS variables paint."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from pmpd.eval.report.results import FP, Metric, Results, Row
from pmpd.runtime.errors import MissingExtraError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise MissingExtraError("matplotlib", "eval") from None

__all__ = ["quality_plot", "row_colors", "speed_plot"]

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
    "axes.titlesize": 11,
    "font.size": 9.5,
    "grid.color": _NAMES["--line"],
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "text.color": _NAMES["--ink"],
    "xtick.color": _NAMES["--muted"],
    "ytick.color": _NAMES["--muted"],
    "ytick.major.size": 0,
}
_LABEL_PIXELS = 13.0


def row_colors(results: Results) -> dict[str, str]:
    """Return the CSS variable that each row is drawn in; the floating-point row has number 0."""
    return {row.schedule: f"--row-{0 if i == 0 else (i - 1) % SERIES + 1}" for i, row in enumerate(results.rows)}


def quality_plot(results: Results) -> str:
    """Return an SVG with a panel per metric: each schedule at its average bits, the floating-point model as a line.

    Uniform schedules are joined, so that a mixed one shows above or below what mixing alone would give.
    """
    colors = row_colors(results)
    with matplotlib.rc_context(_STYLE):
        width = max(6.0, 4.0 * len(results.metrics))
        # At 72 dots per inch a pixel is a point, as in SVG: labels are placed by pixels.
        figure = Figure(figsize=(width, 4.0), dpi=72, layout=ConstrainedLayoutEngine(wspace=0.06))
        panels = figure.subplots(1, len(results.metrics), squeeze=False)[0]
        for axes, metric in zip(panels, results.metrics, strict=True):
            _quality_panel(axes, metric, results.rows, colors)
        figure.draw_without_rendering()
        for axes, metric in zip(panels, results.metrics, strict=True):
            _label_points(axes, metric, _scheduled(results.rows), colors)
        return _svg(figure, "quality", "Quality against average bits")


def _scheduled(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Return the rows that have a place on the axis of bits."""
    return [(row, row.average_bits) for row in rows if row.schedule != FP and row.average_bits is not None]


def _quality_panel(axes: Any, metric: Metric, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    points = _scheduled(rows)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row, bits in points:
        if row.schedule.startswith("uniform:"):
            lines[row.schedule.partition(" ")[2]].append((bits, row.metrics[metric.name]))  # a line per accuracy
    for line in lines.values():
        axes.plot(*zip(*sorted(line), strict=True), color=_NAMES["--muted"], alpha=0.45, zorder=1)
    for row, bits in points:
        axes.errorbar(
            bits,
            row.metrics[metric.name],
            yerr=row.stderr(metric),
            marker="o",
            markersize=7,
            markeredgecolor=_NAMES["--panel"],
            color=_NAMES[colors[row.schedule]],
            elinewidth=1.2,
            zorder=3,
        )
    fp = next((row.metrics[metric.name] for row in rows if row.schedule == FP), None)
    values = [row.metrics[metric.name] for row, _ in points]
    if fp is not None:
        axes.axhline(fp, color=_NAMES["--row-0"], linewidth=1.4, linestyle=(0, (5, 3)), zorder=2)
        place = axes.get_yaxis_transform()
        axes.text(0, fp, FP, transform=place, ha="left", va="bottom", color=_NAMES["--row-0"], fontweight="bold")
        values.append(fp)
    if min(values, default=0) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
    axes.margins(x=0.12, y=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("average bits per decode step")
    axes.set_title(f"{metric.label}  {metric.arrow}")


def _label_points(axes: Any, metric: Metric, points: Sequence[tuple[Row, float]], colors: Mapping[str, str]) -> None:
    """Name each point on its free side, and push names apart that would overlap."""
    middle = sum(axes.get_xlim()) / 2
    for right in (False, True):
        side = [(row, bits) for row, bits in points if bool(bits > middle) is right]
        places = [(axes.transData.transform((bits, row.metrics[metric.name])), row, bits) for row, bits in side]
        above = float("-inf")
        for (_, pixel), row, bits in sorted(places, key=lambda place: float(place[0][1])):
            above = max(float(pixel), above + _LABEL_PIXELS)
            axes.annotate(
                row.schedule,
                (bits, row.metrics[metric.name]),
                xytext=(-8 if right else 8, above - float(pixel)),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=8.5,
                color=_NAMES[colors[row.schedule]],
            )


def speed_plot(results: Results) -> str | None:
    """Return an SVG of decode tokens per second against the token's position, with the switches marked.

    A position's speed is that of its median time over samples; None if no task measured any.
    """
    colors = row_colors(results)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12.0, 3.8), layout="constrained")
        axes = figure.subplots()
        for row in results.rows:
            speeds = _speed_by_position(row)
            if not speeds:
                continue
            color = _NAMES[colors[row.schedule]]
            positions = range(2, len(speeds) + 2)
            dashes = (0, (5, 3)) if row.schedule == FP else "solid"
            axes.plot(positions, speeds, color=color, linewidth=0.8, alpha=0.3)
            axes.plot(positions, _smooth(speeds), color=color, linewidth=2, linestyle=dashes, label=row.schedule)
            longest = max(row.samples, key=lambda sample: sample.output_tokens).precisions
            for index, (before, after) in enumerate(pairwise(longest[1 : len(speeds) + 1]), start=1):
                if after != before:
                    axes.plot(index + 2, _smooth(speeds)[index], "D", color=color, markersize=6, zorder=4)
                    axes.axvline(index + 2, color=color, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
                    axes.annotate(
                        f"{after} bit",
                        (index + 2, _smooth(speeds)[index]),
                        xytext=(5, 6),
                        textcoords="offset points",
                        fontsize=8.5,
                        color=color,
                    )
        if not axes.lines:
            return None
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("position of the token in the answer")
        axes.set_title("decode tokens/s  ↑")
        figure.legend(frameon=False, ncols=SERIES, loc="outside lower left", labelcolor="linecolor")
        return _svg(figure, "speed", "Decode speed against position")


def _speed_by_position(row: Row) -> list[float]:
    """Return tokens/s at each decode step that at least a quarter of the samples reach (at least one)."""
    steps = [sample.seconds[1:] for sample in row.samples]
    speeds = []
    for index in range(max(map(len, steps), default=0)):
        seconds = [step[index] for step in steps if index < len(step)]
        if 4 * len(seconds) < len(steps):
            break
        speeds.append(1 / max(median(seconds), 1e-9))
    return speeds


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the running median of five."""
    return [median(values[max(0, i - 2) : i + 3]) for i in range(len(values))]


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
