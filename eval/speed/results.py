"""What a speed measurement found: a row per schedule and peer, with every time it rests on; markdown, CSV and JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, Self

from pmpd.eval.report.results import format_number
from pmpd.runtime.console.output import csv_text, json_text, markdown_table

__all__ = ["VERSION", "Ratio", "SpeedResults", "SpeedRow", "Spread", "Timing"]

VERSION = 1


@dataclass(frozen=True)
class Spread:
    """A mean over repetitions and their standard deviation (0 for one)."""

    mean: float
    stdev: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of at least one value."""
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0)

    def text(self, digits: int, *, scale: float = 1.0) -> str:
        """Return it as shown in tables."""
        return f"{self.mean * scale:.{digits}f} ± {self.stdev * scale:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One repetition.

    Attributes:
        prefill_seconds: time of the prompt.
        seconds: time of each decode step.
        gemv_seconds: time of these steps inside the compiled matmul kernels; None where they are not counted.
        others: share of all processors' time that other processes used meanwhile; None where the system does not tell.
    """

    prefill_seconds: float
    seconds: tuple[float, ...]
    gemv_seconds: float | None = None
    others: float | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One way of decoding: the bundle under a schedule, or a peer.

    Attributes:
        name: the schedule as the user gave it, or the peer and its variant.
        peer: whether it is a peer.
        bits: mean bits over the decode steps; of a peer, those that its name claims.
        precisions: bits of each decode step; empty for a peer.
        model_bytes: size of the model's weights on disk.
        step_bytes: bytes that a decode step reads, on average (see `traffic`); None for a peer.
        prefill_tps, decode_tps: tokens per second.
        gbs: `step_bytes` by the time of a step, in 10^9 bytes per second.
        gemv_share: share of the decode steps' time inside the compiled matmul kernels.
        reached: speed as a share of what its bits promise: steps as long as those of the uniform schedules, position by
            position and in the same repetition. None for uniform ones.
        others: share of all processors' time that other processes used meanwhile: the less, the better the figures.
        peak_bytes: most memory that its process had resident.
        kernels: what ran, by phase.
        facts: versions, and what else the contender says of itself.
        timings: one per repetition.
    """

    name: str
    peer: bool
    bits: float | None
    precisions: tuple[int, ...]
    model_bytes: int
    step_bytes: float | None
    prefill_tps: Spread
    decode_tps: Spread
    gbs: Spread | None
    gemv_share: Spread | None
    reached: Spread | None
    others: Spread | None
    peak_bytes: int
    kernels: Mapping[str, Sequence[str]]
    facts: Mapping[str, Any]
    timings: tuple[Timing, ...]

    @property
    def uniform(self) -> int | None:
        """The precision of a uniform schedule."""
        return self.precisions[0] if len(set(self.precisions)) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast as a peer a uniform schedule of the same nominal bits is, repetition by repetition."""

    ours: str
    peer: str
    decode: Spread
    prefill: Spread

    @classmethod
    def of(cls, ours: SpeedRow, peer: SpeedRow) -> Self:
        """Compare two rows."""
        pairs = list(zip(ours.timings, peer.timings, strict=True))
        return cls(
            ours=ours.name,
            peer=peer.name,
            decode=Spread.of([sum(theirs.seconds) / sum(our.seconds) for our, theirs in pairs]),
            prefill=Spread.of([theirs.prefill_seconds / our.prefill_seconds for our, theirs in pairs]),
        )


@dataclass(frozen=True, kw_only=True)
class SpeedResults:
    """A whole measurement.

    Attributes:
        rows: the bundle's, then the peers'.
        switch_cost: time that a switch of precision adds to a step, as a share of the step, by row that measured it.
        environment: where and with what it was measured.
    """

    rows: tuple[SpeedRow, ...]
    switch_cost: Mapping[str, Spread]
    environment: Mapping[str, Any]

    @property
    def ratios(self) -> list[Ratio]:
        """Each peer beside the uniform schedules of its nominal bits."""
        ours = [row for row in self.rows if not row.peer and row.uniform is not None]
        peers = [row for row in self.rows if row.peer]
        return [Ratio.of(row, peer) for peer in peers for row in ours if row.uniform == peer.bits]

    def to_json(self) -> str:
        """Return ``{"rows", "ratios", "switch_cost", "environment", "version"}`` as JSON text."""
        return json_text(
            {
                "rows": [asdict(row) for row in self.rows],
                "ratios": [asdict(ratio) for ratio in self.ratios],
                "switch_cost": {name: asdict(cost) for name, cost in self.switch_cost.items()},
                "environment": self.environment,
                "version": VERSION,
            }
        )

    def to_csv(self) -> str:
        """Return a line per row; a spread is two columns."""
        return csv_text([dict(_columns(row)) for row in self.rows])

    def to_markdown(self) -> str:
        """Return where it was measured, the table, the cost of a switch, the kernels, and the ratios to peers."""
        e, settings = self.environment, self.environment["settings"]
        parts = [
            f"{e['bundle']['name']}: {settings['prompt_tokens']} prompt tokens, {settings['max_new_tokens']} decoded, "
            f"{settings['repetitions']} repetitions; {e['threads']} threads of {e['cpu']['model']}",
            markdown_table([_HEADER, *(_cells(row) for row in self.rows)]),
        ]
        notes = [
            f"A switch of precision costs {cost.text(2, scale=100)} % of a token ({name})."
            for name, cost in self.switch_cost.items()
        ]
        notes += _by_rows(
            [(f"{phase} by {', '.join(names)}", r) for r in self.rows for phase, names in r.kernels.items()]
        )
        notes += _by_rows([(row.facts["version"], row) for row in self.rows if row.peer])
        parts += ["\n".join(notes)] if notes else []
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
    "in GEMVs %",
    "of promised %",
    "peak MB",
    "others %",
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
        row.gbs.text(1) if row.gbs else "–",
        row.gemv_share.text(1, scale=100) if row.gemv_share else "–",
        row.reached.text(1, scale=100) if row.reached else "–",
        format_number(row.peak_bytes / 1e6, 0),
        format_number(100 * row.others.mean if row.others else None, 1),
    ]


def _columns(row: SpeedRow) -> list[tuple[str, object]]:
    columns: list[tuple[str, object]] = [
        ("name", row.name),
        ("bits", row.bits),
        ("model_bytes", row.model_bytes),
        ("step_bytes", row.step_bytes),
    ]
    for name in ("prefill_tps", "decode_tps", "gbs", "gemv_share", "reached", "others"):
        spread: Spread | None = getattr(row, name)
        columns += [(name, spread and spread.mean), (f"{name}_stdev", spread and spread.stdev)]
    return [*columns, ("peak_bytes", row.peak_bytes)]
