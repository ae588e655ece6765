"""Texts that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pmpd.runtime.decode.trace import Token
from pmpd.runtime.errors import PmpdError

__all__ = ["StopStrings"]


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

    def flush(self, tail: str) -> list[Token]:
        """Return what was held back when the answer ends without a stop string; `tail` is its last text."""
        if tail and self._held:
            self._held[-1] = replace(self._held[-1], text=(self._held[-1].text or "") + tail)
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
