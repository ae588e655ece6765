"""Measures a bundle and peers made of one checkpoint: speed in turns, then perplexity over the same windows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pmpd.eval.comparison.results import CompareResults
from pmpd.eval.measure.reference import ReferenceCheckpoint
from pmpd.eval.measure.scoring import Sample
from pmpd.eval.report.results import QualityRow, count_text
from pmpd.eval.runner import Settings, evaluate, prepare, read_items
from pmpd.eval.speed.contenders import Peer, parse_peers
from pmpd.eval.speed.speed import SpeedSettings, measure_speed, prepare_speed, start_peer
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime import Bundle
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError

__all__ = ["CompareSettings", "compare"]


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What to compare and how.

    Attributes:
        data: the text for perplexity, whose beginnings are also the prompts for speed.
        schedules: the bundle's rows; default uniform at every precision.
        limit: windows of text.
        reference: folder, alias or hub id of the floating-point model; default what the bundle was made from. The
            peers' models are made of it, too.
        peer_weights: another checkpoint folder or GGUF file to make the peers' models of.
        kernels, prompt_tokens, max_new_tokens, repetitions, max_others, threads, require_fast_kernels, peers,
            peer_python, peer_models: see `SpeedSettings`.

    Raises:
        PmpdError: a value out of range, or an unknown choice.
    """

    data: Path
    schedules: tuple[str, ...] = ()
    limit: int = 16
    reference: str | None = None
    kernels: Path | None = None
    prompt_tokens: int = 128
    max_new_tokens: int = 128
    repetitions: int = 5
    max_others: float | None = None
    threads: int | None = None
    require_fast_kernels: bool = False
    peers: tuple[str, ...] = ()
    peer_python: str = sys.executable
    peer_models: Path | None = None
    peer_weights: Path | None = None

    def __post_init__(self) -> None:
        _ = self.quality, self.speed  # they check their values

    @property
    def quality(self) -> Settings:
        """The settings of the evaluation of perplexity."""
        return Settings(
            task="perplexity",
            data=self.data,
            schedules=self.schedules,
            kernels=self.kernels,
            require_fast_kernels=self.require_fast_kernels,
            limit=self.limit,
            reference=self.reference,
            threads=self.threads,
        )

    @property
    def speed(self) -> SpeedSettings:
        """The settings of the speed measurement."""
        shared = {field.name for field in fields(self)} & {field.name for field in fields(SpeedSettings)}
        return SpeedSettings(**{name: getattr(self, name) for name in shared})


def compare(bundle: Bundle, settings: CompareSettings, *, quiet: bool = True) -> CompareResults:
    """Measure speed, then perplexity; the peers' models are made first. Unless `quiet`, progress is shown on stderr.

    Everything is checked before anything is measured. An interrupt ends it without results.

    Raises:
        PmpdError: an option that does not fit, data without a usable window, a contender that fails.
        MissingExtraError: a package is missing.
    """
    checkpoint = ReferenceCheckpoint.find(bundle, settings.reference)
    task, schedules = prepare(bundle, settings.quality)
    items, _ = read_items(task, settings.quality)
    speed_settings = replace(
        settings.speed, schedules=tuple(schedules), peer_weights=settings.peer_weights or checkpoint.path
    )
    prepare_speed(bundle, speed_settings)
    texts = _texts(items, speed_settings.prompt_tokens + speed_settings.max_new_tokens)
    speed = measure_speed(bundle, speed_settings, texts=texts, quiet=quiet)
    if speed.interrupt:
        raise speed.interrupt
    quality = evaluate(bundle, replace(settings.quality, reference=str(checkpoint.path)), quiet=quiet)
    if quality.interrupt:
        raise quality.interrupt
    rows = [_peer_row(peer, bundle, speed_settings, task, items, quiet=quiet) for peer in parse_peers(settings.peers)]
    return CompareResults(speed=speed, quality=replace(quality, rows=(*quality.rows, *rows)))


def _texts(items: Sequence[Item], length: int) -> list[list[int]]:
    """Cut the text of all windows into pieces of `length` tokens.

    Raises:
        PmpdError: there is not one piece.
    """
    ids = [token for item in items for token in (*item.ids, *item.answer)]
    if len(ids) < length:
        raise PmpdError(
            f"the data have {len(ids)} tokens in {count_text(len(items), 'window')}, "
            f"and one prompt and its answer take {length}: give a longer text or a higher --limit"
        )
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def _peer_row(
    peer: Peer, bundle: Bundle, settings: SpeedSettings, task: Task, items: Sequence[Item], *, quiet: bool
) -> QualityRow:
    """Score a peer on the windows of text, each in one batch."""
    room = replace(settings, prompt_tokens=max(map(task.positions, items)), max_new_tokens=1)
    samples = []
    with start_peer(peer, bundle.manifest, room) as process:
        for item in track(items, step=peer.label, total=len(items), quiet=quiet):
            nll = process.run(prompt=item.ids, answer=item.answer)["nll"]
            samples.append(
                Sample(
                    source=item.source,
                    prompt_tokens=len(item.ids),
                    output_tokens=len(item.answer),
                    precisions=(),
                    prefill_seconds=0.0,
                    scores={"nll": sum(nll) / len(nll)},
                    scored_steps=len(nll),
                )
            )
    return QualityRow.of(peer.label, samples, task.metrics)
