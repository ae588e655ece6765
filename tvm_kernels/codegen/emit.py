"""A small builder of TIR functions: straight-line vector code, loops and buffers, one statement after another.

Kernels are Python functions that call an `Emitter`; a Python loop unrolls, `Emitter.loop` makes a loop of the kernel.
Functions keep the plain C calling convention (no packed arguments), so that a C program links and calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType

__all__ = ["Emitter", "lanes_of", "shuffle", "vector"]

# Buffers are views of raw pointers: the caller knows their extent.
ANY_EXTENT = 1 << 40


def vector(dtype: str, lanes: int) -> str:
    """Return the name of a vector type: ``vector("uint8", 64) == "uint8x64"``."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def lanes_of(value: Any) -> int:
    """Return how many lanes an expression has."""
    _, _, lanes = str(value.ty.dtype).partition("x")
    return int(lanes or 1)


def shuffle(values: Sequence[Any], lanes: Sequence[int]) -> Any:
    """Return the numbered lanes of the vectors, which are counted end to end."""
    have = sum(lanes_of(value) for value in values)
    if have == 1 or (len(set(lanes)) == 1 and len(lanes) > 1):
        value = values[0] if have == 1 else shuffle(values, [lanes[0]])
        return value if len(lanes) == 1 else tirx.Broadcast(value, len(lanes))
    # TVM wants at least as many lanes to choose from as are chosen.
    enough = list(values) * -(-len(lanes) // have)
    return tirx.Shuffle(enough, [tirx.const(lane, "int32") for lane in lanes])


class Emitter:
    """Collects the statements of one kernel. Values are TIR expressions; `bind` names one, so that it is computed once.

    Args:
        name: the C symbol.
        parameters: name and type of each argument; a type ending in ``*`` is a pointer, which becomes a buffer.
    """

    def __init__(self, name: str, parameters: Sequence[tuple[str, str]]) -> None:
        self.name = name
        self._blocks: list[list[Any]] = [[]]
        self._parameters = []
        self._arguments: dict[str, Any] = {}
        for argument, dtype in parameters:
            if dtype.endswith("*"):
                pointer = tirx.Var(argument, PointerType(PrimType(dtype[:-1])))
                buffer = tirx.decl_buffer((ANY_EXTENT,), dtype[:-1], argument, data=pointer, data_alignment=1)
                self._emit(tirx.stmt.DeclBuffer(buffer, data=pointer))
                self._parameters.append(pointer)
                self._arguments[argument] = buffer
            else:
                self._parameters.append(tirx.Var(argument, dtype))
                self._arguments[argument] = self._parameters[-1]

    def __getitem__(self, argument: str) -> Any:
        """Return an argument: a buffer for a pointer, a scalar otherwise."""
        return self._arguments[argument]

    def _emit(self, statement: Any) -> None:
        self._blocks[-1].append(statement)

    def bind(self, value: Any, name: str = "v") -> Any:
        """Compute a value here, once."""
        variable = tirx.Var(name, str(value.ty.dtype))
        self._emit(tirx.Bind(variable, value))
        return variable

    def local(self, dtype: str, size: int, name: str) -> Any:
        """Make a buffer on the stack; with constant indices LLVM keeps it in registers."""
        buffer = tirx.decl_buffer((size,), dtype, name, scope="local", data_alignment=64)
        self._emit(tirx.AllocBuffer(buffer))
        return buffer

    def load(self, buffer: Any, offset: Any, lanes: int = 1, name: str = "v") -> Any:
        """Load `lanes` contiguous elements."""
        return self.bind(tirx.BufferLoad(buffer, [_index(offset, lanes)]), name)

    def store(self, buffer: Any, offset: Any, value: Any) -> None:
        """Store a scalar, or the lanes of a vector side by side."""
        self._emit(tirx.BufferStore(buffer, value, [_index(offset, lanes_of(value))]))

    def prefetch(self, buffer: Any, offset: Any) -> None:
        """Prefetch the cache line of an element, for reading, into the second-level cache."""
        address = tirx.address_of(tirx.BufferLoad(buffer, [offset]))
        # For reading; not into the first level, which can wait for too few lines at a time; data.
        flags = [tirx.const(flag, "int32") for flag in (0, 2, 1)]
        self._emit(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, *flags)))

    @contextmanager
    def loop(self, name: str, begin: Any, end: Any, step: int = 1) -> Iterator[Any]:
        """Run the enclosed statements for ``begin, begin + step, …`` below `end` (int32)."""
        counter = tirx.Var(name, "int32")
        with self._block() as body:
            yield tirx.const(0, "int32") + begin + counter * step
        extent = tirx.floordiv(end - begin + (step - 1), tirx.const(step, "int32")) if step > 1 else end - begin
        self._emit(tirx.For(counter, tirx.const(0, "int32"), extent, tirx.ForKind.SERIAL, _sequence(body)))

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Run the enclosed statements if the condition holds."""
        with self._block() as body:
            yield
        self._emit(tirx.IfThenElse(condition, _sequence(body), None))

    @contextmanager
    def _block(self) -> Iterator[list[Any]]:
        block: list[Any] = []
        self._blocks.append(block)
        yield block
        self._blocks.pop()

    def function(self) -> Any:
        """Return the finished `tirx.PrimFunc`."""
        function = tirx.PrimFunc(self._parameters, _sequence(self._blocks[0]))
        return function.with_attr("global_symbol", self.name).with_attr("tirx.noalias", True)


def _index(offset: Any, lanes: int) -> Any:
    if lanes == 1:
        return offset
    stride = tirx.const(1, str(offset.ty.dtype)) if hasattr(offset, "ty") else 1
    return tirx.Ramp(offset, stride, lanes)


def _sequence(statements: list[Any]) -> Any:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
