"""Lowering: an exported graph, for some numbers of tokens, becomes instructions of an accelerator.

What the mapping assumes:

* weights stream from outside once per pass over them, as p planes and a codebook per row; float16 ones as they are;
* activations stay on chip while decoding (FlightLLM's always-on-chip decode). A prompt's do not fit: products and
  attention load and store them, what is between is fused with them. A product runs over as much of the prompt at a time
  as the activation buffer holds, or over as many weights as the stream buffer holds, whichever moves fewer bytes;
* cached keys and values are read as far as the text goes, rounded up to the granularity of programs; new ones are
  written. A prompt's attention goes head by head: keys and values of a head stay on chip if they fit the activation
  buffer. If not, its queries pass in parts that fit, and each part reads the keys and values that it sees;
* in a layer with a sliding window of W tokens, a token reads and multiplies the keys and values of itself and of the
  W - 1 before it, and those of one window are what must fit the activation buffer. New ones are written all the same;
* heads that share a key/value head are rows of one product; of a prompt's causal attention, only what is seen is
  computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pmpd.npu_backend.hardware.description import Hardware, Number
from pmpd.npu_backend.machine.cost import matrix_cycles
from pmpd.npu_backend.machine.instructions import (
    Data,
    Instruction,
    Load,
    Matrix,
    Operator,
    Program,
    Special,
    SpecialKind,
    Store,
    Sync,
)
from pmpd.npu_backend.program.graph import LOGITS, Node, OnnxGraph
from pmpd.runtime.errors import BundleError, PmpdError

__all__ = ["lower"]

FP16_BITS = 16
_COUNTING = {"ReduceSum", "Sub", "Shape", "Squeeze", "Cast"}  # how long the text is: the host knows
_VIEWS = {"Cast", "Reshape"}  # the same elements, in the order they are in
_FUNCTIONS: dict[str, SpecialKind] = {
    "RMSNormalization": "norm",
    "LayerNormalization": "norm",
    "ReduceMean": "elementwise",  # as wide as what it is taken of, because that is what it is used with
    "Sub": "elementwise",
    "Add": "elementwise",
    "Mul": "elementwise",
    "Div": "elementwise",
    "Tanh": "activation",
    "com.microsoft::QuickGelu": "activation",
    "Gelu": "activation",
    "Relu": "activation",
}


@dataclass(frozen=True)
class _Value:
    """An activation: rows (tokens) of `width` elements each."""

    rows: Number
    width: int


def lower(graph: OnnxGraph, hardware: Hardware, *, tokens: Number, past: Number, fp16: bool = False) -> Program:
    """Lower a prefill or decode graph.

    Args:
        graph: what was exported.
        hardware: the accelerator; its buffers and its matrix unit decide the mapping.
        tokens: new tokens.
        past: tokens before them, whose keys and values are in the cache; an array gives a program for each.
        fp16: weights, activations and KV cache are float16, without bit-planes: the baseline of the paper.

    Raises:
        BundleError: a node cannot be lowered; the message names it.
        PmpdError: the activations of one token do not fit on chip, or there are more tokens than the model's context.
    """
    return _Lowering(graph, hardware, tokens, past, fp16=fp16).program()


class _Lowering:
    def __init__(self, graph: OnnxGraph, hardware: Hardware, tokens: Number, past: Number, *, fp16: bool) -> None:
        self.graph, self.hardware, self.tokens, self.past = graph, hardware, tokens, past
        self.fp16 = fp16
        formats = hardware.formats
        self.byte = (FP16_BITS if fp16 else formats.activation_bits) / 8  # bytes of an activation
        self.kv_bits = FP16_BITS if fp16 else formats.kv_bits
        self.values: dict[str, _Value] = {"input_ids": _Value(tokens, 1)}
        self.counts = {"attention_mask"}  # values that the host computes
        self.logits = {name for node in graph.output_layer for name in node.outputs}

    def program(self) -> Program:
        operators = []
        for node in self.graph.nodes:
            try:
                lowered = self._node(node)
            except (LookupError, ValueError, TypeError) as error:
                raise BundleError(
                    f"{self.graph.path}: node {node.name!r} ({node.op}) is not as exported graphs have it "
                    f"({type(error).__name__} {error}): export again"
                ) from None
            if lowered:
                operators.append(Operator(node.name, node.op.split("::")[-1], tuple(lowered), self._on_chip(node)))
        for operator in operators:
            if np.any(operator.activation_bytes > self.hardware.buffers.activation_kib * 1024):
                raise PmpdError(
                    f"{operator.node}: one token's activations take {np.max(operator.activation_bytes) / 1024:.1f} KiB "
                    f"on chip, {self.hardware.name} has {np.min(self.hardware.buffers.activation_kib):g}: "
                    "give it a larger activation_kib"
                )
        return Program(self.graph.path.name, self.tokens, self.past, tuple(operators))

    def _on_chip(self, node: Node) -> Number:
        """Return the bytes of one token's activations that a node reads and writes; logits leave as they come."""
        names = [name for name in (*node.inputs, *node.outputs) if name not in self.logits]
        values = [self.values[name] for name in names if name in self.values]
        return sum((value.width for value in values), start=0) * self.byte

    def _node(self, node: Node) -> list[Instruction]:
        inputs = [name for name in node.inputs if name and name not in self.graph.initializers]
        if node.op == "CastLike" and node.inputs[0] in self.graph.initializers:
            return []  # a constant that is stored in one type and used in another
        if node.op == "Shape" or (node.op in _COUNTING and self.counts.issuperset(inputs)):
            self.counts.update(node.outputs)
            return []
        special = {
            "Gather": self._gather,
            "Split": self._split,
            "Concat": self._concat,
            "pmpd::BitplaneGather": self._bitplane_gather,
            "pmpd::BitplaneMatMul": self._bitplane_matmul,
            # The whole product: what of it a step can leave out depends on its activations.
            "pmpd::BitplaneLogits": self._bitplane_matmul,
            "pmpd::GroupQueryAttention": self._attention,
            "com.microsoft::RotaryEmbedding": self._rotary_embedding,
        }
        handlers: Mapping[str, Callable[[Node], list[Instruction]]] = (
            dict.fromkeys(_VIEWS, self._view) | dict.fromkeys(_FUNCTIONS, self._function) | special
        )
        if node.op not in handlers:
            raise BundleError(f"{self.graph.path}: node {node.name!r}: the operator {node.op} cannot be lowered")
        return handlers[node.op](node)

    def _input(self, node: Node) -> _Value:
        """Return the activations that a node works on."""
        for name in node.inputs:
            if name in self.values:
                return self.values[name]
        raise BundleError(f"{self.graph.path}: node {node.name!r} ({node.op}) has no activations as input")

    def _vectors(self, node: Node) -> list[Instruction]:
        """Load what a node takes from the weight file whole."""
        nbytes = sum(self.graph.initializers[name].nbytes for name in node.inputs if name in self.graph.initializers)
        return [Load("vectors", nbytes)] if nbytes else []

    def _view(self, node: Node) -> list[Instruction]:
        self.values[node.outputs[0]] = self._input(node)
        return []

    def _split(self, node: Node) -> list[Instruction]:
        x = self._input(node)
        sizes = self.graph.initializers[node.inputs[1]].values if len(node.inputs) > 1 else None
        for i, name in enumerate(node.outputs):
            self.values[name] = _Value(x.rows, sizes[i] if sizes else x.width // len(node.outputs))
        return []

    def _concat(self, node: Node) -> list[Instruction]:
        parts = [self.values[name] for name in node.inputs]
        self.values[node.outputs[0]] = _Value(parts[0].rows, sum(part.width for part in parts))
        return []

    def _function(self, node: Node) -> list[Instruction]:
        x = self._input(node)
        self.values[node.outputs[0]] = x
        return [*self._vectors(node), Special(_FUNCTIONS[node.op], x.rows * x.width), *self._result(node), Sync()]

    def _rotary_embedding(self, node: Node) -> list[Instruction]:
        x = self._input(node)
        self.values[node.outputs[0]] = x
        pairs = self.graph.initializers[node.inputs[2]].shape[1]
        elements = int(node.attributes["num_heads"]) * 2 * pairs
        return [Load("vectors", x.rows * pairs * 2 * 4), Special("rotary", x.rows * elements), Sync()]

    def _gather(self, node: Node) -> list[Instruction]:
        """Rows of the embedding's table, or one row of the activations."""
        table = self.graph.initializers.get(node.inputs[0])
        if table is None:
            self.values[node.outputs[0]] = _Value(1, self._input(node).width)
            return []
        width = table.shape[1]
        self.values[node.outputs[0]] = _Value(self.tokens, width)
        return [Load("embedding", self.tokens * width * (table.nbytes / (table.shape[0] * width))), Sync()]

    def _bitplane_gather(self, node: Node) -> list[Instruction]:
        """Rows of an embedding in bit-planes, its own or the output layer's: of all planes, and of the codebook."""
        planes, codebook = (self.graph.initializers[name] for name in node.inputs[1:3])
        width, rows = int(node.attributes["K"]), planes.shape[1]
        self.values[node.outputs[0]] = _Value(self.tokens, width)
        nbytes = width * FP16_BITS / 8 if self.fp16 else (planes.nbytes + codebook.nbytes) / rows
        return [Load("embedding", self.tokens * nbytes), Sync()]

    def _bitplane_matmul(self, node: Node) -> list[Instruction]:
        x = self._input(node)
        planes, codebook = (self.graph.initializers[name] for name in node.inputs[1:3])
        bits, outputs, _ = planes.shape
        inputs = int(node.attributes["K"])
        self.values[node.outputs[0]] = _Value(x.rows, outputs)
        streams: dict[Data, Number]
        if self.fp16:
            bits, streams = FP16_BITS, {"dense": outputs * inputs * FP16_BITS / 8}
        else:
            streams = {"planes": planes.nbytes, "codebooks": codebook.nbytes}
        steps: list[Instruction] = []
        passes, loaded, stored = self._passes(x, inputs, outputs, sum(streams.values()))
        steps += [Load(data, nbytes * passes) for data, nbytes in streams.items()]
        place = 7 if node.op == "pmpd::BitplaneLogits" else 3  # of the bias
        if len(node.inputs) > place and node.inputs[place]:
            steps.append(Load("vectors", self.graph.initializers[node.inputs[place]].nbytes))
        if np.any(loaded):
            steps.append(Load("activations", loaded))
        steps += self._products(x.rows, outputs, inputs, 1, bits, codebook=not self.fp16)
        if np.any(stored):
            steps.append(Store("activations", stored))
        return [*steps, *self._result(node), Sync()]

    def _result(self, node: Node) -> list[Instruction]:
        """Store what leaves the accelerator: the logits of the node that makes them."""
        value = self.values[node.outputs[0]]
        return [Store("logits", value.rows * value.width * self.byte)] if LOGITS in node.outputs else []

    def _off_chip(self, x: _Value) -> Number:
        """Return the rows of activations that are loaded and stored: a prompt's; one token's stay on chip."""
        return np.where(np.greater(x.rows, 1), x.rows, 0)

    def _passes(self, x: _Value, inputs: int, outputs: int, weights: Number) -> tuple[Number, Number, Number]:
        """Return how often weights are read, and the bytes of activations that are loaded and stored."""
        buffers = self.hardware.buffers
        rows = self._off_chip(x)
        moved = rows * inputs * self.byte
        # Either the prompt in parts that stay on chip, all weights for each, or the other way round.
        by_rows = np.maximum(np.ceil(moved / (buffers.activation_kib * 1024)), 1)
        by_weights = np.ceil(weights / (buffers.stream_kib * 512))
        rows_first = by_rows * weights + moved <= weights + by_weights * moved
        return (
            np.where(rows_first, by_rows, 1.0),
            np.where(rows_first, 1.0, by_weights) * moved,
            rows * outputs * self.byte,
        )

    def _products(
        self, rows: Number, outputs: Number, inputs: Number, count: int, bits: Number, *, codebook: bool
    ) -> list[Instruction]:
        """Whole sets of rows are a matrix-matrix product; rows left over come one by one, if that is quicker."""

        def product(opcode: Literal["MM", "MV"], rows: Number) -> Matrix:
            return Matrix(opcode, rows, outputs, inputs, count, bits, codebook)

        left = np.mod(rows, self.hardware.matrix_unit.rows)
        together, one_by_one = (matrix_cycles(product(opcode, left), self.hardware) for opcode in ("MM", "MV"))
        single = np.where(one_by_one <= together, left, 0)
        return [step for step in (product("MM", rows - single), product("MV", single)) if np.any(step.rows)]

    def _attention(self, node: Node) -> list[Instruction]:
        heads, kv_heads = int(node.attributes["num_heads"]), int(node.attributes["kv_num_heads"])
        x = self._input(node)
        dim = x.width // (heads + 2 * kv_heads)
        positions, pairs = self.graph.initializers[node.inputs[5]].shape
        longest = np.max(np.asarray(self.past) + self.tokens)
        if longest > positions:
            raise PmpdError(f"{self.graph.path}: {longest:.0f} tokens are more than the model's context of {positions}")
        self.values[node.outputs[0]] = _Value(x.rows, heads * dim)
        window = int(node.attributes.get("window", 0)) or np.inf  # positions that a token sees, itself included
        step = self.hardware.controller.length_granularity
        position = kv_heads * dim * self.kv_bits / 8  # bytes of a position's keys, and of its values
        cached = np.minimum(np.ceil(np.asarray(self.past) / step) * step, window - 1)
        # A token sees itself and what is before it: the mean over a prompt's tokens.
        seen = _sum_up_to(window, cached + 1, x.rows, x.rows) / x.rows
        scores = x.rows * heads * seen
        rows = x.rows * (heads // kv_heads)
        room = self.hardware.buffers.activation_kib * 1024
        head_bytes = 2 * np.minimum(cached + x.rows, window) * dim * self.kv_bits / 8  # keys and values
        parts = np.where(head_bytes <= room, 1.0, np.maximum(np.ceil(2 * rows * dim * self.byte / room), 1.0))
        # Before its own tokens, part i of n (from 0) sees i / n of the new ones. The first read of those is that of the
        # input.
        read = _sum_up_to(window - 1, cached, x.rows, parts)
        off_chip = self._off_chip(x) * self.byte
        return [
            *([Load("activations", off_chip * x.width)] if np.any(off_chip) else []),
            Load("vectors", x.rows * pairs * 2 * 4),  # cosines and sines, float32
            Special("rotary", x.rows * (heads + kv_heads) * 2 * pairs),
            Store("kv_cache", x.rows * position * 2),
            Load("kv_cache", read * position),
            *self._products(rows, seen, dim, kv_heads, self.kv_bits, codebook=False),
            Sync(),
            # The factors of a softcap, before and behind its tanh, go into those of the scores and of the softmax.
            *([Special("activation", scores)] if node.attributes.get("softcap") else []),
            Special("softmax", scores),
            Load("kv_cache", read * position),
            *self._products(rows, dim, seen, kv_heads, self.kv_bits, codebook=False),
            *([Store("activations", off_chip * heads * dim)] if np.any(off_chip) else []),
            Sync(),
        ]


def _sum_up_to(limit: float, first: Number, total: Number, count: Number) -> Number:
    """Return the sum of ``min(first + i * total / count, limit)`` for i from 0 to ``count - 1``; `first` <= `limit`."""
    step = total / count
    excess: Number = np.maximum(first + (count - 1) * step - limit, 0)  # of the last
    beyond: Number = np.ceil(excess / step)  # how many are above the limit
    return count * first + (count - 1) / 2 * total - (beyond * excess - beyond * (beyond - 1) / 2 * step)
