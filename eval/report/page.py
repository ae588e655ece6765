"""The report: one page that holds everything it shows, readable in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.report.plots import quality_plots, row_colors, speed_plot
from pmpd.eval.report.results import QualityResults, QualityRow, format_number
from pmpd.eval.report.verdict import verdict
from pmpd.runtime.console.palette import SHADES, shade_of
from pmpd.runtime.errors import MissingExtraError

try:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
except ImportError:
    raise MissingExtraError("jinja2", "text") from None

__all__ = ["render_html"]

SHOWN_SAMPLES = 6
_WIDE, _NARROW = 12.0, 5.2  # inches: a plot for wide screens, and one for telephones


def render_html(results: QualityResults) -> str:
    """Return the report as one HTML document: the table, plots, some answers side by side; no outside resource."""
    folder = files(__package__)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        folder.joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    environment = results.environment
    bits = {
        bits
        for row in results.schedules
        for sample in row.samples
        for turn in sample.turns
        for bits, _, _ in turn.segments
    }
    speed = [speed_plot(results, name, width=width) for name, width in (("wide", _WIDE), ("narrow", _NARROW))]
    threads = environment["threads"]
    return template.render(
        title=f"{environment['bundle']['name']} · {environment['settings']['task']}",
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8") + _shade_rules()),
        headline=[
            f"{environment['bundle']['architecture']}, {environment['bundle']['parameters'] / 1e6:,.1f} M parameters",
            f"{environment['samples']} samples of {environment['data']['name']}",
            environment["cpu"]["model"],
            f"{threads} thread{'s' * (threads != 1)}",
        ],
        results=results,
        verdict=verdict(results),
        colors=row_colors(results),
        best={metric.name: _best(results, metric) for metric in results.metrics},
        share=lambda row: _share(results, row),
        number=format_number,
        quality=[Markup(plot) for plot in quality_plots(results)],
        speed=[Markup(plot) for plot in speed if plot],
        scheduled={row.name for row in results.schedules},
        shades={precision: shade_of(precision, bits).name for precision in sorted(bits, reverse=True)},
        samples=list(_side_by_side(results)),
        score=lambda sample: _score(results.metrics, sample),
        facts=_leaves(environment),
    )


def _best(results: QualityResults, metric: Metric) -> set[str]:
    """Return the best schedules by a metric: the best value, and all that differ from it only within noise.

    None where that is all of them: the data do not tell which one is best.
    """
    sign = 1 if metric.higher_is_better else -1
    rows = results.schedules
    first = max(rows, key=lambda row: sign * row.metrics[metric.name].value, default=None)
    if first is None:
        return set()
    gaps = {row.name: results.difference(metric, row, first) for row in rows}
    names = {name for name, gap in gaps.items() if gap.value == 0 or gap.is_zero}
    return names if len(names) < len(rows) else set()


def _shade_rules() -> str:
    """Return the style of text by the precision that made it: blue for high precision, red for low."""
    light = "".join(f".shade-{shade.name} {{ background: {shade.light}; }}\n" for shade in SHADES)
    dark = "".join(f".shade-{shade.name} {{ background: {shade.dark}; }}\n" for shade in SHADES)
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _share(results: QualityResults, row: QualityRow) -> int:
    """Return a schedule's decode speed in percent of the fastest one's."""
    speeds = {other.name: other.decode_tps.value for other in results.schedules if other.decode_tps}
    return round(100 * speeds.get(row.name, 0.0) / max(speeds.values())) if speeds else 0


def _side_by_side(results: QualityResults) -> Iterator[tuple[Sample, list[tuple[QualityRow, Sample]]]]:
    """Yield the first few samples: the floating-point one, and every row's."""
    for index, first in enumerate(results.rows[0].samples[:SHOWN_SAMPLES]):
        if first.prompt:
            yield first, [(row, row.samples[index]) for row in results.rows]


def _score(metrics: tuple[Metric, ...], sample: Sample) -> str:
    """Return the first metric that a sample has a score of its own for."""
    shown = (f"{m.label} {format_number(sample.scores[m.name], m.digits)}" for m in metrics if m.name in sample.scores)
    return next(shown, "")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings as text, with their dotted names."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
