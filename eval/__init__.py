"""PMPD's evaluation: quality and speed of a bundle under precision schedules, beside its floating-point model."""

from pmpd.eval.metrics.base import Metric, Sample
from pmpd.eval.metrics.statistics import Estimate
from pmpd.eval.peers.measure import PeerSettings, measure_peers
from pmpd.eval.peers.results import PeerResults
from pmpd.eval.report.results import QualityResults, QualityRow
from pmpd.eval.runner import evaluate
from pmpd.eval.settings import Settings
from pmpd.eval.speed.results import SpeedResults, SpeedRow
from pmpd.eval.speed.speed import SpeedSettings, measure_speed
from pmpd.eval.tasks.base import Task
from pmpd.eval.tasks.registry import TASKS

__all__ = [
    "TASKS",
    "Estimate",
    "Metric",
    "PeerResults",
    "PeerSettings",
    "QualityResults",
    "QualityRow",
    "Sample",
    "Settings",
    "SpeedResults",
    "SpeedRow",
    "SpeedSettings",
    "Task",
    "evaluate",
    "measure_peers",
    "measure_speed",
]
