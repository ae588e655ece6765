"""Two evaluations side by side: what changed from one to the other, over the samples that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.eval.report.repeat import facts
from pmpd.eval.report.results import QualityResults, QualityRow, count_text
from pmpd.eval.report.verdict import judge
from pmpd.runtime.console.output import csv_text, json_text, markdown_table
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["VERSION", "Change", "Comparison", "compare_results", "parse_pair"]

VERSION = 1

# What may explain a difference; where and when it was measured does not.
_EXPLAINING = ("bundle", "reference", "metrics", "settings", "versions")
_OF_THE_ROWS = {"settings.schedules", "settings.speed", "settings.threads", "settings.workers", "settings.address"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric of a row of A and of a row of B, over the samples that both have.

    Attributes:
        row_a, row_b: names of the rows.
        metric: which one.
        a, b: its values.
        difference: b minus a, paired by sample, with its bootstrap interval.
        samples: how many samples both have.
        samples_a, samples_b: how many each has.
    """

    row_a: str
    row_b: str
    metric: Metric
    a: Estimate
    b: Estimate
    difference: Estimate
    samples: int
    samples_a: int
    samples_b: int

    @property
    def row(self) -> str:
        """The name of the row, or of both."""
        return self.row_a if self.row_a == self.row_b else f"{self.row_a} → {self.row_b}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations of one task on one data file.

    Attributes:
        a, b: what was compared.
        changes: by row, then by metric.
    """

    a: QualityResults
    b: QualityResults
    changes: tuple[Change, ...]

    @property
    def differing(self) -> dict[str, tuple[str, str]]:
        """What else differs between A and B and may explain a change: bundle, reference, settings, versions."""
        facts_a, facts_b = (dict(facts(results.environment)) for results in (self.a, self.b))
        names = [name for name in facts_a | facts_b if name.startswith(_EXPLAINING) and name not in _OF_THE_ROWS]
        pairs = {name: (facts_a.get(name, "–"), facts_b.get(name, "–")) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_json(self) -> str:
        """Return ``{"version", "changes", "differing", "environments"}`` as JSON text."""
        changes = [{**asdict(change), "metric": change.metric.name} for change in self.changes]
        environments = {"a": self.a.environment, "b": self.b.environment}
        return json_text(
            {"version": VERSION, "changes": changes, "differing": self.differing, "environments": environments}
        )

    def to_csv(self) -> str:
        """Return a line per row and metric; half-widths of 95 % intervals are columns of their own, ``<name>_ci95``."""
        lines = []
        for change in self.changes:
            line: dict[str, object] = {"row_a": change.row_a, "row_b": change.row_b, "metric": change.metric.name}
            for name in ("a", "b", "difference"):
                estimate: Estimate = getattr(change, name)
                line |= {name: estimate.value, f"{name}_ci95": estimate.ci95}
            counts = {"samples": change.samples, "samples_a": change.samples_a, "samples_b": change.samples_b}
            lines.append(line | counts)
        return csv_text(lines)

    def to_markdown(self) -> str:
        """Return what A and B are, the table, and what else differs."""
        table = [["row", "metric", "samples", "A", "B", "B - A", "B is"]]
        for change in self.changes:
            digits, difference = change.metric.digits, change.difference
            table.append(
                [
                    *(change.row, f"{change.metric.label} {change.metric.arrow}", _matched(change)),
                    *(change.a.text(digits), change.b.text(digits), difference.text(digits, sign=True)),
                    judge(change.metric, difference),
                ]
            )
        head = [f"{name}: {_describe(results)}" for name, results in (("A", self.a), ("B", self.b))]
        notes = [f"Over the samples that both have, paired. {PLUS_MINUS}, by bootstrap."]
        notes += [f"{name}: {_short(a)} in A, {_short(b)} in B" for name, (a, b) in self.differing.items()]
        return "\n\n".join(["\n".join(head), markdown_table(table, left=2), "\n".join(notes)])


def parse_pair(text: str) -> tuple[str, str]:
    """Read ``ROW=ROW``, the name of a row of A and one of B. Raises PmpdError where it is not of this form."""
    a, separator, b = text.partition("=")
    if not (a and separator and b):
        raise PmpdError(f"--row {text!r} is not of the form A=B: give a row of the first file, =, a row of the second")
    return a, b


def compare_results(a: QualityResults, b: QualityResults, pairs: Sequence[tuple[str, str]] = ()) -> Comparison:
    """Compare each metric that both have, of rows of one name, or of `pairs` of rows: one of A and one of B.

    Samples match by where they come from in one and the same data file. Texts that were scored match only where as many
    of their tokens were.

    Raises:
        PmpdError: another task, other data, no metric, row or sample in common, or a row that there is not.
    """
    tasks = [results.environment["settings"]["task"] for results in (a, b)]
    if tasks[0] != tasks[1]:
        raise PmpdError(f"A is of the task {tasks[0]} and B of {tasks[1]}: compare runs of one task")
    data = [results.environment["data"] for results in (a, b)]
    if data[0]["sha256"] != data[1]["sha256"]:
        shown = [f"{file['name']} (SHA-256 {_short(file['sha256'])})" for file in data]
        raise PmpdError(f"A is of {shown[0]} and B of {shown[1]}: compare runs over the same data file")
    metrics = [metric for metric in a.metrics if metric in b.metrics]
    if not metrics:
        names = [", ".join(metric.name for metric in results.metrics) for results in (a, b)]
        raise PmpdError(f"A ({names[0]}) and B ({names[1]}) have no metric in common: measure again with --metric")
    rows_a, rows_b = ({row.name: row for row in results.rows} for results in (a, b))
    for which, rows, names in (("A", rows_a, [p[0] for p in pairs]), ("B", rows_b, [p[1] for p in pairs])):
        for name in names:
            if name not in rows:
                raise PmpdError(unknown_choice(f"row of {which}", name, rows))
    chosen = pairs or [(name, name) for name in rows_a if name in rows_b]
    if not chosen:
        raise PmpdError(
            f"A ({', '.join(rows_a)}) and B ({', '.join(rows_b)}) have no row in common: pair rows with --row A=B"
        )
    changes = []
    for name_a, name_b in chosen:
        matched = _match(a, b, rows_a[name_a], rows_b[name_b])
        changes += [_change(rows_a[name_a], rows_b[name_b], metric, matched) for metric in metrics]
    return Comparison(a=a, b=b, changes=tuple(changes))


def _match(a: QualityResults, b: QualityResults, row_a: QualityRow, row_b: QualityRow) -> list[tuple[Sample, Sample]]:
    """Return the samples that both rows have, in the order of A."""
    by_key = {_key(b, sample): sample for sample in row_b.samples}
    matched = [(sample, by_key[key]) for sample in row_a.samples if (key := _key(a, sample)) in by_key]
    if not matched:
        runs = [f"{which} ({_describe(results)}, {_limits(results)})" for which, results in (("A", a), ("B", b))]
        raise PmpdError(f"no sample is in both {runs[0]} and {runs[1]}: measure both with the same options")
    return matched


def _key(results: QualityResults, sample: Sample) -> tuple[str, str, int]:
    """Return what a sample is known by in its data file, whatever the file is called."""
    name = results.environment["data"]["name"]
    tokens = sample.scored_steps if "nll" in sample.scores else 0
    return sample.source.removeprefix(name), sample.group.removeprefix(name), tokens


def _change(row_a: QualityRow, row_b: QualityRow, metric: Metric, matched: Sequence[tuple[Sample, Sample]]) -> Change:
    scored = [pair for pair in matched if all(metric.score in sample.scores for sample in pair)]
    samples_a, samples_b = ([pair[i] for pair in scored] for i in (0, 1))
    return Change(
        row_a=row_a.name,
        row_b=row_b.name,
        metric=metric,
        a=metric.estimate(samples_a),
        b=metric.estimate(samples_b),
        difference=metric.difference(samples_b, samples_a),
        samples=len(scored),
        samples_a=len(row_a.samples),
        samples_b=len(row_b.samples),
    )


def _matched(change: Change) -> str:
    others = f" and {change.samples_b}" if change.samples_b != change.samples_a else ""
    return f"{change.samples} of {change.samples_a}{others}"


def _describe(results: QualityResults) -> str:
    bundle, data = results.environment["bundle"]["name"], results.environment["data"]["name"]
    count = count_text(results.environment["samples"], "sample")
    return f"{bundle}, {results.environment['settings']['task']}, {count} of {data}"


def _limits(results: QualityResults) -> str:
    settings = results.environment["settings"]
    names = ("limit", "max_new_tokens", "stride")
    return ", ".join(f"{name} {settings[name]}" for name in names if settings.get(name) is not None)


def _short(text: str) -> str:
    """Return a text without most of a hash."""
    return f"{text[:12]}…" if len(text) == 64 else text
