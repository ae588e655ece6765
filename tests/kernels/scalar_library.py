"""The operator library with the kernels of `scalar_kernels.c`, for tests in which TVM's are not the point."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmpd.runtime.errors import MissingExtraError
from pmpd.tvm_kernels.library.link import link_library
from pmpd.tvm_kernels.targets import TARGETS, Target, host_target

__all__ = ["KERNELS", "link"]

KERNELS = Path(__file__).with_name("scalar_kernels.c")


def link(output: Path, target: Target | None = None) -> Path:
    """Link the library into `output` and return it; skip the test where that cannot be done."""
    host = host_target()
    if target is None and host is None:
        pytest.skip("no target is for this machine")
    try:
        link_library(target or TARGETS[str(host)], [KERNELS], output=output)
    except MissingExtraError as error:
        pytest.skip(f"needs a C compiler: {error}")
    return output
