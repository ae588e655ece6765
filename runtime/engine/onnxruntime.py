"""The one place that imports ONNX Runtime, and says what to install when it cannot."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from pmpd.runtime.errors import MissingExtraError, PmpdError

__all__ = ["onnxruntime"]


@cache
def onnxruntime() -> Any:
    """Return the module `onnxruntime`; it is imported at the first call, so that importing the runtime cannot fail.

    Raises:
        MissingExtraError: it is not installed.
        PmpdError: both of its distributions are installed.
    """
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        raise PmpdError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "run `pip uninstall onnxruntime onnxruntime-gpu`, then install 'pmpd[cpu]' or 'pmpd[gpu]'"
        )
    try:
        import onnxruntime as module
    except ImportError:
        raise MissingExtraError("onnxruntime", "cpu") from None
    return module


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
