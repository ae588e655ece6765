"""ONNX Runtime sessions of a bundle, one per graph over one mapping of the weights, and running them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.device import Cpu, Device
from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.engine.threads import check_threads
from pmpd.runtime.errors import BundleError, PmpdError, one_line
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.graph_file import check_graph
from pmpd.runtime.format.manifest import Graph

__all__ = ["GraphRunner", "LoadedGraph", "StepBuffers", "open_session"]


def open_session(
    bundle: Bundle,
    graph: Graph,
    *,
    threads: int,
    kernels: KernelLibrary | None = None,
    tag: str = "",
    device: Device | None = None,
) -> Any:
    """Open an `onnxruntime.InferenceSession` for one graph of a bundle.

    Weights are handed over as views of the bundle's mapping, so that further sessions cost no further weight memory.
    With `kernels` they run for `BitplaneMatMul` and report under `tag`; without, its portable body does. Threads stop
    spinning when a run returns: sessions used in turn would otherwise fight for the processors. Several threads may run
    one session at once, each with a binding of its own.

    Raises:
        BundleError: the graph and the manifest disagree about a tensor, or ONNX Runtime refuses the graph.
        PmpdError: `threads` is out of range, or ONNX Runtime refuses the kernels.
    """
    device = Cpu() if device is None else device
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = check_threads(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The graphs are fused already: optimizing them again doubles the time to load and changes no speed.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # A portable body is hundreds of nodes, and planning which of their tensors may share memory takes time that grows
    # with the square of them: 3 of 4 s for 30 layers. A run needs no more memory without.
    options.enable_mem_reuse = options.enable_mem_pattern = kernels is not None
    if kernels is not None:
        kernels.register(options, tag=tag)
    path = bundle.path / graph.file
    check_graph(bundle.manifest, graph, path)  # ONNX Runtime would take a tensor of any type and size
    weights = []
    with _load_errors(path):
        for tensor in bundle.manifest.tensors_at(graph.precision):
            view = bundle.tensor(tensor, planes=bundle.manifest.shape_at(tensor, graph.precision)[0])
            weights.append(device.wrap(view).value)
            options.add_initializer(tensor.name, weights[-1])
        session = ort.InferenceSession(path, options, providers=device.providers)
    session.weights = weights  # ONNX Runtime does not keep them alive
    return session


@dataclass(frozen=True)
class LoadedGraph:
    """A graph and its session, shared by all sequences of an engine.

    Attributes:
        graph: as the manifest lists it.
        path: its file.
        session: `onnxruntime.InferenceSession`.
        tag: the name under which the kernel library reports what ran.
    """

    graph: Graph
    path: Path
    session: Any
    tag: str


# An input of graphs whose output layer is computed coarse to fine: logits that are within it of the best are exact, and
# others may be approximate, but below. Its default, infinity, asks for exact logits.
MARGIN = "logits_margin"


class StepBuffers:
    """What every decode step of one sequence reads and writes, whatever its precision.

    A token id, its logits, and the margin within which logits must be exact.
    """

    def __init__(self, vocab_size: int, *, device: Device | None = None) -> None:
        device = Cpu() if device is None else device
        self.token_id = device.allocate((1, 1), np.int64)
        self.logits = device.allocate((1, 1, vocab_size), np.float32)
        self.margin = device.allocate((1,), np.float32)


class GraphRunner:
    """A loaded graph bound to one sequence's cache: token ids in, logits out, keys and values appended in place.

    It writes the last positions of the cache: the caller extends the cache first.
    """

    def __init__(self, loaded: LoadedGraph, cache: KvCache, step: StepBuffers, *, device: Device | None = None) -> None:
        self.loaded = loaded
        self._cache = cache
        self._buffers = step
        # Decoding feeds one token at a time: its binding is made once and reused.
        self._step = loaded.session.io_binding()
        inputs = {"input_ids": step.token_id}
        if any(value.name == MARGIN for value in loaded.session.get_overridable_initializers()):
            inputs[MARGIN] = step.margin
        with _load_errors(loaded.path):
            (Cpu() if device is None else device).bind(self._step, inputs=inputs, outputs={"logits": step.logits})
            cache.bind(self._step)

    def step(self, token_id: int, *, margin: float = np.inf) -> npt.NDArray[np.float32]:
        """Run one token; return logits ``[V]``: a view that the sequence's next step at any precision overwrites.

        Logits further than `margin` below the best may be approximate, where the graph has such an output layer.
        """
        self._buffers.token_id.array[0, 0] = token_id
        self._buffers.margin.array[0] = margin
        self._run(self._step)
        row: npt.NDArray[np.float32] = self._buffers.logits.array[0, 0]
        return row

    def run(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Run tokens together; return their logits ``[rows, V]`` as a new array.

        A prefill graph gives one row, for the last position; a decode graph a row per token.
        """
        binding = self.loaded.session.io_binding()
        with _load_errors(self.loaded.path):
            binding.bind_cpu_input("input_ids", np.array([ids], dtype=np.int64))
            binding.bind_output("logits")
            self._cache.bind(binding)
        self._run(binding)
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()[0]
        return logits

    def _run(self, binding: Any) -> None:
        with _run_errors(self.loaded.path):
            self.loaded.session.run_with_iobinding(binding)


@contextmanager
def _load_errors(path: Path) -> Iterator[None]:
    """Say in one line what ONNX Runtime, or numpy of a tensor, finds wrong: their errors share no base class."""
    try:
        yield
    except PmpdError:
        raise
    except Exception as error:
        raise _refusal(path, error) from None


@contextmanager
def _run_errors(path: Path) -> Iterator[None]:
    """Say in one line why a graph that loaded does not run, and what helps: not a new bundle, as a rule."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "InvalidArgument":  # what the manifest promised is not what the graph takes
            raise _refusal(path, error) from None
        reason = _reason(error)
        if isinstance(error, MemoryError) or re.search(r"alloc|out of memory", reason, re.IGNORECASE):
            remedy = "there is not enough memory; use a smaller context_length, or stop other programs"
        else:
            remedy = "see whether it runs without kernels (kernels=False, pmpd-run --no-kernels), and report it"
        raise PmpdError(f"{path} failed while running ({reason}): {remedy}") from None


def _refusal(path: Path, error: Exception) -> BundleError:
    version = onnxruntime().__version__
    return BundleError(f"ONNX Runtime {version} refuses {path}: upgrade it, or export again ({_reason(error)})")


def _reason(error: Exception) -> str:
    return one_line(str(error).strip() or repr(error))
