"""From kernels to objects and the table that the operator library is linked from.

Objects are kept in the user's cache folder by what they are made of: a second export compiles nothing. Compiling is
done by processes of their own (`worker`), a few at a time, because TVM uses one thread.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.tvm_kernels.targets import Target

__all__ = ["Progress", "attentions_of", "compile_kernels", "kernels_of", "require_tvm"]

# The code that decides what is in an object: what makes the TIR functions, and what compiles them.
_PACKAGE = Path(__file__).parents[1]
_GENERATORS = [
    *sorted(file for room in ("codegen", "ops") for file in (_PACKAGE / room).rglob("*.py")),
    _PACKAGE / "library" / "worker.py",
]

_WORKER = [sys.executable, "-m", "pmpd.tvm_kernels.library.worker"]

# Given what is done, one item after another, and how many there will be, it hands the items on.
Progress = Callable[[Iterable[str], int], Iterable[str]]


@dataclass(frozen=True)
class _Unit:
    """One function to compile, by its symbol: a kernel, the packing of its activations, attention, or `pmpd_any`."""

    symbol: str
    kernel: dict[str, Any] | None
    triple: str
    cpu: str
    attributes: tuple[str, ...]


def kernels_of(target: Target, precisions: Sequence[int]) -> list[Any]:
    """Return the kernels of a target's library, best first: every instruction set, precision, accuracy and phase."""
    from pmpd.tvm_kernels.ops.matmul.tuned import tuned_kernels

    return tuned_kernels(target, target.isa, precisions=sorted(set(precisions)))


def attentions_of(target: Target, head_dims: Sequence[int]) -> list[Any]:
    """Return the attention kernels of a target's library, best first, for heads of some sizes."""
    from pmpd.tvm_kernels.codegen.isa import Avx2, Avx512, Neon, Portable
    from pmpd.tvm_kernels.ops.attention.attention import queries_together
    from pmpd.tvm_kernels.ops.kernel import AttentionKernel

    # Attention has no use for 8-bit products: the plainest of each vector width.
    return [
        AttentionKernel(isa=isa, dim=dim, queries=queries)
        for isa in (Avx512(), Avx2(), Neon(), Portable())
        if isa.name in (*target.isa, "portable")
        for dim in sorted(set(head_dims))
        for queries in sorted({queries_together(isa, dim), 1}, reverse=True)
    ]


def require_tvm() -> None:
    """Raise MissingExtraError if TVM is not installed."""
    if importlib.util.find_spec("tvm") is None:
        raise MissingExtraError("apache-tvm", "tune")


def compile_kernels(
    target: Target,
    *,
    precisions: Sequence[int],
    directory: Path,
    head_dims: Sequence[int] = (),
    kernels: Sequence[Any] | None = None,
    progress: Progress = lambda done, _: done,
) -> list[Path]:
    """Compile a target's kernels and write the table of ``kernels.h``; return the files to link, objects and C.

    Args:
        target: the machine.
        precisions: the p to have kernels for.
        head_dims: sizes of attention heads to have kernels for.
        directory: where `kernels.c` goes; the objects stay in the cache.
        kernels: other kernels than the tuned ones.
        progress: shows what is done of what is not in the cache yet.

    Raises:
        MissingExtraError: apache-tvm is not installed.
        PmpdError: TVM fails on a kernel.
    """
    require_tvm()
    chosen = kernels_of(target, precisions) if kernels is None else list(kernels)
    attentions = attentions_of(target, head_dims)
    units = {unit.symbol: unit for kernel in chosen for unit in _units(kernel, target)}
    for kernel in attentions:
        machine = (target.triple, kernel.isa.cpu, kernel.isa.attributes)
        units[kernel.name] = _Unit(kernel.name, kernel.to_json(), *machine)
    units["pmpd_any"] = _Unit("pmpd_any", None, target.triple, "generic", ())
    objects = {symbol: _cached(unit) for symbol, unit in units.items()}
    missing = {path: units[symbol] for symbol, path in objects.items() if not path.exists()}
    if missing:
        for _ in progress(_compile_all(missing), len(missing)):
            pass
    table = directory / "kernels.c"
    table.write_text(_table(chosen, attentions), encoding="utf-8")
    return [table, *objects.values()]


def _units(kernel: Any, target: Target) -> list[_Unit]:
    values = kernel.to_json()
    machine = (target.triple, kernel.isa.cpu, kernel.isa.attributes)
    return [_Unit(symbol, values, *machine) for symbol in (kernel.name, kernel.pack_name)]


def _compile_all(units: dict[Path, _Unit]) -> Iterator[str]:
    """Compile functions into objects; yield the symbols as they are done. No worker outlives this, whatever happens.

    Raises:
        PmpdError: TVM fails on a function; what other workers are at is given up.
    """
    todo = iter(units.items())
    lock, done = threading.Lock(), queue.SimpleQueue[str | PmpdError]()

    def work(worker: subprocess.Popen[bytes]) -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        while True:
            with lock:
                path, unit = next(todo, (None, None))
            if unit is None:
                return
            answer = b""
            with suppress(OSError):  # a worker that is gone answers nothing
                worker.stdin.write(json.dumps({"path": str(path), **asdict(unit)}).encode() + b"\n")
                answer = worker.stdout.readline()
            if not answer:
                done.put(PmpdError(f"TVM fails to compile the kernel {unit.symbol}: its messages are above"))
                return
            done.put(unit.symbol)

    with ExitStack() as stack:
        for _ in range(min(len(units), available_threads())):
            worker = stack.enter_context(
                subprocess.Popen(_WORKER, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            thread = threading.Thread(target=work, args=[worker], daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(worker.terminate)  # first of all, and what ends the thread
        for _ in units:
            symbol = done.get()
            if isinstance(symbol, PmpdError):
                raise symbol
            yield symbol


def _cached(unit: _Unit) -> Path:
    """Return where the object of a function is kept: under a name made of everything that decides its contents."""
    digest = hashlib.sha256()
    for module in _GENERATORS:
        digest.update(module.read_bytes())
    digest.update(repr((unit.symbol, unit.triple, unit.cpu, unit.attributes, version("apache-tvm"))).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "pmpd" / "kernels" / f"{unit.symbol}-{digest.hexdigest()[:16]}.o"


def _table(kernels: Sequence[Any], attentions: Sequence[Any]) -> str:
    """Return the C text that lists the kernels."""
    signatures = {
        "pack": "(const float *, void *, float *, float *, int32_t, int32_t, int32_t, int32_t)",
        "matmul": "(const uint8_t *, int64_t, const uint16_t *, const void *, const float *, const float *, float *, "
        "int64_t, uint8_t *, int32_t, int32_t, int32_t, int32_t)",
        "attention": "(const float *, uint16_t *, uint16_t *, const float *, const float *, float *, float *, float, "
        "int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t)",
    }
    packs = sorted({kernel.pack_name for kernel in kernels})
    lines = ['#include "kernels.h"', ""]
    lines += [f"extern void {name}{signatures['pack']};" for name in packs]
    lines += [f"extern void {kernel.name}{signatures['matmul']};" for kernel in kernels]
    lines += ["", 'const char pmpd_any_name[] = "pmpd_any";', "", "const struct pmpd_kernel pmpd_kernels[] = {"]
    lines += [f"  {kernel.table_entry()}," for kernel in kernels] or ["  {0},"]
    lines += ["};", f"const size_t pmpd_kernel_count = {len(kernels)};", ""]
    lines += [f"extern void {kernel.name}{signatures['attention']};" for kernel in attentions]
    lines += ["", "const struct pmpd_attention pmpd_attentions[] = {"]
    lines += [f"  {kernel.table_entry()}," for kernel in attentions] or ["  {0},"]
    lines += ["};", f"const size_t pmpd_attention_count = {len(attentions)};", ""]
    return "\n".join(lines)
