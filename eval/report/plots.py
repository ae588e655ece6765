"""The report's plots, as SVG that takes its colours from the page: matplotlib draws, CSS variables paint."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise, product
from statistics import mean
from typing import Any, NamedTuple

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

__all__ = ["quality_plot", "row_colors", "speed_plot", "step_bits"]

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
    "axes.titlesize": 15.5,
    "font.size": 14.5,
    "grid.color": _NAMES["--line"],
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "text.color": _NAMES["--ink"],
    "xtick.color": _NAMES["--muted"],
    "ytick.color": _NAMES["--muted"],
    "ytick.major.size": 0,
}
# Inches of 72 pixels; the page scales a plot to the width that it has. So letters are about as large as the page's, on
# a telephone and on half (quality) or all (speed) of a wide screen.
_NARROW, _HALF, _WHOLE = 4.2, 7.0, 13.4
_LETTER_PIXELS = 8.7


def row_colors(results: QualityResults) -> dict[str, str]:
    """Return the CSS variable that each row is drawn in; the floating-point row has number 0."""
    return {row.name: f"--row-{0 if i == 0 else (i - 1) % SERIES + 1}" for i, row in enumerate(results.rows)}


def quality_plot(results: QualityResults, metric: Metric, *, wide: bool) -> str:
    """Return an SVG of a metric: each schedule at its average bits with its interval, the fp model as a line.

    Uniform schedules are joined, so that a mixed one shows above or below what mixing alone would give. `wide` is for
    screens wider than a telephone's.
    """
    rows, colors = results.rows, row_colors(results)
    with matplotlib.rc_context(_STYLE):
        # At 72 dots per inch a pixel is a point, as in SVG: labels are placed by pixels.
        figure = Figure(figsize=(_HALF, 5.8) if wide else (_NARROW, 4.0), dpi=72, layout="constrained")
        axes = figure.subplots()
        _draw_quality(axes, metric, rows, colors)
        figure.draw_without_rendering()
        _label_points(axes, metric, rows, colors)
        return _svg(figure, f"{metric.name}-{'wide' if wide else 'narrow'}", f"{metric.label} against average bits")


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


def _label_points(axes: Any, metric: Metric, rows: Sequence[QualityRow], colors: Mapping[str, str]) -> None:
    """Name each point beside it, where the name covers least of other names, points, bars and the line of fp."""
    points = _scheduled(rows)
    extent = axes.get_window_extent()
    frame = _Box(extent.x0, extent.x1, extent.y0, extent.y1)
    values = [row.metrics[metric.name] for row, _ in points]
    places = [tuple(axes.transData.transform((bits, v.value))) for (_, bits), v in zip(points, values, strict=True)]
    heights = [axes.transData.transform((0, row.metrics[metric.name].value))[1] for row in rows if row.name == FP]
    taken = [_Box(frame.left, frame.right, y - 2, y + 2) for y in heights]
    taken += [_Box(x - 6, x + 6, y - 6, y + 6) for x, y in places]
    for (_, bits), value, (x, _) in zip(points, values, places, strict=True):
        ends = (axes.transData.transform((bits, value.value + sign * (value.ci95 or 0.0)))[1] for sign in (-1, 1))
        taken.append(_Box(x - 2, x + 2, *ends))
    for (row, bits), value, (x, y) in zip(points, values, places, strict=True):
        lines = _lines(row.name, int(0.6 * (frame.right - frame.left) / _LETTER_PIXELS))
        length, half = _LETTER_PIXELS * max(map(len, lines)), 9.0 * len(lines)
        choices = []
        for dx, dy in product((9.0, -9.0), (0.0, 18.0, -18.0, 36.0, -36.0)):
            left = x + dx - (length if dx < 0 else 0.0)
            choices.append((_Box(left, left + length, y + dy - half, y + dy + half), dx, dy))
        box, dx, dy = min(choices, key=lambda choice: _covered(choice[0], taken, frame) + 4 * abs(choice[2]))
        taken.append(box)
        axes.annotate(
            "\n".join(lines),
            (bits, value.value),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="right" if dx < 0 else "left",
            va="center",
            color=_NAMES[colors[row.name]],
        ).set_in_layout(False)


def _lines(name: str, letters: int) -> list[str]:
    """Return the name of a schedule in lines of at most so many letters, broken after commas where it has some."""
    lines = [""]
    for part in re.findall("[^,]+,?", name):
        if lines[-1] and len(lines[-1]) + len(part) > letters:
            lines.append("")
        lines[-1] += part
    return lines


class _Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    right: float
    bottom: float
    top: float

    def overlap(self, other: _Box) -> float:
        """Return the area that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return max(0.0, across) * max(0.0, min(self.top, other.top) - max(self.bottom, other.bottom))


def _covered(box: _Box, taken: Sequence[_Box], frame: _Box) -> float:
    """Return the area of a box that other boxes have, and, ten times as bad, what of it is outside of the frame."""
    return sum(map(box.overlap, taken)) + 10 * (box.overlap(box) - box.overlap(frame))


def step_bits(results: QualityResults, row: QualityRow) -> list[float]:
    """Return the bits of each decode step whose time a row has."""
    schedule = results.static(row)
    return [schedule.precision(step) for step in range(len(row.step_seconds))] if schedule else []


def speed_plot(results: QualityResults, *, wide: bool) -> str | None:
    """Return an SVG of decode tokens per second against the token's position, with the switches marked.

    A speed is a number of tokens over all their seconds: those of all repetitions at one position, and its neighbours
    at the same precision (thin: without neighbours). None if no speed was measured.

    Args:
        results: what was measured; the floating-point model is left out.
        wide: for a screen wider than a telephone's.
    """
    timed = [row for row in results.schedules if step_bits(results, row)]
    if not timed:
        return None
    colors = row_colors(results)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WHOLE if wide else _NARROW, 4.6), layout="constrained")
        axes = figure.subplots()
        for row in timed:
            color, bits = _NAMES[colors[row.name]], step_bits(results, row)
            positions = range(2, len(bits) + 2)
            smooth = [1 / value for value in _smooth(row.step_seconds, bits)]
            axes.plot(positions, [1 / value for value in row.step_seconds], color=color, linewidth=0.8, alpha=0.3)
            axes.plot(positions, smooth, color=color, linewidth=2, label=row.name)
            for index, (before, after) in enumerate(pairwise(bits), start=1):
                if after != before:
                    axes.plot(index + 2, smooth[index], "D", color=color, markersize=6, zorder=4)
                    axes.axvline(index + 2, color=color, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
                    axes.annotate(
                        f"{after} bits",
                        (index + 2, smooth[index]),
                        xytext=(6, -16),
                        textcoords="offset points",
                        color=color,
                    )
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlabel("position of the token in the answer")
        axes.set_title("decode tokens/s  ↑")
        figure.legend(frameon=False, ncols=4 if wide else 1, loc="outside lower left", labelcolor="linecolor")
        return _svg(figure, f"speed-{'wide' if wide else 'narrow'}", "Decode speed against position")


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
