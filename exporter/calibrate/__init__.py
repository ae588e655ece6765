"""Statistics of calibration text, for quantization. A new one is a file here and a name in `STATISTICS`."""

from pmpd.exporter.calibrate.base import Statistic
from pmpd.exporter.calibrate.fisher import Fisher
from pmpd.exporter.calibrate.guided import Guided
from pmpd.exporter.calibrate.moments import Moments

__all__ = ["STATISTICS", "Fisher", "Guided", "Moments", "Statistic"]

STATISTICS: dict[str, Statistic] = {statistic.name: statistic for statistic in (Fisher(), Guided(), Moments())}
