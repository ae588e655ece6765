"""The report: one page that holds everything it shows, readable in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from pmpd.eval.report.plots import quality_plot, row_colors, speed_plot
from pmpd.eval.report.results import FP, Metric, Results, Row, Sample, format_number
from pmpd.runtime.errors import MissingExtraError

try:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
except ImportError:
    raise MissingExtraError("jinja2", "text") from None

__all__ = ["render_html"]

SHOWN_SAMPLES = 6


def render_html(results: Results) -> str:
    """Return the report as one HTML document: the table, plots, some answers side by side; no outside resource."""
    folder = files(__package__)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        folder.joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    environment, scheduled = results.environment, [row for row in results.rows if row.schedule != FP]
    bits = {bits for row in scheduled for sample in row.samples for bits, _ in sample.segments}
    speed = speed_plot(results)
    return template.render(
        title=f"{environment['bundle']['name']} · {environment['settings']['task']}",
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        headline=[
            f"{environment['bundle']['architecture']}, {environment['bundle']['parameters'] / 1e6:,.1f} M parameters",
            f"{environment['samples']} samples of {environment['data']['name']}",
            environment["cpu"]["model"],
            f"{environment['threads']} threads",
        ],
        results=results,
        colors=row_colors(results),
        best=lambda metric: _best(scheduled, metric),
        share=lambda row: _share(results, row),
        number=format_number,
        quality=Markup(quality_plot(results)),
        speed=speed and Markup(speed),
        scheduled={row.schedule for row in scheduled},
        ranks={p: rank for rank, p in enumerate(sorted(bits, reverse=True))},
        samples=list(_side_by_side(results)),
        score=lambda sample: _score(results.metrics, sample),
        facts=_leaves(environment),
    )


def _best(rows: list[Row], metric: Metric) -> list[Row]:
    """Return the schedules with the best value of a metric, where there is more than one to choose from."""
    values = [row.metrics[metric.name] for row in rows]
    best = (max if metric.higher_is_better else min)(values)
    return [row for row in rows if row.metrics[metric.name] == best] if len(rows) > 1 else []


def _share(results: Results, row: Row) -> int:
    """Return a row's decode speed in percent of the fastest one's."""
    fastest = max(other.decode_tps or 0 for other in results.rows)
    return round(100 * (row.decode_tps or 0) / fastest) if fastest else 0


def _side_by_side(results: Results) -> Iterator[tuple[Sample, list[tuple[Row, Sample]]]]:
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
