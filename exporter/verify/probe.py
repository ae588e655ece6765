"""Runs of a bundle's graphs in which the inputs and outputs of its own operators can be seen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pmpd.exporter.bundle.workspace import PROBE_PREFIX
from pmpd.exporter.graph.logits import MARGIN
from pmpd.exporter.graph.operators import PMPD_DOMAIN
from pmpd.exporter.verify.agreement import REMEDY
from pmpd.exporter.verify.noise import add_error_inputs, add_noise_inputs
from pmpd.runtime import Bundle, PmpdError
from pmpd.runtime.engine.device import Cpu
from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.sessions import open_session
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import one_line
from pmpd.runtime.format.manifest import Graph

__all__ = ["ExposedGraph", "Node", "Probe", "Run"]

Floats = npt.NDArray[np.float32]
_FED = ".fed"  # behind the name of a weight that is an input
_IDS = "input_ids"
_numbers = count(1)  # a library reports by session


@dataclass(frozen=True)
class Node:
    """A node that a kernel may run.

    Attributes:
        name: the layer of its weights, or of the attention.
        op: its operator.
        inputs: names of its inputs.
        outputs: names of its outputs.
        attributes: its attributes by name.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a graph computed for a text of T tokens.

    Attributes:
        logits: ``[T, V]``, or ``[1, V]`` of a prefill graph.
        values: first input and first output of every node, ``[T, width]``, by name; ``input_ids`` are ``[T]``.
        cache: keys and values, float16 ``[kv_heads, T, slots]``, by the name of the graph's input.
    """

    logits: Floats
    values: Mapping[str, npt.NDArray[Any]]
    cache: Mapping[str, npt.NDArray[np.float16]]


class ExposedGraph:
    """A copy of one of a bundle's graphs that also gives what its nodes see. A context: the copy is deleted at its end.

    Args:
        bundle: the bundle; its folder holds the copy, beside the weights, where ONNX Runtime looks for them.
        graph: which graph.
        replaceable: weights that a run may replace.

    Attributes:
        nodes: the nodes that a kernel may run.
        widths: of the noise on what attention reads, which a run may replace too, by name.
        errors: names of what is added to products, which a run may replace too, by what the product makes.
    """

    def __init__(self, bundle: Bundle, graph: Graph, *, replaceable: Sequence[str] = ()) -> None:
        self._bundle = bundle
        tensors = {tensor.name: tensor for tensor in bundle.manifest.tensors}
        self._file = bundle.path / f"{PROBE_PREFIX}{os.getpid()}.onnx"
        self._graph = graph
        model = ir.load(bundle.path / graph.file)
        self.errors = add_error_inputs(model)
        self.widths = add_noise_inputs(model)
        self._fed = {name: np.ones((1, 1, 1), np.float32) for name in self.widths}
        self._fed |= {name: np.zeros((1, 1, 1), np.float32) for name in self.errors.values()}
        self._fed |= {f"{name}{_FED}": bundle.tensor(tensors[name]) for name in replaceable}
        self.nodes = _expose(model, replaceable)
        self._file.write_bytes(ir.to_proto(model).SerializeToString())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)

    def open(self, library: KernelLibrary | None = None) -> Probe:
        """Open a session as every command opens it; without a library the portable graph runs."""
        session = open_session(
            self._bundle,
            replace(self._graph, file=self._file.name),
            threads=available_threads(),
            kernels=library,
            tag=f"{self._graph.file}#verify{next(_numbers)}",
        )
        return Probe(self._bundle, self._graph, self.nodes, self._fed, session)


class Probe:
    """A session of an `ExposedGraph`."""

    def __init__(
        self,
        bundle: Bundle,
        graph: Graph,
        nodes: Sequence[Node],
        fed: Mapping[str, npt.NDArray[Any]],
        session: Any,
    ) -> None:
        self._graph = graph
        self._contract = bundle.manifest.kv_cache
        self._nodes = nodes
        self._fed = fed
        self._session = session

    def run(
        self,
        pieces: Sequence[Sequence[int]],
        *,
        noisy: Mapping[str, npt.NDArray[Any]] | None = None,
        margin: float | None = None,
    ) -> Run:
        """Run the pieces of a text one after the other, with other values of what is replaceable, by name.

        With a `margin`, logits further below the best may be approximate, where the graph can give such.

        Memory is that of the exposed activations: with 32 tokens 60 MB for 1.4 G parameters.
        """
        cache = KvCache(self._contract, sum(map(len, pieces)))
        ends = (value for node in self._nodes for value in (node.inputs[0], node.outputs[0]) if value != _IDS)
        names = list(dict.fromkeys(("logits", *ends)))
        replaced = {name if name in self._fed else f"{name}{_FED}": value for name, value in (noisy or {}).items()}
        parts = [self._append(cache, piece, names, {**self._fed, **replaced}, margin) for piece in pieces]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in names}
        arrays[_IDS] = np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])
        return Run(
            logits=arrays["logits"],
            values=arrays,
            cache={
                self._contract.past.format(layer=layer, part=part): buffer.array[0].copy()
                for (layer, part), buffer in cache.buffers.items()
            },
        )

    def _append(
        self,
        cache: KvCache,
        ids: Sequence[int],
        names: Sequence[str],
        feeds: Mapping[str, npt.NDArray[Any]],
        margin: float | None,
    ) -> dict[str, Floats]:
        """Append tokens to the cache and return the named outputs, each ``[rows, width]``."""
        cache.extend(len(ids))
        binding = self._session.io_binding()
        binding.bind_cpu_input(_IDS, np.array([ids], dtype=np.int64))
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        if margin is not None:  # bind_cpu_input knows no input with a default
            buffer = Cpu().wrap(np.array([margin], dtype=np.float32))
            binding.bind_ortvalue_input(MARGIN, buffer.value)
        cache.bind(binding)
        for name in names:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            reason = f"verification failed, {self._graph.file} does not run: {one_line(error)}; {REMEDY}"
            raise PmpdError(reason) from None
        values = binding.get_outputs()[-len(names) :]  # those of the cache were bound first
        return {name: value.numpy()[0] for name, value in zip(names, values, strict=True)}


def _expose(model: ir.Model, replaceable: Sequence[str]) -> tuple[Node, ...]:
    """Make the first input and output of each `pmpd` operator an output of the graph, and some weights inputs."""
    for name in replaceable:
        weight = model.graph.initializers[name]
        fed = ir.Value(name=f"{name}{_FED}", type=weight.type, shape=weight.shape)
        weight.replace_all_uses_with(fed)
        model.graph.inputs.append(fed)
    nodes = []
    for node in model.graph:
        if node.domain != PMPD_DOMAIN:
            continue
        for value in (node.inputs[0], node.outputs[0]):
            assert value is not None
            if value not in model.graph.outputs and value.name != _IDS:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)
        nodes.append(
            Node(
                name=_name(node),
                op=node.op_type,
                inputs=tuple("" if value is None else value.name or "" for value in node.inputs),
                outputs=tuple(value.name or "" for value in node.outputs),
                attributes={name: attribute.value for name, attribute in node.attributes.items()},
            )
        )
    return tuple(nodes)


def _name(node: ir.Node) -> str:
    """Return the layer of a node, as its weights are named: ``model.layers.0.self_attn``."""
    return (node.name or node.op_type).rpartition("/")[0].replace("/", ".") or node.op_type
