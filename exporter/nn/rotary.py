"""Rotary position embedding: frequencies with their scalings, and how heads are laid out for the fused attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn.linear import Index

__all__ = ["HeadLayout", "LinearScaling", "Llama3Scaling", "Rotary", "RotaryTables"]


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (LongChat)."""

    factor: float

    def __call__(self, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Scale the frequencies."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __call__(self, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Scale the frequencies."""
        turns = self.original_context * frequencies / (2 * math.pi)  # full turns within the original context
        unscaled = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clip(0, 1)
        return (unscaled + (1 - unscaled) / self.factor) * frequencies


@dataclass(frozen=True)
class Rotary:
    """Rotation of the first `dim` elements of each head, in halves (GPT-NeoX style)."""

    dim: int
    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Return the angle per position of each pair: ``[dim / 2]``."""
        frequencies = self.theta ** (-np.arange(0, self.dim, 2) / self.dim)
        return frequencies if self.scaling is None else self.scaling(frequencies)


@dataclass(frozen=True)
class HeadLayout:
    """How a head of `size` elements stands in the `slots` that the fused attention works on.

    GroupQueryAttention wants heads of a multiple of 16 and rotations of a multiple of 8 pairs, which StableLM's 20
    rotated elements of 80 are not. Attention does not care about the order inside a head, so elements are moved: the
    pairs come first, each half padded to a multiple of 8 with elements that are not rotated (cosine 1, sine 0), then
    the others.
    """

    size: int
    rotary: Rotary

    @property
    def pairs(self) -> int:
        """Rotated pairs of slots."""
        return -(-self.rotary.dim // 16) * 8

    @property
    def slots(self) -> int:
        """Slots of a head."""
        return max(-(-self.size // 16) * 16, 2 * self.pairs)

    def rotated(self) -> tuple[int, ...]:
        """Return which element of a query or key head stands in each slot, -1 for zeros."""
        half = self.rotary.dim // 2
        spare = list(range(self.rotary.dim, self.size)) + [-1] * (self.slots - self.size)
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
    """Cosines and sines of every position: float32 ``[positions, pairs]`` each."""

    def __init__(self, layout: HeadLayout, positions: int) -> None:
        super().__init__()
        angles = np.zeros((positions, layout.pairs))
        angles[:, : layout.rotary.dim // 2] = np.outer(np.arange(positions), layout.rotary.frequencies())
        self.cos = nn.Parameter(angles.shape, data=ir.tensor(np.cos(angles).astype(np.float32)))
        self.sin = nn.Parameter(angles.shape, data=ir.tensor(np.sin(angles).astype(np.float32)))

    def forward(self, op: object) -> tuple[ir.Value, ir.Value]:
        """Return the tables."""
        return self.cos, self.sin
