"""The loop of progressive mixed-precision decoding (PMPD paper, Algorithm 1), and the text of its tokens."""

from __future__ import annotations

import math
import time
from collections import abc
from collections.abc import Iterator, Set
from dataclasses import replace
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from pmpd.runtime.decode.sampling import Sampler
from pmpd.runtime.decode.sequence import Sequence
from pmpd.runtime.decode.stop_strings import StopStrings
from pmpd.runtime.decode.trace import Token, Trace
from pmpd.runtime.errors import PmpdError
from pmpd.runtime.schedule.base import AdaptivePlan, Schedule
from pmpd.runtime.text import TextStream

__all__ = ["decode_tokens", "recorded", "with_text"]


def decode_tokens(
    conversation: Sequence,
    prompt: abc.Sequence[int],
    *,
    epoch: int,
    limit: int,
    schedule: Schedule,
    sampler: Sampler,
    stop: Set[int],
    keep_cache: bool,
    trace: Trace,
) -> Iterator[Token]:
    """Prefill the prompt, then yield up to `limit` tokens; times and the reason of the end go to the trace.

    The sequence is held while it computes and free between tokens. Whoever changes it since `epoch` ends the stream.

    Raises:
        PmpdError: another thread is using the sequence, it changed meanwhile, or logits are not finite.
    """
    begin = time.perf_counter()
    history = list(prompt)
    with conversation.exclusive(since=epoch):
        if keep_cache:
            pairs = zip(conversation.tokens, history, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            trace.reused_tokens = min(same, len(history) - 1)  # the last token is run again, for its logits
        conversation.truncate(trace.reused_tokens)
        logits = conversation.prefill(history[trace.reused_tokens :], precision=schedule.prefill)
        trace.prefill_seconds = time.perf_counter() - begin
        precision = schedule.prefill or conversation.engine.bundle.manifest.prefill_precision
        _check_finite(logits, f"of the prompt (prefill, {precision} bits)")
        plan = conversation.begin(schedule, logits)
        token_id = sampler(logits, history)
        epoch = conversation.epoch
    adaptive = plan if isinstance(plan, AdaptivePlan) else None
    margin = max(sampler.sampling.margin, 0.0 if adaptive is None else getattr(adaptive, "margin", math.inf))
    first_pass: float | None = None
    for index in range(limit):
        if token_id in stop:
            trace.finish_reason = "stop_id"
            return
        yield Token(token_id, index, precision, time.perf_counter() - begin, first_pass=first_pass)
        if index + 1 == limit:
            break
        begin = time.perf_counter()  # time between two yields is the caller's
        with conversation.exclusive(since=epoch):
            history.append(token_id)
            precision, first_pass = plan.precision(index), None
            logits = _step(conversation, token_id, index, precision=precision, margin=margin)
            repeat_at = None if adaptive is None else adaptive.observe(index, logits)
            if repeat_at is not None:
                precision, first_pass = repeat_at, precision
                conversation.truncate(len(conversation.tokens) - 1)
                logits = _step(conversation, token_id, index, precision=precision, margin=sampler.sampling.margin)
            token_id = sampler(logits, history)
            epoch = conversation.epoch
    trace.finish_reason = "length"


def with_text(tokens: Iterator[Token], text: TextStream, stop: StopStrings, *, trace: Trace) -> Iterator[Token]:
    """Give tokens their text, and end before a stop string."""
    for token in tokens:
        yield from stop.push(replace(token, text=text.push(token.id)))
        if stop.found:
            trace.finish_reason = "stop_string"
            return
    yield from stop.flush(text.flush())


def recorded(tokens: Iterator[Token], *, trace: Trace) -> abc.Generator[Token, None, None]:
    """Yield tokens and put each into the trace: it holds what the caller got, no more."""
    for token in tokens:
        trace.tokens.append(token)
        yield token


def _step(
    conversation: Sequence, token_id: int, index: int, *, precision: float, margin: float
) -> npt.NDArray[np.float32]:
    """Append a token and return logits ``[V]``, as `Sequence.step`. Raises PmpdError if they are not finite, too."""
    logits = conversation.step(token_id, precision=precision, margin=margin)
    _check_finite(logits, f"of decode step {index} ({precision} bits)")
    return logits


def _check_finite(logits: npt.NDArray[np.float32], where: str) -> None:
    peak = float(logits.max())  # NaN if any of them is
    if not math.isfinite(peak):
        raise PmpdError(
            f"the model's logits {where} are not finite ({peak}): check the weights (pmpd-run --verify), then see "
            "whether the portable graphs give the same (kernels=False, pmpd-run --no-kernels)"
        )
