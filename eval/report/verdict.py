"""The results in plain words: the schedule to take and what it costs, and what the samples cannot show."""

from __future__ import annotations

from dataclasses import dataclass

from pmpd.eval.measure.examiner import FP
from pmpd.eval.metrics.base import Metric
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.report.results import QualityResults, QualityRow, count_text, format_number

__all__ = ["RULE", "Verdict", "gaps", "judge", "judgement", "speedup", "verdict"]

RULE = (
    "Recommended is the schedule with the fewest average bits that the samples do not show to be worse: the 95 % "
    "interval of its difference to the schedule of most bits contains 0 or lies on the better side, and so does that "
    "of its difference to fp, unless the schedule of most bits is itself worse than fp. Few samples have wide "
    "intervals, which contain 0 easily: so the loss that they do not exclude stands beside the recommendation."
)
"""How `verdict` chooses."""

_NONE = "No recommendation"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to conclude.

    Attributes:
        title: the conclusion in a few words.
        reason: the figures that it rests on.
        caution: what the samples show against it or do not exclude; empty where there is nothing.
        row: the schedule that is recommended, if one is.
    """

    title: str
    reason: str
    caution: str = ""
    row: QualityRow | None = None

    @property
    def text(self) -> str:
        """All of it as one paragraph."""
        return f"{self.title}: {self.reason} {self.caution}".rstrip()


def verdict(results: QualityResults) -> Verdict:
    """Return the recommendation by the task's first metric, chosen as `RULE` says.

    Only metrics of whole answers recommend anything. Those of single steps (perplexity, KL divergence) change with
    every bit, and enough samples show each change: how much of it is too much is for the reader to say.
    """
    metric, rows = results.metrics[0], results.schedules
    if metric.per_step:
        reason = (
            f"{metric.label} measures what each schedule costs, and lower precision always costs some. "
            "How much is too much depends on the use."
        )
        return Verdict(title=_NONE, reason=reason)
    if len(rows) < 2:
        return Verdict(title=_NONE, reason="there is no other schedule to compare with: add some with --schedule.")
    if any(row.average_bits is None for row in rows):
        return Verdict(title=_NONE, reason="a schedule has answers of one token only: use other prompts.")
    if any(gap.ci95 is None for row in rows for _, gap in gaps(results, metric, row)):
        return Verdict(title=_NONE, reason="one sample says nothing about noise: take more.")
    row = min(
        (row for row in rows if _holds(results, metric, row)),
        key=lambda row: (row.average_bits or 0.0, row.step_bytes or 0.0),
    )
    reason = f"{_figures(results, metric, row)}."
    if row is results.high(row):
        reason += " Every schedule with fewer bits is worse."
    return Verdict(title=f"Recommended: {row.name}", reason=reason, caution=_caution(results, metric, row), row=row)


def judge(metric: Metric, gap: Estimate) -> str:
    """Return what a difference of two rows shows: ``better``, ``worse``, or why neither."""
    if gap.ci95 is None:
        return "noise unknown"
    if gap.is_zero:
        return "no difference shown" if gap.ci95 else "the same"
    return "better" if (gap.value > 0) is metric.higher_is_better else "worse"


def judgement(results: QualityResults, metric: Metric, row: QualityRow) -> str:
    """Return what the differences of a row to the row of most bits and to fp show, in a few words."""
    if row.name == FP:
        return "unquantized"
    judged = [(judge(metric, gap), other.name) for other, gap in gaps(results, metric, row)]
    for kind in ("worse", "better"):
        if names := [name for judged_kind, name in judged if judged_kind == kind]:
            return f"{kind} than {names[0] if len(names) == 1 else 'both'}"
    return judged[0][0] if judged else "most bits"


def speedup(row: QualityRow, other: QualityRow) -> Estimate | None:
    """Return how many times as fast as another row it decodes; None where no speed was measured."""
    ours, theirs = row.decode_tps, other.decode_tps
    if ours is None or theirs is None:
        return None
    ratio = ours.value / theirs.value
    if ours.ci95 is None or theirs.ci95 is None:
        return Estimate(ratio, None, ours.count)
    return Estimate(
        ratio, ratio * ((ours.ci95 / ours.value) ** 2 + (theirs.ci95 / theirs.value) ** 2) ** 0.5, ours.count
    )


def gaps(results: QualityResults, metric: Metric, row: QualityRow) -> list[tuple[QualityRow, Estimate]]:
    """Return the rows that a row is compared with, most bits and fp, without itself, and its differences to them."""
    pairs = ((results.high(row), results.to_high(metric, row)), (results.fp, results.to_fp(metric, row)))
    return [(other, gap) for other, gap in pairs if other is not None and gap is not None]


def _holds(results: QualityResults, metric: Metric, row: QualityRow) -> bool:
    """Return whether no difference of a row shows that it is worse."""
    high = results.high(row)
    to_high, to_fp = results.to_high(metric, row), results.to_fp(metric, row)
    if to_high and judge(metric, to_high) == "worse":
        return False
    high_to_fp = results.to_fp(metric, high)
    fp_is_out_of_reach = high_to_fp is not None and judge(metric, high_to_fp) == "worse"
    return to_fp is None or fp_is_out_of_reach or judge(metric, to_fp) != "worse"


def _figures(results: QualityResults, metric: Metric, row: QualityRow) -> str:
    high = results.high(row)
    costs = [f"{format_number(row.average_bits, 2)} bits"]
    if row is not high:
        if row.step_bytes and high.step_bytes:
            less = 1 - row.step_bytes / high.step_bytes
            costs.append(f"{100 * abs(less):.0f} % {'fewer' if less >= 0 else 'more'} bytes a token than {high.name}")
        if ratio := speedup(row, high):
            costs.append(f"decodes {ratio.text(2)} times as fast")
    losses = [f"{gap.text(metric.digits, sign=True)} against {other.name}" for other, gap in gaps(results, metric, row)]
    return f"{', '.join(costs)}; {metric.label} {', '.join(losses)}" if losses else ", ".join(costs)


def _caution(results: QualityResults, metric: Metric, row: QualityRow) -> str:
    """Return against which rows it is worse, and the worse ends of the other differences."""
    worse, open_losses, count = [], [], 0
    for other, gap in gaps(results, metric, row):
        loss = (gap.ci95 or 0.0) - gap.value * (1 if metric.higher_is_better else -1)
        if judge(metric, gap) == "worse":
            worse.append(f"It is worse than {other.name}.")
        elif loss > 0:
            value = other.metrics[metric.name].value
            share = f" ({100 * loss / value:.0f} % of its {value:.{metric.digits}f})" if value else ""
            open_losses.append(f"{loss:.{metric.digits}f} against {other.name}{share}")
            count = gap.count
    if not open_losses:
        return " ".join(worse)
    samples = count_text(count, "sample" if count == len(row.samples) else "document")
    limit = "do not exclude a loss" if worse else "show no loss beyond noise, but do not exclude one"
    return " ".join([*worse, f"{samples} {limit} of up to {' or '.join(open_losses)}."])
