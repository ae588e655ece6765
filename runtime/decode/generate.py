"""Progressive mixed-precision decoding: prefill at high precision, then decode as the schedule says (Algorithm 1)."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pmpd.runtime.decode.sampling import Sampler, Sampling
from pmpd.runtime.decode.trace import Token, Trace
from pmpd.runtime.engine.kernels import NodeKernel, choose_library, portable_kernels, require_fast
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.sessions import GraphRunner, available_threads, open_session
from pmpd.runtime.errors import ContextLengthError, PmpdError, unknown_choice
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.manifest import Graph
from pmpd.runtime.schedule.static import Schedule, parse_schedule
from pmpd.runtime.text import StopStrings, TextStream, Tokenizer

__all__ = ["DEFAULT_CONTEXT_LENGTH", "Generator"]

# Room for more would be allocated lazily, but a 128 k context of a large model is more than most devices have.
DEFAULT_CONTEXT_LENGTH = 4096
# Prompts go in by pieces, so that the memory of activations does not grow with the prompt.
PREFILL_CHUNK = 512

_numbers = count(1)  # a library reports by session, and serves all generators of the process


class Generator:
    """Generates text with a bundle. One sequence at a time; not safe to share between threads.

    Kernels are native code of the bundle and run in this process: refuse those of a bundle that you do not trust with
    ``kernels=False``, or give a library that you built. Where there are none for this machine, the portable graphs run,
    many times slower, and a warning is logged.

    Args:
        bundle: an open bundle.
        threads: threads that ONNX Runtime computes with; default all processors this process may use.
        context_length: positions of the KV cache; default the model's context, at most 4096.
        precisions: decode precisions to load; default all of the bundle.
        tokenizer: the bundle's tokenizer, for tokens with text and for stop strings.
        kernels: True for the bundle's library for this machine, False for none, or the path of another library.
        accuracy: ``exact`` or ``int8`` kernels; default the bundle's.
        require_fast_kernels: refuse to run anything but fast kernels.

    Attributes:
        kernel_library: the library that runs; None for the portable graphs.
        tokens: the token ids that the KV cache holds.
        trace: the record of the last `stream`.

    Raises:
        PmpdError: a precision or accuracy that does not exist, a context beyond the model's, no threads.
        BundleError: ONNX Runtime refuses a graph.
        KernelError: the given library does not load, or fast kernels are required and not there.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        precisions: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        kernels: bool | str | Path = True,
        accuracy: str | None = None,
        require_fast_kernels: bool = False,
    ) -> None:
        manifest = bundle.manifest
        capacity = min(manifest.context_length, DEFAULT_CONTEXT_LENGTH) if context_length is None else context_length
        if not 1 <= capacity <= manifest.context_length:
            raise PmpdError(f"context length {capacity}: the model allows 1 to {manifest.context_length}")
        threads = available_threads() if threads is None else threads
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.trace = Trace(prompt_tokens=0)
        self.cache = KvCache(manifest.kv_cache, capacity)

        decoded = [manifest.graph("decode", p) for p in (manifest.precisions if precisions is None else precisions)]
        prefill = manifest.graph("prefill", manifest.prefill_precision)
        accuracy = accuracy or manifest.accuracy
        self.kernel_library = choose_library(bundle, kernels, accuracy=accuracy, required=require_fast_kernels)
        if require_fast_kernels and self.kernel_library is not None:
            require_fast(self.kernel_library, manifest, [prefill, *decoded])
        self._graphs: dict[str, Graph] = {}  # by the tag of its session

        def runner(graph: Graph) -> GraphRunner:
            tag = f"{graph.file}#{next(_numbers)}"
            self._graphs[tag] = graph
            session = open_session(bundle, graph, threads=threads, kernels=self.kernel_library, tag=tag)
            return GraphRunner(session, self.cache, manifest.architecture.vocab_size, path=bundle.path / graph.file)

        self._prefill = runner(prefill)
        self._decode = {graph.precision: runner(graph) for graph in decoded}
        self._schedule = parse_schedule(manifest.schedule, manifest.precisions)

    def kernels(self, *, reset: bool = False) -> list[NodeKernel]:
        """Return what ran for every node of every loaded graph that a kernel can run: kernel, calls, time.

        Without a library these are the `BitplaneMatMul` nodes. With `reset`, counting starts again after this.
        """
        library, nodes = self.kernel_library, list[NodeKernel]()
        for tag, graph in self._graphs.items():
            nodes += portable_kernels(self.bundle.manifest, graph) if library is None else library.report(tag, graph)
            if library is not None and reset:
                library.reset(tag)
        return nodes

    def reset(self) -> None:
        """Empty the KV cache."""
        self._rewind(0)

    def prefill(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append prompt tokens at the prefill precision; return the logits ``[V]`` of the last position.

        Raises:
            ContextLengthError: the cache has no room for them.
            PmpdError: no tokens, or one that is not in the vocabulary.
        """
        self._check(ids)
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = self._append(self._prefill, ids[start : start + PREFILL_CHUNK])
        last: npt.NDArray[np.float32] = logits[-1].copy()
        return last

    def decode(self, ids: Sequence[int], *, precision: int) -> npt.NDArray[np.float32]:
        """Append tokens at `precision` bits; return the logits ``[len(ids), V]`` of every position.

        Raises:
            ContextLengthError: the cache has no room for them.
            PmpdError: no tokens, one that is not in the vocabulary, or a precision that is not loaded.
        """
        self._check(ids)
        if precision not in self._decode:
            raise PmpdError(unknown_choice("precision", precision, self._decode))
        return self._append(self._decode[precision], ids).copy()

    def decode_step(self, token_id: int, *, precision: int) -> npt.NDArray[np.float32]:
        """Append one token at `precision` bits; return the logits ``[V]`` that follow it. Raises as `decode` does."""
        logits: npt.NDArray[np.float32] = self.decode([token_id], precision=precision)[0]
        return logits

    def stream(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        schedule: Schedule | str | None = None,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        keep_cache: bool = False,
    ) -> abc.Generator[Token, None, None]:
        """Generate tokens after a prompt, one by one; closing the iterator cancels.

        Args:
            prompt_ids: the whole text so far, as token ids.
            max_new_tokens: at most so many tokens; default as many as the cache has room for.
            schedule: the precision of each decode step, also as text (``static:3@16,2@32``); default the bundle's.
            sampling: how tokens are chosen; default greedy.
            stop_ids: tokens that end the answer (not yielded); default those of the bundle.
            stop_strings: texts that end the answer (not part of it); they need a tokenizer.
            keep_cache: keep the longest prefix of `prompt_ids` that the cache already holds and compute only the rest:
                how a conversation goes on. What was decoded at a low precision keeps its low-precision keys and values.

        Raises:
            ContextLengthError: prompt and `max_new_tokens` together do not fit the cache.
            PmpdError: an empty prompt, an unknown token, a precision that is not loaded; or, from the iterator, another
                stream was started on this generator.
        """
        self._check(prompt_ids, room=self.cache.capacity)
        room = self.cache.capacity - len(prompt_ids) + 1  # the last token needs no place in the cache
        limit = room if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise PmpdError(f"max_new_tokens must be 1 or more, got {limit}")
        if limit > room:
            raise ContextLengthError(
                f"{len(prompt_ids)} prompt and {limit} new tokens do not fit the KV cache of {self.cache.capacity}: "
                f"{self._remedy()}, or ask for at most {room} new tokens"
            )
        if isinstance(schedule, str):
            schedule = parse_schedule(schedule, self.bundle.manifest.precisions)
        schedule = schedule or self._schedule
        for precision in schedule.precisions:
            if precision not in self._decode:
                raise PmpdError(f"schedule {schedule}: {unknown_choice('precision', precision, self._decode)}")
        stop_strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
        if stop_strings and self.tokenizer is None:
            raise PmpdError("stop strings need a tokenizer: Generator(bundle, tokenizer=Tokenizer.from_bundle(bundle))")
        stop = set(self.bundle.stop_ids if stop_ids is None else stop_ids)
        prompt, sampler, trace = list(prompt_ids), Sampler(sampling or Sampling()), Trace(prompt_tokens=len(prompt_ids))
        self.trace = trace
        tokens = self._stream(trace, prompt, limit, schedule, sampler, stop, keep_cache)
        if self.tokenizer is None:
            return tokens
        return _with_text(trace, tokens, TextStream(self.tokenizer, prompt), StopStrings(stop_strings))

    def _stream(
        self,
        trace: Trace,
        prompt: list[int],
        limit: int,
        schedule: Schedule,
        sampler: Sampler,
        stop: set[int],
        keep_cache: bool,
    ) -> abc.Generator[Token, None, None]:
        self._check_current(trace)
        begin = time.perf_counter()
        if keep_cache:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, prompt, strict=False)))
            trace.reused_tokens = min(same, len(prompt) - 1)  # the last token is run again, for its logits
        self._rewind(trace.reused_tokens)
        logits = self.prefill(prompt[trace.reused_tokens :])
        trace.prefill_seconds = time.perf_counter() - begin
        precision = self.bundle.manifest.prefill_precision
        for index in range(limit):
            token_id = sampler(logits, prompt)
            if token_id in stop:
                trace.finish_reason = "stop_id"
                return
            now = time.perf_counter()
            trace.tokens.append(Token(token_id, index, precision, now - begin))
            yield trace.tokens[-1]
            self._check_current(trace)
            if index + 1 == limit:
                break
            begin = time.perf_counter()  # time between two yields is the caller's
            prompt.append(token_id)
            precision = schedule.precision(index)
            logits = self._append(self._decode[precision], [token_id])[0]
        trace.finish_reason = "length"

    def _append(self, runner: GraphRunner, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        length = self.cache.length
        try:
            logits = runner(ids)
        except BaseException:  # an interrupt too: what the cache holds must stay what `tokens` says
            self._rewind(length)
            raise
        self.tokens.extend(ids)
        return logits

    def _rewind(self, length: int) -> None:
        self.cache.truncate(length)
        del self.tokens[length:]

    def _check_current(self, trace: Trace) -> None:
        if self.trace is not trace:
            raise PmpdError("another stream was started on this generator: finish one before the next")

    def _check(self, ids: Sequence[int], *, room: int | None = None) -> None:
        vocab_size = self.bundle.manifest.architecture.vocab_size
        if len(ids) == 0:
            raise PmpdError("there are no tokens to run: give at least one token id")
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise PmpdError(f"token id {token_id} is not in the model's vocabulary (0 to {vocab_size - 1})")
        room = self.cache.capacity - self.cache.length if room is None else room
        if len(ids) > room:
            raise ContextLengthError(
                f"{len(ids)} tokens do not fit the KV cache, which has room for {room} of {self.cache.capacity}: "
                f"{self._remedy()}"
            )

    def _remedy(self) -> str:
        longest = self.bundle.manifest.context_length
        if self.cache.capacity < longest:
            return f"make it larger (context_length up to {longest}) or shorten the text"
        return "shorten the text (this is all the model allows)"


def _with_text(
    trace: Trace, tokens: Iterator[Token], text: TextStream, stop: StopStrings
) -> abc.Generator[Token, None, None]:
    """Give tokens their text, in the trace too, and end at a stop string."""

    def record(ready: list[Token]) -> list[Token]:
        for token in ready:
            trace.tokens[token.index] = token
        return ready

    for token in tokens:
        yield from record(stop.push(replace(token, text=text.push(token.id))))
        if stop.found:
            trace.finish_reason = "stop_string"
            return
    yield from record(stop.flush(text.flush()))
