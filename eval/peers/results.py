"""What a comparison with peers gave: a row per contender, each peer beside each precision; markdown and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pmpd.eval.measure.examiner import FP
from pmpd.eval.metrics.statistics import PLUS_MINUS, Estimate
from pmpd.eval.report.results import QualityResults, QualityRow, count_text, format_number
from pmpd.eval.speed.results import Ratio, SpeedResults, SpeedRow
from pmpd.runtime.console.output import json_text, markdown_table
from pmpd.runtime.errors import PmpdError

__all__ = ["VERSION", "Contender", "Pair", "PeerResults"]

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row.

    Attributes:
        name: the schedule, ``fp``, or the peer and its variant.
        bits: mean bits over the decode steps; of a peer, those that its name claims; of fp, those it is stored in.
        model_bytes: size of the weights on disk. None for fp, as what follows, down to `peak_bytes`.
        step_bytes: bytes of weights that a decode step reads, without the KV cache.
        prefill_tps, decode_tps: tokens per second.
        peak_bytes: most memory that its process had resident while its speed was measured.
        perplexity: decode perplexity; None where an unfinished comparison has none.
        difference: its perplexity minus that of fp, paired by window; None for fp, and without both.
    """

    name: str
    bits: float | None
    model_bytes: int | None = None
    step_bytes: float | None = None
    prefill_tps: Estimate | None = None
    decode_tps: Estimate | None = None
    peak_bytes: int | None = None
    perplexity: Estimate | None = None
    difference: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A uniform schedule beside a peer.

    Attributes:
        ours, peer: their names.
        bytes: bytes of weights that a step of ours reads, by those of the peer.
        decode: how many times as fast ours decodes; paired by repetition.
        prefill: the same for the prompt.
        difference: perplexity of ours minus that of the peer; paired by window. None without both.
    """

    ours: str
    peer: str
    bytes: float | None
    decode: Estimate
    prefill: Estimate
    difference: Estimate | None


@dataclass(frozen=True, kw_only=True)
class PeerResults:
    """A whole comparison.

    Attributes:
        speed: the speed measurement.
        quality: fp, the schedules and the peers over the same windows of text.
        unscored: names of the rows without a perplexity, because something ended the comparison early.
        cause: what did: Ctrl-C, a signal or a failure.
    """

    speed: SpeedResults
    quality: QualityResults
    unscored: tuple[str, ...] = ()
    cause: KeyboardInterrupt | PmpdError | None = None

    @property
    def unfinished(self) -> tuple[str, ...]:
        """What was not measured: repetitions of the speed, and perplexities."""
        return (*self.speed.unfinished, *(f"perplexity of {name}" for name in self.unscored))

    @property
    def progress(self) -> str:
        """How much of the comparison there is, for a message."""
        rows = len(self.quality.rows)
        return f"speed: {self.speed.progress}, perplexity: {rows} of {rows + len(self.unscored)} rows are finished"

    @property
    def rows(self) -> list[Contender]:
        """Fp, the schedules, the peers; of an unfinished comparison with what there is of each."""
        metric = self.quality.metrics[0]
        fp = next((row for row in self.quality.rows if row.name == FP), None)
        rows = []
        for name, row, speed in self._measured():
            contender = Contender(name=name, bits=row.average_bits if row else None)
            if speed:
                contender = replace(
                    contender,
                    bits=speed.bits,
                    model_bytes=speed.model_bytes,
                    step_bytes=_weight_bytes(row, speed),
                    prefill_tps=speed.prefill_tps,
                    decode_tps=speed.decode_tps,
                    peak_bytes=speed.peak_bytes,
                )
            if row and fp:
                difference = None if row is fp else metric.difference(row.samples, fp.samples)
                contender = replace(contender, perplexity=row.metrics[metric.name], difference=difference)
            rows.append(contender)
        return rows

    @property
    def pairs(self) -> list[Pair]:
        """Each peer beside each uniform schedule."""
        metric = self.quality.metrics[0]
        rows = [(row, speed) for _, row, speed in self._measured() if speed]
        pairs = []
        for theirs, peer in rows:
            for row, ours in rows:
                if not peer.peer or ours.uniform is None:
                    continue
                ratio = Ratio.of(ours, peer)
                read, theirs_read = _weight_bytes(row, ours), _weight_bytes(theirs, peer)
                pairs.append(
                    Pair(
                        ours=ours.name,
                        peer=peer.name,
                        bytes=read / theirs_read if read and theirs_read else None,
                        decode=ratio.decode,
                        prefill=ratio.prefill,
                        difference=metric.difference(row.samples, theirs.samples) if row and theirs else None,
                    )
                )
        return pairs

    def to_json(self) -> str:
        """Return JSON text with rows, pairs, scores, timings, facts, what is unfinished, environment and version.

        ``scores`` has the negative log-likelihood of each window by row, ``timings`` the seconds of each repetition.
        """
        document: dict[str, Any] = {
            "rows": [asdict(row) for row in self.rows],
            "pairs": [asdict(pair) for pair in self.pairs],
            "scores": {
                row.name: [{"source": s.source, "steps": s.scored_steps, **s.scores} for s in row.samples]
                for row in self.quality.rows
            },
            "timings": {row.name: [asdict(timing) for timing in row.timings] for row in self.speed.rows},
            "facts": {row.name: row.facts for row in self.speed.rows},
            "unfinished": self.unfinished,
            "environment": {"speed": self.speed.environment, "quality": self.quality.environment},
            "version": VERSION,
        }
        return json_text(document)

    def to_markdown(self) -> str:
        """Return where it was measured, the table, notes on it, and the peers beside each precision."""
        e = self.speed.environment
        settings, metric = e["settings"], self.quality.metrics[0]
        head = (
            f"{e['bundle']['name']}: {settings['prompt_tokens']} prompt tokens, {settings['max_new_tokens']} decoded, "
            f"{count_text(settings['repetitions'], 'repetition')}, {count_text(e['threads'], 'thread')} of "
            f"{e['cpu']['model']}"
        )
        if self.quality.rows:
            samples = self.quality.rows[0].samples
            head += (
                f"; perplexity over {count_text(len(samples), 'window')} of "
                f"{self.quality.environment['data']['name']}, {metric.counted(samples)}"
            )
        parts = [head, markdown_table([_HEADER, *map(_cells, self.rows)]), "\n".join(self._notes())]
        if pairs := self.pairs:
            cells = [
                [
                    *(pair.ours, pair.peer, format_number(pair.bytes, 2), pair.decode.text(2), pair.prefill.text(2)),
                    pair.difference.text(metric.digits, sign=True) if pair.difference else "–",
                ]
                for pair in pairs
            ]
            parts.append(markdown_table([["ours", "peer", "bytes", "decode", "prefill", "perplexity"], *cells]))
            parts.append(
                "ours by peer: bytes of weights that a step reads, and how many times as fast; perplexity: ours minus "
                "the peer's. Fewer bytes, more speed and a lower perplexity are better."
            )
        return "\n\n".join(parts)

    def _measured(self) -> list[tuple[str, QualityRow | None, SpeedRow | None]]:
        """Return the name, the perplexity and the speed of fp (it has no speed), the schedules and the peers."""
        scored = {row.name: row for row in self.quality.rows}
        speeds = {row.name: row for row in self.speed.rows}
        return [(name, scored.get(name), speeds.get(name)) for name in (*scored, *self.unscored)]

    def _notes(self) -> Iterator[str]:
        yield f"{PLUS_MINUS}: over repetitions for speed, over windows of text for perplexity (differences are paired)."
        yield "MB/token: weights that a step reads, output layer included, KV cache not. MB: weights on disk."
        for row in self.speed.rows:
            if row.peer:
                yield f"{row.name}: {row.facts['version']}"
        loads = [(row.other_load.value, row.name) for row in self.speed.rows if row.other_load]
        if loads:
            load, name = max(loads)
            yield f"Other processes used at most {100 * load:.1f} % of all processors on average ({name})."


_HEADER = [
    *("", "bits", "MB", "MB/token", "decode tokens/s", "prefill tokens/s", "peak MB", "perplexity"),
    "difference to fp",
]


def _weight_bytes(row: QualityRow | None, speed: SpeedRow) -> float | None:
    """Return the bytes of weights that a step reads: the bundle's from the manifest, a peer's as it says."""
    if speed.peer:
        return speed.facts.get("step_bytes")
    return row.step_bytes if row else None


def _cells(row: Contender) -> list[str]:
    def megabytes(value: float | None) -> str:
        return format_number(value and value / 1e6, 1)

    return [
        row.name,
        format_number(row.bits, 2),
        megabytes(row.model_bytes),
        megabytes(row.step_bytes),
        row.decode_tps.text(1) if row.decode_tps else "–",
        row.prefill_tps.text(1) if row.prefill_tps else "–",
        format_number(row.peak_bytes and row.peak_bytes / 1e6, 0),
        row.perplexity.text(2) if row.perplexity else "–",
        row.difference.text(2, sign=True) if row.difference else "–",
    ]
