"""Runs of a bundle's graphs in which the inputs and outputs of its own operators can be seen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pmpd.exporter.bundle.workspace import PROBE_PREFIX
from pmpd.exporter.graph.logits import MARGIN
from pmpd.exporter.graph.operators import PMPD_DOMAIN
from pmpd.exporter.verify.agreement import REMEDY
from pmpd.runtime import Bundle, PmpdError
from pmpd.runtime.engine.device import Cpu
from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.sessions import open_session
from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import one_line
from pmpd.runtime.format.manifest import Graph

__all__ = ["Node", "Probe", "Run"]

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


class Probe:
    """A session of one of a bundle's graphs, opened as every command opens it, that also gives what its nodes see.

    Args:
        bundle: the bundle; its folder holds a second copy of the graph while the session is opened.
        graph: which graph.
        library: kernels to run, None for the portable graph.
        replaceable: weights that a run may replace.
    """

    def __init__(
        self, bundle: Bundle, graph: Graph, *, library: KernelLibrary | None, replaceable: Sequence[str] = ()
    ) -> None:
        self._graph = graph
        self._contract = bundle.manifest.kv_cache
        tensors = {tensor.name: tensor for tensor in bundle.manifest.tensors}
        self._weights = {name: bundle.tensor(tensors[name]) for name in replaceable}
        with _probe_file(bundle) as file:
            self.nodes = _expose(bundle.path / graph.file, file, replaceable)
            tag = f"{graph.file}#verify{next(_numbers)}"
            self._session = open_session(
                bundle, replace(graph, file=file.name), threads=available_threads(), kernels=library, tag=tag
            )

    def run(
        self,
        pieces: Sequence[Sequence[int]],
        *,
        weights: Mapping[str, npt.NDArray[Any]] | None = None,
        margin: float | None = None,
    ) -> Run:
        """Run the pieces of a text one after the other, with other values of some replaceable weights.

        With a `margin`, logits further below the best may be approximate, where the graph can give such.

        Memory is that of the exposed activations: with 32 tokens 60 MB for 1.4 G parameters.
        """
        cache = KvCache(self._contract, sum(map(len, pieces)))
        ends = (value for node in self.nodes for value in (node.inputs[0], node.outputs[0]) if value != _IDS)
        names = list(dict.fromkeys(("logits", *ends)))
        feeds = {f"{name}{_FED}": value for name, value in {**self._weights, **(weights or {})}.items()}
        parts = [self._append(cache, piece, names, feeds, margin) for piece in pieces]
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


@contextmanager
def _probe_file(bundle: Bundle) -> Iterator[Path]:
    """Give the name of a file beside the weights, where ONNX Runtime looks for them; it is deleted in the end."""
    file = bundle.path / f"{PROBE_PREFIX}{os.getpid()}.onnx"
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _expose(source: Path, target: Path, replaceable: Sequence[str]) -> tuple[Node, ...]:
    """Write a graph with the first input and output of each `pmpd` operator as outputs, and some weights as inputs."""
    model = ir.load(source)
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
    target.write_bytes(ir.to_proto(model).SerializeToString())
    return tuple(nodes)


def _name(node: ir.Node) -> str:
    """Return the layer of a node, as its weights are named: ``model.layers.0.self_attn``."""
    return (node.name or node.op_type).rpartition("/")[0].replace("/", ".") or node.op_type
