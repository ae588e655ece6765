"""Measures a bundle and peers made of one checkpoint: speed in turns, then perplexity over the same windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pmpd.eval.measure.examiner import FP
from pmpd.eval.measure.reference import ReferenceCheckpoint
from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.peers.results import PeerResults
from pmpd.eval.report.results import QualityResults, QualityRow, count_text
from pmpd.eval.runner import evaluate, prepare, read_items
from pmpd.eval.settings import Settings
from pmpd.eval.speed.contenders import Peer, parse_peers
from pmpd.eval.speed.speed import SpeedSettings, measure_speed, prepare_speed, start_peer
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime import Bundle
from pmpd.runtime.console.progress import track
from pmpd.runtime.errors import PmpdError

__all__ = ["PeerSettings", "measure_peers"]


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """What to compare and how.

    Attributes:
        data: the text for perplexity, whose beginnings are also the prompts for speed.
        limit: windows of text.
        reference: folder, alias or hub id of the floating-point model; default what the bundle was made from.
        speed: schedules, resources and peers, for perplexity too, and the turns. Here its default schedules are uniform
            at every precision, and the default `peer_weights` is the floating-point model.

    Raises:
        PmpdError: a value out of range, or an unknown choice.
    """

    data: Path
    limit: int = 16
    reference: str | None = None
    speed: SpeedSettings = field(default_factory=SpeedSettings)

    def __post_init__(self) -> None:
        _ = self.quality  # it checks its values

    @property
    def quality(self) -> Settings:
        """The settings of the evaluation of perplexity."""
        return Settings(
            task="decode_perplexity",
            data=self.data,
            limit=self.limit,
            reference=self.reference,
            schedules=self.speed.schedules,
            kernels=self.speed.kernels,
            require_fast_kernels=self.speed.require_fast_kernels,
            threads=self.speed.threads,
        )


def measure_peers(bundle: Bundle, settings: PeerSettings, *, quiet: bool = True) -> PeerResults:
    """Measure speed, then perplexity; the peers' models are made first. Unless `quiet`, progress is shown on stderr.

    Everything is checked before anything is measured. An interrupt (KeyboardInterrupt) or a PmpdError after at least
    one whole repetition of the speed ends the comparison: what is finished is returned, with what is not as
    `unfinished` and the exception as `cause`.

    Raises:
        PmpdError: an option that does not fit, data without a usable window, a contender that fails before that.
        MissingExtraError: a package is missing.
    """
    checkpoint = ReferenceCheckpoint.find(bundle, settings.reference)
    task, schedules = prepare(bundle, settings.quality)
    items, _ = read_items(task, settings.quality)
    speed_settings = replace(
        settings.speed,
        schedules=tuple(schedules),
        peer_weights=settings.speed.peer_weights or checkpoint.path,
    )
    prepare_speed(bundle, speed_settings)
    texts = _texts(items, speed_settings.prompt_tokens + speed_settings.max_new_tokens)
    peers = parse_peers(speed_settings.peers)
    names = (FP, *schedules, *(peer.label for peer in peers))
    quality = QualityResults(rows=(), metrics=task.metrics, environment={})
    speed = measure_speed(bundle, speed_settings, texts=texts, quiet=quiet)
    cause = speed.cause
    try:
        if cause is None:
            quality = evaluate(bundle, replace(settings.quality, reference=str(checkpoint.path)), quiet=quiet)
        for peer in peers if cause is None else ():
            row = _peer_row(peer, bundle, speed_settings, task, items, quiet=quiet)
            quality = replace(quality, rows=(*quality.rows, row))
    except (KeyboardInterrupt, PmpdError) as error:
        cause = error.with_traceback(None)
    return PeerResults(speed=speed, quality=quality, unscored=names[len(quality.rows) :], cause=cause)


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
            turn = Turn(prompt_tokens=len(item.ids), segments=())
            scores = {"nll": sum(nll) / len(nll)}
            samples.append(
                Sample(source=item.source, group=item.group, turns=(turn,), scores=scores, scored_steps=len(nll))
            )
    return QualityRow.of(peer.label, samples, task.metrics)
