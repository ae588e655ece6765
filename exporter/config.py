"""What to export and how: what the user asked for, and what follows from it, in two checked, immutable values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmpd.exporter.quantize import METHODS
from pmpd.exporter.quantize.losses import MEASURES
from pmpd.exporter.source.models import published_name
from pmpd.runtime.errors import PmpdError, unknown_choice
from pmpd.runtime.format.bitplanes import MAX_PRECISION
from pmpd.runtime.format.manifest import ACCURACIES
from pmpd.runtime.format.precision import is_precision, parse_precision
from pmpd.runtime.schedule.registry import parse_schedule
from pmpd.tvm_kernels.targets import find_target, host_target

__all__ = [
    "BUILT_IN",
    "DEFAULT_EMBEDDING_PRECISION",
    "DEFAULT_HEAD_PRECISION",
    "DEFAULT_PRECISIONS",
    "NO_TEXT",
    "OWN_TEXT",
    "PLAIN_METHOD",
    "ExportConfig",
    "ResolvedConfig",
    "calibration_text",
    "parse_bits",
]

DEFAULT_PRECISIONS = (5, 4, 3)
DEFAULT_HEAD_PRECISION = 6
DEFAULT_TUNED = 4
DEFAULT_EMBEDDING_PRECISION = 6
PLAIN_METHOD = "anyprecision"
"""What quantizes without statistics."""
BUILT_IN, OWN_TEXT, NO_TEXT = "builtin", "own", "none"
"""In the place of a calibration file: the text that comes with pmpd, what the model writes itself, or nothing."""


def parse_bits(argument: str) -> tuple[float, ...]:
    """Read precisions, such as ``4,3,2`` or ``4,3.25,3``.

    Raises:
        PmpdError: that is not what it is.
    """
    try:
        return tuple(parse_precision(bits.strip()) for bits in argument.split(","))
    except PmpdError as error:
        raise PmpdError(f"{argument!r} is not a list of bits like 4,3,2 or 4,3.25,3: {error}") from None


def calibration_text(argument: str | None) -> Path | str | None:
    """Return what an option's argument stands for: a file, or what `ExportConfig.calibration` is instead of one."""
    return argument if argument in (None, BUILT_IN, OWN_TEXT, NO_TEXT) else Path(argument)


def _mixes(precisions: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(bits for bits in precisions if not isinstance(bits, int))


def _planes(precisions: tuple[float, ...], parent: int) -> tuple[int, ...]:
    if _mixes(precisions):
        return tuple(range(parent, math.floor(precisions[-1]) - 1, -1))
    return tuple(map(int, precisions))


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """Every choice of an export that does not depend on the model's own configuration.

    Attributes: as in `ExportConfig`, with every default filled in, and

        optional: precisions that nobody asked for: the bundle goes without those that are of no use.
        targets: machines to build kernels for.
        kernels_required: whether a target that cannot be built for is an error; otherwise the bundle goes without.
        context_length: longest text in tokens; None: what the checkpoint allows.
    """

    model: str
    output: Path
    revision: str | None
    precisions: tuple[float, ...]
    optional: tuple[float, ...]
    parent: int
    method: str
    seed_precision: int
    prefill: float
    head_precision: int
    embedding_precision: int | None
    coarse_precision: int | None
    groups: int
    schedule: str
    context_length: int | None
    calibration: Path | str | None
    calibration_samples: int
    calibration_length: int
    tune: tuple[int, ...]
    targets: tuple[str, ...]
    kernels_required: bool
    accuracy: str
    overwrite: bool
    verify: bool

    @property
    def mixes(self) -> tuple[float, ...]:
        """The precisions that read other numbers of planes in other layers, high to low."""
        return _mixes(self.precisions)

    @property
    def planes(self) -> tuple[int, ...]:
        """The numbers of planes that layers have codebooks for, high to low.

        Those of the precisions; with mixes all from the lowest precision to the parent, for layers to choose from.
        """
        return _planes(self.precisions, self.parent)

    def to_json(self) -> dict[str, Any]:
        """Return what decides the bundle's contents, as JSON-ready data; of local paths only the last part."""
        document = asdict(self)
        for name in ("output", "overwrite", "kernels_required", "optional", "verify"):
            del document[name]
        document["model"] = published_name(self.model)
        document["precisions"] = list(self.precisions)
        document["targets"], document["tune"] = list(self.targets), list(self.tune)
        document["calibration"] = getattr(self.calibration, "name", self.calibration)
        return document


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The configuration of an export.

    Attributes:
        model: hub id, alias, folder or GGUF file.
        output: the bundle's folder.
        revision: branch, tag or commit on the hub.
        precisions: bits to decode at; one graph each. One with decimals is a mix, which needs calibration. Default 5, 4
            and 3, without those of no use for the model (`ResolvedConfig.optional`).
        parent: bits of the nested codes; default the highest precision, rounded up.
        method: how weights are quantized, one of `METHODS`; default guided, or `PLAIN_METHOD` with `NO_TEXT` or several
            groups.
        seed_precision: bits of the first clustering; each further bit splits the clusters in two.
        prefill: bits to prefill at; default the highest precision.
        head_precision: bits of the output layer, the same in every graph.
        embedding_precision: bits of the embedding, the same in every graph; default 6. One that is tied to the output
            layer has that layer's.
        coarse_precision: bits of the output layer that a decode step reads of every row; the others are read of rows
            that can still win. 0 reads all of every row; default 4 where that is less to read (`outline.coarse_bits`).
        groups: codebooks per row.
        schedule: the bundle's default schedule; default uniform at the highest precision.
        context_length: longest text in tokens; default what the checkpoint allows.
        calibration: text whose statistics the method uses, `BUILT_IN`, `OWN_TEXT` or `NO_TEXT`; default `BUILT_IN` if
            the method cannot do without. `Export.prepare` says for which models it is `NO_TEXT`.
        calibration_samples: sequences of that text.
        calibration_length: tokens of each sequence.
        tune: precisions whose codebooks are tuned end to end, on the text of the calibration (`pmpd.exporter.tune`);
            default those of up to `DEFAULT_TUNED` bits of method guided. `Export.prepare` says for which models none.
        targets: machines to build kernels for; default this one, if TVM and a compiler are installed.
        accuracy: how kernels compute, ``exact`` or ``int8``; default int8, or exact with more than one group per row,
            for which there is only a slow kernel, in float32.
        overwrite: replace an existing bundle.
        verify: check the bundle before it is published; the manifest records whether that was done.

    Raises:
        PmpdError: a value out of range, or values that contradict each other.
    """

    model: str
    output: Path
    revision: str | None = None
    precisions: tuple[float, ...] | None = None
    parent: int | None = None
    method: str | None = None
    seed_precision: int = 2
    prefill: float | None = None
    head_precision: int = DEFAULT_HEAD_PRECISION
    embedding_precision: int | None = None
    coarse_precision: int | None = None
    groups: int = 1
    schedule: str | None = None
    context_length: int | None = None
    calibration: Path | str | None = None
    calibration_samples: int = 64
    calibration_length: int = 256
    tune: tuple[int, ...] | None = None
    targets: tuple[str, ...] | None = None
    accuracy: str | None = None
    overwrite: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        for name, bits in (
            *(("precision", bits) for bits in self._bits),
            ("parent precision", 1 if self.parent is None else self.parent),
            ("seed precision", self.seed_precision),
            ("head precision", self.head_precision),
            ("embedding precision", 1 if self.embedding_precision is None else self.embedding_precision),
        ):
            if not 1 <= bits <= MAX_PRECISION:
                raise PmpdError(f"{name} must be 1 to {MAX_PRECISION} bits, got {bits}")
        if odd := [bits for bits in self._bits if not is_precision(bits)]:
            raise PmpdError(f"a precision is a whole number or has one or two decimals, got {odd[0]!r}")
        if not self._bits or list(self._bits) != sorted(set(self._bits), reverse=True):
            raise PmpdError(f"precisions must fall without repeats (4,3,2), got {','.join(map(str, self._bits))}")
        if self.coarse_precision and not 0 < self.coarse_precision < self.head_precision:
            raise PmpdError(
                f"coarse precision must be 0 (off) or 1 to {self.head_precision - 1} bits, fewer than the output "
                f"layer has, got {self.coarse_precision}"
            )
        if self.coarse_precision and self.groups > 1:
            raise PmpdError(f"coarse precision {self.coarse_precision}: it needs one codebook per row (--groups 1)")
        if self.parent is not None and self.parent < self._bits[0]:
            raise PmpdError(f"parent precision {self.parent} is lower than the highest precision {self._bits[0]}")
        if self.prefill is not None and self.prefill not in self._bits:
            raise PmpdError(f"prefill precision {self.prefill} is not among the precisions {list(self._bits)}")
        for name, number in (
            ("groups", self.groups),
            ("calibration samples", self.calibration_samples),
            ("calibration length", self.calibration_length),
        ):
            if number < 1:
                raise PmpdError(f"{name} must be 1 or more, got {number}")
        if self.schedule is not None:
            parse_schedule(self.schedule, self._bits)
        for target in self.targets or ():
            find_target(target)
        if self.accuracy is not None and self.accuracy not in ACCURACIES:
            raise PmpdError(unknown_choice("accuracy", self.accuracy, ACCURACIES))
        if self.accuracy == "int8" and self.groups > 1:
            raise PmpdError(f"groups {self.groups}: int8 kernels take one codebook per row: use --accuracy exact")
        self._check_calibration()
        self._check_mixes()
        self._check_tune()

    @property
    def _bits(self) -> tuple[float, ...]:
        return DEFAULT_PRECISIONS if self.precisions is None else self.precisions

    def _check_calibration(self) -> None:
        texts = (BUILT_IN, OWN_TEXT, NO_TEXT)
        if isinstance(self.calibration, str) and self.calibration not in texts:
            raise PmpdError(unknown_choice("calibration text", self.calibration, texts) + "; a file is a Path")
        if isinstance(self.calibration, Path) and not self.calibration.is_file():
            raise PmpdError(
                f"calibration text {self.calibration} is not a file: give another with --calibration, or {BUILT_IN}, "
                "which is the text that comes with pmpd"
            )
        if self.method is None:
            return
        if self.method not in METHODS:
            raise PmpdError(unknown_choice("method", self.method, METHODS))
        method = METHODS[self.method]
        if self.calibration == NO_TEXT and method.requires:
            raise PmpdError(f"method {self.method} needs a calibration text: leave out --calibration {NO_TEXT}")
        if self.calibration not in (None, NO_TEXT) and not method.needs:
            raise PmpdError(f"method {self.method} uses no calibration text: leave out --calibration")

    def _check_mixes(self) -> None:
        mixes = ", ".join(map(str, _mixes(self._bits)))
        method, calibration = self._quantization()
        if mixes and calibration == NO_TEXT:
            raise PmpdError(
                f"precision {mixes}: which layers read more planes follows from a calibration text: give one with "
                f"--calibration {BUILT_IN} or a file, or take whole precisions"
            )
        if mixes and not METHODS[method].needs & MEASURES:
            methods = [name for name, known in METHODS.items() if known.needs & MEASURES]
            raise PmpdError(
                f"precision {mixes}: method {method} cannot tell which layers should read more planes: take "
                f"--method {' or '.join(methods)}, or whole precisions"
            )

    def _check_tune(self) -> None:
        if not self.tune:
            return
        tuned = ",".join(map(str, self.tune))
        if unknown := set(self.tune) - set(_planes(self._bits, self._parent)):
            raise PmpdError(f"tune {tuned}: no layer has {min(unknown)} bits: choose among {list(self._bits)}")
        method, calibration = self._quantization()
        if calibration == NO_TEXT:
            remedy = f"--calibration {BUILT_IN} or a file" if METHODS[method].needs else "--method guided"
            raise PmpdError(f"tune {tuned}: codebooks are tuned on a calibration text: take {remedy}")

    @property
    def _parent(self) -> int:
        return math.ceil(self._bits[0]) if self.parent is None else self.parent

    def _quantization(self) -> tuple[str, Path | str]:
        """Return the method and the calibration text, with their defaults."""
        method, calibration = self.method, self.calibration
        if method is None:
            method = PLAIN_METHOD if calibration == NO_TEXT or self.groups > 1 else "guided"
        if calibration is None:
            calibration = BUILT_IN if METHODS[method].requires else NO_TEXT
        return method, calibration

    def resolve(self) -> ResolvedConfig:
        """Return the configuration with every default filled in."""
        high, host = self._bits[0], host_target()
        targets, tune, (method, calibration) = self.targets, self.tune, self._quantization()
        schedule = parse_schedule(self.schedule or f"uniform:{high}", self._bits)
        named = {high, self.prefill, schedule.prefill, *schedule.precisions}
        if targets is None:
            targets = () if host is None else (host,)
        if tune is None:
            guided = method == "guided" and calibration != NO_TEXT
            tune = tuple(bits for bits in _planes(self._bits, self._parent) if guided and bits <= DEFAULT_TUNED)
        return ResolvedConfig(
            model=self.model,
            output=self.output,
            revision=self.revision,
            precisions=self._bits,
            optional=tuple(bits for bits in self._bits if self.precisions is None and bits not in named),
            parent=self._parent,
            method=method,
            seed_precision=self.seed_precision,
            prefill=high if self.prefill is None else self.prefill,
            head_precision=self.head_precision,
            embedding_precision=self.embedding_precision,
            coarse_precision=self.coarse_precision,
            groups=self.groups,
            schedule=str(schedule),
            context_length=self.context_length,
            calibration=None if calibration == NO_TEXT else calibration,
            calibration_samples=self.calibration_samples,
            calibration_length=self.calibration_length,
            tune=tune,
            targets=targets,
            kernels_required=self.targets is not None,
            accuracy=self.accuracy or ("int8" if self.groups == 1 else "exact"),
            overwrite=self.overwrite,
            verify=self.verify,
        )
