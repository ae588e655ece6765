"""From kernels to objects and the table that the operator library is linked from.

Objects are kept in the user's cache folder by what they are made of: a second export compiles nothing.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pmpd.runtime.errors import MissingExtraError
from pmpd.tvm_kernels.targets import Target

__all__ = ["compile_kernels", "kernels_of"]


@dataclass(frozen=True)
class _Unit:
    """One function to compile: the kernel itself, its packing function, or the portable one (no kernel)."""

    symbol: str
    kernel: Any
    part: Literal["kernel", "pack", "portable"]
    triple: str
    cpu: str
    attributes: tuple[str, ...]


def kernels_of(target: Target, precisions: Sequence[int]) -> list[Any]:
    """Return the kernels of a target's library, best first: every instruction set, precision, accuracy and phase."""
    from pmpd.tvm_kernels.kernel import ACCURACIES, Kernel, isa_named
    from pmpd.tvm_kernels.records import tuning

    return [
        Kernel(isa=isa, bits=bits, accuracy=accuracy, phase=phase, tuning=tuning(isa, bits, accuracy, phase))
        for isa in map(isa_named, target.isa)
        for bits in sorted(set(precisions))
        for accuracy in ACCURACIES
        for phase in ("gemv", "gemm")
    ]


def compile_kernels(
    target: Target, *, precisions: Sequence[int], directory: Path, kernels: Sequence[Any] | None = None
) -> list[Path]:
    """Compile a target's kernels and write the table of ``kernels.h``; return the files to link, objects and C.

    Args:
        target: the machine.
        precisions: the p to have kernels for.
        directory: where `kernels.c` goes; the objects stay in the cache.
        kernels: other kernels than the tuned ones.

    Raises:
        MissingExtraError: apache-tvm is not installed.
    """
    try:
        import tvm  # noqa: F401
    except ImportError:
        raise MissingExtraError("kernels need apache-tvm: run `pip install 'pmpd[tune]'`") from None
    chosen = kernels_of(target, precisions) if kernels is None else list(kernels)
    units = {unit.symbol: unit for kernel in chosen for unit in _units(kernel, target)}
    units["pmpd_any"] = _Unit("pmpd_any", None, "portable", target.triple, target.baseline, ())
    objects = {symbol: _cached(unit) for symbol, unit in units.items()}
    missing = [(units[symbol], path) for symbol, path in objects.items() if not path.exists()]
    if missing:
        # TVM compiles in one thread; fresh processes, because its own threads do not survive a fork.
        workers = min(len(missing), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in pool.map(_compile, *zip(*missing, strict=True)):
                pass
    table = directory / "kernels.c"
    table.write_text(_table(chosen), encoding="utf-8")
    return [table, *objects.values()]


def _units(kernel: Any, target: Target) -> list[_Unit]:
    machine = (target.triple, kernel.isa.cpu, kernel.isa.attributes)
    return [_Unit(kernel.name, kernel, "kernel", *machine), _Unit(kernel.pack_name, kernel, "pack", *machine)]


def _cached(unit: _Unit) -> Path:
    """Return where the object of a function is kept: under a name made of everything that decides its contents."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted(here.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(repr((unit.symbol, unit.triple, unit.cpu, unit.attributes, version("apache-tvm"))).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "pmpd" / "kernels" / f"{unit.symbol}-{digest.hexdigest()[:16]}.o"


def _compile(unit: _Unit, path: Path) -> None:
    """Compile one function into an object file (in a process of its own)."""
    import tvm
    from tvm import tirx

    from pmpd.tvm_kernels.portable import portable_matmul

    made = {"kernel": lambda: unit.kernel.function(), "pack": lambda: unit.kernel.pack_function()}
    function = made.get(unit.part, portable_matmul)()
    target = tvm.target.Target(
        {"kind": "llvm", "mtriple": unit.triple, "mcpu": unit.cpu, "mattr": list(unit.attributes)}
    )
    module = tvm.IRModule({unit.symbol: function.with_attr("target", target)})
    # Only what turns TIR into LLVM: no packed calling convention, so that C calls the kernels directly.
    for step in (tirx.transform.FlattenBuffer(), tirx.transform.StmtSimplify(), tirx.transform.LowerIntrin()):
        module = step(module)
    compiled = tvm.get_global_func("target.build.llvm")(module, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.o")
    compiled.write_to_file(str(partial), "o")
    partial.replace(path)


def _table(kernels: Sequence[Any]) -> str:
    """Return the C text that lists the kernels."""
    signatures = {
        "pack": "(const float *, void *, float *, float *, int32_t, int32_t, int32_t, int32_t)",
        "matmul": "(const uint8_t *, int64_t, const uint16_t *, const void *, const float *, const float *, float *, "
        "int64_t, uint8_t *, int32_t, int32_t, int32_t, int32_t)",
    }
    packs = sorted({kernel.pack_name for kernel in kernels})
    lines = ['#include "kernels.h"', ""]
    lines += [f"extern void {name}{signatures['pack']};" for name in packs]
    lines += [f"extern void {kernel.name}{signatures['matmul']};" for kernel in kernels]
    lines += ["", 'const char pmpd_any_name[] = "pmpd_any";', "", "const struct pmpd_kernel pmpd_kernels[] = {"]
    lines += [f"  {kernel.table_entry()}," for kernel in kernels] or ["  {0},"]
    lines += ["};", f"const size_t pmpd_kernel_count = {len(kernels)};", ""]
    return "\n".join(lines)
