"""Compiled kernels of `pmpd::BitplaneMatMul`, and the library that registers them with ONNX Runtime."""

from pmpd.tvm_kernels.library.link import build_library, require_toolchain
from pmpd.tvm_kernels.targets import TARGETS, host_target

__all__ = ["TARGETS", "build_library", "host_target", "require_toolchain"]
