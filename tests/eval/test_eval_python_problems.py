"""The Python problems that come with the package."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from doctest import DocTestParser

import pytest

from pmpd.eval.data.python_problems import PythonProblem, python_problems
from pmpd.eval.sandbox.run import Verdict, run_python

PROBLEMS = python_problems()


def verdicts_of(programs: list[str]) -> list[Verdict]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda program: run_python(program, seconds=60), programs))


def body_of(problem: PythonProblem) -> str:
    """The solution without its signature, to be put behind the prompt."""
    signature = problem.prompt.partition('    """')[0]
    assert problem.solution.startswith(signature)
    return problem.solution.removeprefix(signature)


def examples_of(problem: PythonProblem) -> list[str]:
    """The examples of a docstring, as assertions."""
    docstring = ast.get_docstring(ast.parse(problem.prompt).body[0])  # type: ignore[arg-type]
    examples = DocTestParser().get_examples(docstring or "")
    return [f"assert repr({example.source.strip()}) == {example.want.strip()!r}" for example in examples]


def test_there_are_a_hundred_different_problems() -> None:
    assert len(PROBLEMS) == 100
    for key in ("name", "entry", "prompt", "solution"):
        assert len({getattr(problem, key) for problem in PROBLEMS}) == 100


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_problem_is_complete(problem: PythonProblem) -> None:
    (function,) = ast.parse(problem.prompt).body
    assert isinstance(function, ast.FunctionDef)
    assert function.name == problem.entry
    assert function.returns is not None
    assert all(argument.annotation is not None for argument in function.args.args)
    assert problem.prompt.endswith('"""\n')
    assert examples_of(problem)
    assertions = [test for test in problem.tests if test.startswith("assert ")]
    assert 5 <= len(assertions) <= 8
    assert all(problem.entry in test for test in assertions)


@pytest.mark.full
def test_solutions_pass_their_tests_and_the_examples() -> None:
    programs = [
        "\n".join([problem.program(problem.prompt + body_of(problem)), *examples_of(problem)]) for problem in PROBLEMS
    ]
    verdicts = dict(zip((problem.name for problem in PROBLEMS), verdicts_of(programs), strict=True))
    assert {name: verdict.reason for name, verdict in verdicts.items() if not verdict.passed} == {}


@pytest.mark.full
def test_functions_that_return_nothing_fail() -> None:
    verdicts = verdicts_of([problem.program(problem.prompt) for problem in PROBLEMS])
    assert [problem.name for problem, verdict in zip(PROBLEMS, verdicts, strict=True) if verdict.passed] == []
