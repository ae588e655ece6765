"""What tasks make of records: prompts, references, and what follows in a conversation."""

from __future__ import annotations

from typing import Any

import pytest
from eval_fakes import MODEL, USER, make, records

from pmpd.eval.data.records import Template
from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.metrics.rouge import rouge
from pmpd.eval.metrics.texts import TextScorer
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime import PmpdError


def test_fidelity_takes_the_start_of_a_text_or_a_template() -> None:
    (item,) = make("fidelity").items(records({"text": " ".join(["a b c d"] * 20)}))
    assert len(item.ids) == 33
    (item,) = make("fidelity", template=Template("h {x}")).items(records({"x": "a"}))
    assert item.ids == (0, 9, 2)
    assert item.unscored == 1  # the first token comes from prefill
    with pytest.raises(PmpdError, match="f:1: unknown field 'prompt'"):
        list(make("fidelity").items(records({"x": "a"})))


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "f:2: unknown field 'summary'"),
        ({"summary": " \n"}, "f:2: the reference 'summary' is empty: remove the record, or fill it in"),
        ({"summary1": "x", "summary2": ""}, "f:2: the reference 'summary2' is empty"),
        ({"summary": ["x", ""]}, r"f:2: the reference 'summary\[1\]' is empty"),
        ({"summary": []}, "f:2: field 'summary' is not text"),
        ({"summary": None}, "f:2: field 'summary' is not text"),
    ],
)
def test_a_reference_that_is_none_is_named(fields: dict[str, Any], message: str) -> None:
    data = records({"dialogue": "a", "summary": "b"}, {"dialogue": "a", **fields})
    with pytest.raises(PmpdError, match=message):
        list(make("dialogsum", template=Template("{dialogue}")).items(data))


def test_iwslt_has_long_sentences_only() -> None:
    """Those of more than 60 tokens, of the model's own and without the one that begins a text."""
    plain = {"template": Template("{fr}")}
    data = records(*({"fr": " ".join(["a"] * count), "en": f"{count}"} for count in (60, 61, 3, 62)))
    assert [item.references for item in make("iwslt", **plain).items(data)] == [("61",), ("62",)]
    assert [metric.name for metric in make("iwslt", **plain).metrics] == ["sacrebleu", "bleu"]
    assert list(make("iwslt", **plain).items(records({"fr": "a", "en": ""}))) == []
    with pytest.raises(PmpdError, match="f:1: the reference 'en' is empty"):
        list(make("iwslt", **plain).items(records({"fr": " ".join(["a"] * 61), "en": ""})))
    with pytest.raises(PmpdError, match="f:1: unknown field 'fr'"):
        list(make("iwslt").items(records({"en": "a"})))


QUESTIONS = {"turns": ["a b", "c d"]}


def test_mt_bench_goes_on_from_the_models_own_answer_in_chat() -> None:
    task = make("mt_bench", chat=True)
    (item,) = task.items(records(QUESTIONS))
    assert (item.prompt, item.turns, item.references) == ("a b", ("c d",), ())
    assert task.turn(item, []) == item.ids == (0, USER, 2, 3, MODEL)
    assert task.turn(item, ["e f"]) == (0, USER, 2, 3, MODEL, 6, 7, USER, 4, 5, MODEL)


def test_mt_bench_goes_on_from_the_models_own_answer_without_chat() -> None:
    task = make("mt_bench")
    (item,) = task.items(records(QUESTIONS))
    text = task.tokenizer.decode
    assert text(task.turn(item, [])) == "Question: a b Answer:"
    assert text(task.turn(item, ["e f"])) == "Question: a b Answer: e f Question: c d Answer:"
    (item,) = task.items(records({"turns": ["a", "b", "c"]}))
    assert text(task.turn(item, ["e", "f"])) == ("Question: a Answer: e Question: b Answer: f Question: c Answer:")


def test_a_conversation_takes_room_for_all_its_turns() -> None:
    task = make("mt_bench", chat=True, max_new_tokens=5)
    one, two = task.items(records({"turns": ["a b"]}, QUESTIONS))
    assert task.positions(one) == len(one.ids) + 5
    longest = task.turn(two, [task.tokenizer.decode([2] * 5)])
    assert task.positions(two) >= len(longest) + 5


def test_mt_bench_with_a_template_or_one_question_has_one_turn() -> None:
    assert [item.turns for item in make("mt_bench", template=Template("{turns[1]}")).items(records(QUESTIONS))] == [()]
    assert [item.turns for item in make("mt_bench").items(records({"turns": ["a"]}))] == [()]
    with pytest.raises(PmpdError, match=r"f:1: field 'turns\[1\]' is not text"):
        list(make("mt_bench").items(records({"turns": ["a", None]})))


def answered(*texts: str, references: tuple[str, ...]) -> Sample:
    turns = tuple(Turn(prompt_tokens=1, segments=((4, 1, text),)) for text in texts)
    return Sample(source="f:1", turns=turns, scores={}, reference=references)


def test_the_rouge_of_a_conversation_is_the_mean_over_turns() -> None:
    scored = TextScorer(["rougeL", "sacrebleu"]).scored(answered("a b", "c d", references=("a b", "c e")))
    assert scored.scores["rougeL"] == pytest.approx((100 + 50) / 2)
    assert scored.counts["bleu"][:3] == (4, 4, 3)  # words, and those of them that match, of both turns
    one = TextScorer(["rougeL"]).scored(answered("a b", references=("a b", "c e")))
    assert one.scores["rougeL"] == pytest.approx(rouge("a b", ["a b", "c e"])["rougeL"]) == 50


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("rougeL", "rougl"), "unknown metric 'rougl': choose one of"),
        (("",), "unknown metric ''"),
        (("bertscore",), "the metric bertscore needs an encoder: give a folder or hub id with --encoder"),
    ],
)
def test_metrics_that_there_are_not(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        TextScorer(names)


def test_a_text_without_a_reference_is_named() -> None:
    with pytest.raises(PmpdError, match="f:1: there is no reference text"):
        TextScorer(["rougeL"]).scored(answered("a", references=()))


def test_every_own_prompt_is_a_template() -> None:
    for name in ("dialogsum", "cnn_dailymail", "iwslt", "mt_bench"):
        plain, chat = TASKS[name].prompts  # type: ignore[attr-defined]
        assert Template(plain).text != Template(chat).text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jsonl", {}, "give --prompt-template"),
        ("perplexity", {"chat": True}, "--chat does not apply"),
        ("perplexity", {"reference_field": "x"}, "--reference-field does not apply"),
        ("fidelity", {"reference_field": "x"}, "--reference-field does not apply"),
        ("fidelity", {"stride": 3}, "--stride does not apply"),
        ("decode_perplexity", {"stride": 3}, "--stride does not apply"),
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
