"""The report: one page that holds everything it shows, for wide and narrow screens, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from operator import itemgetter
from typing import Any

from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.report.plots import quality_plot, row_colors, speed_plot, step_bits
from pmpd.eval.report.repeat import facts, hashes, repeat_command
from pmpd.eval.report.results import QualityResults, QualityRow, count_text, format_number
from pmpd.eval.report.verdict import RULE, Verdict, gaps, judgement, speedup, verdict
from pmpd.runtime.console.palette import SHADES, shade_of
from pmpd.runtime.errors import MissingExtraError

try:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
except ImportError:
    raise MissingExtraError("jinja2", "text") from None

__all__ = ["SHOWN_SAMPLES", "render_html"]

SHOWN_SAMPLES = 6
"""Samples that a group of answers has, at most."""


def render_html(results: QualityResults) -> str:
    """Return the report as one HTML document, without any outside resource.

    The verdict comes first; then tables, plots with their numbers, answers side by side, and how to repeat it.
    """
    folder = files(__package__)
    template = Environment(autoescape=True, undefined=StrictUndefined, extensions=["jinja2.ext.do"]).from_string(
        folder.joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    environment, conclusion = results.environment, verdict(results)
    bits = {bits for row in results.schedules for turn in _turns(row) for bits, _, _ in turn.segments}
    return template.render(
        title=f"{environment['bundle']['name']} · {environment['settings']['task']}",
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8") + _shade_rules()),
        chips=list(_chips(results)),
        results=results,
        verdict=conclusion,
        tiles=list(_tiles(results, conclusion)),
        rule=RULE,
        example=_example(results),
        highs=", ".join(dict.fromkeys(results.high(row).name for row in results.schedules)),
        colors=row_colors(results),
        judgement=lambda metric, row: judgement(results, metric, row),
        speedup=speedup,
        number=_number,
        signs=_with_minus_signs,
        width=_width,
        quality_plot=lambda metric, wide: Markup(quality_plot(results, metric, wide=wide)),
        speed_plots=[Markup(plot) for wide in (True, False) if (plot := speed_plot(results, wide=wide))],
        speed_runs=[(row, run) for row in results.schedules for run in _speed_runs(results, row)],
        scheduled={row.name for row in results.schedules},
        shades={precision: shade_of(precision, bits).name for precision in sorted(bits, reverse=True)},
        sample_groups=list(_sample_groups(results, conclusion)),
        score=lambda row, index: _score(results, row, index),
        command=repeat_command(environment),
        hashes=list(hashes(environment)),
        facts=facts(environment),
    )


def _turns(row: QualityRow) -> Iterator[Any]:
    return (turn for sample in row.samples for turn in sample.turns)


def _chips(results: QualityResults) -> Iterator[str]:
    """Yield what was measured and on what, each in a few words."""
    environment = results.environment
    yield f"{environment['bundle']['architecture']}, {environment['bundle']['parameters'] / 1e6:,.1f} M parameters"
    yield f"{count_text(environment['samples'], 'sample')} of {environment['data']['name']}"
    skipped = environment["data"]["skipped"]
    yield f"{skipped} skipped, too long for the model" if skipped else "none skipped"
    yield f"{environment['cpu']['model']}, {count_text(environment['threads'], 'thread')}"
    if "date" in environment:
        yield environment["date"]


@dataclass(frozen=True)
class _Tile:
    """A figure in large type, and what it is."""

    value: str
    spread: str
    label: str


def _tiles(results: QualityResults, conclusion: Verdict) -> Iterator[_Tile]:
    """Yield the figures of the schedule that is recommended."""
    if (row := conclusion.row) is None:
        return
    metric, high = results.metrics[0], results.high(row)
    yield _Tile(_number(row.average_bits, 2), "", "average bits")
    if row is not high and row.step_bytes and high.step_bytes:
        share = 100 * (row.step_bytes / high.step_bytes - 1)
        yield _Tile(_number(share, 0, sign=True) + " %", "", f"bytes a token, against {high.name}")
    for other, gap in gaps(results, metric, row):
        spread = f"± {_number(gap.ci95, metric.digits)}" if gap.ci95 else ""
        yield _Tile(_number(gap.value, metric.digits, sign=True), spread, f"{metric.label}, against {other.name}")
    if row is not high and (ratio := speedup(row, high)):
        spread = f"± {_number(ratio.ci95, 2)}" if ratio.ci95 else ""
        yield _Tile(f"{_number(ratio.value, 2)} ×", spread, f"decode speed, against {high.name}")


def _example(results: QualityResults) -> str:
    """Return the schedule with most switches in words; empty where none is static."""
    schedules = [schedule for row in results.schedules if (schedule := results.static(row))]
    if not schedules:
        return ""
    schedule = max(schedules, key=lambda schedule: len(schedule.switches))
    ends = [start for _, start in schedule.switches[1:]]
    parts = [
        f"{bits} bits up to step {end}" if start else f"{bits} bits in the first {end} steps"
        for (bits, start), end in zip(schedule.switches, ends, strict=False)
        if end > start
    ]
    parts.append(f"{schedule.switches[-1][0]} bits {'to the end' if parts else 'in every step'}")
    return f"{schedule} reads {', then '.join(parts)}."


def _speed_runs(results: QualityResults, row: QualityRow) -> Iterator[tuple[str, float, float]]:
    """Yield each stretch of one precision in an answer: positions, bits, and tokens per second over all of it."""
    position = 2  # the first token comes from prefill
    for bits, stretch in groupby(zip(step_bits(results, row), row.step_seconds, strict=False), key=itemgetter(0)):
        seconds = [time for _, time in stretch]
        yield f"{position}–{position + len(seconds) - 1}", bits, len(seconds) / sum(seconds)
        position += len(seconds)


@dataclass(frozen=True)
class _SampleGroup:
    """Samples that are shown together, by index."""

    title: str
    note: str
    indices: Sequence[int]


def _sample_groups(results: QualityResults, conclusion: Verdict) -> Iterator[_SampleGroup]:
    """Yield the first samples, and those in which a schedule loses most; all of them where they are few."""
    count = len(results.rows[0].samples)
    if not any(sample.prompt for sample in results.rows[0].samples):
        return
    if count <= 2 * SHOWN_SAMPLES:
        yield _SampleGroup(f"All {count_text(count, 'sample')}", "", range(count))
        return
    yield _SampleGroup(f"The first {SHOWN_SAMPLES} samples", "In the order of the data.", range(SHOWN_SAMPLES))
    row = conclusion.row
    rows = [row] if row and row is not results.high(row) else list(results.schedules)
    losses = {index: max(_loss(results, row, index) for row in rows) for index in range(count)}
    worst = sorted((index for index in losses if losses[index] > 0), key=lambda index: -losses[index])
    if worst:
        name = rows[0].name if len(rows) == 1 else "a schedule"
        yield _SampleGroup(
            f"The {min(SHOWN_SAMPLES, len(worst))} samples in which {name} loses most",
            f"Of all {count}, by {results.metrics[0].label} against the schedule of most bits. Some may be above, too.",
            worst[:SHOWN_SAMPLES],
        )


def _loss(results: QualityResults, row: QualityRow, index: int) -> float:
    """Return how much worse a row's score of a sample is than that of the row of most bits."""
    metric = results.metrics[0]
    ours, high = (other.samples[index].scores.get(metric.score) for other in (row, results.high(row)))
    if ours is None or high is None:
        return 0.0
    return high - ours if metric.higher_is_better else ours - high


def _score(results: QualityResults, row: QualityRow, index: int) -> str:
    """Return a sample's score by the first metric that it has one of, and how far it is from the row of most bits."""
    scores = row.samples[index].scores
    metric = next((metric for metric in results.metrics if metric.score in scores), None)
    if metric is None:
        return ""
    text = f"{metric.label} {_number(scores[metric.score], metric.digits)}"
    if row in results.schedules and row is not results.high(row):
        high = results.high(row).samples[index].scores
        if metric.score in high:
            text += f" ({_number(scores[metric.score] - high[metric.score], metric.digits, sign=True)})"
    return text


def _shade_rules() -> str:
    """Return the style of text by the precision that made it: blue for high precision, red for low."""
    light = "".join(f".shade-{shade.name} {{ background: {shade.light}; }}\n" for shade in SHADES)
    dark = "".join(f".shade-{shade.name} {{ background: {shade.dark}; }}\n" for shade in SHADES)
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """Return a number as the page shows it, with thousands apart and a minus sign."""
    if value is None:
        return format_number(value, digits)
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _with_minus_signs(text: str) -> str:
    return re.sub(r"(?<=\s)-(?=\d)", "\N{MINUS SIGN}", text)


def _width(estimates: Sequence[Estimate | None], digits: int) -> int:
    """Return how many characters the widest of several intervals takes, so that values line up before them."""
    return max((len(f"± {_number(e.ci95, digits)}") for e in estimates if e is not None and e.ci95), default=0)
