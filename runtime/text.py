"""Text in and out: tokenizer, chat template, detokenization of a stream (extra `text`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pmpd.runtime.errors import BundleError, MissingExtraError, PmpdError, one_line
from pmpd.runtime.format.bundle import Bundle

__all__ = ["TextStream", "Tokenizer"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are not a whole character yet
_MARK = "text-of-a-message"  # put into a conversation to see where a template writes it


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: `tokenizers.Tokenizer`.
        template: the chat template, in Jinja; None for a model without.
        tool_template: another one for conversations with tools, where the model has one.
        specials: the texts of special tokens, as the template calls them (``bos_token``, …).
        context_length: the most tokens that the model reads; it bounds what a template may write.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        specials: Mapping[str, str | list[str]],
        *,
        tool_template: str | None = None,
        context_length: int = 131_072,
    ) -> None:
        self._tokenizer = tokenizer
        self._template, self._tool_template = template, tool_template
        self._specials = specials
        # A token has 4 characters on average; runs of spaces and the like can have many more.
        self._limit = 100_000 + 64 * context_length

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """Read the tokenizer of a bundle.

        Raises:
            MissingExtraError: the package tokenizers is not installed.
            BundleError: the bundle has no tokenizer, or one that cannot be read.
        """
        try:
            import tokenizers
        except ImportError:
            raise MissingExtraError("tokenizers", "text") from None
        files = bundle.manifest.files
        if "tokenizer.json" not in files:
            raise BundleError(f"{bundle.path} has no tokenizer.json: use token ids, or export a model that has one")
        path = bundle.path / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:
            _raise_unless_library(error)
            raise BundleError(f"{path} cannot be read ({one_line(error)}): copy the bundle again") from None
        template, tool_template = (
            _read(bundle.path / name) if name in files else None
            for name in ("chat_template.jinja", "chat_template_tool_use.jinja")
        )
        specials = None
        if "special_tokens_map.json" in files:
            specials = _specials(bundle.path / "special_tokens_map.json")
        return cls(
            tokenizer,
            template,
            specials or {},
            tool_template=tool_template,
            context_length=bundle.manifest.context_length,
        )

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return token ids; `special_tokens` puts the model's start token in front, where it has one.

        Raises:
            PmpdError: the text has lone surrogates, which Python makes of bytes that are not UTF-8, or the tokenizer
                fails.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        except TypeError:
            raise PmpdError(f"the text {text!r:.60} is not valid Unicode: give UTF-8 text") from None
        except BaseException as error:
            _raise_unless_library(error)
            raise PmpdError(
                f"the tokenizer fails on {text!r:.60} ({one_line(error)}): export the model again"
            ) from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def special_id(self, name: str) -> int | None:
        """Return the id of the special token that the model's authors call ``bos_token``, ``eos_token``, …, or None."""
        text = self._specials.get(name)
        token_id: int | None = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        return token_id

    @property
    def chat_template(self) -> str | None:
        """The chat template, in Jinja; None for a model without."""
        return self._template

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self._template is not None

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the chat template writes what a system message says; some refuse one, some leave it out."""
        return self._writes([{"role": "system", "content": _MARK}, {"role": "user", "content": "Hi"}])

    @cached_property
    def has_tools(self) -> bool:
        """Whether the chat template tells the model which tools it may call."""
        function = {"name": _MARK, "description": "", "parameters": {"type": "object", "properties": {}}}
        return self._writes([{"role": "user", "content": "Hi"}], tools=[{"type": "function", "function": function}])

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that the chat template writes after an answer; None if it writes no token of its own there."""
        answer = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}]
        try:
            _, _, after = self.chat_text(answer, add_generation_prompt=False).rpartition(_MARK)
            ids = self.encode(after.lstrip(), special_tokens=False)[:1]
        except PmpdError:
            return None
        return next((i for i in ids if i in self._tokenizer.get_added_tokens_decoder()), None)

    def _writes(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        try:
            return _MARK in self.chat_text(messages, tools=tools)
        except PmpdError:
            return False

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, as transformers' `apply_chat_template` would.

        Args:
            messages: ``{"role": "user" | "assistant" | "system" | …, "content": text}``, and whatever else the
                template reads (``tool_calls``, …).
            tools: functions that the model may call, as JSON schemas.
            documents: texts that the model may use, ``{"title": …, "text": …}``.
            add_generation_prompt: end with the start of an answer, which the model is to continue.
            continue_final_message: end inside the last message, so that the model goes on with it; then no further
                answer is begun.
            variables: others that the template knows, such as ``enable_thinking``.

        Raises:
            PmpdError: the model has no chat template, the template refuses the messages, or it does more than a
                template may (`pmpd.runtime.chat`).
            MissingExtraError: the package jinja2 is not installed.
        """
        text = self.chat_text(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        return self.encode(text, special_tokens=False)  # the template writes the start token itself

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation. Arguments and errors as in `apply_chat_template`."""
        template = self._template
        if template is None:
            raise PmpdError("this model has no chat template: give it plain text instead")
        if tools is not None and self._tool_template is not None:
            template = self._tool_template
        try:
            from pmpd.runtime.chat import render
        except ImportError:
            raise MissingExtraError("jinja2", "text") from None
        try:
            text = render(
                template,
                messages=_with_mark(messages) if continue_final_message else messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                variables={**self._specials, **(variables or {})},
                limit=self._limit,
            )
        except Exception as error:  # a template is a program from elsewhere: it can fail in any way
            raise PmpdError(
                f"the model's chat template refuses the conversation: {one_line(error) or type(error).__name__}"
            ) from None
        return _until_mark(text) if continue_final_message else text


def _with_mark(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages with a mark and a space behind the text of the last one."""
    *earlier, last = messages or [{}]
    content = last.get("content")
    if isinstance(content, str):
        return [*earlier, {**last, "content": f"{content}{_MARK} "}]
    parts = list(content or ())
    index = next((index for index in reversed(range(len(parts))) if "text" in parts[index]), None)
    if index is None:
        raise PmpdError("there is no last message with a text to continue")
    parts[index] = {**parts[index], "text": f"{parts[index]['text']}{_MARK} "}
    return [*earlier, {**last, "content": parts}]


def _until_mark(text: str) -> str:
    """Return a conversation up to the mark; where the template trims messages, the last one is trimmed too."""
    before, separator, after = text.rpartition(_MARK)
    if not separator:
        raise PmpdError("the model's chat template does not write the last message, so it cannot be continued")
    return before if after.startswith(" ") else before.rstrip()


def _raise_unless_library(error: BaseException) -> None:
    """Raise again what is not an error of the Rust library, whose panics are no `Exception`."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({one_line(error)}): copy the bundle again") from None


def _specials(path: Path) -> dict[str, str | list[str]]:
    """Return the texts of special tokens: a token is its text, or an object with the text as ``content``."""
    try:
        document = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({one_line(error)}): copy the bundle again") from None

    def text(token: Any) -> str:
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str):
            raise BundleError(f"{path} has the special token {one_line(repr(token), 80)}, not a text: export again")
        return content

    if not isinstance(document, dict):
        raise BundleError(f"{path} is {one_line(repr(document), 80)}, not an object: export again")
    named = {name: token for name, token in document.items() if name.endswith(("_token", "_tokens"))}
    return {name: list(map(text, t)) if isinstance(t, list) else text(t) for name, t in named.items() if t is not None}


class TextStream:
    """Turns token ids into text piece by piece, holding back bytes until they are whole characters.

    The pieces are what the tokens add to the text of `prompt`: some decoders drop the space of a word at the start. A
    character that the prompt begins and an answer ends belongs to the answer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._context = 0  # decoding starts here: earlier tokens are out, but decoders look back to the last with text
        self._done = len(self._ids)

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(UNFINISHED):
            return ""
        piece = self._added(text)
        if piece:
            self._context = self._done
        self._done = len(self._ids)
        return piece

    def flush(self) -> str:
        """Return what is left at the end: replacement characters for bytes that never became a character."""
        return self._added(self._tokenizer.decode(self._ids[self._context :]))

    def _added(self, text: str) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._done])
        # The prompt's last replacement character is not in `text` any more if its bytes became a character since.
        same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        return text[same:]
