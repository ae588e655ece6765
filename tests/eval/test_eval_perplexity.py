"""Perplexity: which tokens of a text are scored, with which context, and against torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_fakes import WORDS, make, records
from tiny_models import plain_model
from torch.nn.functional import cross_entropy

from pmpd.eval import Settings, evaluate
from pmpd.eval.runner import _spread
from pmpd.eval.tasks.base import Item
from pmpd.eval.tasks.perplexity import STRETCHES, Perplexity
from pmpd.exporter.demo import demo_model_path
from pmpd.runtime import Bundle, PmpdError, Tokenizer

ALPHABET = "a b c d e f g h a"  # ten tokens with <s>


def windows(*texts: str, name: str = "perplexity", **options: Any) -> list[Item]:
    return list(make(name, **options).items(records(*({"text": text} for text in texts))))


def scored(items: Sequence[Item]) -> list[tuple[str, str]]:
    """Return each scored token with what comes before it in its window."""
    words = [[WORDS[i] for i in (*item.ids, *item.answer)] for item in items]
    starts = [len(item.ids) + item.unscored for item in items]
    return [
        (text[i], "".join(text[:i])) for text, start in zip(words, starts, strict=True) for i in range(start, len(text))
    ]


def test_windows_side_by_side_score_all_but_the_first_token_of_each() -> None:
    items = windows(ALPHABET, max_new_tokens=4)
    assert [(item.ids, item.answer, item.unscored) for item in items] == [
        ((0,), (2, 3, 4), 0),
        ((5,), (6, 7, 8), 0),
        ((9,), (2,), 0),
    ]
    assert [item.source.partition(" ")[2] for item in items] == ["token 0", "token 4", "token 8"]


def test_a_last_token_alone_is_no_window() -> None:
    assert [item.answer for item in windows("a b c d", max_new_tokens=4)] == [(2, 3, 4)]


def test_a_stride_scores_every_token_once_after_all_that_fits() -> None:
    assert scored(windows(ALPHABET, max_new_tokens=4, stride=2)) == [
        ("a", "<s>"), ("b", "<s>a"), ("c", "<s>ab"),
        ("d", "bc"), ("e", "bcd"),
        ("f", "de"), ("g", "def"),
        ("h", "fg"), ("a", "fgh"),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [2, 3, 5, 9, 10, 11, 40])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_any_stride_scores_every_token_but_the_first_once(size: int, stride: int) -> None:
    if stride > size:
        return
    got = scored(windows(ALPHABET, max_new_tokens=size, stride=stride))
    if stride < size:
        assert [token for token, _ in got] == ALPHABET.split()
        # With as much context as there is, but for what the stride leaves out.
        assert all(len(context.replace("<s>", "s")) >= min(i + 1, size - stride) for i, (_, context) in enumerate(got))
    else:
        assert len(got) == 10 - math.ceil(10 / size)


def test_windows_fit_the_context() -> None:
    items = windows(ALPHABET, max_new_tokens=64, context_length=6)
    assert [make("perplexity").positions(item) for item in items] == [6, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 4, "stride": 5}, "windows of 4 tokens with a stride of 5: a stride is 1 to"),
        ({"max_new_tokens": 1}, "windows of 1 tokens with a stride of 1"),
    ],
)
def test_windows_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        windows(ALPHABET, **options)


def test_records_are_joined_and_each_is_a_group() -> None:
    items = windows("a b c d e", "f g", "h a b c", max_new_tokens=4)
    assert [(*item.ids, *item.answer) for item in items] == [(0, 2, 3, 4), (5, 6, 7, 8), (9, 2, 3, 4)]
    # A window belongs to the document of its first scored token.
    assert [item.group for item in items] == ["f:1", "f:1", "f:3"]


def test_the_empty_line_between_records_is_a_part_of_the_text() -> None:
    pieces = list(_task()._documents(records({"text": "a b"}, {"text": "c"})))
    assert pieces == [("f:1", "a b"), ("f:2", "\n\nc")]


def _task() -> Perplexity:
    task = make("perplexity", max_new_tokens=4)
    assert isinstance(task, Perplexity)
    return task


WIKITEXT = "a\n = Title = \n\n b c d e \n = = a = = \n f g \n = Title = \n h a = b = c\n"


def test_articles_of_wikitext_are_groups_of_one_text() -> None:
    pieces = list(_task()._documents(records({"text": WIKITEXT})))
    assert "".join(text for _, text in pieces) == WIKITEXT
    second = WIKITEXT.rindex(" = Title")
    assert [source for source, _ in pieces] == ["f:1+0", f"f:1+{second}"]  # what comes before the first is its part
    assert pieces[1][1].startswith(" = Title = \n h")
    items = windows(WIKITEXT, max_new_tokens=5)
    assert [word for item in items for word in (*item.ids, *item.answer)] == [
        0, *(WORDS.index(word) for word in WIKITEXT.split()),
    ]  # fmt: skip
    assert list(dict.fromkeys(item.group for item in items)) == ["f:1+0", f"f:1+{second}"]


def test_articles_of_several_records() -> None:
    pieces = list(_task()._documents(records({"text": WIKITEXT}, {"text": WIKITEXT})))
    assert "".join(text for _, text in pieces) == f"{WIKITEXT}\n\n{WIKITEXT}"
    assert len({source for source, _ in pieces}) == 4


def test_a_text_of_one_document_is_divided_into_stretches() -> None:
    text = " ".join(["a"] * 320)
    for name, options in (("perplexity", {"max_new_tokens": 4}), ("decode_perplexity", {"max_new_tokens": 2})):
        groups = [item.group for item in windows(text, name=name, **options)]
        assert len(set(groups)) == STRETCHES
        assert groups == [group for group in dict.fromkeys(groups) for _ in range(groups.count(group))]
        assert max(map(groups.count, groups)) <= 6
    assert len({item.group for item in windows(text, max_new_tokens=100)}) == 4  # fewer windows are one each


def test_a_limit_takes_windows_from_all_over_the_text() -> None:
    items = [Item(source=f"{i}", ids=(i,)) for i in range(10)]
    assert [item.ids[0] for item in _spread(items, 4)] == [0, 2, 5, 7]
    assert _spread(items, None) == _spread(items, 10) == _spread(items, 99) == items
    assert make("perplexity").spreads
    assert not make("fidelity").spreads


def test_decode_perplexity_halves_windows_into_context_and_answer() -> None:
    items = windows(ALPHABET, name="decode_perplexity", max_new_tokens=3)
    assert [(item.ids, item.answer, item.unscored) for item in items] == [
        ((0, 2, 3), (4, 5, 6), 1),
        ((7, 8), (9, 2), 1),
    ]
    assert [item.source for item in items] == ["f:1+0", "f:1+6"]


def test_decode_perplexity_drops_scraps() -> None:
    options = {"name": "decode_perplexity", "max_new_tokens": 64, "context_length": 4}
    assert [(i.ids, i.answer) for i in windows("a b c d e", **options)] == [((0, 2), (3, 4))]


STORY = (
    "Once upon a time there was a girl. She had a red ball and a small dog. The dog ran after the ball, and the girl "
    "ran after the dog. They all fell into the pond. The girl laughed and the dog shook the water off."
)


@pytest.mark.parametrize("stride", [None, 5])
def test_perplexity_of_the_floating_point_model_is_that_of_torch(
    demo_bundle: Path, tmp_path: Path, stride: int | None
) -> None:
    size = 16
    data = tmp_path / "story.txt"
    data.write_text(STORY, encoding="utf-8")
    settings = Settings(
        task="perplexity", data=data, max_new_tokens=size, stride=stride, schedules=("uniform:4",), threads=1
    )
    fp, four = evaluate(Bundle.open(demo_bundle), settings).rows

    ids = torch.tensor([Tokenizer.from_bundle(Bundle.open(demo_bundle)).encode(STORY)])
    model, losses = plain_model(demo_model_path()), []
    for start in range(0, ids.shape[1], stride or size):
        window = ids[:, start : start + size]
        fresh = window.shape[1] - 1 if start == 0 or stride is None else window.shape[1] - (size - stride)
        if fresh < 1:
            break
        with torch.inference_mode():
            logits = model(window).logits
        losses.append(cross_entropy(logits[0, -fresh - 1 : -1], window[0, -fresh:], reduction="none"))
    losses = torch.cat(losses)

    assert sum(sample.scored_steps for sample in fp.samples) == len(losses)
    assert not stride or len(losses) == ids.shape[1] - 1
    assert fp.metrics["perplexity"].value == pytest.approx(math.exp(losses.mean().item()), rel=1e-4)
    assert four.metrics["perplexity"].value == pytest.approx(fp.metrics["perplexity"].value, rel=0.3)
    assert four.metrics["perplexity"].value != pytest.approx(fp.metrics["perplexity"].value, rel=1e-4)
    assert {bits for sample in four.samples for bits in sample.turns[0].precisions} == {4}
