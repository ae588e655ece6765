"""The task `python`: from records to passed tests."""

from __future__ import annotations

from typing import Any

import pytest

from pmpd.eval.data.records import Record, Template
from pmpd.eval.metrics.base import Sample, Turn
from pmpd.eval.tasks.python import Python
from pmpd.runtime import PmpdError

HEAD = 'def double(x: int) -> int:\n    """Return twice a number."""\n'
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]


class Bytes:
    """A tokenizer with a token for each byte."""

    has_chat_template = True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        return list(f"user: {messages[0]['content']}\n".encode())


def make(*, chat: bool = False) -> Python:
    return Python(tokenizer=Bytes(), stop_ids=(), max_new_tokens=4, context_length=999, chat=chat)  # type: ignore[arg-type]


def scored(output: str, *, chat: bool) -> float:
    (item,) = make(chat=chat).items([Record("p:1", {"prompt": HEAD, "tests": TESTS})])
    turn = Turn(prompt_tokens=1, segments=((4, 1, output),))
    sample = Sample(prompt=item.prompt, reference=item.references, turns=(turn,), scores={})
    return make(chat=chat).scored(sample).scores["pass_at_1"]


def test_a_base_model_continues_and_a_chat_model_is_asked() -> None:
    record = Record("p:1", {"prompt": HEAD, "tests": TESTS})
    (item,) = make().items([record])
    assert bytes(item.ids).decode() == HEAD
    (item,) = make(chat=True).items([record])
    assert bytes(item.ids).decode().startswith("user: Complete this Python function.")
    assert HEAD in item.prompt


@pytest.mark.parametrize(
    ("output", "chat", "passes"),
    [
        ("    return 2 * x\n\nprint(double(1))", False, True),
        ("    return x\n", False, False),
        ("    while True:\n        pass\n", False, False),
        ("Here it is:\n```python\ndef double(x):\n    return x + x\n```\nIt adds.", True, True),
        ("```python\ndef double(x):\n    return 4\n```", True, False),
        ("I cannot.", True, False),
        ("", False, False),
    ],
)
def test_answers_are_run(output: str, chat: bool, passes: bool) -> None:
    assert scored(output, chat=chat) == 100.0 * passes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": HEAD}, "p:1: unknown field 'tests'"),
        ({"prompt": HEAD, "tests": "assert True"}, "p:1: field 'tests' is not a list of statements"),
        ({"prompt": HEAD, "tests": []}, "p:1: field 'tests' is not a list of statements"),
        ({"prompt": "x = 1\n", "tests": TESTS}, "p:1: field 'prompt' has no function: it needs"),
    ],
)
def test_records_that_do_not_fit_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PmpdError, match=message):
        list(make().items([Record("p:1", fields)]))


def test_a_template_is_refused() -> None:
    with pytest.raises(PmpdError, match="--prompt-template does not apply to this task"):
        Python(tokenizer=Bytes(), stop_ids=(), max_new_tokens=4, context_length=9, template=Template("{prompt}"))  # type: ignore[arg-type]
