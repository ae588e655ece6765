"""Tasks on a fake model: what they ask, and how they score and sum up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from pmpd.eval.data.records import Record, Template
from pmpd.eval.measure.models import Answer, Forced
from pmpd.eval.report.results import QualityRow
from pmpd.eval.tasks.base import Task
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime import PmpdError

WORDS = ["<s>", "</s>", "a", "b", "c", "d", "e", "f", "g", "h"]
V = len(WORDS)


class WordTokenizer:
    """One token per word."""

    has_chat_template = True

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return [0] * special_tokens + [WORDS.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i] for i in ids if i > 1)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [0, 9, *self.encode(messages[0]["content"], special_tokens=False), 9]


class FakeModel:
    """Answers with fixed tokens; gives each target of forcing the probability `p`."""

    def __init__(self, answer: Sequence[int], *, bits: Sequence[int], p: float = 0.5) -> None:
        self.answer = answer
        self.bits = tuple(bits)
        self.p = p
        self.prompts: list[tuple[int, ...]] = []

    def warm_up(self, prompt: Sequence[int]) -> None:
        raise AssertionError("tasks do not warm up")

    def generate(self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int]) -> Answer:
        self.prompts.append(tuple(prompt))
        ids = tuple(self.answer[:max_new_tokens])
        seconds = (0.5, *[0.1] * (len(ids) - 1)) if ids else ()
        return Answer(ids=ids, precisions=self.bits[: len(ids)], seconds=seconds, prefill_seconds=0.4)

    def force(self, prompt: Sequence[int], answer: Sequence[int]) -> Forced:
        rows = np.full((len(answer) - 1, V), (1 - self.p) / (V - 1))
        rows[range(len(rows)), answer[1:]] = self.p
        return Forced(logits=np.log(rows).astype(np.float32), precisions=self.bits[: len(answer)], prefill_seconds=0.2)


def make(name: str, **options: Any) -> Task:
    values = {"max_new_tokens": 4, "context_length": 100, **options}
    return TASKS[name](tokenizer=WordTokenizer(), stop_ids=(1,), **values)  # type: ignore[arg-type]


def records(*fields: dict[str, Any]) -> list[Record]:
    return [Record(f"f:{i}", each) for i, each in enumerate(fields, start=1)]


def test_perplexity_windows_halve_into_context_and_answer() -> None:
    items = list(make("perplexity", max_new_tokens=3).items(records({"text": "a b c d e f g h a"})))  # 10 with <s>
    assert [(item.ids, item.answer) for item in items] == [((0, 2, 3), (4, 5, 6)), ((7, 8), (9, 2))]
    assert [item.source for item in items] == ["f:1+0", "f:1+6"]


def test_perplexity_windows_are_cut_to_the_context_and_scraps_dropped() -> None:
    task = make("perplexity", max_new_tokens=64, context_length=4)
    assert [(i.ids, i.answer) for i in task.items(records({"text": "a b c d e"}))] == [((0, 2), (3, 4))]
    assert all(task.positions(item) <= 4 for item in task.items(records({"text": "a b c d e f g h"})))


def test_perplexity_is_exp_of_the_mean_over_tokens_not_over_windows() -> None:
    task = make("perplexity", max_new_tokens=3)
    long, short = task.items(records({"text": "a b c d e f g h a"}))
    samples = [
        task.measure(FakeModel((), bits=(4, 3, 2), p=p), item, None)[0] for p, item in ((0.5, long), (0.25, short))
    ]
    row = QualityRow.of("static:3@0,2@1", samples, task.metrics, bytes_at={3: 30.0, 2: 20.0})
    perplexity = row.metrics["perplexity"]
    assert perplexity.value == pytest.approx(math.exp((2 * math.log(2) + math.log(4)) / 3), rel=1e-6)
    assert perplexity.ci95 is not None
    assert perplexity.ci95 > 0
    assert row.average_bits == pytest.approx((3 + 2 + 3) / 3)
    assert row.step_bytes == pytest.approx((30 + 20 + 30) / 3)
    assert row.decode_tps is None


def test_fidelity_to_itself_is_perfect_and_to_another_is_not() -> None:
    task = make("fidelity")
    (item,) = task.items(records({"prompt": "a b"}))
    assert item.ids == (0, 2, 3)
    fp, baseline = task.measure(FakeModel((4, 5, 6), bits=(16, 16, 16), p=0.5), item, None)
    fp_row = QualityRow.of("fp", [fp], task.metrics)
    assert {name: metric.value for name, metric in fp_row.metrics.items()} == {
        "kl_divergence": pytest.approx(0, abs=1e-9),
        "top1_agreement": 100,
        "rougeL": 100,
    }
    assert all(metric.ci95 is None for metric in fp_row.metrics.values())
    other, again = task.measure(FakeModel((4, 7, 7), bits=(4, 3, 2), p=0.05), item, baseline)
    assert again is baseline
    rest = 0.5 / (V - 1)
    want = 0.5 * math.log(0.5 / 0.05) + 0.5 * math.log(rest / (0.95 / (V - 1)))
    assert other.scores["kl_divergence"] == pytest.approx(want, rel=1e-5)
    assert other.scores["top1_agreement"] == 0
    assert other.scores["rougeL"] == pytest.approx(100 / 3)
    assert (other.output, other.reference, other.scored_steps) == ("c f f", ("c d e",), 2)
    assert other.segments == ((4, "c"), (3, " f"), (2, " f"))


def test_fidelity_weighs_logit_metrics_by_steps_and_texts_alike() -> None:
    task = make("fidelity")
    items = list(task.items(records({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})))
    baselines = [
        task.measure(FakeModel(ids, bits=(16,) * 4), item, None)[1]
        for ids, item in zip([(4, 5, 6, 7), (4, 5), (4,)], items, strict=True)
    ]
    samples = [
        task.measure(FakeModel((4,), bits=(4,) * 4, p=p), item, baseline)[0]
        for p, item, baseline in zip([0.05, 0.5, 0.5], items, baselines, strict=True)
    ]
    summary = {metric.name: metric.estimate(samples).value for metric in task.metrics}
    assert summary["top1_agreement"] == pytest.approx(100 / 4)  # three steps wrong, one right, none
    assert summary["rougeL"] == pytest.approx((40 + 200 / 3 + 100) / 3)


def test_fidelity_takes_the_start_of_a_text_or_a_template() -> None:
    (item,) = make("fidelity").items(records({"text": " ".join(["a b c d"] * 20)}))
    assert len(item.ids) == 33
    (item,) = make("fidelity", template=Template("h {x}")).items(records({"x": "a"}))
    assert item.ids == (0, 9, 2)
    with pytest.raises(PmpdError, match="f:1: unknown field 'prompt'"):
        list(make("fidelity").items(records({"x": "a"})))


def test_rouge_task_scores_against_its_references() -> None:
    task = make("jsonl", template=Template("{x}"), reference_field="y")
    (item,) = task.items(records({"x": "a b", "y": "d e"}))
    sample, _ = task.measure(FakeModel((5, 7), bits=(4, 3)), item, None)
    assert (sample.prompt, sample.output, sample.reference) == ("a b", "d f", ("d e",))
    assert sample.scores["rougeL"] == pytest.approx(50.0)
    row = QualityRow.of("uniform:3", [sample, sample], task.metrics)
    assert row.average_bits == 3
    assert row.decode_tps is not None
    assert row.decode_tps.value == pytest.approx(10)


@pytest.mark.parametrize("name", ["mt_bench", "jsonl"])
def test_without_references_the_floating_point_answer_is_one(name: str) -> None:
    task = make(name, template=Template("{x}"))
    (item,) = task.items(records({"x": "a b"}))
    fp, baseline = task.measure(FakeModel((4, 5), bits=(16, 16)), item, None)
    other, _ = task.measure(FakeModel((4, 6), bits=(4, 4)), item, baseline)
    assert fp.scores["rougeL"] == 100
    assert other.scores["rougeL"] == pytest.approx(50)
    assert other.reference == ("c d",)


@pytest.mark.parametrize(
    ("fields", "references"),
    [
        ({"summary": "x"}, ("x",)),
        ({"summary1": "x", "summary2": "y", "summary3": "z"}, ("x", "y", "z")),
        ({"summary": ["x", "y"]}, ("x", "y")),
    ],
)
def test_dialogsum_has_one_or_several_references(fields: dict[str, Any], references: tuple[str, ...]) -> None:
    (item,) = make("dialogsum", template=Template("{dialogue}")).items(records({"dialogue": "a", **fields}))
    assert item.references == references


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(PmpdError, match="f:1: unknown field 'summary'"):
        list(make("dialogsum", template=Template("{dialogue}")).items(records({"dialogue": "a"})))


def test_chat_puts_the_prompt_through_the_template() -> None:
    (item,) = make("mt_bench", chat=True).items(records({"turns": ["a b", "c"]}))
    assert item.ids == (0, 9, 2, 3, 9)
    assert item.prompt == "a b"


def test_every_own_prompt_is_a_template() -> None:
    for task in (TASKS["dialogsum"], TASKS["cnn_dailymail"], TASKS["mt_bench"]):
        plain, chat = task.prompts  # type: ignore[attr-defined]
        assert Template(plain).text != Template(chat).text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jsonl", {}, "give --prompt-template"),
        ("perplexity", {"chat": True}, "--chat does not apply"),
        ("perplexity", {"reference_field": "x"}, "--reference-field does not apply"),
        ("fidelity", {"reference_field": "x"}, "--reference-field does not apply"),
    ],
)
def test_options_that_a_task_lacks_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        make(name, **options)


def test_an_empty_prompt_is_named() -> None:
    task = make("jsonl", template=Template("{x}"))
    task.tokenizer.encode = lambda text: []  # type: ignore[method-assign, assignment, misc]
    with pytest.raises(PmpdError, match="f:1: the prompt is empty"):
        list(task.items(records({"x": ""})))
