"""Statistics of calibration text, for quantization. A new one is a file here and a name in `STATISTICS`."""

from pmpd.exporter.calibrate.base import Statistic
from pmpd.exporter.calibrate.fisher import Fisher

__all__ = ["STATISTICS", "Fisher", "Statistic"]

STATISTICS: dict[str, Statistic] = {statistic.name: statistic for statistic in (Fisher(),)}
