"""The network's graph in float32 over the checkpoint's own tensors: what the quantized graphs are built like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import torch

from pmpd.exporter.arch import Family
from pmpd.exporter.bundle.layers import parent_scope, plain_tensors
from pmpd.exporter.nn import Embedding, FloatLinear, Norm
from pmpd.exporter.onnx_model import build_graph
from pmpd.exporter.source.checkpoint import Checkpoint
from pmpd.exporter.verify.noise import add_noise_inputs, portable_noise

__all__ = ["FloatGraph"]

_EMBEDDING = "model.embed_tokens.weight"
_IR_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


class FloatGraph:
    """A session of the float graph. The large tensors are its inputs, fed from the mapped checkpoint without a copy."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self._shape = family.shape
        stored_as = checkpoint.tensor(_EMBEDDING).dtype
        dtype = _IR_TYPES[stored_as]
        linear = partial(FloatLinear, dtype=dtype)
        decoder = family.decoder(linear, linear, partial(Embedding, dtype=dtype))
        model = build_graph(decoder, phase="decode", producer="pmpd")
        self._weights: dict[str, Any] = {}
        norms = set()
        for scope, module in decoder.named_modules():
            for name, parameter in module.named_parameters(prefix=scope, recurse=False):
                if isinstance(module, FloatLinear) or name == _EMBEDDING:
                    source = name if parameter.sources is None else parent_scope(scope) + parameter.sources[0]
                    self._weights[name] = _ort_value(checkpoint.tensor(source).to(stored_as))
                elif isinstance(module, Norm):
                    norms.add(name)
        arrays = dict(plain_tensors(decoder, checkpoint, skip=set(self._weights)))
        self._norms: dict[str, npt.NDArray[np.float32]] = {name: arrays.pop(name) for name in sorted(norms)}
        self._hidden = _expose_hidden(model.graph)
        for name in (*self._weights, *self._norms):
            model.graph.inputs.append(model.graph.initializers.pop(name))
        for name, array in arrays.items():
            model.graph.initializers[name].const_value = ir.tensor(array)
        self._widths = add_noise_inputs(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # In the order of the graph: by default every weight would be cast to float32 before the first is used. ONNX
        # Runtime counts the nodes of functions that it inlines after all others, so they are inlined before.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False  # an arena would keep what the largest layer needed
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto = onnx.inliner.inline_local_functions(ir.to_proto(model))
        self._session = onnxruntime.InferenceSession(proto.SerializeToString(), options)

    def logits(self, ids: Sequence[int], *, noisy: bool = False) -> npt.NDArray[np.float32]:
        """Return the logits ``[len(ids), V]`` of a text; `noisy` with noise of the size of its rounding."""
        return self._run("logits", ids, portable_noise(self._norms, self._widths, len(ids)) if noisy else {})

    def hidden(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return what the output layer is given for a text, ``[len(ids), K]``."""
        return self._run(self._hidden, ids, {})

    def _run(
        self, output: str, ids: Sequence[int], noisy: Mapping[str, npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        calm = self._norms | {name: np.ones((1, 1, 1), np.float32) for name in self._widths}
        shape = self._shape
        past = _ort_value(torch.zeros(1, shape.kv_heads, len(ids), shape.head.slots, dtype=torch.float16))
        feeds = {
            "input_ids": _ort_value(torch.tensor([list(ids)])),
            "attention_mask": _ort_value(torch.ones(1, len(ids), dtype=torch.int64)),
            **{f"past_key_values.{layer}.{part}": past for layer in range(shape.layers) for part in ("key", "value")},
            **self._weights,
            **{name: _ort_value(torch.from_numpy(array)) for name, array in {**calm, **noisy}.items()},
        }
        values: npt.NDArray[np.float32] = self._session.run_with_ort_values([output], feeds)[0].numpy()[0]
        return values


def _expose_hidden(graph: ir.Graph) -> str:
    """Make the output layer's input an output of the graph, and return its name: the product nearest to the logits."""
    node = graph.outputs[0].producer()
    while node is not None and node.op_type != "FusedMatMul":
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    assert node is not None
    hidden = node.inputs[0]
    assert hidden is not None
    assert hidden.name is not None
    hidden.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(hidden)
    return hidden.name


def _ort_value(tensor: torch.Tensor) -> Any:
    """Wrap a torch tensor without a copy; numpy has no bfloat16, so that one travels as its bits."""
    if tensor.dtype == torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            tensor.view(torch.uint16).numpy(), ir.DataType.BFLOAT16
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
