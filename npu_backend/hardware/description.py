"""Accelerators as data: a TOML file, checked when it is read, with units in the names and a source for every number.

The parts are those of FlightLLM (Zeng et al., FPGA 2024): a matrix unit for matrix-matrix and matrix-vector products, a
special function unit, on-chip buffers, off-chip memory. Decompression turns bit-planes into codebook entries on their
way from the weight buffer to the matrix unit.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = [
    "Area",
    "Buffers",
    "Controller",
    "Decompression",
    "Energy",
    "Formats",
    "Hardware",
    "MatrixUnit",
    "Memory",
    "Number",
    "Range",
    "SpecialUnit",
    "number_ranges",
    "read_hardware",
    "shipped_hardware",
]

# A number, or an array of them: an exploration costs all its points at once.
Number = float | npt.NDArray[np.float64]

_SHIPPED = Path(__file__).parent / "hw"


@dataclass(frozen=True)
class Range:
    """The unit of a number, for messages, and the range outside of which no such hardware exists."""

    unit: str
    low: float
    high: float
    whole: bool = False


def _ranges(section: type[_Section]) -> dict[str, Range]:
    """Return the range of every number of a section."""
    hints = get_type_hints(section, include_extras=True)
    return {declared.name: hints[declared.name].__metadata__[0] for declared in fields(section)}  # type: ignore[arg-type]


class _Section:
    def __post_init__(self) -> None:
        for name, limit in _ranges(type(self)).items():
            value = getattr(self, name)
            values = np.ravel(value)
            numbers = values.dtype.kind in "if"
            wrong = values[~((values >= limit.low) & (values <= limit.high))].tolist() if numbers else [value]
            if wrong:
                raise PmpdError(
                    f"{name} must be a number of {limit.unit} from {limit.low:g} to {limit.high:g}, got {wrong[0]!r}"
                )
            if limit.whole and (parts := values[values % 1 != 0].tolist()):
                raise PmpdError(f"{name} must be a whole number of {limit.unit}, got {parts[0]!r}")


@dataclass(frozen=True, kw_only=True)
class MatrixUnit(_Section):
    """Multiply-accumulate units, and how the dimensions of a product are laid over them.

    A matrix-matrix product works on `rows` rows of activations, `mm_outputs` outputs and `inputs` inputs in a cycle; a
    matrix-vector product on `mv_outputs` outputs and `inputs` inputs of one row, which may leave units idle.
    """

    rows: Annotated[Number, Range("rows of activations", 1, 1 << 16, whole=True)]
    mm_outputs: Annotated[Number, Range("outputs", 1, 1 << 16, whole=True)]
    mv_outputs: Annotated[Number, Range("outputs", 1, 1 << 16, whole=True)]
    inputs: Annotated[Number, Range("inputs", 1, 1 << 16, whole=True)]
    frequency_ghz: Annotated[Number, Range("GHz", 0.01, 10)]
    utilization: Annotated[Number, Range("the cycles in which products advance (a share)", 0.01, 1)]
    fp16_cycles: Annotated[Number, Range("cycles that a product with float16 weights takes", 1, 64)]

    def __post_init__(self) -> None:
        super().__post_init__()
        units, needed = np.broadcast_arrays(self.rows * self.mm_outputs, self.mv_outputs)
        if np.any(needed > units):
            raise PmpdError(
                f"mv_outputs must be at most rows * mm_outputs = {units[needed > units][0]:g}, the units there are, "
                f"got {needed[needed > units][0]:g}"
            )

    @property
    def macs(self) -> Number:
        """Multiply-accumulate units."""
        return self.rows * self.mm_outputs * self.inputs


@dataclass(frozen=True, kw_only=True)
class SpecialUnit(_Section):
    """Throughput of everything but matrix products, in elements per cycle of the matrix unit's clock."""

    softmax_per_cycle: Annotated[Number, Range("elements a cycle", 0.01, 1e6)]
    norm_per_cycle: Annotated[Number, Range("elements a cycle", 0.01, 1e6)]
    activation_per_cycle: Annotated[Number, Range("elements a cycle", 0.01, 1e6)]
    rotary_per_cycle: Annotated[Number, Range("elements a cycle", 0.01, 1e6)]
    elementwise_per_cycle: Annotated[Number, Range("elements a cycle", 0.01, 1e6)]


@dataclass(frozen=True, kw_only=True)
class Memory(_Section):
    """Off-chip memory: `efficiency` of its bandwidth is reached by long transfers, which are whole bursts."""

    bandwidth_gb_s: Annotated[Number, Range("GB/s (10^9 bytes)", 0.01, 1e5)]
    efficiency: Annotated[Number, Range("the bandwidth that long transfers reach (a share)", 0.01, 1)]
    burst_bytes: Annotated[Number, Range("bytes", 1, 1 << 20, whole=True)]
    latency_ns: Annotated[Number, Range("ns", 0, 1e5)]


@dataclass(frozen=True, kw_only=True)
class Buffers(_Section):
    """On-chip memory: a double buffer of `stream_kib` for what streams in, and `activation_kib` for activations."""

    stream_kib: Annotated[Number, Range("KiB", 1, 1 << 24)]
    activation_kib: Annotated[Number, Range("KiB", 1, 1 << 24)]


@dataclass(frozen=True, kw_only=True)
class Decompression(_Section):
    """Turns bit-planes into codebook entries, `weights_per_cycle` weights per cycle."""

    weights_per_cycle: Annotated[Number, Range("weights a cycle", 0.01, 1 << 24)]


@dataclass(frozen=True, kw_only=True)
class Formats(_Section):
    """Bits of activations on chip and of keys and values in the cache."""

    activation_bits: Annotated[Number, Range("bits", 4, 32, whole=True)]
    kv_bits: Annotated[Number, Range("bits", 2, 32, whole=True)]


@dataclass(frozen=True, kw_only=True)
class Controller(_Section):
    """Instructions: their size, the cycles that a synchronisation costs, and for how many lengths a program is reused.

    FlightLLM's length-adaptive compilation: context lengths up to the same multiple of `length_granularity` run one
    program.
    """

    instruction_bytes: Annotated[Number, Range("bytes", 1, 1024, whole=True)]
    sync_cycles: Annotated[Number, Range("cycles", 0, 1e6)]
    length_granularity: Annotated[Number, Range("tokens", 1, 1 << 20, whole=True)]


@dataclass(frozen=True, kw_only=True)
class Energy(_Section):
    """Energy per byte and per operation, and static power."""

    memory_pj_per_byte: Annotated[Number, Range("pJ per byte", 0, 1e5)]
    buffer_pj_per_byte: Annotated[Number, Range("pJ per byte", 0, 1e5)]
    mac_pj: Annotated[Number, Range("pJ per multiply-accumulate of 8 bits", 0, 1e4)]
    fp16_mac_pj: Annotated[Number, Range("pJ per multiply-accumulate of float16", 0, 1e4)]
    special_pj_per_element: Annotated[Number, Range("pJ per element", 0, 1e5)]
    static_w: Annotated[Number, Range("W", 0, 1e4)]


@dataclass(frozen=True, kw_only=True)
class Area(_Section):
    """A proxy for silicon area: multipliers and buffers; no wires, no pads, no controller."""

    mac_um2: Annotated[Number, Range("um^2 per multiply-accumulate unit", 0.1, 1e6)]
    buffer_um2_per_kib: Annotated[Number, Range("um^2 per KiB", 1, 1e7)]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """An accelerator. Every number may be an array: then every result computed from it is an array too.

    Attributes:
        name: what ``--hardware`` calls it.
        title: a one-line description.
        sources: where each number comes from, by ``section.field``.
    """

    name: str
    title: str
    matrix_unit: MatrixUnit
    special_unit: SpecialUnit
    memory: Memory
    buffers: Buffers
    decompression: Decompression
    formats: Formats
    controller: Controller
    energy: Energy
    area: Area
    sources: dict[str, str]

    @property
    def hertz(self) -> Number:
        """Cycles a second."""
        return self.matrix_unit.frequency_ghz * 1e9

    @property
    def bytes_per_second(self) -> Number:
        """Bytes a second that long transfers reach."""
        return self.memory.bandwidth_gb_s * 1e9 * self.memory.efficiency

    @property
    def area_mm2(self) -> Number:
        """The area proxy in mm²."""
        buffers = self.buffers.stream_kib + self.buffers.activation_kib
        return (self.matrix_unit.macs * self.area.mac_um2 + buffers * self.area.buffer_um2_per_kib) / 1e6

    def varied(self, **numbers: Number) -> Self:
        """Return the accelerator with other numbers, by ``section__field``."""
        sections: dict[str, dict[str, Number]] = {}
        for name, number in numbers.items():
            section, _, entry = name.partition("__")
            sections.setdefault(section, {})[entry] = number
        return replace(
            self, **{section: replace(getattr(self, section), **entries) for section, entries in sections.items()}
        )


_SECTIONS: dict[str, type[_Section]] = {
    "matrix_unit": MatrixUnit,
    "special_unit": SpecialUnit,
    "memory": Memory,
    "buffers": Buffers,
    "decompression": Decompression,
    "formats": Formats,
    "controller": Controller,
    "energy": Energy,
    "area": Area,
}


def number_ranges() -> dict[str, Range]:
    """Return the range of every number of a description, by ``section.field``."""
    return {f"{name}.{field}": limit for name, kind in _SECTIONS.items() for field, limit in _ranges(kind).items()}


def shipped_hardware() -> dict[str, Path]:
    """Return the descriptions that come with the package, by name."""
    return {file.stem: file for file in sorted(_SHIPPED.glob("*.toml"))}


def read_hardware(name: str | Path) -> Hardware:
    """Read a hardware description: one that is shipped, by its name, or a TOML file.

    Raises:
        PmpdError: it does not exist, is not TOML, lacks a field or a source, or has an unknown field or a bad value.
    """
    shipped = shipped_hardware()
    path = shipped.get(str(name), Path(name))
    if not path.is_file():
        raise PmpdError(f"{unknown_choice('hardware', name, shipped)}, or give a TOML file")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PmpdError(f"cannot read {path} ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PmpdError(f"{path} is not valid TOML ({error})") from None
    sources = document.pop("sources", None)
    title = document.pop("title", None)
    if not isinstance(title, str):
        raise PmpdError(f"{path} needs a title: a line of text")
    if not isinstance(sources, dict):
        raise PmpdError(f"{path} needs a table [sources]: where each number comes from, by section and field")
    parts = {}
    for section, kind in _SECTIONS.items():
        if section not in document:
            raise PmpdError(f"{path} lacks the table [{section}]: {(kind.__doc__ or '').splitlines()[0]}")
        parts[section] = _read_section(path, section, kind, document.pop(section), sources)
    if document:
        raise PmpdError(f"{path}: {unknown_choice('table', next(iter(document)), _SECTIONS)}")
    if unknown := sorted(sources.keys() - _SECTIONS):
        raise PmpdError(f"{path}: [sources] has an {unknown_choice('table', unknown[0], _SECTIONS)}")
    named = {f"{section}.{name}": text for section, texts in sources.items() for name, text in texts.items()}
    return Hardware(name=path.stem, title=title, sources=named, **parts)  # type: ignore[arg-type]


def _read_section(path: Path, section: str, kind: type[_Section], values: Any, sources: dict[str, Any]) -> _Section:
    known = {name: limit.unit for name, limit in _ranges(kind).items()}
    if not isinstance(values, dict):
        raise PmpdError(f"{path}: [{section}] must be a table, got {values!r}")
    for name in values:
        if name not in known:
            raise PmpdError(f"{path}: [{section}] has an {unknown_choice('field', name, known)}")
        if isinstance(values[name], list):
            raise PmpdError(f"{path}: [{section}] {name} must be one number of {known[name]}, got {values[name]}")
    texts = sources.get(section)
    for name, unit in known.items():
        if name not in values:
            raise PmpdError(f"{path}: [{section}] lacks {name}, {unit}")
        if not isinstance(texts, dict) or not isinstance(texts.get(name), str) or not texts[name].strip():
            raise PmpdError(f"{path}: [sources.{section}] lacks {name}: say where {values[name]!r} comes from")
    if unknown := sorted(texts.keys() - known):  # type: ignore[union-attr]
        raise PmpdError(f"{path}: [sources.{section}] has an {unknown_choice('field', unknown[0], known)}")
    try:
        return kind(**values)
    except PmpdError as error:
        raise PmpdError(f"{path}: [{section}] {error}") from None
