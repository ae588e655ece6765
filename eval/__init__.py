"""PMPD's evaluation: quality and speed of a bundle under precision schedules, beside its floating-point model."""

from pmpd.eval.comparison.compare import CompareSettings, compare
from pmpd.eval.comparison.results import CompareResults
from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.report.results import QualityResults, QualityRow
from pmpd.eval.runner import evaluate
from pmpd.eval.settings import Settings
from pmpd.eval.speed.results import SpeedResults, SpeedRow
from pmpd.eval.speed.speed import SpeedSettings, measure_speed
from pmpd.eval.tasks.base import Task
from pmpd.eval.tasks.registry import TASKS

__all__ = [
    "TASKS",
    "CompareResults",
    "CompareSettings",
    "Estimate",
    "Metric",
    "QualityResults",
    "QualityRow",
    "Sample",
    "Settings",
    "SpeedResults",
    "SpeedRow",
    "SpeedSettings",
    "Task",
    "compare",
    "evaluate",
    "measure_speed",
]
