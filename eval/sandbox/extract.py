"""The function in a model's answer."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from itertools import takewhile

__all__ = ["extract_code"]

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "python", "python3", "py")


def extract_code(answer: str, entry: str, prompt: str) -> str:
    """Return the program that an answer to a prompt consists of, with the function `entry`.

    In this order: the first fenced block of Python that defines the function, the first fenced block, the text if it
    defines the function. Otherwise the answer continues the prompt (a signature with a docstring), up to the first line
    that no longer belongs to the function's body. A block that the answer does not close ends with it.
    """
    definition = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry)}\s*\(", re.MULTILINE)
    blocks = list(_blocks(answer))
    defining = (code for language, code in blocks if language in _PYTHON and definition.search(code))
    if (code := next(defining, None)) is not None:
        return code
    if blocks:
        return blocks[0][1]
    if definition.search(answer):
        return textwrap.dedent(answer)
    first, *others = answer.split("\n")
    body = takewhile(lambda line: not line.strip() or line[0].isspace(), others)
    if prompt.endswith("\n") and first.strip() and not first[0].isspace():
        return prompt  # nothing of the answer is in the function
    return prompt + "\n".join([first, *body])


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """Yield the language, in lower case, and the code of each fenced block."""
    for match in _FENCE.finditer(answer):
        yield match[1].lower(), textwrap.dedent(match[2])
