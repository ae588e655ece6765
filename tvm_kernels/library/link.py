"""The operator library of a target: compiled kernels and the C code around them, linked into one file.

The C code (`ort_ops`) is compiled for the least processor of the architecture, so that any machine that loads the
library can run the code that chooses a kernel. The zig compiler comes first even where there is another: it links for
every target, and against glibc 2.17, so that a library runs on systems older than the one it was made on.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.tvm_kernels.library.compile import Progress, compile_kernels, require_tvm
from pmpd.tvm_kernels.targets import Target, find_target, host_target

__all__ = ["build_library", "compile_for_host", "link_library", "require_toolchain"]

SOURCES = Path(__file__).parents[1] / "ort_ops"
# ONNX Runtime fixes what functions take, whether they use it or not.
_WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
INCLUDE = [f"-I{SOURCES}", "-isystem", str(SOURCES / "third_party")]
_OPTIONS = ["-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", *_WARNINGS, *INCLUDE]
_LINK = ["-shared", "-s", "-pthread", "-lm", "-Wl,-z,defs", f"-Wl,--version-script={SOURCES / 'exports.map'}"]


def build_library(
    target: str,
    *,
    precisions: Sequence[int],
    head_dims: Sequence[int] = (),
    output: Path,
    progress: Progress = lambda done, _: done,
) -> None:
    """Compile kernels for some precisions (bits), sizes of heads and a target, and link them into the file `output`.

    Raises:
        MissingExtraError: TVM, or a C compiler that can link for the target, is not installed.
        PmpdError: the target is unknown, TVM fails on a kernel, or the library cannot be linked or written.
    """
    chosen = find_target(target)
    _compiler(chosen)  # if there is none, say so before the kernels take their time
    require_tvm()
    from pmpd.tvm_kernels.ops import kernels_of
    from pmpd.tvm_kernels.ops.base import Demand

    demand = Demand(precisions=sorted(set(precisions)), head_dims=sorted(set(head_dims)))
    with TemporaryDirectory() as directory:
        files = compile_kernels(chosen, kernels_of(chosen, demand), directory=Path(directory), progress=progress)
        link_library(chosen, files, output=output)


def require_toolchain(target: str) -> None:
    """Check that `build_library` finds all that it needs for a target.

    Raises:
        MissingExtraError: TVM, or a C compiler that can link for the target, is not installed.
        PmpdError: the target is unknown.
    """
    _compiler(find_target(target))
    require_tvm()


def link_library(target: Target, kernels: Sequence[Path], *, output: Path) -> None:
    """Link objects and C files that define the operators' tables of kernels into the operator library `output`.

    The file appears whole, or what was there before stays.

    Raises:
        MissingExtraError: no C compiler that can link for the target is installed.
        PmpdError: the library cannot be linked or written.
    """
    defines = [f'-DPMPD_VERSION="{version("pmpd")}"', f'-DPMPD_TARGET="{target.name}"']
    compiler, sources = _compiler(target), map(str, [*sorted(SOURCES.glob("*.c")), *kernels])
    _run([*compiler, *_OPTIONS, *defines, *sources, *_LINK], output)


def compile_for_host(source: Path, *, output: Path) -> None:
    """Compile a C file into a shared library for this processor, which others may not run.

    Loops over floats may be reordered. The file appears whole, or what was there before stays.

    Raises:
        MissingExtraError: no C compiler is installed.
        PmpdError: no target is for this machine, or the code cannot be compiled or written.
    """
    host = host_target()
    if host is None:
        raise PmpdError(f"nothing is compiled for {platform.machine()} on {sys.platform}, which is not a target")
    fast = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
    options = ["-std=c11", *fast, "-fPIC", *_WARNINGS]
    *compiler, _ = _compiler(find_target(host))
    native = "-mcpu=native" if "ziglang" in compiler else "-march=native"
    _run([*compiler, native, *options, str(source), "-shared", "-s"], output)


def _run(command: Sequence[str], output: Path) -> None:
    """Run a compiler whose result becomes `output`."""
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            process = subprocess.run([*command, "-o", str(draft)], capture_output=True, text=True, check=False)
            if process.returncode:
                name = "zig" if "ziglang" in command else Path(command[0]).name
                raise PmpdError(f"{name} cannot link {output}: {_reason(process)}")
            draft.replace(output)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise PmpdError(f"cannot write {output} ({error.strerror}): choose another place") from None


def _compiler(target: Target) -> list[str]:
    """Return the beginning of a command that compiles for the least processor of a target."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", target.zig, "-mcpu=baseline"]
    if sys.platform == "linux" and platform.machine() == target.arch:
        for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
            if command and shutil.which(command[0]):
                return [*command, f"-march={target.baseline}"]
    raise MissingExtraError("ziglang", "tune")


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    """Return the first error that a compiler reports."""
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    return next((line for line in lines if "error" in line), lines[-1])
