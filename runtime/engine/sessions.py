"""ONNX Runtime sessions of a bundle: one per graph, over one mapping of the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.engine.kernels import KernelLibrary
from pmpd.runtime.engine.kv_cache import KvCache
from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.errors import BundleError, PmpdError
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.manifest import Graph

__all__ = ["GraphRunner", "available_threads", "open_session"]


def available_threads() -> int:
    """Return the number of processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    bundle: Bundle, graph: Graph, *, threads: int, kernels: KernelLibrary | None = None, tag: str = ""
) -> Any:
    """Open an `onnxruntime.InferenceSession` for one graph of a bundle.

    Weights are handed over as views of the bundle's mapping, so that further sessions cost no further weight memory.
    With `kernels` they run for `BitplaneMatMul` and report under `tag`; without, its portable body does. Threads stop
    spinning when a run returns: sessions used in turn would otherwise fight for the processors.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        PmpdError: `threads` is not positive, or ONNX Runtime refuses the kernels.
    """
    if threads < 1:
        raise PmpdError(f"threads must be 1 or more, got {threads}")
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The graphs are fused already: optimizing them again doubles the time to load and changes no speed.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if kernels is not None:
        kernels.register(options, tag=tag)
    path = bundle.path / graph.file
    weights = []
    with _refusals(path):
        for tensor in bundle.manifest.tensors_at(graph.precision):
            view = bundle.tensor(tensor, planes=graph.precision)
            weights.append(ort.OrtValue.ortvalue_from_numpy(view))
            options.add_initializer(tensor.name, weights[-1])
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.weights = weights  # ONNX Runtime does not keep them alive
    return session


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Say in one line what ONNX Runtime, or numpy of a tensor, finds wrong: their errors share no base class."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise BundleError(
            f"ONNX Runtime {onnxruntime().__version__} refuses {path}: upgrade it, or export again ({reason})"
        ) from None


class GraphRunner:
    """A session bound to the KV cache: token ids in, logits out, cache extended in place."""

    def __init__(self, session: Any, cache: KvCache, vocab_size: int, *, path: Path) -> None:
        self.session = session
        self._path = path
        self._cache = cache
        # Decoding feeds one token at a time: its binding and buffers are made once and reused.
        self._id = np.zeros((1, 1), dtype=np.int64)
        self._logits = np.zeros((1, 1, vocab_size), dtype=np.float32)
        ort = onnxruntime()
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in (self._id, self._logits)]
        self._step = session.io_binding()
        with _refusals(path):
            self._step.bind_ortvalue_input("input_ids", self._values[0])
            self._step.bind_ortvalue_output("logits", self._values[1])
            cache.bind(self._step)

    def __call__(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append `ids` to the cache; return logits ``[rows, V]``.

        A prefill graph gives one row, for the last position; a decode graph a row per id. After a single id the row is
        a view that the next call overwrites.
        """
        self._cache.extend(len(ids))
        if len(ids) == 1:
            self._id[0, 0] = ids[0]
            self._run(self._step)
            row: npt.NDArray[np.float32] = self._logits[0]
            return row
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], dtype=np.int64))
        binding.bind_output("logits")
        self._cache.bind(binding)
        self._run(binding)
        logits: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()[0]
        return logits

    def _run(self, binding: Any) -> None:
        with _refusals(self._path):
            self.session.run_with_iobinding(binding)
