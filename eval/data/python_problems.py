"""Short Python problems with tests: a task whose answers are right or wrong, without texts to compare them with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PYTHON_PROBLEMS", "PythonProblem", "python_problems"]

PYTHON_PROBLEMS = Path(__file__).with_name("python_problems.jsonl")


@dataclass(frozen=True)
class PythonProblem:
    """A function to write. All of them were written for this project.

    Attributes:
        name: what results call it.
        prompt: the function's signature and docstring, with examples; ends with a line break.
        entry: the function's name.
        tests: statements that run after the function is defined, most of them assertions.
        solution: a function that passes.
    """

    name: str
    prompt: str
    entry: str
    tests: tuple[str, ...]
    solution: str

    def program(self, code: str) -> str:
        """Return a program that runs to its end if `code` defines the function and passes the tests."""
        return "\n".join([code, *self.tests, ""])


def python_problems() -> tuple[PythonProblem, ...]:
    """Return the problems that come with the package, in the order of `PYTHON_PROBLEMS`."""
    lines = PYTHON_PROBLEMS.read_text(encoding="utf-8").splitlines()
    return tuple(PythonProblem(**{**fields, "tests": tuple(fields["tests"])}) for fields in map(json.loads, lines))
