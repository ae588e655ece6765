"""The operator library: compiled kernels that take the place of the graphs' portable functions.

A bundle holds one library per target. It is native code, and loading it runs it: only load bundles that you trust, give
a library that you built, or do without. What a library offers its host is in `tvm_kernels/ort_ops`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.runtime.engine.onnxruntime import onnxruntime
from pmpd.runtime.errors import KernelError, PmpdError, one_line, unknown_choice
from pmpd.runtime.format.bundle import Bundle
from pmpd.runtime.format.manifest import ACCURACIES, Graph, Manifest
from pmpd.runtime.format.targets import machine_targets

__all__ = [
    "LOGITS",
    "MATMUL",
    "PORTABLE",
    "KernelLibrary",
    "NodeKernel",
    "choose_library",
    "portable_kernels",
    "require_fast",
    "slow_kernels",
]

log = logging.getLogger(__name__)

MATMUL = "BitplaneMatMul"
LOGITS = "BitplaneLogits"  # a product, of which only what can matter is finished
PORTABLE = "portable"
# Marker in the name of the generic kernel, which takes any bits and any number of codebooks per row, slowly.
_GENERIC = "any"


@dataclass(frozen=True, kw_only=True)
class NodeKernel:
    """What ran for one node that a compiled kernel may run, such as a `BitplaneMatMul` of weights ``[N, K]``.

    Attributes:
        graph: the file of its graph.
        node: its name.
        op: its operator: `MATMUL`, `LOGITS`, or another that the library has (``GroupQueryAttention``).
        bits: bits of its weights, or of a number in the KV cache; 0 before its first run.
        n: rows of its weights, or columns of attention's output; 0 before its first run.
        k: columns of its weights, or elements of a head; None for the portable body, as the manifest does not tell.
        kernel: the kernel that ran last, None before the first run; `PORTABLE` for the portable body.
        calls: how often it ran; None for the portable body, which is not counted.
        seconds: wall time of all calls; None for the portable body.
        finished: of `LOGITS`, the share of its weights' rows that were read whole; None for others.
    """

    graph: str
    node: str
    op: str
    bits: int
    n: int
    k: int | None
    kernel: str | None
    calls: int | None
    seconds: float | None
    finished: float | None = None

    @property
    def slow(self) -> bool:
        """Whether what ran was the portable body or the library's generic kernel."""
        return self.kernel is not None and (self.kernel == PORTABLE or _GENERIC in self.kernel.split("_"))


class KernelLibrary:
    """A loaded operator library, and the accuracy that its kernels compute at.

    Attributes:
        path: its file.
        accuracy: ``exact`` or ``int8``.
        info: what it reports: ``version``, ``target``, ``features`` of this processor, and the ``kernels`` it chose.

    Raises:
        KernelError: the file cannot be loaded on this machine, or is not an operator library.
        PmpdError: ONNX Runtime refuses the library, or the library refuses ONNX Runtime or the accuracy.
    """

    def __init__(self, path: Path, *, accuracy: str) -> None:
        self.path = path.absolute()
        self.accuracy = accuracy
        try:
            library = ctypes.CDLL(str(self.path))
            self._info, self._report, self._reset = (
                getattr(library, f"pmpd_ops_{name}") for name in ("info", "report", "reset")
            )
        except (OSError, AttributeError) as error:
            raise KernelError(
                f"kernel library {self.path} does not load on this machine ({one_line(error)}): export the model again "
                "on this machine, or run without kernels"
            ) from None
        self._info.restype = ctypes.c_char_p
        self._report.argtypes, self._report.restype = (
            [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t],
            ctypes.c_size_t,
        )
        self._reset.argtypes, self._reset.restype = [ctypes.c_char_p], None
        self.register(onnxruntime().SessionOptions(), tag="")  # what it refuses, it refuses here
        self.info: dict[str, Any] = json.loads(self._info())

    def register(self, options: Any, *, tag: str) -> None:
        """Add the library to the options of a session, whose nodes it will report under `tag`.

        Raises:
            PmpdError: ONNX Runtime or the library refuses.
        """
        options.add_session_config_entry("pmpd.accuracy", self.accuracy)
        options.add_session_config_entry("pmpd.session", tag)
        try:
            options.register_custom_ops_library(str(self.path))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            reason = one_line(str(error).strip() or repr(error))
            raise PmpdError(f"ONNX Runtime {onnxruntime().__version__} refuses {self.path}: {reason}") from None

    def kernel(self, bits: int, *, rows: str) -> str:
        """Return the name of the matmul for weights of `bits` and ``one`` or ``many`` rows of activations.

        Raises:
            KernelError: the library has none.
        """
        wanted = {"op": MATMUL, "bits": bits, "accuracy": self.accuracy, "rows": rows}
        names: list[str] = [choice["kernel"] for choice in self.info["kernels"] if wanted.items() <= choice.items()]
        if not names:
            raise KernelError(f"kernel library {self.path} has no kernel for {bits} bits: export the model again")
        return names[0]

    def report(self, tag: str, graph: Graph) -> list[NodeKernel]:
        """Return what ran for the nodes of session `tag`, which runs `graph`."""
        size, needed = 0, 1
        while needed >= size:  # it may grow between two calls
            size = needed + 1
            buffer = ctypes.create_string_buffer(size)
            needed = self._report(tag.encode(), buffer, size)
        return [
            NodeKernel(
                graph=graph.file,
                node=node["name"],
                op=node["op"],
                bits=node["bits"],
                n=node["n"],
                k=node["k"],
                kernel=node["kernel"],
                calls=node["calls"],
                seconds=node["nanoseconds"] / 1e9,
                finished=_share_finished(node),
            )
            for node in json.loads(buffer.value)
        ]

    def reset(self, tag: str) -> None:
        """Count calls and seconds of the session's nodes from zero."""
        self._reset(tag.encode())


def _share_finished(node: dict[str, Any]) -> float | None:
    if node["op"] != LOGITS or not node["calls"]:
        return None
    share: float = node["finished"] / (node["calls"] * node["n"])
    return share


def choose_library(bundle: Bundle, choice: bool | str | Path, *, accuracy: str, required: bool) -> KernelLibrary | None:
    """Load the kernels that a user wants: True for the bundle's, False for none, or the path of a library.

    Where the bundle's are wanted and none of them loads, the answer is None and a warning is logged; where they are
    `required`, that is an error.

    Raises:
        KernelError: as `KernelLibrary` for a path; or kernels are required and there are none.
        PmpdError: as `KernelLibrary`; or there is no such accuracy.
    """
    if accuracy not in ACCURACIES:
        raise PmpdError(unknown_choice("accuracy", accuracy, ACCURACIES))
    if not isinstance(choice, bool):
        return KernelLibrary(Path(choice), accuracy=accuracy)
    if not choice:
        if required:
            raise KernelError("fast kernels are required and kernels refused: drop one of the two options")
        return None
    try:
        return _bundle_library(bundle, accuracy=accuracy)
    except KernelError as error:
        if required:
            raise
        log.warning("%s; the portable graphs run instead, many times slower", error)
        return None


def _bundle_library(bundle: Bundle, *, accuracy: str) -> KernelLibrary:
    offered, targets = bundle.manifest.kernels, machine_targets()
    target = next((target for target in targets if target in offered), None)
    if target is not None:
        return KernelLibrary(bundle.path / offered[target], accuracy=accuracy)
    machine = f"this machine ({platform.system()} {platform.machine()})"
    kernels = f"kernels for {', '.join(offered)}, not for {machine}" if offered else "no kernels"
    remedy = f"export it with --target {targets[0]}" if targets else f"no target fits {machine}"
    raise KernelError(f"{bundle.path} has {kernels}: {remedy}")


def require_fast(library: KernelLibrary, manifest: Manifest, graphs: Iterable[Graph]) -> None:
    """Raise KernelError if a product of the graphs would run the library's generic kernel."""
    if slow := slow_kernels(library, manifest, graphs):
        raise KernelError(slow)


def slow_kernels(library: KernelLibrary, manifest: Manifest, graphs: Iterable[Graph]) -> str | None:
    """Return in one line which products of the graphs would run the library's generic, slow kernel, and what to do.

    None where all of them run fast kernels.
    """
    groups = [tensor.shape[1] for tensor in manifest.tensors if tensor.role == "codebook"]
    if max(groups, default=1) > 1:
        return (
            f"no fast kernel has several codebooks per row, and this bundle has {max(groups)}: its products run the "
            "slow kernel 'pmpd_any'; export the model with --groups 1"
        )
    for graph in graphs:
        for node in portable_kernels(manifest, graph):
            for rows in ("one", "many"):
                if _GENERIC in (kernel := library.kernel(node.bits, rows=rows)).split("_"):
                    return (
                        f"{graph.file}: {library.path} has only the slow kernel {kernel!r} for {node.node} "
                        f"({node.bits} bits, {library.accuracy}) on this processor: export with other precisions"
                    )
    return None


def portable_kernels(manifest: Manifest, graph: Graph) -> list[NodeKernel]:
    """Return the matmul nodes of a graph as they run without a library, from the tensors they read."""
    return [
        NodeKernel(
            graph=graph.file,
            node=planes.layer or "",
            op=MATMUL,
            bits=manifest.shape_at(planes, graph.precision)[0],
            n=planes.shape[1],
            k=None,
            kernel=PORTABLE,
            calls=None,
            seconds=None,
        )
        for planes in manifest.tensors
        if planes.role == "planes"
    ]
