"""What models make of items: answers turn by turn, their bits and texts, and scores of given texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fakes import MODEL, USER, FakeGenerator, FakeReference, V, make, records

from pmpd.eval.data.records import Template
from pmpd.eval.measure.examiner import FP, Baseline, BundleExaminer, Job, ReferenceExaminer, item_key, logits_file
from pmpd.eval.metrics.base import Sample
from pmpd.eval.report.results import QualityRow
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime import Schedule, parse_schedule

BITS = (4, 3, 2)


def schedules_of(*texts: str) -> tuple[Schedule, ...]:
    return tuple(parse_schedule(text, BITS) for text in texts)


def answers_of(task: Task, item: Item, generator: FakeGenerator, *schedules: Schedule) -> tuple[list[Sample], int]:
    examiner = BundleExaminer(task, lambda: generator)  # type: ignore[arg-type, return-value]
    measured = examiner(Job(items=(item,), schedules=schedules, baselines=(None,)))
    (samples,) = measured.samples
    return [samples[schedule] for schedule in schedules], measured.steps


def reference_of(task: Task, items: Sequence[Item], model: FakeReference, folder: Path | None = None) -> list[Sample]:
    examiner = ReferenceExaminer(task, lambda: model, folder)  # type: ignore[arg-type, return-value]
    measured = examiner(Job(items=tuple(items), schedules=(FP,), baselines=(None,) * len(items)))
    return [samples[FP] for samples in measured.samples]


def letter_of_bits(tokens: Sequence[int], bits: float) -> int:
    """A model that says d at 4 bits, c at 3 and b at 2, whatever it is asked."""
    return int(bits) + 1


def test_a_conversation_under_each_schedule_goes_on_from_its_own_answer() -> None:
    task = make("mt_bench", chat=True, max_new_tokens=3)
    (item,) = task.items(records({"turns": ["a b", "c d"]}))
    generator = FakeGenerator(letter_of_bits)
    high, low, mixed = schedules_of("uniform:4", "uniform:2", "static:3@0,2@1")
    samples, steps = answers_of(task, item, generator, high, low, mixed)
    first = (0, USER, 2, 3, MODEL)

    def second(answer: Sequence[int]) -> tuple[int, ...]:
        return (*first, *answer, USER, 4, 5, MODEL)

    answers = [(5, 5, 5), (5, 3, 3), (5, 4, 3)]
    assert [[turn.ids for turn in sample.turns] for sample in samples] == [[ids, ids] for ids in answers]
    # The first prompt is run once for all; the second ones differ.
    assert sorted(generator.prefills) == sorted([(first, 4), *((second(ids), 4) for ids in answers)])
    assert [turn.prompt_tokens for turn in samples[0].turns] == [5, 12]
    assert samples[1].output == "d b b\n\nd b b"
    assert steps == 2 * (2 + 2 + 2)
    row = QualityRow.of("x", [_scored(task, samples[2])], task.metrics, bytes_at={4: 40.0, 3: 30.0, 2: 20.0})
    assert (row.average_bits, row.step_bytes) == (2.5, 25.0)  # without the first token of each turn


def _scored(task: Task, sample: Sample) -> Sample:
    return task.scored(replace(sample, reference=tuple("d d d" for _ in sample.turns)))


def test_the_floating_point_model_answers_turn_by_turn_side_by_side() -> None:
    task = make("mt_bench", max_new_tokens=2)
    items = list(task.items(records({"turns": ["a", "b"]}, {"turns": ["c"]}, {"turns": ["d", "e"]})))
    model = FakeReference((2, 3), (4,), (5, 6), (7,), (8,))
    samples = reference_of(task, items, model)
    assert [len(prompts) for prompts in model.prompts] == [3, 2]
    assert model.prompts[1] == [task.turn(items[0], ["a b"]), task.turn(items[2], ["d e"])]
    assert [[turn.ids for turn in sample.turns] for sample in samples] == [[(2, 3), (7,)], [(4,)], [(5, 6), (8,)]]
    assert samples[0].steps == 1


def test_an_answer_is_cut_where_the_precision_changes() -> None:
    task = make("jsonl", template=Template("{x}"), reference_field="y")
    (item,) = task.items(records({"x": "a b", "y": "d c"}))
    assert (item.prompt, item.references) == ("a b", ("d c",))
    (sample,), _ = answers_of(task, item, FakeGenerator(letter_of_bits), *schedules_of("static:3@1,2@2"))
    (turn,) = sample.turns
    assert turn.segments == ((4, 2, "d d"), (3, 1, " c"), (2, 1, " b"))
    assert (turn.output, turn.tokens, turn.precisions) == ("d d c b", 4, (4, 4, 3, 2))
    assert turn.passes == (4, 3, 2)
    assert (sample.scores, sample.scored_steps) == ({}, 0)


def test_an_answer_of_nothing() -> None:
    task = make("jsonl", template=Template("{x}"))
    (item,) = task.items(records({"x": "a"}))
    (sample,), steps = answers_of(task, item, FakeGenerator(lambda *_: 1), *schedules_of("uniform:2"))
    assert (sample.turns[0].segments, sample.output, sample.steps, steps) == ((), "", 0, 0)
    row = QualityRow.of("uniform:2", [_scored(task, sample)], task.metrics)
    assert row.average_bits is None


def fidelity(fp: FakeReference, bundle: FakeGenerator, tmp_path: Path, *prompts: str) -> list[tuple[Sample, Sample]]:
    """Return the samples of the floating-point model and of 3 bits."""
    task = make("fidelity")
    items = list(task.items(records(*({"prompt": prompt} for prompt in prompts))))
    theirs = reference_of(task, items, fp, tmp_path)
    (schedule,) = schedules_of("static:3@1")
    pairs = []
    for item, sample in zip(items, theirs, strict=True):
        examiner = BundleExaminer(task, lambda: bundle)  # type: ignore[arg-type, return-value]
        baseline = Baseline(sample.turns[0].ids, logits_file(tmp_path, item))
        ours = examiner(Job(items=(item,), schedules=(schedule,), baselines=(baseline,))).samples[0][schedule]
        pairs.append((sample, ours))
    return pairs


def test_fidelity_to_itself_is_perfect_and_to_another_is_not(tmp_path: Path) -> None:
    """The bundle says f for certain, at each step; the floating-point model halves between c, d, e and all others."""
    ((fp, ours),) = fidelity(FakeReference((4, 5, 6)), FakeGenerator(lambda *_: 7, p=0.95), tmp_path, "a b")
    assert fp.scores == {"kl_divergence": pytest.approx(0, abs=1e-9), "top1_agreement": 100}
    other, unsure = 0.05 / (V - 1), 0.5 / (V - 1)
    want = (
        0.5 * math.log(0.5 / other)
        + unsure * math.log(unsure / 0.95)
        + 0.5 * (V - 2) / (V - 1) * math.log(unsure / other)
    )
    assert ours.scores["kl_divergence"] == pytest.approx(want, rel=2e-3)  # kept in half precision
    assert ours.scores["top1_agreement"] == 0
    assert (fp.scored_steps, ours.scored_steps) == (2, 2)
    assert (fp.output, ours.output) == ("c d e", "f f f f")


def test_fidelity_weighs_steps(tmp_path: Path) -> None:
    pairs = fidelity(FakeReference((4, 5, 6, 7), (4, 7), (4,)), FakeGenerator(lambda *_: 7), tmp_path, "a", "b", "c")
    ours = [sample for _, sample in pairs]
    assert [sample.scored_steps for sample in ours] == [3, 1, 0]
    assert [sample.scores.get("top1_agreement") for sample in ours] == [pytest.approx(100 / 3), 100, None]
    agreement = make("fidelity").metrics[1]
    assert agreement.estimate(ours).value == pytest.approx(100 * 2 / 4)


def test_kept_logits_are_exact_where_it_matters(tmp_path: Path) -> None:
    task = make("fidelity")
    (item,) = task.items(records({"prompt": "a"}))
    reference_of(task, [item], FakeReference((4, 5), p=0.9), tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == f"{item_key(item)}.npy"
    logits = np.load(file)
    assert (logits.dtype, logits.shape) == (np.float16, (2, V))
    assert logits.max(axis=-1).tolist() == [0, 0]
    assert logits[0, 2] == pytest.approx(math.log(0.1 / (V - 1) / 0.9), rel=1e-3)


def test_the_key_of_an_item_is_what_is_asked() -> None:
    item = Item(source="f:1", ids=(1, 2), turns=("a",), answer=(3,), unscored=1)
    same: list[dict[str, Any]] = [{"source": "f:9"}, {"references": ("x",)}, {"group": "g"}, {"prompt": "p"}]
    other: list[dict[str, Any]] = [{"ids": (1, 3)}, {"turns": ()}, {"answer": (3, 3)}, {"unscored": 0}]
    values = {"source": "f:1", "ids": (1, 2), "turns": ("a",), "answer": (3,), "unscored": 1}
    assert {item_key(Item(**(values | change))) for change in same} == {item_key(item)}
    assert item_key(item) not in {item_key(Item(**(values | change))) for change in other}


@pytest.mark.parametrize(("spec", "prefill"), [("uniform:3", 3), ("static:3@0,2@1", 3), ("static:2@1", 4)])
def test_perplexity_has_its_prompt_at_the_precision_of_the_first_step(spec: str, prefill: float) -> None:
    task = make("perplexity", max_new_tokens=4)
    (item,) = task.items(records({"text": "a b c"}))
    generator = FakeGenerator(lambda tokens, _: tokens[-1] + 1, p=0.25)
    (sample,), steps = answers_of(task, item, generator, *schedules_of(spec))
    assert generator.prefills == [((0,), prefill)]
    assert steps == 0
    # <s> is followed by </s> for this model, and a by b.
    wrong = -math.log(0.75 / (V - 1))
    assert sample.scores["nll"] == pytest.approx((wrong - 2 * math.log(0.25)) / 3, rel=1e-6)
    assert (sample.scored_steps, sample.turns[0].tokens, sample.turns[0].ids) == (3, 3, ())


def test_what_is_context_only_is_not_scored() -> None:
    task = make("perplexity", max_new_tokens=4, stride=2)
    first, second = task.items(records({"text": "a b c d e"}))
    generator = FakeGenerator(lambda tokens, _: 5, p=0.25)  # says d
    samples = [answers_of(task, item, generator, *schedules_of("uniform:3"))[0][0] for item in (first, second)]
    wrong = -math.log(0.75 / (V - 1))
    assert [sample.scored_steps for sample in samples] == [3, 2]
    assert samples[0].scores["nll"] == pytest.approx(wrong, rel=1e-6)  # a, b, c
    assert samples[1].scores["nll"] == pytest.approx((wrong - math.log(0.25)) / 2, rel=1e-6)  # d, e


def test_decode_perplexity_scores_decode_steps() -> None:
    task = make("decode_perplexity", max_new_tokens=3)
    long, short = task.items(records({"text": "a b c d e f g h a"}))  # ten tokens with <s>
    samples = []
    for p, item in ((0.5, long), (0.25, short)):
        generator = FakeGenerator(lambda tokens, _, text=(*item.ids, *item.answer): text[len(tokens) % len(text)], p=p)
        samples += answers_of(task, item, generator, *schedules_of("static:3@0,2@1"))[0]
        assert generator.prefills == [(item.ids, 4)]
    row = QualityRow.of("static:3@0,2@1", samples, task.metrics, bytes_at={3: 30.0, 2: 20.0})
    perplexity = row.metrics["decode_perplexity"]
    assert perplexity.value == pytest.approx(math.exp((2 * math.log(2) + math.log(4)) / 3), rel=1e-6)
    assert row.average_bits == pytest.approx((3 + 2 + 3) / 3)
    assert row.step_bytes == pytest.approx((30 + 20 + 30) / 3)
