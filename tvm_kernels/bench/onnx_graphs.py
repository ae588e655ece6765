"""Matrix multiplications as ONNX Runtime runs them, ours and its own: what `measure.take_turns` compares kernels with.

A graph has a node for every matrix, all of them fed with the same activations; a sample is one run of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.errors import MissingExtraError
from pmpd.tvm_kernels.bench.measure import Sample, Weights, copies_of, random_memory
from pmpd.tvm_kernels.bench.shapes import Shape

__all__ = ["bitplane_graph", "float_graph", "nbits_graph"]

# Operator, domain, shape, attributes, and weights by name.
_Node = tuple[str, str, Shape, Mapping[str, Any], Mapping[str, npt.NDArray[Any]]]
_ACCURACY_LEVEL = 4  # of MatMulNBits: 8-bit activations
_STUB = "weights"  # an empty file that must exist: the session gets the weights in memory


@dataclass(frozen=True)
class _Run:
    """A sample: one run of a session. The session reads its weights in the memory of `values`."""

    session: Any
    binding: Any
    values: Mapping[str, Any]

    def __call__(self) -> list[float]:
        begin = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return [time.perf_counter() - begin]


def bitplane_graph(library: Path, weights: Sequence[Weights], *, accuracy: str, m: int, threads: int) -> Sample:
    """Return a run of our operator with the kernels of a library, at an accuracy, on all matrices."""
    nodes: list[_Node] = [
        ("BitplaneMatMul", "pmpd", matrices.shape, {"K": matrices.shape.k}, {"planes": planes, "codebook": codebook})
        for matrices in weights
        for planes, codebook in zip(matrices.planes, matrices.codebook, strict=True)
    ]
    options = onnxruntime().SessionOptions()
    KernelLibrary(library, accuracy=accuracy).register(options, tag="")
    return _graph(nodes, options, m=m, threads=threads)


def nbits_graph(shape: Shape, *, bits: int, block: int, m: int, threads: int) -> tuple[Sample, int, int]:
    """Return a run of ``MatMulNBits``, with the bytes of a matrix and how many there are; `block` columns a scale."""
    blocks = -(-shape.k // block)
    size = shape.n * blocks * block * bits // 8
    copies = copies_of(size, m=m)
    values = random_memory(copies * size).reshape(copies, shape.n, blocks, -1)
    scales = np.full((shape.n, blocks), 0.01, np.float32)
    attributes = {"K": shape.k, "N": shape.n, "bits": bits, "block_size": block, "accuracy_level": _ACCURACY_LEVEL}
    nodes: list[_Node] = [
        ("MatMulNBits", "com.microsoft", shape, attributes, {"B": matrix, "scales": scales.copy()}) for matrix in values
    ]
    sample = _graph(nodes, onnxruntime().SessionOptions(), m=m, threads=threads)
    return sample, size + scales.nbytes, copies


def float_graph(shape: Shape, *, m: int, threads: int) -> tuple[Sample, int, int]:
    """Return a run of float32 ``MatMul``, with the bytes of a matrix and how many there are."""
    size = 4 * shape.n * shape.k
    copies = copies_of(size, m=m)
    values = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    nodes: list[_Node] = [
        ("MatMul", "", shape, {}, {"B": np.resize(values, (shape.k, shape.n))}) for _ in range(copies)
    ]
    return _graph(nodes, onnxruntime().SessionOptions(), m=m, threads=threads), size, copies


def _graph(nodes: Sequence[_Node], options: Any, *, m: int, threads: int) -> Sample:
    """Return a run of a graph."""
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        raise MissingExtraError("onnx", "tune") from None

    onnx_nodes, outputs, stubs = [], [], []
    inputs = {f"x{k}": k for k in sorted({shape.k for _, _, shape, _, _ in nodes})}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for number, (operator, domain, shape, attributes, weights) in enumerate(nodes):
        initializers = {f"{name}.{number}": array for name, array in weights.items()}
        arrays |= initializers
        output = f"y{number}"
        onnx_nodes.append(
            helper.make_node(operator, [f"x{shape.k}", *initializers], [output], domain=domain, **attributes)
        )
        outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [m, shape.n]))
    for name, array in arrays.items():
        stub = onnx.TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        stub.data_location = TensorProto.EXTERNAL
        stub.external_data.add(key="location", value=_STUB)
        stubs.append(stub)
    graph = helper.make_graph(
        onnx_nodes,
        "multiplications",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [m, k]) for name, k in inputs.items()],
        outputs,
        stubs,
    )
    domains = [("", 21), ("com.microsoft", 1), ("pmpd", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid(*domain) for domain in domains])

    runtime = onnxruntime()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Threads of a session that has had its turn are quiet in those of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for name, value in values.items():
        options.add_initializer(name, value)
    with TemporaryDirectory(prefix="pmpd-") as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(model.SerializeToString())
        path.with_name(_STUB).touch()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, k in inputs.items():
        x = np.random.default_rng(k).normal(size=(m, k)).astype(np.float32)
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(x))
    for output, (_, _, shape, _, _) in zip(outputs, nodes, strict=True):
        y = runtime.OrtValue.ortvalue_from_numpy(np.empty((m, shape.n), np.float32))
        binding.bind_ortvalue_output(output.name, y)
    session.run_with_iobinding(binding)

    return _Run(session, binding, values)
