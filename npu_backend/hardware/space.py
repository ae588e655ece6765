"""Design spaces: numbers of a hardware description that vary, as a grid or a sample of it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.npu_backend.hardware.description import Range, number_ranges
from pmpd.runtime.errors import PmpdError, unknown_choice

__all__ = ["LARGEST", "Space", "parse_axis", "read_space"]

LARGEST = 200_000  # the most points that are simulated at once


@dataclass(frozen=True)
class Space:
    """Every combination of the values of its axes.

    Attributes:
        axes: values by ``section.field`` of a hardware description.
    """

    axes: Mapping[str, tuple[float, ...]]

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return prod(map(len, self.axes.values()))

    def points(self, sample: int | None = None, *, seed: int = 0) -> dict[str, npt.NDArray[np.float64]]:
        """Return values by axis, one entry per combination: all of them, or a random sample without repetition.

        Raises:
            PmpdError: there are too many, or the sample is empty.
        """
        if sample is not None and sample < 1:
            raise PmpdError(f"a sample has 1 or more points, got {sample}")
        number = self.size if sample is None else min(sample, self.size)
        if number > LARGEST:
            raise PmpdError(f"{number:,} points are more than {LARGEST:,}: take a sample, or vary less")
        places = np.arange(self.size) if number == self.size else _sample(self.size, number, seed)
        columns = np.unravel_index(places, [len(values) for values in self.axes.values()])
        return {
            name: np.array(values, dtype=float)[column]
            for (name, values), column in zip(self.axes.items(), columns, strict=True)
        }


def _sample(size: int, number: int, seed: int) -> npt.NDArray[np.int64]:
    if size > np.iinfo(np.int64).max:
        raise PmpdError(f"a space of {size:.1e} points is too large to draw from: vary less")
    return np.sort(np.random.default_rng(seed).choice(size, number, replace=False))


def parse_axis(text: str) -> tuple[str, tuple[float, ...]]:
    """Read an axis as users write it: ``memory.bandwidth_gb_s=16,32,64``, or ``=16:64:5`` for five values up to 64.

    The values of a range are spaced geometrically, and rounded where the number must be whole.

    Raises:
        PmpdError: not an axis, an unknown number, or a value out of its range.
    """
    name, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise PmpdError(f"{text!r} is not an axis: write it like memory.bandwidth_gb_s=16,32,64 or =16:64:5")
    return _axis(name.strip(), [item.strip() for item in values.split(",")])


def read_space(path: Path) -> Space:
    """Read a space from a TOML file: tables and fields as in a hardware description, each a list or ``"16:64:5"``.

    Raises:
        PmpdError: the file cannot be read, or as `parse_axis` does.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PmpdError(f"cannot read {path} ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PmpdError(f"{path} is not valid TOML ({error})") from None
    axes = {}
    for section, fields in document.items():
        if not isinstance(fields, dict):
            raise PmpdError(f"{path}: {section} must be a table of fields, as in a hardware description")
        for field, values in fields.items():
            try:
                name, numbers = _axis(f"{section}.{field}", values if isinstance(values, list) else [values])
            except PmpdError as error:
                raise PmpdError(f"{path}: {error}") from None
            axes[name] = numbers
    return Space(axes)


def _axis(name: str, items: Sequence[Any]) -> tuple[str, tuple[float, ...]]:
    ranges = number_ranges()
    if name not in ranges:
        raise PmpdError(unknown_choice("number to vary", name, ranges))
    limit = ranges[name]
    values = dict.fromkeys(value for item in items for value in _values(name, item, limit))
    if not values:
        raise PmpdError(f"{name} needs values to vary over")
    for value in values:
        if not limit.low <= value <= limit.high or (limit.whole and value % 1):
            raise PmpdError(
                f"{name} must be a {'whole ' if limit.whole else ''}number of {limit.unit} "
                f"from {limit.low:g} to {limit.high:g}, got {value:g}"
            )
    return name, tuple(values)


def _values(name: str, item: Any, limit: Range) -> Iterable[float]:
    """Read a value, or a range ``low:high:count``."""
    wrong = PmpdError(f"{name}: {item!r} is neither a number nor a range like 16:64:5")
    if isinstance(item, bool) or not isinstance(item, str | int | float):
        raise wrong
    try:
        numbers = [float(part) for part in str(item).split(":")]
    except ValueError:
        raise wrong from None
    if len(numbers) == 1:
        return numbers
    if len(numbers) != 3 or not 0 < numbers[0] < numbers[1] or numbers[2] % 1 or not 2 <= numbers[2] <= LARGEST:
        raise wrong
    steps = np.geomspace(numbers[0], numbers[1], int(numbers[2]))
    return [float(round(value)) if limit.whole else float(f"{value:.4g}") for value in steps.tolist()]
