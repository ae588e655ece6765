"""The tasks by name. One more is a file in this folder and a line here."""

from __future__ import annotations

from pmpd.eval.tasks.base import Task
from pmpd.eval.tasks.fidelity import Fidelity
from pmpd.eval.tasks.perplexity import DecodePerplexity
from pmpd.eval.tasks.rouge import CnnDailyMail, DialogSum, MtBench, Rouge

__all__ = ["TASKS"]

TASKS: dict[str, type[Task]] = {
    "perplexity": DecodePerplexity,
    "fidelity": Fidelity,
    "dialogsum": DialogSum,
    "cnn_dailymail": CnnDailyMail,
    "mt_bench": MtBench,
    "jsonl": Rouge,
}
