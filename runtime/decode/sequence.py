"""One conversation: a KV cache and the tokens it holds, over a shared engine."""

from __future__ import annotations

import math
import threading
from collections import abc
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.engine import Engine
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.sessions import GraphRunner, StepBuffers
from pmpd.runtime.errors import ContextLengthError, PmpdError, unknown_choice
from pmpd.runtime.schedule.base import Plan, Prefill, Schedule

__all__ = ["DEFAULT_CONTEXT_LENGTH", "Sequence"]

# Room for more would be allocated lazily, but a 128 k context of a large model is more than most devices have.
DEFAULT_CONTEXT_LENGTH = 4096
# Prompts go in by pieces, so that the memory of activations does not grow with the prompt.
PREFILL_CHUNK = 512
# Decode graphs give logits of every position, so their pieces are short enough for that many logits.
DECODE_CHUNK_LOGITS = 1 << 24


class Sequence:
    """The tokens of one conversation and their keys and values; one thread at a time.

    A call that finds another thread at work is refused before it changes anything. Several sequences of one engine run
    in several threads at once.

    Args:
        engine: a loaded bundle.
        context_length: positions of the KV cache; default the model's context, at most 4096.

    Attributes:
        tokens: the token ids that the KV cache holds.
        epoch: grows with every change, so that a stream notices when somebody else has used its sequence.

    Raises:
        PmpdError: a context beyond the model's, or no memory for it.
    """

    def __init__(self, engine: Engine, *, context_length: int | None = None) -> None:
        manifest = engine.bundle.manifest
        longest = manifest.context_length
        capacity = min(longest, DEFAULT_CONTEXT_LENGTH) if context_length is None else context_length
        if not 1 <= capacity <= longest:
            raise PmpdError(f"context length {capacity}: the model allows 1 to {longest}")
        self.engine = engine
        self.tokens: list[int] = []
        self.epoch = 0
        self.cache = KvCache(manifest.kv_cache, capacity, device=engine.device)
        step = StepBuffers(manifest.architecture.vocab_size, device=engine.device)
        self._prefill = GraphRunner(engine.prefill, self.cache, step, device=engine.device)
        self._decode = {
            precision: GraphRunner(loaded, self.cache, step, device=engine.device)
            for precision, loaded in engine.decode.items()
        }
        self._lock = threading.RLock()
        self._closed = False

    def close(self) -> None:
        """Free the KV cache. The sequence cannot be used afterwards; streams on it end with an error."""
        with self.exclusive():
            self._closed = True
            self._decode.clear()
            self.cache.buffers.clear()
            del self._prefill

    @property
    def precisions(self) -> tuple[float, ...]:
        """The decode precisions that are loaded."""
        return tuple(self._decode)

    def exclusive(self, *, since: int | None = None) -> AbstractContextManager[None]:
        """Hold the sequence for one change; with `since`, only if nothing has changed since that epoch.

        Raises:
            PmpdError: when entered: another thread is at work on the sequence, it has changed, or it is closed.
        """
        return _Exclusive(self, since)

    def reset(self) -> None:
        """Empty the KV cache."""
        self.truncate(0)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        with self.exclusive():
            del self.tokens[length:]  # first: an interrupt between the two must not leave tokens that the cache lacks
            self.cache.truncate(length)

    def prefill(self, ids: abc.Sequence[int], *, precision: float | None = None) -> npt.NDArray[np.float32]:
        """Append prompt tokens; return the logits ``[V]`` of the last position.

        Args:
            ids: the tokens.
            precision: of the weights, in bits; None for the bundle's prefill precision. Another one runs that
                precision's decode graph, which is somewhat slower, as it computes the logits of all positions.

        Raises:
            ContextLengthError: the cache has no room for them.
            PmpdError: no tokens, one that is not in the vocabulary, a precision that is not loaded, or another thread
                is at work.
        """
        with self.exclusive():
            self.check(ids)
            manifest = self.engine.bundle.manifest
            if precision is None or precision == manifest.prefill_precision:
                runner, size = self._prefill, PREFILL_CHUNK
            else:
                runner = self._runner(precision)
                size = max(1, min(PREFILL_CHUNK, DECODE_CHUNK_LOGITS // manifest.architecture.vocab_size))
            for start in range(0, len(ids), size):
                logits = self._append(ids[start : start + size], runner.run)
            last: npt.NDArray[np.float32] = logits[-1]
            return last

    def decode(self, ids: abc.Sequence[int], *, precision: float) -> npt.NDArray[np.float32]:
        """Append tokens at `precision` bits; return the logits ``[len(ids), V]`` of every position.

        Raises:
            ContextLengthError: the cache has no room for them.
            PmpdError: no tokens, one that is not in the vocabulary, a precision that is not loaded, or another thread
                is at work.
        """
        with self.exclusive():
            self.check(ids)
            return self._append(ids, self._runner(precision).run)

    def step(self, token_id: int, *, precision: float, margin: float = math.inf) -> npt.NDArray[np.float32]:
        """Append one token at `precision` bits; return logits ``[V]`` that the next step overwrites.

        Those within `margin` of the best are exact. With a finite margin a bundle whose output layer is computed coarse
        to fine gives the others approximately, and reads less: they are below the best by more than the margin.

        Raises as `decode` does.
        """
        with self.exclusive():
            self.check((token_id,))
            runner = self._runner(precision)
            return self._append((token_id,), lambda _: runner.step(token_id, margin=margin))

    def begin(self, schedule: Schedule, logits: npt.NDArray[np.float32]) -> Plan:
        """Return the schedule's plan for the prompt in the cache; `logits` ``[V]`` are those of its last position."""
        logits = logits.view()
        logits.flags.writeable = False
        return schedule.begin(Prefill(tokens=tuple(self.tokens), logits=logits, kv=self.cache.view()))

    def check(self, ids: abc.Sequence[int], *, room: int | None = None) -> None:
        """Raise PmpdError or ContextLengthError unless the ids are tokens and fit `room`; default what is free."""
        vocab_size = self.engine.bundle.manifest.architecture.vocab_size
        if len(ids) == 0:
            raise PmpdError("there are no tokens to run: give at least one token id")
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise PmpdError(f"token id {token_id} is not in the model's vocabulary (0 to {vocab_size - 1})")
        room = self.cache.capacity - self.cache.length if room is None else room
        if len(ids) > room:
            raise ContextLengthError(
                f"{len(ids)} tokens do not fit the KV cache, which has room for {room} of {self.cache.capacity}: "
                f"{self.remedy()}"
            )

    def remedy(self) -> str:
        """Return what helps where tokens do not fit."""
        longest = self.engine.bundle.manifest.context_length
        if self.cache.capacity < longest:
            return f"make it larger (context_length up to {longest}) or shorten the text"
        return "shorten the text (this is all the model allows)"

    def _runner(self, precision: float) -> GraphRunner:
        if precision not in self._decode:
            raise PmpdError(unknown_choice("precision", precision, self._decode))
        return self._decode[precision]

    def _append(
        self, ids: abc.Sequence[int], run: Callable[[abc.Sequence[int]], npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        length = self.cache.length
        try:
            self.cache.extend(len(ids))
            logits = run(ids)
            self.tokens.extend(ids)
        except BaseException:  # an interrupt too: what the cache holds must stay what `tokens` says
            del self.tokens[length:]
            self.cache.truncate(length)
            raise
        return logits


class _Exclusive:
    """A class, as a generator function would cost a decode step of a small model one percent."""

    __slots__ = ("_sequence", "_since")

    def __init__(self, sequence: Sequence, since: int | None) -> None:
        self._sequence, self._since = sequence, since

    def __enter__(self) -> None:
        sequence = self._sequence
        if not sequence._lock.acquire(blocking=False):
            raise PmpdError(
                "another thread is using this conversation: wait for it, or give each thread a Generator of its own "
                "(Generator.on shares an Engine)"
            )
        fault = None
        if sequence._closed:
            fault = "this conversation is closed: make another Generator or Sequence"
        elif self._since is not None and self._since != sequence.epoch:
            fault = (
                "the conversation changed between two tokens of this stream (another stream was started on this "
                "generator, or reset, prefill or decode was called): finish or close a stream first"
            )
        if fault is not None:
            sequence._lock.release()
            raise PmpdError(fault)
        sequence.epoch += 1

    def __exit__(self, *_: object) -> None:
        self._sequence._lock.release()
