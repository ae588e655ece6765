"""Codebooks learned end to end, after all layers are quantized: codes stay, and the model's own output decides."""

from pmpd.exporter.tune.student import Codebooks, Coded, Student
from pmpd.exporter.tune.tune import NEAR, Tuned, Tuner, rate

__all__ = ["NEAR", "Codebooks", "Coded", "Student", "Tuned", "Tuner", "rate"]
