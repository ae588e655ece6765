"""The figures a trace derives from its tokens, by hand."""

from __future__ import annotations

import json

import pytest

from pmpd.runtime import Token, Trace


def test_averages_leave_out_the_token_that_prefill_made() -> None:
    tokens = [Token(id=i, index=i, precision=p, seconds=s) for i, (p, s) in enumerate([(4, 9.0), (4, 0.5), (2, 0.25)])]
    trace = Trace(prompt_tokens=12, reused_tokens=2, prefill_seconds=5.0, tokens=tokens)
    assert trace.average_bits == 3.0
    assert trace.decode_seconds == 0.75
    assert trace.decode_tokens_per_second == pytest.approx(2 / 0.75)
    assert trace.prefill_tokens_per_second == 2.0


def test_both_passes_of_a_step_count() -> None:
    once, twice = Token(5, 1, 3, 0.1), Token(5, 2, 5, 0.3, first_pass=3)
    assert (once.passes, twice.passes) == ((3,), (3, 5))
    trace = Trace(prompt_tokens=1, tokens=[Token(5, 0, 4, 0.1), once, twice])
    assert trace.average_bits == (3 + 3 + 5) / 2
    assert trace.decode_tokens_per_second == pytest.approx(2 / 0.4)


def test_nothing_to_average_yet() -> None:
    for trace in (Trace(prompt_tokens=3), Trace(prompt_tokens=3, tokens=[Token(5, 0, 4, 0.1)])):
        assert trace.average_bits is None
        assert trace.decode_tokens_per_second is None
        assert trace.prefill_tokens_per_second is None


def test_trace_is_json() -> None:
    trace = Trace(prompt_tokens=1, tokens=[Token(5, 0, 4, 0.1, "é")], finish_reason="length")
    document = json.loads(json.dumps(trace.to_dict()))
    assert document["tokens"] == [
        {"id": 5, "index": 0, "precision": 4, "seconds": 0.1, "text": "é", "first_pass": None}
    ]
    assert document["finish_reason"] == "length"
