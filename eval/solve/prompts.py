"""Prompts to learn from: of a text cut at random, or those that a model expects.

What a model says when nobody asks is the kind of text that it was trained on; a chat model also writes the questions
that it expects, given what its template puts before one (Xu et al., *Magpie*, ICLR 2025).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pmpd.eval.tasks.base import Item
from pmpd.runtime import Generator, PmpdError, Sampling, Tokenizer

__all__ = ["cut", "write_prompts"]

SHORTEST, LONGEST = 16, 256  # tokens of a prompt that was cut
WRITTEN = {True: 96, False: 160}  # tokens that a model writes for a prompt: a question, or a text to cut
_MARK = "\ue000"  # of a private use: in no template


def cut(item: Item, tokenizer: Tokenizer) -> Item | None:
    """Return a text up to a random place, as the prompt of a completion (A.1.2); None if it is too short."""
    end = min(len(item.ids) - 1, LONGEST)
    if end < SHORTEST:
        return None
    ids = item.ids[: random.Random(str(item.ids)).randint(SHORTEST, end)]
    return replace(item, ids=ids, prompt=tokenizer.decode(ids))


def write_prompts(generator: Generator, tokenizer: Tokenizer, *, count: int, chat: bool, file: Path) -> Iterator[int]:
    """Let a model write texts, or with `chat` questions, into a file of JSON lines with the field ``text``.

    Each is drawn from the model's own distribution, with a seed of its own: a file that has fewer is extended. Yields
    the number of those that are there, one by one.

    Raises:
        PmpdError: the chat template does not say how a question begins.
    """
    start = _start(tokenizer, generator.bundle.stop_ids, chat=chat)
    precision = generator.bundle.manifest.precisions[0]
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    lines = [line for line in lines if line.endswith("\n")]  # the last may be cut off
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    with file.open("a", encoding="utf-8") as opened:
        for number in range(count):
            if number >= len(lines):
                sampling = Sampling(temperature=1.0, seed=number)
                trace = generator.generate(
                    start, max_new_tokens=WRITTEN[chat], schedule=f"uniform:{precision}", sampling=sampling
                )
                text = tokenizer.decode([token.id for token in trace.tokens]).strip()
                opened.write(json.dumps({"text": text or "…"}) + "\n")
                opened.flush()
            yield number + 1


def _start(tokenizer: Tokenizer, stop_ids: Sequence[int], *, chat: bool) -> list[int]:
    """Return the tokens that a text, or the first question of a conversation, begins with."""
    if not chat:
        return tokenizer.encode("") or list(stop_ids[:1]) or [0]
    before, separator, _ = tokenizer.chat_text([{"role": "user", "content": _MARK}]).partition(_MARK)
    if not (separator and before):
        raise PmpdError("the model's chat template does not write a question alone: give texts with --data")
    return tokenizer.encode(before, special_tokens=False)
