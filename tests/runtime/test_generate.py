"""Generation with the demo model: the text, the switches, the cache, and how a stream ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pytest

from pmpd.runtime import (
    Bundle,
    BundleError,
    ContextLengthError,
    Generator,
    PmpdError,
    Prefill,
    Sampling,
    Token,
    Tokenizer,
    parse_schedule,
)
from pmpd.runtime.decode import sequence
from pmpd.runtime.decode.sampling import Sampler

PROMPT = "Once upon a time, there was a little girl named Lily."
TEXTS = Path(__file__).parents[1] / "golden" / "demo-texts.json"
GOLDEN = json.loads(TEXTS.read_text(encoding="utf-8"))["texts"]["uniform:4"]
CONTEXT = 64
ROUNDING = 5e-3  # of logits: sums in another order, rounded to the KV cache's float16


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def shared(bundle: Bundle) -> Generator:
    return Generator(bundle, context_length=CONTEXT, tokenizer=Tokenizer.from_bundle(bundle))


@pytest.fixture
def generator(shared: Generator) -> Generator:
    shared.reset()
    return shared


@pytest.fixture
def small(bundle: Bundle) -> Generator:
    """Room for 16 positions, one precision, no tokenizer."""
    return Generator(bundle, context_length=16, precisions=[2])


@pytest.fixture(scope="module")
def prompt(bundle: Bundle) -> list[int]:
    return Tokenizer.from_bundle(bundle).encode(PROMPT)


def text_of(tokens: Iterator[Token]) -> str:
    return "".join(token.text or "" for token in tokens)


def ids_of(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


def test_stream_is_prefill_and_decode_steps_by_the_schedule(generator: Generator, prompt: list[int]) -> None:
    schedule = parse_schedule("static:3@2,2@4", (4, 3, 2))
    streamed = [
        (token.index, token.id, token.precision)
        for token in generator.stream(prompt, max_new_tokens=8, schedule=schedule)
    ]
    generator.reset()
    token_id = int(generator.prefill(prompt).argmax())
    by_hand = [(0, token_id, 4)]
    for step in range(7):
        precision = schedule.precision(step)
        token_id = int(generator.decode_step(token_id, precision=precision).argmax())
        by_hand.append((step + 1, token_id, precision))
    assert streamed == by_hand
    assert [precision for _, _, precision in streamed] == [4, 4, 4, 3, 3, 2, 2, 2]


def test_a_schedule_may_have_the_prompt_at_another_precision(generator: Generator, prompt: list[int]) -> None:
    tokens = list(generator.stream(prompt, max_new_tokens=3, schedule="prefill:2,uniform:3"))
    assert [token.precision for token in tokens] == [2, 3, 3]
    generator.reset()
    logits = generator.decode(prompt, precision=2)[-1]
    assert tokens[0].id == int(logits.argmax())
    generator.reset()
    np.testing.assert_array_equal(generator.prefill(prompt, precision=2), logits)
    generator.reset()
    assert not np.array_equal(generator.prefill(prompt), logits)


def test_a_prompt_at_another_precision_goes_in_by_pieces(
    generator: Generator, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generator.prefill(prompt, precision=2)
    vocab = generator.bundle.manifest.architecture.vocab_size
    monkeypatch.setattr("pmpd.runtime.decode.sequence.DECODE_CHUNK_LOGITS", 3 * vocab)
    generator.reset()
    np.testing.assert_allclose(generator.prefill(prompt, precision=2), whole, atol=ROUNDING)
    assert generator.tokens == prompt


def test_the_prefill_precision_of_the_bundle_needs_no_decode_graph(bundle: Bundle, prompt: list[int]) -> None:
    with Generator(bundle, precisions=(3,)) as small:
        asked = small.generate(prompt, max_new_tokens=3, schedule="prefill:4,uniform:3")
        plain = small.generate(prompt, max_new_tokens=3, schedule="uniform:3")
        assert [t.id for t in asked.tokens] == [t.id for t in plain.tokens]
        with pytest.raises(PmpdError, match="schedule prefill:2,uniform:3: unknown precision '2': choose one of 3"):
            small.stream(prompt, schedule="prefill:2,uniform:3")


def test_any_object_with_precisions_is_a_schedule(generator: Generator, prompt: list[int]) -> None:
    class UpAndDown:
        precisions = (4, 2)
        prefill = None

        def begin(self, prefill: Prefill) -> Self:
            return self

        def precision(self, step: int) -> int:
            return 2 if step % 2 == 0 else 4

    tokens = list(generator.stream(prompt, max_new_tokens=4, schedule=UpAndDown()))
    assert [token.precision for token in tokens] == [4, 2, 4, 2]


def test_a_plan_sees_the_prompt_and_every_steps_logits(generator: Generator, prompt: list[int]) -> None:
    seen: list[tuple[str, int]] = []

    class Watchful:
        """Goes to 2 bits after the second step."""

        def __init__(self, prefill: Prefill) -> None:
            assert prefill.tokens == tuple(prompt)
            assert prefill.kv.tokens == len(prompt)
            contract = generator.bundle.manifest.kv_cache
            for layer in range(contract.layers):
                for part in (prefill.kv.keys(layer), prefill.kv.values(layer)):
                    assert part.shape == (contract.heads, len(prompt), contract.head_dim)
            seen.append(("begin", int(prefill.logits.argmax())))
            with pytest.raises(ValueError, match="read-only"):
                prefill.logits[0] = 0

        def precision(self, step: int) -> int:
            return 4 if len(seen) < 3 else 2

        def observe(self, step: int, logits: npt.NDArray[np.float32]) -> None:
            assert logits.shape == (4096,)
            seen.append((f"step {step}", int(logits.argmax())))

    class ByPrompt:
        precisions = (4, 2)
        prefill = None

        def begin(self, prefill: Prefill) -> Watchful:
            return Watchful(prefill)

    tokens = list(generator.stream(prompt, max_new_tokens=5, schedule=ByPrompt()))
    assert [token.precision for token in tokens] == [4, 4, 4, 2, 2]
    assert seen == [("begin", tokens[0].id), *((f"step {i}", tokens[i + 1].id) for i in range(4))]


def test_schedules_of_the_bundle_have_names(generator: Generator, prompt: list[int]) -> None:
    name = generator.bundle.manifest.default_schedule
    named = ids_of(generator.stream(prompt, max_new_tokens=3, schedule=name))
    assert named == ids_of(generator.stream(prompt, max_new_tokens=3))


def test_precision_switch_stays_in_the_same_memory(generator: Generator, prompt: list[int]) -> None:
    cache = generator.cache
    pointers = {key: buffer.value.data_ptr() for key, buffer in cache.buffers.items()}
    generator.prefill(prompt)
    for position, precision in enumerate((4, 3, 2, 4), start=len(prompt)):
        before = {key: buffer.array.copy() for key, buffer in cache.buffers.items()}
        generator.decode_step(5, precision=precision)
        runner = generator.sequence._decode[precision]
        names = [output.name for output in runner.loaded.session.get_outputs()]
        outputs = dict(zip(names, runner._step.get_outputs(), strict=True))
        for (layer, part), buffer in cache.buffers.items():
            assert buffer.value.data_ptr() == pointers[layer, part] == buffer.array.ctypes.data
            assert outputs[f"present.{layer}.{part}"].data_ptr() == pointers[layer, part]
            changed = (buffer.array != before[layer, part]).any(axis=(0, 1, 3))
            assert np.flatnonzero(changed).tolist() == [position]  # the new token's place and no other


def test_precisions_differ(generator: Generator, prompt: list[int]) -> None:
    logits = []
    for precision in (4, 3, 2):
        generator.reset()
        logits.append(generator.decode(prompt, precision=precision))
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    assert np.abs(logits[1] - logits[2]).max() > 0.1


def test_decode_of_many_tokens_is_decode_step_by_step(generator: Generator, prompt: list[int]) -> None:
    generator.prefill(prompt)
    together = generator.decode(prompt[:5], precision=2)
    generator.reset()
    generator.prefill(prompt)
    one_by_one = np.stack([generator.decode_step(i, precision=2) for i in prompt[:5]])
    assert together.shape == (5, 4096)
    np.testing.assert_allclose(together, one_by_one, atol=ROUNDING)
    assert generator.tokens == prompt + prompt[:5]


def test_prefill_is_the_last_row_of_decode(generator: Generator, prompt: list[int]) -> None:
    prefilled = generator.prefill(prompt)
    generator.reset()
    np.testing.assert_allclose(prefilled, generator.decode(prompt, precision=4)[-1], atol=ROUNDING)


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_prompt_in_pieces_is_the_prompt_at_once(
    generator: Generator, prompt: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generator.prefill(prompt)
    generator.reset()
    monkeypatch.setattr(sequence, "PREFILL_CHUNK", chunk)
    np.testing.assert_allclose(generator.prefill(prompt), whole, atol=ROUNDING)
    assert generator.tokens == prompt
    assert generator.cache.length == generator.cache.mask.sum() == len(prompt)


def test_returned_logits_are_the_callers_own(generator: Generator, prompt: list[int]) -> None:
    first = generator.decode_step(prompt[0], precision=2)
    copy = first.copy()
    generator.decode_step(prompt[1], precision=2)
    assert np.array_equal(first, copy)


def test_closing_cancels_and_the_generator_goes_on(generator: Generator, prompt: list[int]) -> None:
    stream = generator.stream(prompt, schedule="uniform:4")
    begun = [next(stream).id, next(stream).id]
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []
    assert generator.trace.finish_reason is None
    assert [token.id for token in generator.trace.tokens] == begun
    assert generator.tokens == [*prompt, begun[0]]
    assert text_of(generator.stream(prompt, max_new_tokens=5, schedule="uniform:4")) == GOLDEN[:23]


def test_an_interrupted_step_leaves_the_cache_as_it_was(
    generator: Generator, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.prefill(prompt)
    want = generator.decode_step(5, precision=3)
    generator.reset()
    generator.prefill(prompt)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generator.sequence._decode[3], "_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generator.decode_step(5, precision=3)
    assert generator.tokens == prompt
    assert generator.cache.length == int(generator.cache.mask.sum()) == len(prompt)
    assert np.array_equal(generator.decode_step(5, precision=3), want)


def test_second_stream_ends_the_first(generator: Generator, prompt: list[int]) -> None:
    first = generator.stream(prompt, max_new_tokens=5)
    next(first)
    second = generator.stream(prompt, max_new_tokens=5)
    want = next(second).id
    with pytest.raises(PmpdError, match="another stream was started on this generator"):
        next(first)
    assert [want, *ids_of(second)] == [token.id for token in generator.trace.tokens]
    assert generator.trace.finish_reason == "length"


def test_stream_that_never_began_is_ended_too(generator: Generator, prompt: list[int]) -> None:
    first = generator.stream(prompt, max_new_tokens=5)
    second = generator.stream(prompt, max_new_tokens=3)
    next(second)
    with pytest.raises(PmpdError, match="another stream was started on this generator"):
        next(first)
    assert len(list(second)) == 2


def test_conversation_goes_on_from_the_kept_cache(generator: Generator, prompt: list[int]) -> None:
    answer = ids_of(generator.stream(prompt, max_new_tokens=4, schedule="uniform:4"))
    longer = [*prompt, *answer, *prompt[1:5]]
    continued = ids_of(generator.stream(longer, max_new_tokens=4, schedule="uniform:4", keep_cache=True))
    assert generator.trace.reused_tokens == len(prompt) + 3  # the last token of an answer is never fed
    assert generator.trace.prompt_tokens == len(longer)
    logits = generator.decode_step(7, precision=4)
    assert ids_of(generator.stream(longer, max_new_tokens=4, schedule="uniform:4")) == continued
    assert generator.trace.reused_tokens == 0
    np.testing.assert_allclose(generator.decode_step(7, precision=4), logits, atol=ROUNDING)


def test_kept_cache_is_cut_where_the_texts_part(generator: Generator, prompt: list[int]) -> None:
    list(generator.stream(prompt, max_new_tokens=3, schedule="uniform:4"))
    other = [*prompt[:6], 9, *prompt[7:]]
    continued = ids_of(generator.stream(other, max_new_tokens=3, schedule="uniform:4", keep_cache=True))
    assert generator.trace.reused_tokens == 6
    assert generator.tokens[: len(other)] == other
    again = ids_of(generator.stream(other, max_new_tokens=3, schedule="uniform:4", keep_cache=True))
    assert generator.trace.reused_tokens == len(other) - 1  # one token must run, for its logits
    assert continued == again == ids_of(generator.stream(other, max_new_tokens=3, schedule="uniform:4"))


def test_trace_tells_what_happened(generator: Generator, prompt: list[int]) -> None:
    started = time.perf_counter()
    tokens = list(generator.stream(prompt, max_new_tokens=6, schedule="static:3@2,2@3"))
    took = time.perf_counter() - started
    trace = generator.trace
    assert trace.tokens == tokens
    assert (trace.prompt_tokens, trace.reused_tokens, trace.finish_reason) == (len(prompt), 0, "length")
    assert trace.average_bits == (4 + 4 + 3 + 2 + 2) / 5  # token 0 is prefill's
    assert all(token.seconds > 0 for token in tokens)
    assert tokens[0].seconds >= trace.prefill_seconds > 0
    assert sum(token.seconds for token in tokens) <= took
    assert "".join(token.text or "" for token in trace.tokens).startswith(GOLDEN[:18])


def test_time_of_the_caller_does_not_count(generator: Generator, prompt: list[int]) -> None:
    for token in generator.stream(prompt, max_new_tokens=2, schedule="uniform:2"):
        if token.index == 0:
            time.sleep(1)
    assert generator.trace.decode_seconds < 1


def test_one_new_token_needs_no_decode(generator: Generator, prompt: list[int]) -> None:
    (token,) = generator.stream(prompt, max_new_tokens=1, schedule="uniform:2")
    assert (token.index, token.precision) == (0, 4)
    assert generator.tokens == prompt
    assert generator.trace.average_bits is None


def test_stop_id_ends_and_is_not_given(generator: Generator, prompt: list[int]) -> None:
    ids = ids_of(generator.stream(prompt, max_new_tokens=4, schedule="uniform:4"))
    assert ids_of(generator.stream(prompt, max_new_tokens=4, schedule="uniform:4", stop_ids=[ids[2]])) == ids[:2]
    assert generator.trace.finish_reason == "stop_id"
    assert list(generator.stream(prompt, max_new_tokens=4, stop_ids=[ids[0]])) == []


def test_bundle_names_the_default_stop_id(
    generator: Generator, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = int(generator.prefill(prompt).argmax())
    monkeypatch.setattr(Bundle, "stop_ids", (first,))
    assert list(generator.stream(prompt)) == []
    assert ids_of(generator.stream(prompt, max_new_tokens=1, stop_ids=())) == [first]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ([" loved"], " She"),
        (["ved"], " She lo"),  # inside a token
        (["e l"], " Sh"),  # across two
        (["loved to play with", "to play"], " She loved "),  # the one that comes first
        ([" She"], ""),
        (["to playground"], " She loved to play"),  # begins to come and does not
    ],
)
def test_stop_strings(generator: Generator, prompt: list[int], stop: list[str], text: str) -> None:
    assert text_of(generator.stream(prompt, max_new_tokens=4, schedule="uniform:4", stop_strings=stop)) == text
    assert generator.trace.finish_reason == ("length" if stop == ["to playground"] else "stop_string")


def test_tokens_have_text_only_with_a_tokenizer(small: Generator, prompt: list[int]) -> None:
    (token,) = small.stream(prompt, max_new_tokens=1, schedule="uniform:2")
    assert token.text is None
    with pytest.raises(PmpdError, match="stop strings need a tokenizer"):
        small.stream(prompt, schedule="uniform:2", stop_strings=["x"])


def test_unfinished_character_at_the_end_is_not_lost(
    generator: Generator, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generator.tokenizer is not None
    emoji = generator.tokenizer.encode("so 😀", special_tokens=False)[:-1]
    script = iter(emoji)
    monkeypatch.setattr(Sampler, "__call__", lambda *_: next(script))
    tokens = list(generator.stream(prompt, max_new_tokens=len(emoji), schedule="uniform:2"))
    assert [token.id for token in tokens] == emoji
    assert text_of(iter(tokens)) == generator.tokenizer.decode(emoji)


def test_drawing_repeats_with_its_seed(generator: Generator, prompt: list[int]) -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=2, seed=seed)
        return ids_of(generator.stream(prompt, max_new_tokens=5, schedule="uniform:2", sampling=sampling))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_repetition_penalty_sees_prompt_and_answer(
    generator: Generator, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def choose(_: Sampler, logits: npt.NDArray[np.float32], history: Sequence[int]) -> int:
        seen.append(list(history))
        return int(logits.argmax())

    monkeypatch.setattr(Sampler, "__call__", choose)
    ids = ids_of(generator.stream(prompt, max_new_tokens=3, schedule="uniform:2"))
    assert seen == [prompt, [*prompt, *ids[:1]], [*prompt, *ids[:2]]]


def test_cache_fills_to_its_last_place(small: Generator, prompt: list[int]) -> None:
    assert len(prompt) == 14
    tokens = list(small.stream(prompt, schedule="uniform:2"))
    assert len(tokens) == 3  # 14 + 2 in the cache, and the last needs no place
    assert small.cache.length == 16
    assert small.trace.finish_reason == "length"
    with pytest.raises(ContextLengthError, match="1 tokens do not fit the KV cache, which has room for 0 of 16"):
        small.decode_step(5, precision=2)
    assert small.cache.length == len(small.tokens) == 16


def test_context_length_is_enforced(small: Generator, prompt: list[int], bundle: Bundle) -> None:
    with pytest.raises(ContextLengthError, match=r"17 tokens do not fit .* 16: make it larger .*1024"):
        small.stream([*prompt, 5, 5, 5], schedule="uniform:2")
    with pytest.raises(ContextLengthError, match=r"14 prompt and 4 new tokens do not fit .* at most 3 new tokens"):
        small.stream(prompt, max_new_tokens=4, schedule="uniform:2")
    assert len(list(small.stream([*prompt, 5, 5], schedule="uniform:2"))) == 1
    for length in (0, 1025):
        with pytest.raises(PmpdError, match=f"context length {length}: the model allows 1 to 1024"):
            Generator(bundle, context_length=length)


@pytest.mark.parametrize("token_id", [-1, 4096, 10**20])
def test_unknown_token(small: Generator, token_id: int) -> None:
    with pytest.raises(PmpdError, match=rf"token id {token_id} is not in the model's vocabulary \(0 to 4095\)"):
        small.stream([1, token_id], schedule="uniform:2")
    with pytest.raises(PmpdError, match="is not in the model's vocabulary"):
        small.decode_step(token_id, precision=2)
    assert small.tokens == []
    assert small.cache.length == 0


def test_bad_arguments(small: Generator, bundle: Bundle) -> None:
    with pytest.raises(PmpdError, match="there are no tokens to run"):
        small.stream([], schedule="uniform:2")
    with pytest.raises(PmpdError, match="max_new_tokens must be 1 or more, got 0"):
        small.stream([1], max_new_tokens=0, schedule="uniform:2")
    with pytest.raises(PmpdError, match="schedule uniform:4: unknown precision '4': choose one of 2"):
        small.stream([1])  # the bundle's own schedule needs what is not loaded
    with pytest.raises(PmpdError, match="unknown precision '3': choose one of 2"):
        small.decode([1], precision=3)
    with pytest.raises(PmpdError, match="unknown precision '7': choose one of 4, 3, 2"):
        small.stream([1], schedule="uniform:7")
    with pytest.raises(BundleError, match="no decode graph at 5 bits"):
        Generator(bundle, precisions=[5])
    with pytest.raises(PmpdError, match="threads must be 1 or more, got 0"):
        Generator(bundle, threads=0)
