"""From kernels to objects and the tables that the operator library is linked from.

Objects are cached in the user's cache folder, under a hash of everything they are made of: a second export compiles
nothing. Separate processes (`worker`) compile, a few at a time, because TVM uses one thread.
"""

from __future__ import annotations

import ast
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
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmpd.runtime.engine.threads import available_threads
from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.tvm_kernels.targets import Target

if TYPE_CHECKING:  # needs TVM
    from pmpd.tvm_kernels.ops.base import Kernel

__all__ = ["Progress", "compile_kernels", "require_tvm"]

# The code that determines the contents of an object: it makes the TIR functions and compiles them.
_PACKAGE = Path(__file__).parents[1]
_GENERATORS = [
    *sorted(file for room in ("codegen", "ops") for file in (_PACKAGE / room).rglob("*.py")),
    _PACKAGE / "library" / "worker.py",
]

_WORKER = [sys.executable, "-m", "pmpd.tvm_kernels.library.worker"]

# Passes on the symbols of an iterator as they are done; the number is how many there will be.
Progress = Callable[[Iterable[str], int], Iterable[str]]


@dataclass(frozen=True)
class _Unit:
    """One function to compile: its symbol, its kernel, and the machine.

    Attributes:
        kernel: as `Kernel.to_json` describes it; None for the operator's fallback.
        triple, cpu, attributes: LLVM's names for the machine.
    """

    symbol: str
    operator: str
    kernel: dict[str, Any] | None
    triple: str
    cpu: str
    attributes: tuple[str, ...]


def require_tvm() -> None:
    """Raise MissingExtraError if TVM is not installed."""
    if importlib.util.find_spec("tvm") is None:
        raise MissingExtraError("apache-tvm", "tune")


def compile_kernels(
    target: Target,
    kernels: Sequence[Kernel],
    *,
    directory: Path,
    progress: Progress = lambda done, _: done,
) -> list[Path]:
    """Compile kernels and what the operators fall back to; return the files to link, objects and a C file of tables.

    Args:
        target: the machine.
        kernels: of any operators; those of each best first.
        directory: where the C file, `kernels.c`, goes; the objects stay in the cache.
        progress: shows which functions are done, of those that are not in the cache yet.

    Raises:
        MissingExtraError: apache-tvm is not installed.
        PmpdError: TVM fails on a kernel.
    """
    require_tvm()
    from pmpd.tvm_kernels.ops import OPERATORS

    units = {unit.symbol: unit for kernel in kernels for unit in _units(kernel, kernel.to_json(), target)}
    for operator in OPERATORS.values():
        if fallback := operator.fallback():
            units |= {unit.symbol: unit for unit in _units(fallback, None, target)}
    objects = {symbol: _cached(unit) for symbol, unit in units.items()}
    missing = {path: units[symbol] for symbol, path in objects.items() if not path.exists()}
    if missing:
        for _ in progress(_compile_all(missing), len(missing)):
            pass
    tables = directory / "kernels.c"
    tables.write_text(_tables(kernels), encoding="utf-8")
    return [tables, *objects.values()]


def _units(kernel: Kernel, values: dict[str, Any] | None, target: Target) -> list[_Unit]:
    machine = (target.triple, kernel.isa.cpu, kernel.isa.attributes)
    return [_Unit(symbol, kernel.operator, values, *machine) for symbol in kernel.functions]


def _compile_all(units: dict[Path, _Unit]) -> Iterator[str]:
    """Compile functions into objects; yield the symbols as they are done. No worker outlives this call.

    Raises:
        PmpdError: TVM fails on a function; the other workers are ended.
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


@cache
def _code_digest() -> bytes:
    """Return a hash of the code that determines the contents of an object; comments do not count."""
    digest = hashlib.sha256()
    for module in _GENERATORS:
        digest.update(ast.dump(ast.parse(module.read_bytes())).encode())
    return digest.digest()


def _cached(unit: _Unit) -> Path:
    """Return the path of a function's object in the cache; its name has a hash of all that decides its contents."""
    digest = hashlib.sha256(_code_digest())
    digest.update(repr((unit.symbol, unit.triple, unit.cpu, unit.attributes, version("apache-tvm"))).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "pmpd" / "kernels" / f"{unit.symbol}-{digest.hexdigest()[:16]}.o"


def _tables(kernels: Sequence[Kernel]) -> str:
    """Return the C text of all operators' tables."""
    from pmpd.tvm_kernels.ops import OPERATORS

    lines = ['#include "cpu.h"', *(f'#include "{operator.header}"' for operator in OPERATORS.values()), ""]
    for name, operator in OPERATORS.items():
        lines += [operator.table([kernel for kernel in kernels if kernel.operator == name]), ""]
    return "\n".join(lines)
