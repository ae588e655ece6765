"""What the harness passes on: values of ``--model_args``, and what a task says about its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pmpd.runtime.errors import PmpdError, one_line

__all__ = ["GenerationArguments", "whole_number"]

_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Those that shape sampling, so that greedy decoding need not know them.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def whole_number(name: str, value: Any) -> int:
    """Return an argument that must be a whole number of 1 or more.

    Raises:
        PmpdError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PmpdError(f"{name} must be a whole number of 1 or more, got {one_line(repr(value), 60)}")
    return value


@dataclass(frozen=True, kw_only=True)
class GenerationArguments:
    """How a task wants its answers.

    Attributes:
        until: texts that end an answer and are no part of it.
        max_tokens: the most tokens of an answer.
    """

    until: tuple[str, ...]
    max_tokens: int

    @classmethod
    def read(cls, stated: Mapping[str, Any], *, default_tokens: int) -> Self:
        """Read a task's ``generation_kwargs``.

        A temperature without ``do_sample`` asks for sampling if it is above 0, and is of no account if ``do_sample`` is
        false, as in the harness's own models.

        Raises:
            PmpdError: they ask for something other than greedy decoding, or have a value that does not fit.
        """
        until = stated.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(text, str) for text in until):
            raise PmpdError(f"until must be a text or a list of texts, got {one_line(repr(until), 60)}")
        do_sample = stated.get("do_sample")
        if do_sample is None:
            do_sample = (stated.get("temperature") or 0) > 0
        if do_sample:
            raise PmpdError(
                "the task asks for sampling and the model pmpd decodes greedily: "
                "give --gen_kwargs do_sample=False if greedy answers will do"
            )
        for name, value in stated.items():
            if name not in ("until", "do_sample", *_TOKENS, *_SAMPLING):
                raise PmpdError(
                    f"the task asks for {one_line(name, 40)}={one_line(repr(value), 40)} and the model pmpd decodes "
                    "greedily, up to `until` or `max_gen_toks`: it cannot answer this task"
                )
        name, limit = next(
            ((name, stated[name]) for name in _TOKENS if stated.get(name) is not None), ("", default_tokens)
        )
        return cls(until=tuple(filter(None, until)), max_tokens=whole_number(name, limit))
