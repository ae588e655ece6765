"""A process that compiles kernels: it reads a function a line, as `compile` describes it, and answers with a line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []


def _compile(symbol: str, kernel: dict[str, Any] | None, triple: str, cpu: str, attributes: list[str]) -> Any:
    """Return the compiled module of one function."""
    import tvm
    from tvm import tirx

    from pmpd.tvm_kernels.ops.kernel import AttentionKernel, Kernel
    from pmpd.tvm_kernels.ops.matmul.portable import portable_matmul

    if kernel is None:
        function = portable_matmul()
    elif "dim" in kernel:
        function = AttentionKernel.from_json(kernel).function()
    else:
        product = Kernel.from_json(kernel)
        function = product.pack_function() if symbol == product.pack_name else product.function()
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu, "mattr": attributes})
    module = tvm.IRModule({symbol: function.with_attr("target", target)})
    # Only what turns TIR into LLVM: no packed calling convention, so that C calls the kernels directly.
    for step in (tirx.transform.FlattenBuffer(), tirx.transform.StmtSimplify(), tirx.transform.LowerIntrin()):
        module = step(module)
    return tvm.get_global_func("target.build.llvm")(module, target)


def _serve() -> None:
    for line in sys.stdin:
        values = json.loads(line)
        path = Path(values.pop("path"))
        compiled = _compile(**values)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.o")
        compiled.write_to_file(str(partial), "o")
        partial.replace(path)
        sys.stdout.write(f"{values['symbol']}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
