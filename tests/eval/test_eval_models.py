"""Models under test: how a schedule becomes calls of the generator, and the floating-point reference."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import convert
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY_MODELS, TinyModel, plain_logits, plain_model

from pmpd.eval.measure.models import Answer, Forced, Scheduled, precision_runs
from pmpd.eval.measure.reference import Reference, ReferenceCheckpoint
from pmpd.runtime import Bundle, Generator, Plan, PmpdError, Prefill, Schedule, Token, parse_schedule

BITS = (4, 3, 2)
V = 11


class FakeGenerator:
    """Writes down every call; logits say which token they follow."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(prefill_precision=4))

    def reset(self) -> None:
        self.calls.append(("reset",))

    def prefill(self, ids: Sequence[int], *, precision: float | None = None) -> np.ndarray:
        self.calls.append(("prefill", tuple(ids)) if precision is None else ("prefill", tuple(ids), precision))
        return np.zeros(V, np.float32)

    def begin(self, schedule: Schedule, logits: np.ndarray) -> Plan:
        return schedule.begin(Prefill(tokens=(), logits=logits, kv=None))  # type: ignore[arg-type]

    def decode(self, ids: Sequence[int], *, precision: int) -> np.ndarray:
        self.calls.append(("decode", tuple(ids), precision))
        return np.eye(V, dtype=np.float32)[list(ids)]

    def stream(self, prompt: Sequence[int], **options: Any) -> Iterator[Token]:
        self.calls.append(("stream", tuple(prompt), options["max_new_tokens"], str(options["schedule"])))
        yield Token(7, 0, 4, 0.6)
        yield Token(8, 1, 3, 0.1)


def joined(parts: Iterable[Forced]) -> tuple[np.ndarray, tuple[float, ...], dict[int, float]]:
    """Return the logits and the precisions of all positions, and the first passes of those that were run again."""
    listed = list(parts)
    assert [part.start for part in listed] == np.cumsum([0, *(len(part.logits) for part in listed[:-1])]).tolist()
    bits = [part.precision for part in listed for _ in part.logits]
    passes = {part.start: part.first_pass for part in listed if part.first_pass is not None}
    return np.concatenate([part.logits for part in listed]), tuple(bits), passes


def scheduled(spec: str) -> tuple[Scheduled, FakeGenerator]:
    generator = FakeGenerator()
    return Scheduled(generator, parse_schedule(spec, BITS)), generator  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "steps", "runs"),
    [
        ("uniform:3", 5, [(0, 5, 3)]),
        ("static:3@2,2@4", 6, [(0, 2, 4), (2, 4, 3), (4, 6, 2)]),
        ("static:3@2,2@4", 3, [(0, 2, 4), (2, 3, 3)]),
        ("static:3@2,2@2", 4, [(0, 2, 4), (2, 4, 2)]),
        ("static:2@9", 0, []),
    ],
)
def test_runs_of_one_precision(spec: str, steps: int, runs: list[tuple[int, int, int]]) -> None:
    assert list(precision_runs(parse_schedule(spec, BITS), steps)) == runs


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 30))
def test_runs_cover_each_step_once_at_its_precision(first: int, more: int, steps: int) -> None:
    schedule = parse_schedule(f"static:3@{first},2@{first + more}", BITS)
    covered = [(i, bits) for start, end, bits in precision_runs(schedule, steps) for i in range(start, end)]
    assert covered == [(i, schedule.precision(i)) for i in range(steps)]


def test_teacher_forcing_asks_an_adaptive_plan_after_every_step() -> None:
    class Watchful:
        precisions = (4, 2)
        prefill = None

        def __init__(self) -> None:
            self.last = -1

        def begin(self, prefill: Prefill) -> Plan:
            return self

        def precision(self, step: int) -> int:
            return 2 if self.last == 4 else 4

        def observe(self, step: int, logits: np.ndarray) -> None:
            self.last = int(logits.argmax())

    generator = FakeGenerator()
    logits, bits, _ = joined(Scheduled(generator, Watchful()).force([1, 2], [3, 4, 5, 6]))  # type: ignore[arg-type]
    assert [call for call in generator.calls if call[0] == "decode"] == [
        ("decode", (3,), 4),
        ("decode", (4,), 4),
        ("decode", (5,), 2),
    ]
    assert bits == (4, 4, 4, 2)
    assert logits[1:].argmax(axis=1).tolist() == [3, 4, 5]


@pytest.fixture(scope="module")
def demo(demo_bundle: Path) -> Generator:
    return Generator(Bundle.open(demo_bundle), context_length=64)


def test_teacher_forcing_runs_a_step_again_as_a_stream_does(demo: Generator) -> None:
    model = Scheduled(demo, parse_schedule("repeat:2,4@1", BITS))
    answer = model.generate([1, 5, 9], max_new_tokens=16, stop_ids=())
    assert 0 < len(answer.first_passes) < 15
    assert answer.precisions[1:] == tuple(4 if index in answer.first_passes else 2 for index in range(1, 16))
    assert set(answer.first_passes.values()) == {2}
    logits, bits, first_passes = joined(model.force([1, 5, 9], answer.ids))
    assert bits == answer.precisions
    assert first_passes == answer.first_passes
    assert tuple(logits.argmax(axis=1)) == answer.ids


def test_teacher_forcing_with_every_step_again_is_the_high_precision(demo: Generator) -> None:
    again, high = (
        joined(Scheduled(demo, parse_schedule(text, BITS)).force([1, 5, 9], [7, 8, 9, 10]))
        for text in ("repeat:2,4@9999", "uniform:4")
    )
    np.testing.assert_allclose(again[0], high[0], atol=5e-3)  # three calls and one round differently
    assert again[1:] == ((4,) * 4, {1: 2, 2: 2, 3: 2})
    assert high[1:] == ((4,) * 4, {})


def test_teacher_forcing_makes_one_call_per_run_and_feeds_all_but_the_last_token() -> None:
    model, generator = scheduled("static:3@2,2@3")
    logits, bits, _ = joined(model.force([1, 2], [3, 4, 5, 6, 9]))
    assert generator.calls == [
        ("reset",),
        ("prefill", (1, 2)),
        ("decode", (3, 4), 4),
        ("decode", (5,), 3),
        ("decode", (6,), 2),
    ]
    assert logits[1:].argmax(axis=1).tolist() == [3, 4, 5, 6]
    assert bits == (4, 4, 4, 3, 2)


def test_no_call_gives_more_logits_than_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmpd.eval.measure.models.ROWS", 2)
    model, generator = scheduled("static:3@3")
    logits, _, _ = joined(model.force([1], [3, 4, 5, 6, 7, 8]))
    assert generator.calls[2:] == [("decode", (3, 4), 4), ("decode", (5,), 4), ("decode", (6, 7), 3)]
    assert logits[1:].argmax(axis=1).tolist() == [3, 4, 5, 6, 7]


def test_teacher_forcing_has_the_prompt_at_the_schedules_precision() -> None:
    model, generator = scheduled("prefill:2,uniform:3")
    _, bits, _ = joined(model.force([1, 2], [3, 4]))
    assert generator.calls == [("reset",), ("prefill", (1, 2), 2), ("decode", (3,), 3)]
    assert bits == (2, 3)


def test_the_caller_may_choose_the_precision_of_the_prompt() -> None:
    model, generator = scheduled("uniform:3")
    _, bits, _ = joined(model.force([1, 2], [3, 4], prefill=3))
    assert generator.calls[1] == ("prefill", (1, 2), 3)
    assert bits == (3, 3)


def test_an_answer_takes_ids_and_bits_from_the_stream() -> None:
    model, generator = scheduled("static:3@0")
    answer = model.generate([1, 2], max_new_tokens=9, stop_ids=())
    assert answer == Answer(ids=(7, 8), precisions=(4, 3))
    assert generator.calls == [("stream", (1, 2), 9, "uniform:3")]


@pytest.fixture(scope="module")
def tiny_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model: torch.nn.Module = LlamaForCausalLM(config).eval()
    return model


def full_logits(model: torch.nn.Module, ids: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([list(ids)])).logits[0].numpy()
    return logits


def answer_of(reference: Reference, prompt: Sequence[int], stop_ids: Sequence[int] = ()) -> Answer:
    (answer,) = reference.answers([prompt], max_new_tokens=6, stop_ids=stop_ids)
    return answer


def test_reference_answers_what_recomputing_the_whole_text_gives(tiny_llama: torch.nn.Module) -> None:
    text = [1, 5, 9]
    answer = answer_of(Reference(tiny_llama, bits=16), text)
    for token in answer.ids:
        assert token == full_logits(tiny_llama, text)[-1].argmax()
        text.append(token)
    assert answer.precisions == (16,) * 6


def test_reference_stops_before_a_stop_token(tiny_llama: torch.nn.Module) -> None:
    reference = Reference(tiny_llama, bits=16, last_logits={"logits_to_keep": 1})
    ids = answer_of(reference, [1, 5, 9]).ids
    assert answer_of(reference, [1, 5, 9], stop_ids=(ids[3],)).ids == ids[: ids.index(ids[3])]


@pytest.mark.parametrize("together", [True, False])
def test_reference_answers_side_by_side_as_alone(tiny_llama: torch.nn.Module, together: bool) -> None:
    reference = Reference(tiny_llama, bits=16, last_logits={"logits_to_keep": 1}, together=together)
    prompts = [[1, 5, 9, 30, 4], [1, 7], [1, 40, 41]]
    whole = reference.answers(prompts, max_new_tokens=6, stop_ids=())
    assert whole == [answer_of(reference, prompt) for prompt in prompts]
    stop = whole[0].ids[3]
    ended = reference.answers(prompts, max_new_tokens=6, stop_ids=(stop,))
    assert ended == [answer_of(reference, prompt, stop_ids=(stop,)) for prompt in prompts]
    assert len(ended[0].ids) < 6


def test_reference_forces_what_one_forward_pass_gives(
    tiny_llama: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmpd.eval.measure.reference.ROWS", 2)
    prompt, answer = [1, 5, 9], [4, 8, 15, 16, 23]
    logits, bits, _ = joined(Reference(tiny_llama, bits=32).force(prompt, answer))
    np.testing.assert_allclose(logits, full_logits(tiny_llama, prompt + answer)[2:-1], rtol=1e-4, atol=1e-4)
    assert bits == (32,) * 5


def test_reference_applies_softcaps(tmp_path: Path) -> None:
    folder = TINY_MODELS["gemma2"].save(tmp_path)
    prompt, answer = [1, 5, 9], [4, 8, 15, 16]
    logits, _, _ = joined(ReferenceCheckpoint(folder, 32).load("transformers", threads=1).force(prompt, answer))
    wanted = plain_logits(plain_model(folder), prompt + answer)[2:-1]
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_reference_is_found_with_the_bits_it_is_stored_in(demo_bundle: Path) -> None:
    assert ReferenceCheckpoint.find(Bundle.open(demo_bundle)).bits == 16


def test_reference_of_another_vocabulary_is_refused(demo_bundle: Path, tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    with pytest.raises(PmpdError, match="has 50 tokens, the bundle 4096"):
        ReferenceCheckpoint.find(Bundle.open(demo_bundle), str(tmp_path))


def test_reference_that_is_no_checkpoint_is_refused(demo_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(PmpdError, match="--reference"):
        ReferenceCheckpoint.find(Bundle.open(demo_bundle), str(tmp_path))
    with pytest.raises(PmpdError, match="--reference"):
        ReferenceCheckpoint.find(Bundle.open(demo_bundle), "no-such-model")


def test_optimum_and_transformers_agree(demo_bundle: Path) -> None:
    try:
        from optimum.onnxruntime import ORTModelForCausalLM  # noqa: F401
    except ImportError as error:
        pytest.skip(f"needs the extra `baseline`: {error}")
    checkpoint = ReferenceCheckpoint.find(Bundle.open(demo_bundle))
    forced = [
        joined(checkpoint.load(backend, threads=1).force([1, 300, 400], [500, 600, 700]))
        for backend in ("transformers", "optimum")
    ]
    np.testing.assert_allclose(forced[0][0], forced[1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({}, "optimum-onnx is not installed"),
        ({"__init__.py": ""}, "optimum-onnx is not installed"),
        (
            {"__init__.py": "", "onnxruntime.py": "from transformers import gone"},
            r"optimum-onnx cannot be imported with transformers \d.* \(cannot import name 'gone'.*\[eval,baseline\]",
        ),
        (
            {"__init__.py": "", "onnxruntime.py": "raise RuntimeError('Failed to import\\nno gone')"},
            r"optimum-onnx cannot be imported with transformers \d.* \(Failed to import no gone\)",
        ),
    ],
)
def test_optimum_that_cannot_be_imported(
    module: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optimum"]:
        monkeypatch.delitem(sys.modules, name)
    if module:
        (tmp_path / "optimum").mkdir()
        for name, source in module.items():
            (tmp_path / "optimum" / name).write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "optimum", None)
    with pytest.raises(PmpdError, match=message):
        ReferenceCheckpoint(tmp_path, 32).load("optimum", threads=1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "optimum"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_gguf_file_is_a_reference(demo_bundle: Path, tmp_path: Path) -> None:
    folder = TinyModel("llama", {"vocab_size": 4096}).save(tmp_path / "folder")
    file = str(convert(folder, tmp_path / "tiny.gguf"))
    prompt, answer = [1, 300, 400], [500, 600, 700]
    references = [ReferenceCheckpoint.find(Bundle.open(demo_bundle), str(path)) for path in (file, folder)]
    assert [reference.bits for reference in references] == [32, 32]
    forced = [joined(reference.load("transformers", threads=1).force(prompt, answer)) for reference in references]
    np.testing.assert_allclose(forced[0][0], forced[1][0], rtol=1e-4, atol=1e-4)
    with pytest.raises(PmpdError, match="optimum reads no GGUF file"):
        references[0].load("optimum", threads=1)
