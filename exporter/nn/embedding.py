"""Embeddings: a table of floats, one of bit-planes, and one that is the output layer's."""

from __future__ import annotations

from typing import Any, Protocol

import onnx_ir as ir
from onnxscript import nn

from pmpd.exporter.nn.linear import BitplaneLinear, Part, Stored

__all__ = ["BitplaneEmbedding", "Embedding", "EmbeddingFactory", "TiedEmbedding"]


class Embedding(nn.Module):
    """Rows of a table ``[V, H]`` of floats in its stored type, as float32."""

    def __init__(self, words: int, width: int, *, dtype: ir.DataType) -> None:
        super().__init__()
        self.weight = Stored([words, width], dtype=dtype)

    def forward(self, op: Any, input_ids: ir.Value) -> ir.Value:
        """``[B, S] → [B, S, H]``."""
        return op.Cast(op.Gather(self.weight, input_ids), to=ir.DataType.FLOAT)  # type: ignore[no-any-return]


class BitplaneEmbedding(BitplaneLinear):
    """Rows of a table ``[V, H]`` in bit-planes, all of them in every graph, as float32.

    A linear layer of one-hot inputs, whose product is a ``pmpd::BitplaneGather``.
    """

    def __init__(self, words: int, width: int, *, precision: int, groups: int = 1) -> None:
        table = [Part("embed_tokens", words)]
        super().__init__(table, width, bias=False, precision=precision, groups=groups, nested=False)

    def forward(self, op: Any, input_ids: ir.Value) -> ir.Value:
        """``[B, S] → [B, S, H]``."""
        return self.rows(op, input_ids)


class TiedEmbedding(nn.Module):
    """Rows of an output layer's bit-planes, all of its planes, as float32: it stores no table of its own."""

    def __init__(self, head: BitplaneLinear) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple, so that the head is not a part of this module

    def forward(self, op: Any, input_ids: ir.Value) -> ir.Value:
        """``[B, S] → [B, S, H]``."""
        (head,) = self._head
        return head.rows(op, input_ids)


class EmbeddingFactory(Protocol):
    """Makes the embedding of a network that has one of its own."""

    def __call__(self, words: int, width: int) -> Embedding | BitplaneEmbedding:
        """Return an embedding of `words` rows of `width` elements."""
        ...
