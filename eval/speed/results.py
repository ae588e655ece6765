"""What a speed measurement gave: a row per schedule and peer, with every time behind it; markdown, CSV and JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.eval.report.results import count_text, format_number
from pmpd.runtime.console.output import csv_text, json_text, markdown_table
from pmpd.runtime.errors import PmpdError

__all__ = ["VERSION", "Ratio", "SpeedResults", "SpeedRow", "Timing"]

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One repetition.

    Attributes:
        prefill_seconds: time of the prompt.
        seconds: time of each decode step.
        matmul_seconds: time of these steps inside the compiled matmul kernels; None where they are not counted.
        other_load: share of all processors' time that other processes used meanwhile; None where it is unknown.
    """

    prefill_seconds: float
    seconds: tuple[float, ...]
    matmul_seconds: float | None = None
    other_load: float | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One way of decoding: the bundle under a schedule, or a peer.

    Attributes:
        name: the schedule as the user gave it, or the peer and its variant.
        peer: whether it is a peer.
        bits: mean bits over the decode steps; of a peer, those that its name claims.
        precisions: bits of each decode step; empty for a peer.
        model_bytes: size of the model's weights on disk.
        step_bytes: bytes that a decode step reads, on average (see `traffic`; of a peer, its tensors and cache).
        prefill_tps: prompt tokens per second; of the bundle over all its rows of one accuracy, which run one graph.
        decode_tps: tokens per second.
        gb_per_second: `step_bytes` by the time of a step, in 10^9 bytes per second.
        matmul_share: share of the decode steps' time inside the compiled matmul kernels.
        expected_share: speed of a mixed schedule as a share of what is expected: steps that take as long as those of
            the uniform schedules, position by position and in the same repetition. None for uniform ones.
        other_load: share of all processors' time that other processes used meanwhile: lower is better.
        peak_bytes: most memory that its process had resident.
        kernels: what ran, by phase.
        facts: versions, and what else the contender says of itself.
        timings: one per repetition.
    """

    name: str
    peer: bool
    bits: float | None
    precisions: tuple[float, ...]
    model_bytes: int
    step_bytes: float | None
    prefill_tps: Estimate
    decode_tps: Estimate
    gb_per_second: Estimate | None
    matmul_share: Estimate | None
    expected_share: Estimate | None
    other_load: Estimate | None
    peak_bytes: int
    kernels: Mapping[str, Sequence[str]]
    facts: Mapping[str, Any]
    timings: tuple[Timing, ...]

    @property
    def uniform(self) -> float | None:
        """The precision of a uniform schedule."""
        return self.precisions[0] if len(set(self.precisions)) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast as a peer a uniform schedule of the same nominal bits is; a ratio per repetition."""

    ours: str
    peer: str
    decode: Estimate
    prefill: Estimate

    @classmethod
    def of(cls, ours: SpeedRow, peer: SpeedRow) -> Self:
        """Compare two rows."""
        pairs = list(zip(ours.timings, peer.timings, strict=True))
        return cls(
            ours=ours.name,
            peer=peer.name,
            decode=Estimate.of([sum(theirs.seconds) / sum(our.seconds) for our, theirs in pairs]),
            prefill=Estimate.of([theirs.prefill_seconds / our.prefill_seconds for our, theirs in pairs]),
        )


@dataclass(frozen=True, kw_only=True)
class SpeedResults:
    """A whole measurement.

    Attributes:
        rows: the bundle's, then the peers'.
        switch_cost: time that a switch of precision adds to a step, as a share of the step, by row that measured it.
        environment: where and with what it was measured.
        unfinished: repetitions that were not measured, because something ended the measurement early.
        cause: what did: Ctrl-C, a signal or a failure.
    """

    rows: tuple[SpeedRow, ...]
    switch_cost: Mapping[str, Estimate]
    environment: Mapping[str, Any]
    unfinished: tuple[str, ...] = ()
    cause: KeyboardInterrupt | PmpdError | None = None

    @property
    def progress(self) -> str:
        """How much of the measurement there is, for a message."""
        finished = len(self.rows[0].timings)
        return f"{finished} of {finished + len(self.unfinished)} repetitions are finished"

    @property
    def ratios(self) -> list[Ratio]:
        """Each peer beside the uniform schedules of its nominal bits."""
        ours = [row for row in self.rows if not row.peer and row.uniform is not None]
        peers = [row for row in self.rows if row.peer]
        return [Ratio.of(row, peer) for peer in peers for row in ours if row.uniform == peer.bits]

    def to_json(self) -> str:
        """Return ``{"rows", "ratios", "switch_cost", "unfinished", "environment", "version"}`` as JSON text."""
        return json_text(
            {
                "rows": [asdict(row) for row in self.rows],
                "ratios": [asdict(ratio) for ratio in self.ratios],
                "switch_cost": {name: asdict(cost) for name, cost in self.switch_cost.items()},
                "unfinished": self.unfinished,
                "environment": self.environment,
                "version": VERSION,
            }
        )

    def to_csv(self) -> str:
        """Return a line per row; half-widths of 95 % intervals are columns of their own, ``<name>_ci95``."""
        return csv_text([dict(_columns(row)) for row in self.rows])

    def to_markdown(self) -> str:
        """Return where it was measured, the table, the cost of a switch, the kernels, and the ratios to peers."""
        e, settings = self.environment, self.environment["settings"]
        parts = [
            f"{e['bundle']['name']}: {settings['prompt_tokens']} prompt tokens, {settings['max_new_tokens']} decoded, "
            f"{count_text(settings['repetitions'], 'repetition')}; {count_text(e['threads'], 'thread')} of "
            f"{e['cpu']['model']}",
            markdown_table([_HEADER, *(_cells(row) for row in self.rows)]),
        ]
        notes = list(_NOTES)
        notes += [
            f"A switch of precision costs {cost.text(2, scale=100)} % of a token ({name})."
            for name, cost in self.switch_cost.items()
        ]
        notes += _by_rows(
            [(f"{phase} by {', '.join(names)}", r) for r in self.rows for phase, names in r.kernels.items()]
        )
        notes += _by_rows([(row.facts["version"], row) for row in self.rows if row.peer])
        parts.append("\n".join(notes))
        if ratios := self.ratios:
            cells = [[r.ours, r.peer, f"{r.decode.text(2)}", f"{r.prefill.text(2)}"] for r in ratios]
            parts.append(markdown_table([["ours", "times as fast as", "decode", "prefill"], *cells]))
        return "\n\n".join(parts)


_HEADER = [
    "",
    "bits",
    "model MB",
    "MB/token",
    "prefill tokens/s",
    "decode tokens/s",
    "GB/s",
    "in matmuls %",
    "of expected %",
    "peak MB",
    "other load %",
]
_NOTES = [
    f"{PLUS_MINUS} over repetitions.",
    "MB/token: what a step reads, KV cache included; GB/s: that over the time of a step. in matmuls: share of the "
    "decode time in compiled matmul kernels.",
    "of expected: a mixed schedule's speed as a share of what the uniform rows give for the same steps. other load: "
    "share of all processors that other processes used.",
]


def _by_rows(facts: Sequence[tuple[str, SpeedRow]]) -> list[str]:
    """Return each fact once, after the names of the rows that it holds for."""
    names: dict[str, list[str]] = defaultdict(list)
    for fact, row in facts:
        names[fact].append(row.name)
    return [f"{', '.join(rows)}: {fact}" for fact, rows in names.items()]


def _cells(row: SpeedRow) -> list[str]:
    return [
        row.name,
        format_number(row.bits, 2),
        format_number(row.model_bytes / 1e6, 0),
        format_number(row.step_bytes and row.step_bytes / 1e6, 0),
        row.prefill_tps.text(1),
        row.decode_tps.text(1),
        row.gb_per_second.text(1) if row.gb_per_second else "–",
        row.matmul_share.text(1, scale=100) if row.matmul_share else "–",
        row.expected_share.text(1, scale=100) if row.expected_share else "–",
        format_number(row.peak_bytes / 1e6, 0),
        format_number(100 * row.other_load.value if row.other_load else None, 1),
    ]


def _columns(row: SpeedRow) -> list[tuple[str, object]]:
    columns: list[tuple[str, object]] = [
        ("name", row.name),
        ("bits", row.bits),
        ("model_bytes", row.model_bytes),
        ("step_bytes", row.step_bytes),
    ]
    for name in ("prefill_tps", "decode_tps", "gb_per_second", "matmul_share", "expected_share", "other_load"):
        estimate: Estimate | None = getattr(row, name)
        columns += [(name, estimate and estimate.value), (f"{name}_ci95", estimate and estimate.ci95)]
    return [*columns, ("peak_bytes", row.peak_bytes)]
