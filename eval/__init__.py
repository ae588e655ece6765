"""PMPD's evaluation: quality and speed of a bundle under precision schedules, beside its floating-point model."""

from pmpd.eval.results import Metric, Results, Row, Sample
from pmpd.eval.runner import Settings, evaluate
from pmpd.eval.tasks import TASKS, Task

__all__ = [
    "TASKS",
    "Metric",
    "Results",
    "Row",
    "Sample",
    "Settings",
    "Task",
    "evaluate",
]
