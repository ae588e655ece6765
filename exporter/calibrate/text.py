"""The text of a calibration as tokens: a file's, or the one that comes with pmpd.

The built-in text (`built_in.jsonl`) was written for this purpose: encyclopedia, news, science, stories, letters, chats,
mathematics, program code, and other languages than English, 87 documents of about 50,000 tokens. Its chats are put into
the model's own template.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmpd.exporter.config import BUILT_IN
from pmpd.exporter.documents import read_documents
from pmpd.runtime.errors import one_line

__all__ = ["text_tokens"]

log = logging.getLogger(__name__)

_FILE = Path(__file__).with_name("built_in.jsonl")
FOREIGN = 0.4
"""Tokens per byte of UTF-8 from which on a tokenizer was not made for a language; it falls apart into bytes at one."""


def text_tokens(text: Path | str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text.

    Args:
        text: a file, or `BUILT_IN`.
        tokenizer: of transformers.

    Raises:
        PmpdError: as `read_documents`.
    """
    documents = list(_built_in(tokenizer)) if text == BUILT_IN else read_documents(Path(text))
    tokens: list[int] = tokenizer("\n\n".join(documents))["input_ids"]
    return tokens


def _built_in(tokenizer: Any) -> Iterator[str]:
    """Yield the documents of the built-in text, without those in languages that the tokenizer was not made for."""
    with _FILE.open(encoding="utf-8") as file:
        for document in map(json.loads, file):
            text = _chat(document["messages"], tokenizer) if document["kind"] == "chat" else document["text"]
            foreign = document["kind"] == "language" and _tokens_per_byte(text, tokenizer) > FOREIGN
            if not foreign:
                yield text


def _tokens_per_byte(text: str, tokenizer: Any) -> float:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) / len(text.encode())


def _chat(messages: list[Mapping[str, str]], tokenizer: Any) -> str:
    """Return a conversation in the model's template, or as plain text where it has none that takes one."""
    if getattr(tokenizer, "chat_template", None):
        try:
            rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like
            log.debug("built-in text: the chat template does not take a conversation (%s)", one_line(error))
        else:
            return rendered
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
