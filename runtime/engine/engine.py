"""What a process loads once: an open bundle's sessions, kernels and threads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from pmpd.runtime.engine.device import open_device
from pmpd.runtime.engine.kernels import NodeKernel, choose_library, portable_kernels, require_fast, slow_kernels
from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.engine.sessions import LoadedGraph, open_session
from pmpd.runtime.engine.threads import available_threads, check_threads
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.manifest import Graph

__all__ = ["Engine"]

log = logging.getLogger(__name__)

_numbers = count(1)  # a library reports by session, and serves all engines of the process


class Engine:
    """A bundle ready to run: one per process, shared by any number of sequences and threads.

    Kernels are native code of the bundle and run in this process: for a bundle that you do not trust give
    ``kernels=False``, or the path of a library that you built. Where there are none for this machine the portable
    graphs run, many times slower, and a warning is logged; so it is where a graph needs the library's generic kernel.

    Args:
        bundle: an open bundle.
        device: where to run; ``cpu``.
        threads: threads that ONNX Runtime computes with; default all processors this process may use.
        precisions: decode precisions to load; default all of the bundle.
        kernels: True for the bundle's library for this machine, False for none, or the path of another library.
        accuracy: ``exact`` or ``int8`` kernels; default the bundle's.
        require_fast_kernels: refuse to run anything but fast kernels.

    Attributes:
        kernel_library: the library that runs; None for the portable graphs.
        prefill: the loaded prefill graph.
        decode: the loaded decode graphs, by precision.

    Raises:
        PmpdError: a precision, device or accuracy that does not exist, or a number of threads out of range.
        BundleError: ONNX Runtime refuses a graph.
        KernelError: the library does not load, or fast kernels are required and there are none.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        precisions: Sequence[float] | None = None,
        kernels: bool | str | Path = True,
        accuracy: str | None = None,
        require_fast_kernels: bool = False,
    ) -> None:
        onnxruntime()  # if it is missing, say so before anything about kernels
        manifest = bundle.manifest
        self.bundle = bundle
        self.device = open_device(device)
        self.threads = available_threads() if threads is None else check_threads(threads)
        bits, where = manifest.precisions if precisions is None else precisions, self.device.name
        graphs = [manifest.graph("decode", precision, device=where) for precision in bits]
        prefill = manifest.graph("prefill", manifest.prefill_precision, device=where)
        self.kernel_library = choose_library(
            bundle, kernels, accuracy=accuracy or manifest.accuracy, required=require_fast_kernels
        )
        if self.kernel_library is not None:
            if require_fast_kernels:
                require_fast(self.kernel_library, manifest, [prefill, *graphs])
            elif slow := slow_kernels(self.kernel_library, manifest, [prefill, *graphs]):
                log.warning("%s", slow)
        self.prefill = self._load(prefill)
        self.decode = {graph.precision: self._load(graph) for graph in graphs}

    def _load(self, graph: Graph) -> LoadedGraph:
        tag = f"{graph.file}#{next(_numbers)}"
        session = open_session(
            self.bundle, graph, threads=self.threads, kernels=self.kernel_library, tag=tag, device=self.device
        )
        return LoadedGraph(graph, self.bundle.path / graph.file, session, tag)

    def kernels(self, *, reset: bool = False) -> list[NodeKernel]:
        """Return what ran for every node of every loaded graph that a kernel can run: kernel, calls, time.

        They are counted over all sequences. Without a library these are the `BitplaneMatMul` nodes. With `reset`,
        counting starts again after this.
        """
        library, nodes = self.kernel_library, list[NodeKernel]()
        for loaded in (self.prefill, *self.decode.values()):
            if library is None:
                nodes += portable_kernels(self.bundle.manifest, loaded.graph)
                continue
            nodes += library.report(loaded.tag, loaded.graph)
            if reset:
                library.reset(loaded.tag)
        return nodes
