"""A process that compiles kernels. It reads lines of JSON, one per function (a `compile._Unit` and the path of the
object), and answers each with the symbol when the object is written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

__all__: list[str] = []


def _compile(
    symbol: str, operator: str, kernel: dict[str, Any] | None, triple: str, cpu: str, attributes: list[str]
) -> Any:
    """Return the compiled module of one function."""
    import tvm
    from tvm import tirx

    from pmpd.tvm_kernels.ops import OPERATORS

    chosen = OPERATORS[operator].fallback() if kernel is None else OPERATORS[operator].from_json(kernel)
    assert chosen is not None
    function = chosen.functions[symbol].build()
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
