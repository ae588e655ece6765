"""What to export and how: every choice of an export in one checked, immutable value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.bitplanes import MAX_PRECISION
from pmpd.runtime.format.manifest import ACCURACIES
from pmpd.runtime.schedule.registry import parse_schedule
from pmpd.tvm_kernels.targets import find_target

__all__ = ["DEFAULT_ACCURACY", "DEFAULT_HEAD_PRECISION", "ExportConfig"]

DEFAULT_ACCURACY = "int8"
DEFAULT_HEAD_PRECISION = 6


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The configuration of an export.

    Attributes:
        model: hub id, alias or folder.
        output: the bundle's folder.
        revision: branch, tag or commit on the hub.
        precisions: bits to decode at; one graph each.
        parent: bits of the nested codes; default the highest precision.
        seed_precision: bits that are clustered from scratch; each further one splits clusters in two.
        prefill: bits to prefill at; default the highest precision.
        head_precision: bits of the output layer, the same in every graph.
        groups: codebooks per row.
        schedule: the bundle's default schedule; default uniform at the highest precision.
        context_length: longest text in tokens; default what the checkpoint allows.
        calibration: text whose gradients weight the clustering; default none, all weights count alike.
        calibration_samples: sequences of that text.
        calibration_length: tokens of each.
        targets: machines to build kernels for; default this one, if TVM and a compiler are there.
        accuracy: how kernels compute, ``exact`` or ``int8``.
        overwrite: replace an existing bundle.

    Raises:
        PmpdError: a value out of range, or values that contradict each other.
    """

    model: str
    output: Path
    revision: str | None = None
    precisions: tuple[int, ...] = (4, 3, 2)
    parent: int | None = None
    seed_precision: int = 2
    prefill: int | None = None
    head_precision: int = DEFAULT_HEAD_PRECISION
    groups: int = 1
    schedule: str | None = None
    context_length: int | None = None
    calibration: Path | None = None
    calibration_samples: int = 64
    calibration_length: int = 256
    targets: tuple[str, ...] | None = None
    accuracy: str = DEFAULT_ACCURACY
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, bits in (
            *(("precision", bits) for bits in self.precisions),
            ("parent precision", self.parent or 1),
            ("seed precision", self.seed_precision),
            ("head precision", self.head_precision),
        ):
            if not 1 <= bits <= MAX_PRECISION:
                raise PmpdError(f"{name} must be 1 to {MAX_PRECISION} bits, got {bits}")
        if not self.precisions or list(self.precisions) != sorted(set(self.precisions), reverse=True):
            raise PmpdError(f"precisions must fall without repeats (4,3,2), got {','.join(map(str, self.precisions))}")
        if self.parent is not None and self.parent < self.precisions[0]:
            raise PmpdError(f"parent precision {self.parent} is lower than the highest precision {self.precisions[0]}")
        if self.prefill is not None and self.prefill not in self.precisions:
            raise PmpdError(f"prefill precision {self.prefill} is not among the precisions {list(self.precisions)}")
        for name, number in (
            ("groups", self.groups),
            ("calibration samples", self.calibration_samples),
            ("calibration length", self.calibration_length),
        ):
            if number < 1:
                raise PmpdError(f"{name} must be 1 or more, got {number}")
        if self.schedule is not None:
            parse_schedule(self.schedule, self.precisions)
        for target in self.targets or ():
            find_target(target)
        if self.accuracy not in ACCURACIES:
            raise PmpdError(unknown_choice("accuracy", self.accuracy, ACCURACIES))
        if self.calibration is not None and not self.calibration.is_file():
            raise PmpdError(f"calibration text {self.calibration} is not a file")

    def resolved(self) -> Self:
        """Return the configuration with every default filled in that does not depend on the model."""
        high = self.precisions[0]
        return replace(
            self,
            parent=self.parent or high,
            prefill=self.prefill or high,
            schedule=str(parse_schedule(self.schedule or f"uniform:{high}", self.precisions)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what decides the bundle's contents, as JSON-ready data; of paths only the last part."""
        document = asdict(self)
        del document["output"], document["overwrite"]
        document["precisions"] = list(self.precisions)
        document["targets"] = self.targets and list(self.targets)
        document["calibration"] = self.calibration and self.calibration.name
        return document
