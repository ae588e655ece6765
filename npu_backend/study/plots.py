"""Pictures: where the time goes as stacked bars, and a design space with its Pareto front."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.npu_backend.program.lower import FP16_BITS
from pmpd.npu_backend.study.breakdown import PhaseBreakdown
from pmpd.npu_backend.study.explore import Exploration, pareto_front
from pmpd.runtime.console.output import amount
from pmpd.runtime.errors import MissingExtraError, PmpdError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ImportError:
    raise MissingExtraError("matplotlib", "npu") from None

__all__ = ["FORMATS", "STYLE", "check_format", "pareto", "render", "time_bars"]

FORMATS = (".svg", ".png")
_INK, _MUTED, _LINE = "#1f2933", "#66727f", "#e3e7eb"
STYLE = {  # of all pictures, for `matplotlib.rc_context`
    "axes.edgecolor": _LINE,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelcolor": _MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9.5,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "pmpd",
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_PRODUCTS = ("#14406b", "#235f96", "#3f83bd", "#6fa8d6", "#a3c9e8", "#cde1f2")  # the blues of weights
_OTHERS = ("#d9822b", "#e9b872", "#8a6fb0", "#7aa37a")
_REST, _REST_COLOR = "rest", "#b4bbc3"
_PRODUCT = "BitplaneMatMul"
_MANY = 60  # points on a front: smaller then
_DECADE = 10.0  # from this spread on, an axis is logarithmic
_SMALL = 0.01  # of every bar: shown together


def check_format(path: Path) -> None:
    """Raise PmpdError if a picture cannot be written as the name of its file says."""
    if path.suffix.lower() not in FORMATS:
        raise PmpdError(f"{path}: a picture's name ends in {' or '.join(FORMATS)}")


def render(figure: Any, path: Path) -> bytes:
    """Return a figure as SVG or PNG, as the name of a file says; `check_format` refuses others."""
    kind, buffer = path.suffix.lower()[1:], io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def time_bars(phases: Sequence[PhaseBreakdown], title: str) -> Any:
    """Return a figure of stacked bars: milliseconds of each phase, prompts on the left and decode steps on the right.

    Args:
        phases: grouped by module (``breakdown.GROUPINGS["module"]``).
        title: a line about all of it.
    """
    colors, parts = _parts(phases)
    with matplotlib.rc_context(STYLE):
        bars: dict[str, list[tuple[PhaseBreakdown, Mapping[str, float]]]] = {"prefill": [], "decode": []}
        for phase, seconds in zip(phases, parts, strict=True):
            bars[phase.phase].append((phase, seconds))
        places = max(map(len, bars.values()))
        figure = Figure(figsize=(11, 1.65 + 0.38 * places), layout=ConstrainedLayoutEngine(wspace=0.06, h_pad=0.09))
        for axes, (kind, group) in zip(figure.subplots(1, 2), bars.items(), strict=True):
            _bars(axes, group, colors)
            axes.set_ylim(places - 0.5, -0.5)
            axes.set_title(f"{group[0][0].tokens:,} tokens of prompt, ms" if kind == "prefill" else "one new token, ms")
        handles = [Patch(color=color) for color in colors.values()]
        figure.legend(
            handles,
            list(colors),
            frameon=False,
            ncols=len(colors),
            loc="outside lower left",
            handlelength=0.9,
            columnspacing=1.4,
        )
        figure.suptitle(title, x=0.008, ha="left", fontsize=11.5, fontweight="bold")
        return figure


def _bars(axes: Any, bars: Sequence[tuple[PhaseBreakdown, Mapping[str, float]]], colors: Mapping[str, str]) -> None:
    for place, (phase, parts) in enumerate(bars):
        left = 0.0
        for name, color in colors.items():
            width = 1e3 * parts.get(name, 0.0)
            axes.barh(place, width, left=left, height=0.68, color=color, edgecolor="white", linewidth=0.6)
            left += width
        rate = f"{amount(left)} ms"
        if phase.phase == "decode":
            rate += f" · {1 / phase.seconds:,.1f} tokens/s"
        axes.annotate(rate, (left, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    twice = len({phase.precision for phase, _ in bars}) < len(bars)
    axes.set_yticks(range(len(bars)), [_label(phase, steps=twice) for phase, _ in bars], color=_INK)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.32)


def _label(phase: PhaseBreakdown, *, steps: bool) -> str:
    bits = "float16" if phase.precision == FP16_BITS else f"{phase.precision} bits"
    if not phase.steps or not steps:
        return bits
    first, last = phase.steps[0], phase.steps[-1]
    return f"{bits}, step {first}" if first == last else f"{bits}, steps {first}–{last}"


def _parts(phases: Sequence[PhaseBreakdown]) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Return the colours of parts, and the seconds of each part in each phase.

    A part is a linear layer of all blocks, or another kind of operator; those that are small everywhere are one.
    """
    products: dict[str, None] = {}
    parts: list[dict[str, float]] = []
    for phase in phases:
        seconds: dict[str, float] = defaultdict(float)
        for row in phase.rows:
            *path, kind = row.name.split("/")
            name = path[-1] if kind == _PRODUCT and path else kind
            seconds[name] += row.seconds
            if kind == _PRODUCT:
                products[name] = None
        parts.append(seconds)
    large = {
        name
        for phase, seconds in zip(phases, parts, strict=True)
        for name, spent in seconds.items()
        if spent > _SMALL * phase.seconds
    }
    others = sorted(large - products.keys(), key=lambda name: -sum(seconds.get(name, 0.0) for seconds in parts))
    colors = dict(zip(products, cycle(_PRODUCTS))) | dict(zip(others, cycle(_OTHERS)))
    for seconds in parts:
        seconds[_REST] = sum(seconds.pop(name) for name in set(seconds) - colors.keys())
    return colors | {_REST: _REST_COLOR}, parts


def pareto(exploration: Exploration) -> Any:
    """Return a figure of a design space: tokens a second against area and against energy, with the Pareto front.

    A line joins the points of the front that nothing beats in the two quantities of a panel.
    """
    metrics, front = exploration.metrics, exploration.front
    speed = metrics["tokens_per_second"]
    sides = ((metrics["area_mm2"], "area proxy, mm²"), (1e3 * metrics["energy_per_token_j"], "mJ per token"))
    clouds = [
        _Cloud("over a limit", np.flatnonzero(~exploration.kept), _OTHERS[1], "x", 10),
        _Cloud("dominated", np.setdiff1d(np.flatnonzero(exploration.kept), front), _REST_COLOR, "o", 7),
        _Cloud("on the Pareto front", front, _PRODUCTS[1], "o", 36 if len(front) < _MANY else 16),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.8), layout=ConstrainedLayoutEngine(wspace=0.05, h_pad=0.09))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (x, label) in zip(panels, sides, strict=True):
            for order, cloud in enumerate(clouds, start=1):
                axes.scatter(
                    x[cloud.points],
                    speed[cloud.points],
                    s=cloud.size,
                    color=cloud.color,
                    marker=cloud.marker,
                    linewidths=0.7,
                    zorder=order,
                    rasterized=cloud.points is not front,
                )
            edge = front[pareto_front(np.stack([speed[front], -x[front]], axis=1))]
            axes.step(x[edge][::-1], speed[edge][::-1], where="post", color=_PRODUCTS[1], linewidth=1, alpha=0.6)
            if np.max(x) > _DECADE * np.min(x):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlabel(label)
        panels[0].set_title("new tokens a second, prompt included  ↑")
        handles = [
            Line2D([], [], marker=cloud.marker, markersize=5, linestyle="", color=cloud.color, label=cloud.name)
            for cloud in reversed(clouds)
            if len(cloud.points)
        ]
        figure.legend(handles=handles, frameon=False, ncols=3, loc="outside lower left", handletextpad=0.2)
        figure.suptitle(exploration.title, x=0.008, ha="left", fontsize=11.5, fontweight="bold")
        return figure


@dataclass(frozen=True)
class _Cloud:
    """Points of a design space that are drawn alike."""

    name: str
    points: npt.NDArray[np.int64]
    color: str
    marker: str
    size: float
