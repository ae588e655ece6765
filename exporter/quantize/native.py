"""The C code of this folder, compiled once for each kind of processor, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmpd.runtime.errors import MissingExtraError, PmpdError
from pmpd.tvm_kernels.library.link import compile_for_host

__all__ = ["descend", "require_compiled", "sums", "sums_nbytes"]

_SOURCE = Path(__file__).with_name("descent.c")
_TALL, _WIDE, _BLOCK = 512, 128, 64  # as in the C code
Floats = npt.NDArray[np.float32]


def require_compiled() -> None:
    """Compile the code unless it is in the cache.

    Raises:
        MissingExtraError: no C compiler is installed.
        PmpdError: it fails, or its result cannot be loaded.
    """
    _library()


@cache
def _library() -> ctypes.CDLL:
    digest = hashlib.sha256(_SOURCE.read_bytes() + _processor()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "pmpd" / "quantize" / f"descent-{digest}.so"
    if not path.exists():
        try:
            compile_for_host(_SOURCE, output=path)
        except MissingExtraError:
            raise
        except PmpdError as error:
            raise PmpdError(f"method guided needs compiled code: {error}; or take --method anyprecision") from None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise PmpdError(f"cannot load {path} ({error}): delete it and export again") from None
    library.pmpd_descend.restype = ctypes.c_int64
    library.pmpd_sums.restype = None
    return library


def _processor() -> bytes:
    """Return what tells processors apart whose instructions differ; a user's cache may be shared by several."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return next((line for line in lines if line.lower().startswith((b"flags", b"features"))), b"")
    return platform.processor().encode()


def sums_nbytes(levels: int, columns: int) -> int:
    """Return the bytes of what `sums` returns for a row, but for the smaller part."""
    return 4 * levels * _padded(columns)


def _padded(columns: int) -> int:
    return -(-columns // _WIDE) * _WIDE


def sums(codes: npt.NDArray[np.uint8], H: Floats, levels: int) -> tuple[Floats, npt.NDArray[np.float64]]:
    """Add up H by code.

    Args:
        codes: ``[R, K]``, below `levels`.
        H: symmetric ``[K, K]``.

    Returns:
        The lines of H added up by each row's codes, ``[R, levels, K]``, and its elements added up by pairs of them,
        ``[R, levels, levels]``.
    """
    R, K = codes.shape
    lines = np.empty((R, levels, _padded(K)), dtype=np.float32)
    pairs = np.empty((R, levels, levels), dtype=np.float64)
    order = np.empty((R, K), dtype=np.uint16)
    ends = np.empty((R, -(-K // _TALL), levels + 1), dtype=np.uint16)
    _library().pmpd_sums(*_addresses(codes, H, lines, pairs, order, ends), *map(ctypes.c_int64, (R, K, levels)))
    return lines[:, :, :K], pairs


def descend(
    codes: npt.NDArray[np.uint8],
    H: Floats,
    values: Floats,
    weight: Floats,
    gradient: Floats,
    between: Floats | None = None,
    before: Floats | None = None,
    *,
    last: bool = False,
) -> int:
    """Make one pass of coordinate descent over all columns; return how many codes have changed.

    Args:
        codes: parent codes ``[R, K]``, changed in place.
        H: symmetric ``[K, K]``.
        values: ``[P, R, levels]``, what each parent code stands for at each precision.
        weight: ``[P, R]``, what each precision's loss counts.
        gradient: ``[P, R, K]``, the product of H with each row's error, kept up to date in place.
        between: ``[R, R]``, how much of each row's gradient counts in those of others, with zeros on the diagonal; None
            if rows are independent.
        before: ``[P, R, K]``, the gradient that has all that counts of the others already.
        last: no pass follows, and nobody needs the gradient, which saves work.
    """
    P, R, levels = values.shape
    arrays = _addresses(codes, H, values, weight, gradient)
    others = [None, None] if between is None or before is None else _addresses(between, before)
    K = codes.shape[1]
    steps, places = np.empty((P, R, K), dtype=np.float32), np.empty((P, R, K), dtype=np.uint8)
    counts = np.empty((-(-K // _BLOCK), P, R), dtype=np.uint8)
    sizes = map(ctypes.c_int64, (P, R, K, levels, last))
    changes: int = _library().pmpd_descend(*arrays, *others, *_addresses(steps, places, counts), *sizes)
    return changes


def _addresses(*arrays: npt.NDArray[Any]) -> list[ctypes.c_void_p]:
    if not all(array.flags.c_contiguous for array in arrays):
        raise ValueError("the C code takes contiguous arrays")
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]
