"""What to evaluate, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pmpd.eval.data.records import Template
from pmpd.eval.measure.reference import BACKENDS
from pmpd.eval.measure.workers import check_workers
from pmpd.eval.speed.speed import SPEED
from pmpd.eval.tasks.answers import Answers
from pmpd.eval.tasks.registry import TASKS
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.manifest import ACCURACIES

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate and how.

    Attributes:
        task: a name of `TASKS`.
        data: JSON lines (``.jsonl``, also ``.jsonl.gz``), or a plain text; default the task's own, if it has any.
        schedules: one row each; ``4`` and ``uniform:4`` are the same row. Default uniform at every precision of the
            bundle.
        accuracies: how kernels compute; each gives all rows again. Default the bundle's.
        kernels: a kernel library to use instead of the bundle's.
        require_fast_kernels: whether to refuse a bundle without compiled kernels for this machine.
        limit: use only the first items of the data, at most this many (records; for perplexity, windows of text).
        max_new_tokens: tokens per answer; default the task's.
        prompt_template: the prompt, with ``{field}``; default the task's.
        reference_field: field with the reference text; default the task's.
        chat: whether prompts go through the chat template; default where both task and model have one.
        reference: folder, alias or hub id of the floating-point model; default what the bundle was made from.
        reference_backend: a name of `BACKENDS`.
        metrics: names of `TEXT_METRICS`, the columns of a task with answers; default the task's.
        encoder: folder or hub id of BERTScore's encoder; with one, BERTScore is a column by default.
        stride: tokens between windows of text, for perplexity.
        speed: whether decode speed is measured, too, after all samples.
        threads: threads to compute with; default all processors this process may use.
        workers: processes that measure, side by side; samples are the same. `threads` are of each.
        address: HOST:PORT of a Ray cluster for them; each of its nodes has the models at the same paths.

    Raises:
        PmpdError: a value out of range, or an unknown choice.
    """

    task: str
    data: Path = Path()
    schedules: tuple[str, ...] = ()
    accuracies: tuple[str, ...] = ()
    kernels: Path | None = None
    require_fast_kernels: bool = False
    limit: int | None = None
    max_new_tokens: int | None = None
    prompt_template: str | None = None
    reference_field: str | None = None
    chat: bool | None = None
    reference: str | None = None
    reference_backend: str = "transformers"
    metrics: tuple[str, ...] = ()
    encoder: str | None = None
    stride: int | None = None
    speed: bool = False
    threads: int | None = None
    workers: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        check_workers(self.workers, self.address)
        if self.task not in TASKS:
            raise PmpdError(unknown_choice("task", self.task, [*TASKS, SPEED]))
        for accuracy in self.accuracies:
            if accuracy not in ACCURACIES:
                raise PmpdError(unknown_choice("accuracy", accuracy, ACCURACIES))
        if self.reference_backend not in BACKENDS:
            raise PmpdError(unknown_choice("reference backend", self.reference_backend, BACKENDS))
        if self.data == Path() and (default := TASKS[self.task].default_data) is not None:
            object.__setattr__(self, "data", default)
        if self.data == Path():
            raise PmpdError(f"the task {self.task} needs --data: a .jsonl or text file")
        if not self.data.is_file():
            raise PmpdError(f"data file {self.data} does not exist: give a .jsonl or text file")
        for name in ("limit", "max_new_tokens", "stride", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PmpdError(f"{name.replace('_', ' ')} must be 1 or more, got {value}")
        if self.prompt_template is not None:
            Template(self.prompt_template)
        if (self.metrics or self.encoder) and not issubclass(TASKS[self.task], Answers):
            raise PmpdError(f"--metric and --encoder do not apply to the task {self.task}: leave them out")
