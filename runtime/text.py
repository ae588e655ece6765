"""Text in and out: tokenizer, chat template, streaming detokenization, stop strings (extra `text`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from pmpd.runtime.decode.trace import Token
from pmpd.runtime.errors import BundleError, MissingExtraError, PmpdError
from pmpd.runtime.format.bundle import Bundle

__all__ = ["StopStrings", "TextStream", "Tokenizer"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are not a whole character yet


class Tokenizer:
    """The bundle's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, template: str | None, specials: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._specials = specials

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
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
        except Exception as error:
            raise BundleError(
                f"{bundle.path / 'tokenizer.json'} cannot be read ({error}): copy the bundle again"
            ) from None
        template = specials = None
        if "chat_template.jinja" in files:
            template = (bundle.path / "chat_template.jinja").read_text(encoding="utf-8")
        if "special_tokens_map.json" in files:
            specials = json.loads((bundle.path / "special_tokens_map.json").read_text(encoding="utf-8"))
        return cls(tokenizer, template, specials or {})

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return token ids; `special_tokens` puts the model's start token in front, where it has one.

        Raises:
            PmpdError: the text has lone surrogates, which Python makes of bytes that are not UTF-8.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        except TypeError:
            raise PmpdError(f"the text {text!r:.60} is not valid Unicode: give UTF-8 text") from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works."""
        return self._template is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation that the model is to answer next.

        `messages` are ``{"role": "user" | "assistant" | "system", "content": text}``.

        Raises:
            PmpdError: the model has no chat template, or the template refuses the messages.
            MissingExtraError: the package jinja2 is not installed.
        """
        if self._template is None:
            raise PmpdError("this model has no chat template: give it plain text instead")
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise MissingExtraError("jinja2", "text") from None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = refuse
        try:
            template = environment.from_string(self._template)
            text = template.render(messages=messages, add_generation_prompt=True, **self._specials)
        except Exception as error:  # a template is a program from elsewhere: it can fail in any way
            raise PmpdError(f"the model's chat template refuses the conversation: {error}") from None
        return self.encode(text, special_tokens=False)  # the template writes the start token itself


class TextStream:
    """Turns token ids into text piece by piece, holding back bytes until they are whole characters.

    The pieces are what the tokens add to the text of `prompt`: some decoders drop the space of a word at the start.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._context = 0  # decoding starts here: earlier tokens are out, but decoders look back to the last with text
        self._done = len(self._ids)

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes."""
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._ids[self._context : self._done])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(UNFINISHED):
            return ""
        piece = text[len(before) :]
        if piece:
            self._context = self._done
        self._done = len(self._ids)
        return piece

    def flush(self) -> str:
        """Return what is left at the end: the marks of bytes that never became a character."""
        before = self._tokenizer.decode(self._ids[self._context : self._done])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]


class StopStrings:
    """Holds back tokens that may be the start of a stop string, and drops them when it comes.

    Tokens without text wait for the next with text, so that what is left of a text always has a token to go with.

    Attributes:
        found: whether a stop string has come.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise PmpdError("a stop string must not be empty")
        self._strings = tuple(strings)
        self._held: list[Token] = []
        self.found = False

    def push(self, token: Token) -> list[Token]:
        """Return the tokens that are certainly part of the answer; the last may have its text cut."""
        self._held.append(token)
        text = "".join(held.text or "" for held in self._held)
        ends = [at for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            self.found = True
            return self._cut(min(ends))
        if not token.text or any(text.endswith(string[:n]) for string in self._strings for n in range(1, len(string))):
            return []
        return self._release()

    def flush(self, rest: str) -> list[Token]:
        """Return what was held back when the answer ends without a stop string; `rest` is text still to come."""
        if rest and self._held:
            self._held[-1] = replace(self._held[-1], text=(self._held[-1].text or "") + rest)
        return self._release()

    def _release(self) -> list[Token]:
        held, self._held = self._held, []
        return held

    def _cut(self, length: int) -> list[Token]:
        kept: list[Token] = []
        for token in self._release():
            if length <= 0:
                break
            kept.append(replace(token, text=(token.text or "")[:length]))
            length -= len(token.text or "")
        return kept
