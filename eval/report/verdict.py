"""The results in plain words: what each schedule costs in quality, and gains in speed."""

from __future__ import annotations

from pmpd.eval.metrics.base import Metric
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.report.results import QualityResults, QualityRow

__all__ = ["verdict"]


def verdict(results: QualityResults) -> list[str]:
    """Return a line per schedule: the task's first metric against the fp model and the row of most bits, and speed.

    Differences are paired: both rows answered the same items. "Within noise" says that the 95 % interval of the
    difference contains 0, so that these data do not show which row is better.
    """
    metric, fp = results.metrics[0], results.fp
    lines = []
    for row in results.schedules:
        high = results.high(row)
        parts = [] if fp is None else [_quality(results, metric, row, fp)]
        if row is not high:
            parts += [_quality(results, metric, row, high), *_speed(row, high)]
        bits = f" ({row.average_bits:.2f} bits)" if row.average_bits is not None else ""
        lines.append(f"{row.name}{bits}: {metric.label} {'; '.join(parts)}.")
    return lines


def _quality(results: QualityResults, metric: Metric, row: QualityRow, other: QualityRow) -> str:
    gap = results.difference(metric, row, other)
    if gap.value == 0 and not gap.ci95:
        return f"the same as {other.name}"
    judgement = _judge(gap, higher_is_better=metric.higher_is_better)
    return f"{gap.text(metric.digits, sign=True)} against {other.name} ({judgement})"


def _judge(gap: Estimate, *, higher_is_better: bool) -> str:
    if gap.ci95 is None:
        return "one answer only: noise unknown"
    if gap.is_zero:
        return "within noise"
    return "better" if (gap.value > 0) is higher_is_better else "worse"


def _speed(row: QualityRow, high: QualityRow) -> list[str]:
    """Return how many times as fast as another row it decodes; nothing where no speed was measured."""
    ours, theirs = row.decode_tps, high.decode_tps
    if ours is None or theirs is None:
        return []
    ratio = ours.value / theirs.value
    if ours.ci95 is None or theirs.ci95 is None:
        return [f"decodes {ratio:.2f} times as fast (one answer only: noise unknown)"]
    error = ratio * ((ours.ci95 / ours.value) ** 2 + (theirs.ci95 / theirs.value) ** 2) ** 0.5
    noise = ", within noise" if abs(ratio - 1) <= error else ""
    return [f"decodes {ratio:.2f} ± {error:.2f} times as fast{noise}"]
