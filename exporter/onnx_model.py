"""From a network to an ONNX model: inputs, outputs and names that every graph of a bundle has."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript

from pmpd.exporter.arch import Decoder
from pmpd.exporter.graph.logits import BITPLANE_LOGITS, MARGIN, bitplane_logits
from pmpd.exporter.graph.operators import (
    BITPLANE_GATHER,
    GROUP_QUERY_ATTENTION,
    PMPD_DOMAIN,
    PMPD_VERSION,
    bitplane_gather,
    bitplane_matmul,
    group_query_attention,
    limited_group_query_attention,
)

__all__ = ["Phase", "build_graph"]

OPSET = 23
IR_VERSION = 10
Phase = Literal["prefill", "decode"]


def build_graph(decoder: Decoder, *, phase: Phase, producer: str) -> ir.Model:
    """Build the graph of a network.

    The names are those of onnxruntime-genai. There is one sequence, and the KV cache is one buffer per layer and part,
    of fixed capacity C, which a run extends in place:

    * in: ``input_ids`` int64 ``[1, S]``; ``attention_mask`` int64 ``[1, T]``, 1 for each position that holds a token,
      this run's included; ``past_key_values.{i}.key`` and ``.value`` float16 ``[1, kv_heads, C, slots]``;
    * out: ``logits`` float32, of the last position ``[1, 1, V]`` (prefill) or all ``[1, S, V]`` (decode);
      ``present.{i}.key`` and ``.value``, bound to the memory of the past.

    That is what kernels take. The portable body also lets the cache grow from nothing, as it is ONNX Runtime's own
    operator; no caller should count on it.

    A decode graph whose output layer is computed coarse to fine has one more input, ``logits_margin`` float32 ``[1]``,
    which has a default: infinity, for exact logits (see `bitplane_logits`).

    Parameters become initializers under their names in the network; their values are for the caller to set.
    """
    shape = decoder.shape
    graph = ir.Graph(
        [], [], nodes=[], name=phase, opset_imports={"": OPSET, "com.microsoft": 1, PMPD_DOMAIN: PMPD_VERSION}
    )
    builder = onnxscript.GraphBuilder(graph)
    op = builder.op
    input_ids = builder.input("input_ids", ir.DataType.INT64, [1, "sequence_length"])
    mask = builder.input("attention_mask", ir.DataType.INT64, [1, "total_sequence_length"])
    names = [f"{i}.{part}" for i in range(shape.layers) for part in ("key", "value")]
    kv_shape: list[int | str] = [1, shape.kv_heads, "capacity", shape.head.slots]
    past = [builder.input(f"past_key_values.{name}", ir.DataType.FLOAT16, kv_shape) for name in names]

    valid = op.ReduceSum(mask, [1], keepdims=0)  # (1)
    last_position = op.Cast(op.Sub(valid, 1), to=ir.DataType.INT32)  # (1)
    total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2)), to=ir.DataType.INT32)  # ()
    first_position = None
    if decoder.rotates_early:
        first_position = op.Sub(valid, op.Shape(input_ids, start=1, end=2))  # (1)
    last_only = phase == "prefill"
    lengths = (last_position, total, first_position)
    logits, presents = decoder(op, input_ids, lengths, past, last_only=last_only)

    rows = 1 if last_only else "sequence_length"
    _output(builder, "logits", logits, ir.DataType.FLOAT, [1, rows, shape.vocab_size])
    for name, present in zip(names, presents, strict=True):
        _output(builder, f"present.{name}", present, ir.DataType.FLOAT16, kv_shape)
    definitions = [bitplane_matmul(), _attention(graph)]
    if any(node.op_type == BITPLANE_LOGITS for node in graph):
        definitions.append(bitplane_logits())
        _add_margin(graph)
    if any(node.op_type == BITPLANE_GATHER for node in graph):
        definitions.append(bitplane_gather())
    for node in graph:
        node.metadata_props.clear()  # the builder's scope notes are half the file
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name=producer)
    for definition in definitions:
        function = ir.serde.deserialize_function(definition)
        model.functions[function.identifier()] = function
    return model


def _attention(graph: ir.Graph) -> onnx.FunctionProto:
    """Return the definition of attention: the one with limits if a layer has some, and then every node states them.

    ONNX Runtime does not find the defaults of a function that onnx_ir has written.
    """
    nodes = [node for node in graph if node.op_type == GROUP_QUERY_ATTENTION]
    if not any({"window", "softcap"} & node.attributes.keys() for node in nodes):
        return group_query_attention()
    for node in nodes:
        node.attributes.setdefault("window", ir.AttrInt64("window", 0))
        node.attributes.setdefault("softcap", ir.AttrFloat32("softcap", 0.0))
    return limited_group_query_attention()


def _add_margin(graph: ir.Graph) -> None:
    """Make the margin of the output layer an input with a default."""
    name = next(name for name in graph.initializers if name.endswith(MARGIN))
    margin = graph.initializers.pop(name)
    margin.name = MARGIN
    margin.const_value = ir.tensor(np.array([np.inf], dtype=np.float32), name=MARGIN)
    graph.inputs.append(margin)
    graph.register_initializer(margin)


def _output(builder: Any, name: str, value: ir.Value, dtype: ir.DataType, shape: list[int | str]) -> None:
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    builder.graph.outputs.append(value)
