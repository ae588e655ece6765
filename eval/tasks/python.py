"""The task ``python``: functions that a model writes are run against tests. No reference text is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pmpd.eval.data.python_problems import PYTHON_PROBLEMS
from pmpd.eval.data.records import Record
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.registry import METRICS
from pmpd.eval.sandbox.extract import extract_code
from pmpd.eval.sandbox.run import run_python
from pmpd.eval.tasks.base import Item, Task
from pmpd.runtime.errors import PmpdError

__all__ = ["Python"]

MESSAGE = (
    "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{prompt}```"
)
SECONDS = 5.0  # that a program may run
_ENTRY = re.compile(r"^def (\w+)\(", re.MULTILINE)


class Python(Task):
    """Short Python problems: the share of greedy answers that pass all tests (pass@1 of Chen et al., 2021).

    A record has ``prompt``, a signature with a docstring, and ``tests``, a list of statements; the default data are 100
    problems that come with the package. A chat model is asked for the whole function, another one continues the prompt.
    """

    default_new_tokens = 320
    default_data = PYTHON_PROBLEMS
    generates = True
    chats = True
    takes = frozenset({"chat"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The share of problems solved."""
        return (METRICS["pass_at_1"],)

    def items(self, records: Iterable[Record]) -> Iterator[Item]:
        """Make prompts of records; what answers are scored by is in `references`: the prompt and the tests."""
        for record in records:
            prompt, tests = record.text("prompt"), record.value("tests")
            if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
                raise PmpdError(f"{record.source}: field 'tests' is not a list of statements but {tests!r:.60}")
            if _ENTRY.search(prompt) is None:
                raise PmpdError(f"{record.source}: field 'prompt' has no function: it needs a line `def NAME(…`")
            item = self._prompt(record, MESSAGE.replace("{prompt}", prompt) if self.chat else prompt)
            yield replace(item, references=(prompt, "\n".join(tests)))

    def scored(self, sample: Sample) -> Sample:
        """Run the tests on the function in an answer, for at most five seconds."""
        prompt, tests = sample.reference
        entry = _ENTRY.findall(prompt)[-1]
        program = f"{extract_code(sample.output, entry, prompt)}\n{tests}\n"
        passed = run_python(program, seconds=SECONDS).passed
        return replace(sample, scores={**sample.scores, "pass_at_1": 100.0 * passed})
