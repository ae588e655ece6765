"""The accelerator's instructions, after FlightLLM (Zeng et al., FPGA 2024): load, store, matrix, special, synchronise.

Quantities that depend on the length of the text may be arrays, one entry per decode step: a whole generation is one
program. An `Operator` is a node of the graph: its loads stream in while the previous one computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmpd.npu_backend.hardware.description import Number

__all__ = ["Data", "Instruction", "Load", "Matrix", "Operator", "Program", "Special", "SpecialKind", "Store", "Sync"]

Data = Literal["planes", "codebooks", "dense", "vectors", "embedding", "kv_cache", "activations", "logits"]
SpecialKind = Literal["softmax", "norm", "activation", "rotary", "elementwise"]


@dataclass(frozen=True)
class Load:
    """``LD``: bytes from off-chip memory into a buffer."""

    data: Data
    nbytes: Number


@dataclass(frozen=True)
class Store:
    """``ST``: bytes from a buffer to off-chip memory."""

    data: Data
    nbytes: Number


@dataclass(frozen=True)
class Matrix:
    """``MM`` and ``MV``: `count` products of `rows` rows of activations with ``[outputs, inputs]`` weights.

    `weight_bits` are the planes of each weight; 16 is float16, without codebook. Keys and values of the cache are
    weights too, of the cache's bits and without codebook.
    """

    opcode: Literal["MM", "MV"]
    rows: Number
    outputs: Number
    inputs: Number
    count: int
    weight_bits: Number
    codebook: bool

    @property
    def macs(self) -> Number:
        """Multiply-accumulate operations."""
        return self.rows * self.outputs * self.inputs * self.count


@dataclass(frozen=True)
class Special:
    """``MISC``: a function of `elements` elements in the special function unit."""

    function: SpecialKind
    elements: Number


@dataclass(frozen=True)
class Sync:
    """``SYS``: what follows waits for what came before."""


Instruction = Load | Store | Matrix | Special | Sync


@dataclass(frozen=True)
class Operator:
    """The instructions of one node, and what its activations take of the activation buffer, in bytes."""

    node: str
    kind: str
    instructions: tuple[Instruction, ...]
    activation_bytes: Number = 0

    def nbytes(self, *data: Data) -> Number:
        """Return the bytes it moves from and to off-chip memory, of all kinds or of some."""
        moves = [step for step in self.instructions if isinstance(step, Load | Store)]
        return sum((move.nbytes for move in moves if not data or move.data in data), start=0.0)

    @property
    def macs(self) -> Number:
        """Multiply-accumulate operations."""
        return sum((step.macs for step in self.instructions if isinstance(step, Matrix)), start=0.0)


@dataclass(frozen=True)
class Program:
    """One run of a graph: `tokens` new tokens after `past` earlier ones (an array: one run per entry)."""

    graph: str
    tokens: Number
    past: Number
    operators: tuple[Operator, ...]

    def nbytes(self, *data: Data) -> Number:
        """Return the bytes it moves from and to off-chip memory, of all kinds or of some."""
        return sum((operator.nbytes(*data) for operator in self.operators), start=0.0)
