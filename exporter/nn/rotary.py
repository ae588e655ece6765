"""Rotary position embedding: frequencies with their scalings, and how heads are laid out for the fused attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn.linear import Index

__all__ = [
    "HeadLayout",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "NtkScaling",
    "PositionScale",
    "RopeScaling",
    "Rotary",
    "RotaryTables",
    "YarnScaling",
    "plain_frequencies",
]

Doubles = npt.NDArray[np.float64]


def plain_frequencies(dim: int, theta: float) -> Doubles:
    """Return the angle per position of each pair of `dim` rotated elements, unscaled: ``[dim / 2]``."""
    frequencies: Doubles = theta ** (-np.arange(0, dim, 2) / dim)
    return frequencies


class RopeScaling(Protocol):
    """How a rotary embedding was stretched to longer texts than it was first trained on."""

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        ...

    def frequencies(self, dim: int, theta: float) -> Doubles:
        """Return the angle per position of each pair of `dim` rotated elements: ``[dim / 2]``."""
        ...


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (LongChat)."""

    factor: float
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float) -> Doubles:
        """Divide all frequencies."""
        return plain_frequencies(dim, theta) / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float) -> Doubles:
        """Divide frequencies by how many turns they make within the original context."""
        frequencies = plain_frequencies(dim, theta)
        turns = self.original_context * frequencies / (2 * math.pi)
        unscaled = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clip(0, 1)
        return (unscaled + (1 - unscaled) / self.factor) * frequencies


@dataclass(frozen=True)
class YarnScaling:
    """Fast pairs are kept, slow ones divided by `factor`, those between blended by number (YaRN, Peng et al., 2023).

    The blend goes from the pair that makes `beta_fast` turns within the original context to the one that makes
    `beta_slow`, to whole pairs outwards if `truncate`.
    """

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, dim: int, theta: float) -> Doubles:
        """Divide frequencies by their pair's number."""

        def pair(turns: float) -> float:
            return dim * math.log(self.original_context / (2 * math.pi * turns)) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        if first == last:
            last += 0.001
        scaled = ((np.arange(dim // 2) - first) / (last - first)).clip(0, 1)  # [dim / 2]
        return (1 - scaled + scaled / self.factor) * plain_frequencies(dim, theta)


@dataclass(frozen=True)
class NtkScaling:
    """The base is stretched so that the slowest pair is `alpha` times slower (NTK-aware scaling; Hunyuan)."""

    alpha: float
    attention_factor: float = 1.0

    def frequencies(self, dim: int, theta: float) -> Doubles:
        """Return the frequencies of another base."""
        return plain_frequencies(dim, theta * self.alpha ** (dim / (dim - 2)))


@dataclass(frozen=True)
class LongRopeScaling:
    """Each pair's frequency is divided by a factor of its own, found by search (LongRoPE, Ding et al., 2024)."""

    factors: tuple[float, ...]
    attention_factor: float

    def frequencies(self, dim: int, theta: float) -> Doubles:
        """Divide frequencies by their pair's factor."""
        frequencies: Doubles = plain_frequencies(dim, theta) / np.array(self.factors)
        return frequencies


@dataclass(frozen=True)
class PositionScale:
    """Queries at later positions are larger: ``1 + beta * log(1 + floor(position / original_context))`` (Llama 4)."""

    beta: float
    original_context: int

    def __call__(self, positions: npt.NDArray[np.integer]) -> Doubles:
        """Return the factor of each position."""
        factors: Doubles = 1 + self.beta * np.log(1 + np.floor(positions / self.original_context))
        return factors


@dataclass(frozen=True)
class Rotary:
    """Rotation of the first `dim` elements of each head, in halves (GPT-NeoX style).

    With a `position_scale`, which takes a rotation of whole heads, rotated heads also change in size.
    """

    dim: int
    theta: float
    scaling: RopeScaling | None = None
    position_scale: PositionScale | None = None

    def frequencies(self) -> Doubles:
        """Return the angle per position of each pair: ``[dim / 2]``."""
        if self.scaling is None:
            return plain_frequencies(self.dim, self.theta)
        return self.scaling.frequencies(self.dim, self.theta)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor


@dataclass(frozen=True)
class HeadLayout:
    """How a head of `size` elements stands in the `slots` that the fused attention works on.

    GroupQueryAttention wants heads of a multiple of 16 and rotations of a multiple of 8 pairs, which StableLM's 20
    rotated elements of 80 are not. Attention does not care about the order inside a head, so elements are moved: the
    pairs come first, each half padded to a multiple of 8 with elements that are not rotated (cosine 1, sine 0), then
    the others. A head without rotation has 8 pairs that turn by nothing, because the operator takes no fewer.
    """

    size: int
    rotary: Rotary | None

    @property
    def pairs(self) -> int:
        """Rotated pairs of slots."""
        return max(-(-self._dim // 16), 1) * 8

    @property
    def _dim(self) -> int:
        return 0 if self.rotary is None else self.rotary.dim

    @property
    def slots(self) -> int:
        """Slots of a head."""
        return max(-(-self.size // 16) * 16, 2 * self.pairs)

    def rotated(self) -> tuple[int, ...]:
        """Return which element of a query or key head stands in each slot, -1 for zeros."""
        half = self._dim // 2
        spare = list(range(2 * half, self.size)) + [-1] * (self.slots - self.size)
        fill = self.pairs - half
        first, second = list(range(half)), list(range(half, 2 * half))
        return tuple(first + spare[:fill] + second + spare[fill : 2 * fill] + spare[2 * fill :])

    def plain(self) -> tuple[int, ...]:
        """Return which element of a value head stands in each slot, -1 for zeros."""
        return tuple(range(self.size)) + (-1,) * (self.slots - self.size)

    def heads(self, slots: tuple[int, ...], count: int) -> Index:
        """Repeat a head's layout for `count` heads side by side; None if that changes nothing."""
        if slots == tuple(range(self.size)):
            return None
        return tuple(-1 if slot < 0 else head * self.size + slot for head in range(count) for slot in slots)


class RotaryTables(nn.Module):
    """Cosines and sines of every position for heads of one layout: float32 ``[positions, pairs]`` each.

    A network has one of these per layout that its layers ask for (`DecoderLayer.tables`).
    """

    def __init__(self, layout: HeadLayout, positions: int) -> None:
        super().__init__()
        cos, sin = np.ones((positions, layout.pairs)), np.zeros((positions, layout.pairs))
        if layout.rotary is not None:
            half, factor = layout.rotary.dim // 2, layout.rotary.attention_factor
            angles = np.outer(np.arange(positions), layout.rotary.frequencies())  # [positions, dim / 2]
            cos[:, :half], sin[:, :half] = factor * np.cos(angles), factor * np.sin(angles)
            if layout.rotary.position_scale is not None:
                sizes = layout.rotary.position_scale(np.arange(positions))[:, None]  # [positions, 1]
                cos, sin = sizes * cos, sizes * sin
        self.cos = nn.Parameter(cos.shape, data=ir.tensor(cos.astype(np.float32)))
        self.sin = nn.Parameter(sin.shape, data=ir.tensor(sin.astype(np.float32)))

    def forward(self, op: object) -> tuple[ir.Value, ir.Value]:
        """Return the tables."""
        return self.cos, self.sin
