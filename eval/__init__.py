"""PMPD's evaluation: quality and speed of a bundle under precision schedules, beside its floating-point model."""

from pmpd.eval.report.results import Metric, Results, Row, Sample
from pmpd.eval.runner import Settings, evaluate
from pmpd.eval.speed.results import SpeedResults, SpeedRow
from pmpd.eval.speed.speed import SpeedSettings, measure_speed
from pmpd.eval.tasks.base import TASKS, Task

__all__ = [
    "TASKS",
    "Metric",
    "Results",
    "Row",
    "Sample",
    "Settings",
    "SpeedResults",
    "SpeedRow",
    "SpeedSettings",
    "Task",
    "evaluate",
    "measure_speed",
]
