"""The one place that imports ONNX Runtime, and says what to install when it cannot."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from pmpd.runtime.errors import MissingExtraError, PmpdError

__all__ = ["onnxruntime"]


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
    raise PmpdError(
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
        "run `pip uninstall onnxruntime onnxruntime-gpu`, then install 'pmpd[cpu]' or 'pmpd[gpu]'"
    )
try:
    import onnxruntime
except ImportError:
    raise MissingExtraError("onnxruntime", "cpu") from None
