"""One conversation and many: streams notice changes, threads do not mix texts, wrong logits are errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmpd.runtime import Bundle, Generator, PmpdError, Sampling, Token, Tokenizer
from pmpd.runtime.decode.sampling import Sampler

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "Tom had a big red ball. He went to the park.",
)
CONTEXT = 64
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "schedule": "static:3@3,2@6"}


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return Bundle.open(demo_bundle)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.from_bundle(bundle)


@pytest.fixture(scope="module")
def shared(bundle: Bundle, tokenizer: Tokenizer) -> Generator:
    return Generator(bundle, context_length=CONTEXT, tokenizer=tokenizer)


@pytest.fixture
def generator(shared: Generator) -> Generator:
    shared.reset()
    return shared


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in PROMPTS]


def ids_of(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.reset(),
        lambda g: g.prefill([1, 5]),
        lambda g: g.decode([5, 6], precision=2),
        lambda g: g.decode_step(5, precision=2),
        lambda g: next(g.stream([1, 5], max_new_tokens=3)),
        lambda g: g.stream([1, 5], max_new_tokens=3),
    ],
)
def test_a_stream_notices_every_change_of_its_conversation(
    generator: Generator, prompts: list[list[int]], change: Callable[[Generator], object]
) -> None:
    stream = generator.stream(prompts[0], **OPTIONS)
    begun = [next(stream).id, next(stream).id]
    change(generator)
    held = list(generator.tokens)
    with pytest.raises(PmpdError, match="the conversation changed between two tokens of this stream") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    assert generator.tokens == held  # the refused step changed nothing
    assert ids_of(generator.stream(prompts[0], **OPTIONS))[:2] == begun


def test_a_stream_that_has_not_begun_notices_too(generator: Generator, prompts: list[list[int]]) -> None:
    stream = generator.stream(prompts[0], **OPTIONS)
    generator.prefill([1, 5])
    with pytest.raises(PmpdError, match="the conversation changed"):
        next(stream)


def in_thread(action: Callable[[], object]) -> object:
    """Return what an action gives in another thread, or the error it raises."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(action())
        except PmpdError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return result[0]


@pytest.mark.parametrize(
    "action",
    [
        lambda g: g.reset(),
        lambda g: g.prefill([1, 5]),
        lambda g: g.decode_step(5, precision=2),
        lambda g: g.stream([1, 5], max_new_tokens=3),
        lambda g: next(g.stream([1, 5], max_new_tokens=3)),
    ],
)
def test_a_second_thread_is_refused_before_it_changes_anything(
    generator: Generator,
    prompts: list[list[int]],
    action: Callable[[Generator], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = ids_of(generator.stream(prompts[0], **OPTIONS))
    choose, outcomes = Sampler.__call__, list[object]()

    def meanwhile(self: Sampler, logits: Any, history: Any) -> int:
        held = list(generator.tokens), generator.cache.length
        outcomes.append(in_thread(lambda: action(generator)))
        assert held == (generator.tokens, generator.cache.length)
        return choose(self, logits, history)

    monkeypatch.setattr(Sampler, "__call__", meanwhile)
    assert ids_of(generator.stream(prompts[0], **OPTIONS)) == want
    assert len(outcomes) == len(want)
    assert all(isinstance(outcome, PmpdError) and "another thread" in str(outcome) for outcome in outcomes)


@pytest.mark.usefixtures("all_processors")
def test_two_threads_on_one_generator_never_mix_their_texts(generator: Generator, prompts: list[list[int]]) -> None:
    right = [ids_of(generator.stream(prompt, **OPTIONS)) for prompt in prompts]
    wrong, ended = [], [0, 0]
    barrier = threading.Barrier(2)

    def run(k: int) -> None:
        for _ in range(10):
            barrier.wait(30)
            ids = []
            try:
                for token in generator.stream(prompts[k], **OPTIONS):
                    ids.append(token.id)
                ended[k] += 1
            except PmpdError:
                pass
            if ids != right[k][: len(ids)]:
                wrong.append((k, ids))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


def test_decode_steps_of_several_threads_are_counted_or_refused(generator: Generator) -> None:
    generator.prefill([1, 5])
    taken, refused = list[int](), list[PmpdError]()

    def run() -> None:
        for _ in range(15):
            try:
                generator.decode_step(7, precision=2)
                taken.append(7)
            except PmpdError as error:
                refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert generator.tokens == [1, 5, *taken]
    assert generator.cache.length == int(generator.cache.mask.sum()) == len(generator.tokens)
    assert len(taken) + len(refused) == 45


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=1)])
@pytest.mark.parametrize("step", [None, 0, 2])
def test_logits_that_are_not_numbers_are_an_error_with_a_place(
    generator: Generator,
    prompts: list[list[int]],
    sampling: Sampling,
    step: int | None,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, calls = type(generator.sequence._prefill)._run, [0]

    def spoil(self: Any, binding: Any) -> None:
        run(self, binding)
        calls[0] += 1
        if calls[0] == (1 if step is None else step + 2):
            binding.get_outputs()[0].numpy()[..., 9] = value

    monkeypatch.setattr(type(generator.sequence._prefill), "_run", spoil)
    place = r"of the prompt \(prefill, 4 bits\)" if step is None else rf"of decode step {step} \(2 bits\)"
    with pytest.raises(PmpdError, match=rf"logits {place} are not finite \({value}\)") as caught:
        list(generator.stream(prompts[0], max_new_tokens=5, schedule="uniform:2", sampling=sampling))
    assert "\n" not in str(caught.value)
    assert len(generator.trace.tokens) == (0 if step is None else step + 1)


def test_one_token_impossible_is_fine(generator: Generator, prompts: list[list[int]], monkeypatch: Any) -> None:
    run = type(generator.sequence._prefill)._run

    def forbid(self: Any, binding: Any) -> None:
        run(self, binding)
        binding.get_outputs()[0].numpy()[..., 9] = -np.inf

    want = ids_of(generator.stream(prompts[0], **OPTIONS))
    monkeypatch.setattr(type(generator.sequence._prefill), "_run", forbid)
    assert ids_of(generator.stream(prompts[0], **OPTIONS)) == want


def test_trace_holds_what_was_yielded_and_nothing_of_a_stop_string(
    generator: Generator, prompts: list[list[int]]
) -> None:
    whole = "".join(token.text or "" for token in generator.stream(prompts[0], max_new_tokens=8, schedule="uniform:4"))
    stop = whole[-6:]
    tokens = list(generator.stream(prompts[0], max_new_tokens=20, schedule="uniform:4", stop_strings=stop))
    trace = generator.trace
    assert trace.finish_reason == "stop_string"
    assert trace.tokens == tokens
    assert "".join(token.text for token in trace.tokens if token.text is not None) == whole[: whole.index(stop)]
    assert None not in {token.text for token in trace.tokens}
    assert trace.average_bits == 4


def test_generate_gives_the_whole_answer(generator: Generator, prompts: list[list[int]]) -> None:
    tokens = list(generator.stream(prompts[0], **OPTIONS))
    answer = generator.generate(PROMPTS[0], **OPTIONS)
    assert answer is generator.trace
    assert [token.id for token in answer.tokens] == [token.id for token in tokens]
    assert answer.text == "".join(token.text or "" for token in tokens)
    assert answer.finish_reason == "length"
    assert generator.generate(prompts[0], **OPTIONS).text == answer.text


def test_generate_from_text_needs_a_tokenizer(bundle: Bundle) -> None:
    with Generator(bundle, context_length=16, precisions=[2]) as generator:
        with pytest.raises(PmpdError, match="a prompt as text needs a tokenizer"):
            generator.generate("Hi", schedule="uniform:2")
        assert generator.generate([1, 5], max_new_tokens=2, schedule="uniform:2").text == ""


def test_a_closed_generator_says_so(bundle: Bundle) -> None:
    with Generator(bundle, context_length=16, precisions=[2]) as generator:
        stream = generator.stream([1, 5], max_new_tokens=4, schedule="uniform:2")
        next(stream)
    generator.close()
    for use in (
        generator.reset,
        lambda: generator.prefill([1]),
        lambda: generator.stream([1]),
        lambda: generator.tokens,
        generator.kernels,
        lambda: next(stream),
    ):
        with pytest.raises(PmpdError, match="closed"):
            use()
