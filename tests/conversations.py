"""Conversations of many kinds, for comparing chat templates with transformers."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from pmpd.runtime.chat import render

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
__all__ = ["CASES", "differences"]

SYSTEM = {"role": "system", "content": "Be <brief> & kind.\n"}
HELLO = {"role": "user", "content": "  Weather in Zürich? 🦉 \n"}
ANSWER = {"role": "assistant", "content": "Sunny, 'mild'."}
THANKS = {"role": "user", "content": 'Thanks: {"a": [1, "<b>"]}\n\n{{ not_a_template }} {% no %}'}
THOUGHT = {"role": "assistant", "content": "<think>\nLet me see.\n</think>\n\nSunny."}
REASONED = {"role": "assistant", "reasoning_content": "Let me see.", "content": "Sunny."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "at": None, "fine": True}},
        }
    ],
}
CALLS = {
    "role": "assistant",
    "content": "I will look.",
    "tool_calls": [
        {"id": "call00002", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}},
        {"id": "call00003", "type": "function", "function": {"name": "time", "arguments": {}}},
    ],
}
CALL_AS_TEXT = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call00004", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": '{"celsius": 3.5}'}
RESULTS = [
    {"role": "tool", "tool_call_id": "call00002", "name": "weather", "content": "3 °C"},
    {"role": "tool", "tool_call_id": "call00003", "name": "time", "content": "12:00"},
]
PARTS = {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Zürich?"}]}
PICTURE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says 'it' & <more>: ä\n\"quoted\"",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city."},
                    "days": {"type": "integer", "default": 1},
                    "at": {"type": ["string", "null"], "enum": ["noon", "night", None]},
                    "fine": {"type": "boolean"},
                    "where": {
                        "type": "object",
                        "properties": {
                            "lat": {"type": "number"},
                            "tags": {"type": "array", "items": {"type": "string"}},
                        },
                    },
                },
                "required": ["city"],
            },
            "return": {"type": "string", "description": "The weather."},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "time",
            "description": "Tells the time.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
PLAIN_TOOLS = [  # without what some templates do not write: unions of types, objects in objects
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city."},
                    "days": {"type": "integer", "description": "How many."},
                    "tags": {"type": "array", "items": {"type": "string"}, "description": "Which."},
                },
                "required": ["city"],
            },
        },
    }
]
DOCUMENTS = [{"title": "Zürich", "text": "It <rains>."}, {"title": "Bern", "text": "It's dry.", "extra": 3}]


def case(*messages: dict[str, Any], tools: Any = None, documents: Any = None, **variables: Any) -> dict[str, Any]:
    return {"messages": list(messages), "tools": tools, "documents": documents, "variables": variables}


# Messages, tools, documents and the template's own variables by name.
CASES = {
    "one message": case(HELLO),
    "system": case(SYSTEM, HELLO),
    "turns": case(HELLO, ANSWER, THANKS),
    "turns and system": case(SYSTEM, HELLO, ANSWER, THANKS, ANSWER),
    "empty texts": case({"role": "system", "content": ""}, {"role": "user", "content": ""}),
    "empty answer": case(HELLO, {"role": "assistant", "content": ""}, THANKS),
    "nothing": case(),
    "roles that do not alternate": case(HELLO, THANKS),
    "an answer first": case(ANSWER, HELLO),
    "system late": case(HELLO, SYSTEM),
    "unknown role": case({"role": "critic", "content": "Hm."}),
    "developer": case({"role": "developer", "content": "Be brief."}, HELLO),
    "tools": case(HELLO, tools=TOOLS),
    "tools and system": case(SYSTEM, HELLO, tools=TOOLS),
    "plain tools": case(SYSTEM, HELLO, tools=PLAIN_TOOLS),
    "a call and plain tools": case(HELLO, CALL, RESULT, ANSWER, THANKS, tools=PLAIN_TOOLS),
    "no tools": case(HELLO, tools=[]),
    "a call": case(HELLO, CALL, RESULT, tools=TOOLS),
    "a call and its answer": case(SYSTEM, HELLO, CALL, RESULT, ANSWER, THANKS, tools=TOOLS),
    "several calls": case(HELLO, CALLS, *RESULTS, tools=TOOLS),
    "arguments as text": case(HELLO, CALL_AS_TEXT, RESULT, ANSWER, tools=TOOLS),
    "a call without tools": case(HELLO, CALL, RESULT),
    "content in parts": case(PARTS, ANSWER, PARTS),
    "system in parts": case({"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, PARTS),
    "a picture": case(PICTURE),
    "thoughts in the text": case(HELLO, THOUGHT, THANKS),
    "thoughts apart": case(HELLO, REASONED, THANKS, REASONED),
    "thoughts and a call": case(HELLO, {**CALL, "reasoning_content": "Hm."}, RESULT, tools=TOOLS),
    "thinking off": case(SYSTEM, HELLO, enable_thinking=False),
    "thinking on": case(HELLO, THOUGHT, THANKS, enable_thinking=True),
    "thinking in other words": case(HELLO, thinking=True, reasoning_effort="low", controls={"thinking": True}),
    "tools of the system": case({**SYSTEM, "tools": '[{"name": "weather"}]'}, HELLO, ANSWER),
    "documents": case(HELLO, documents=DOCUMENTS),
    "documents, tools and system": case(SYSTEM, HELLO, tools=TOOLS, documents=DOCUMENTS),
    "a date": case(HELLO, date_string="26 Nov 2026", current_date="2026-11-26"),
}


def differences(template: str) -> list[str]:
    """Return where a template's texts of the conversations above differ from those that transformers makes of it.

    A template that refuses a conversation has to do so in the same words.
    """
    return [
        f"{name} (add_generation_prompt={begin}): {ours!r:.300} instead of {theirs!r:.300}"
        for name, conversation in CASES.items()
        for begin in (True, False)
        if (ours := outcome(our_text, template, conversation, begin))
        != (theirs := outcome(their_text, template, conversation, begin))
    ]


def outcome(text: Any, template: str, conversation: dict[str, Any], begin: bool) -> str:
    try:
        return f"text: {text(template, **conversation, begin=begin)}"
    except RecursionError:
        return "error: RecursionError"
    except Exception as error:
        return f"error: {type(error).__name__} {error}"


def our_text(template: str, *, messages: Any, tools: Any, documents: Any, variables: Any, begin: bool) -> str:
    return render(
        template,
        messages=messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=begin,
        variables=SPECIALS | variables,
        limit=1_000_000,
    )


def their_text(template: str, *, messages: Any, tools: Any, documents: Any, variables: Any, begin: bool) -> str:
    (text,), _ = render_jinja_template(
        [messages], tools, documents, chat_template=template, add_generation_prompt=begin, **SPECIALS | variables
    )
    return str(text)
