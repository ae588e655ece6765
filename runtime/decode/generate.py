"""`Generator`: prompts in, tokens out. The simple face of an engine and one conversation."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pmpd.runtime.decode import sequence
from pmpd.runtime.decode.sampling import Sampler, Sampling
from pmpd.runtime.decode.stop_strings import StopStrings
from pmpd.runtime.decode.stream import decode_tokens, recorded, with_text
from pmpd.runtime.decode.trace import Token, Trace
from pmpd.runtime.engine.engine import Engine
from pmpd.runtime.engine.kernels import KernelLibrary, NodeKernel
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.errors import ContextLengthError, PmpdError, unknown_choice
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.schedule.base import Plan, Schedule
from pmpd.runtime.schedule.registry import schedule_of
from pmpd.runtime.text import TextStream, Tokenizer

__all__ = ["Generator"]


class Generator:
    """Generates text with a bundle: the simple face of an `Engine` and one `Sequence`. One thread at a time.

    Kernels are native code of the bundle and run in this process: for a bundle that you do not trust give
    ``kernels=False``, or the path of a library that you built. Where there are none for this machine, the portable
    graphs run, many times slower, and a warning is logged.

    Several conversations at once, also in several threads, share what is loaded: `Generator.on` one `Engine` each.

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
        tokenizer: the tokenizer, or None.
        trace: the record of the last `stream`.

    Raises:
        PmpdError: a precision or accuracy that does not exist, a context beyond the model's, a number of threads out of
            range.
        BundleError: ONNX Runtime refuses a graph.
        KernelError: the library does not load, or fast kernels are required and there are none.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        context_length: int | None = None,
        precisions: Sequence[float] | None = None,
        tokenizer: Tokenizer | None = None,
        kernels: bool | str | Path = True,
        accuracy: str | None = None,
        require_fast_kernels: bool = False,
    ) -> None:
        engine = Engine(
            bundle,
            threads=threads,
            precisions=precisions,
            kernels=kernels,
            accuracy=accuracy,
            require_fast_kernels=require_fast_kernels,
        )
        self._attach(engine, context_length, tokenizer)

    @classmethod
    def on(cls, engine: Engine, *, context_length: int | None = None, tokenizer: Tokenizer | None = None) -> Self:
        """Return a generator for one more conversation on a loaded engine. Arguments and errors as above."""
        generator = cls.__new__(cls)
        generator._attach(engine, context_length, tokenizer)
        return generator

    def _attach(self, engine: Engine, context_length: int | None, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.trace = Trace(prompt_tokens=0)
        self._default = schedule_of(engine.bundle)
        self._open: sequence.Sequence | None = sequence.Sequence(engine, context_length=context_length)

    def close(self) -> None:
        """Free sessions and KV cache. The generator cannot be used afterwards; an engine it shares stays open."""
        if self._open is not None:
            self._open.close()
        self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sequence(self) -> sequence.Sequence:
        """The conversation: its tokens and KV cache."""
        if self._open is None:
            raise PmpdError("this generator is closed: make another")
        return self._open

    @property
    def engine(self) -> Engine:
        """What is loaded."""
        return self.sequence.engine

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self.engine.bundle

    @property
    def kernel_library(self) -> KernelLibrary | None:
        """The library that runs; None for the portable graphs."""
        return self.engine.kernel_library

    @property
    def cache(self) -> KvCache:
        """The conversation's KV cache."""
        return self.sequence.cache

    @property
    def tokens(self) -> list[int]:
        """The token ids that the KV cache holds."""
        return self.sequence.tokens

    def kernels(self, *, reset: bool = False) -> list[NodeKernel]:
        """Return what ran for every node that a kernel can run, as `Engine.kernels`."""
        return self.engine.kernels(reset=reset)

    def reset(self) -> None:
        """Empty the KV cache."""
        self.sequence.reset()

    def prefill(self, ids: Sequence[int], *, precision: float | None = None) -> npt.NDArray[np.float32]:
        """Append prompt tokens, at the bundle's prefill precision unless another is given, in bits.

        Returns the logits ``[V]`` of the last position. Raises as `decode` does.
        """
        return self.sequence.prefill(ids, precision=precision)

    def begin(self, schedule: Schedule, logits: npt.NDArray[np.float32]) -> Plan:
        """Return the schedule's plan for the prompt that was prefilled and gave `logits` ``[V]``."""
        return self.sequence.begin(schedule, logits)

    def decode(self, ids: Sequence[int], *, precision: float) -> npt.NDArray[np.float32]:
        """Append tokens at `precision` bits; return the logits ``[len(ids), V]`` of every position.

        Raises:
            ContextLengthError: the cache has no room for them.
            PmpdError: no tokens, one that is not in the vocabulary, a precision that is not loaded, or another thread
                is using the generator.
        """
        return self.sequence.decode(ids, precision=precision)

    def decode_step(self, token_id: int, *, precision: float) -> npt.NDArray[np.float32]:
        """Append one token at `precision` bits; return the logits ``[V]`` that follow it. Raises as `decode` does."""
        with self.sequence.exclusive():
            return self.sequence.step(token_id, precision=precision).copy()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        schedule: Schedule | str | None = None,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        keep_cache: bool = False,
    ) -> Trace:
        """Generate a whole answer: its `text`, `tokens` and `finish_reason` are in the trace that is returned.

        `prompt` is text, which needs a tokenizer, or token ids. Other arguments and errors as in `stream`.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PmpdError("a prompt as text needs a tokenizer: give token ids, or Generator(…, tokenizer=…)")
            prompt = self.tokenizer.encode(prompt)
        tokens = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            schedule=schedule,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            keep_cache=keep_cache,
        )
        trace = self.trace
        for _ in tokens:
            pass
        return trace

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        schedule: Schedule | str | None = None,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
    ) -> Trace:
        """Answer the last of `messages` through the model's chat template: `text` of the trace that is returned.

        `messages`, `tools`, `documents` and `variables` are those of `Tokenizer.apply_chat_template`, the rest are
        those of `stream`. What the KV cache already holds of the conversation is kept. To get the answer token by
        token, stream what the template gives: ``stream(tokenizer.apply_chat_template(messages), keep_cache=True)``.

        Raises:
            PmpdError: there is no tokenizer or no chat template, it refuses the messages, or as `stream`.
        """
        if self.tokenizer is None:
            raise PmpdError("a chat needs a tokenizer: Generator(…, tokenizer=Tokenizer.from_bundle(bundle))")
        return self.generate(
            self.tokenizer.apply_chat_template(messages, tools=tools, documents=documents, variables=variables),
            max_new_tokens=max_new_tokens,
            schedule=schedule,
            sampling=sampling,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            keep_cache=True,
        )

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

        Why it ended is in `trace.finish_reason`.

        Args:
            prompt_ids: the whole text so far, as token ids.
            max_new_tokens: the most tokens to generate; default as many as the cache has room for.
            schedule: the precision of each decode step, also as text (``static:3@16,2@32``) or as the name of one of
                the bundle's; default the bundle's default.
            sampling: how tokens are chosen; default greedy.
            stop_ids: tokens that end the answer (not yielded); default those of the bundle.
            stop_strings: texts that end the answer (not part of it); they need a tokenizer.
            keep_cache: keep the longest prefix of `prompt_ids` that the cache already holds and compute only the rest:
                how a conversation goes on. What was decoded at a low precision keeps its low-precision keys and values.

        Raises:
            ContextLengthError: prompt and `max_new_tokens` together do not fit the cache.
            PmpdError: an empty prompt, an unknown token, a precision that is not loaded, another thread is using the
                generator; or, from the iterator: the conversation changed meanwhile (another stream, reset, prefill,
                decode), or the model's logits are not numbers.
        """
        conversation = self.sequence
        capacity = conversation.cache.capacity
        conversation.check(prompt_ids, room=capacity)
        room = capacity - len(prompt_ids) + 1  # the last token needs no place in the cache
        limit = room if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise PmpdError(f"max_new_tokens must be 1 or more, got {limit}")
        if limit > room:
            raise ContextLengthError(
                f"{len(prompt_ids)} prompt and {limit} new tokens do not fit the KV cache of {capacity}: "
                f"{conversation.remedy()}, or ask for at most {room} new tokens"
            )
        if isinstance(schedule, str):
            schedule = schedule_of(self.bundle, schedule)
        schedule = schedule or self._default
        asked = set(schedule.precisions)
        if schedule.prefill not in (None, self.bundle.manifest.prefill_precision):
            asked.add(schedule.prefill)
        for precision in asked:
            if precision not in conversation.precisions:
                raise PmpdError(
                    f"schedule {schedule}: {unknown_choice('precision', precision, conversation.precisions)}"
                )
        stop_strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
        if stop_strings and self.tokenizer is None:
            raise PmpdError("stop strings need a tokenizer: Generator(bundle, tokenizer=Tokenizer.from_bundle(bundle))")
        stops = StopStrings(stop_strings)
        with conversation.exclusive():  # ends other streams
            epoch = conversation.epoch
            trace = self.trace = Trace(prompt_tokens=len(prompt_ids))
        tokens = decode_tokens(
            conversation,
            prompt_ids,
            epoch=epoch,
            limit=limit,
            schedule=schedule,
            sampler=Sampler(sampling or Sampling()),
            stop=frozenset(self.bundle.stop_ids if stop_ids is None else stop_ids),
            keep_cache=keep_cache,
            trace=trace,
        )
        if self.tokenizer is not None:
            tokens = with_text(tokens, TextStream(self.tokenizer, prompt_ids), stops, trace=trace)
        return recorded(tokens, trace=trace)
