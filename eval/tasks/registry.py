"""The tasks by name. One more is a file in this folder and a line here."""

from __future__ import annotations

from pmpd.eval.tasks.answers import Answers, CnnDailyMail, DialogSum, Iwslt, MtBench
from pmpd.eval.tasks.base import Task
from pmpd.eval.tasks.fidelity import Fidelity
from pmpd.eval.tasks.perplexity import DecodePerplexity, Perplexity
from pmpd.eval.tasks.python import Python

__all__ = ["ANSWERING", "TASKS"]

TASKS: dict[str, type[Task]] = {
    "perplexity": Perplexity,
    "decode_perplexity": DecodePerplexity,
    "fidelity": Fidelity,
    "dialogsum": DialogSum,
    "cnn_dailymail": CnnDailyMail,
    "iwslt": Iwslt,
    "mt_bench": MtBench,
    "python": Python,
    "jsonl": Answers,
}

ANSWERING = tuple(name for name, kind in TASKS.items() if kind.generates and not kind.forces)
"""Names of the tasks that score nothing but answers."""
